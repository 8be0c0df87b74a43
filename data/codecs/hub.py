"""Speech codecs of Hugging Face (Mimi, EnCodec) as a `Codec`: residual codes, flattened frame by frame.

The weights stay where they are, and their licence is the user's choice; a data set remembers the folder and the hash of
the weights. Training never loads them: only encoding and decoding do.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from ..files import fingerprint
from .base import check_codes, load_arrays, save_arrays

_KINDS = {"mimi": "MimiModel", "encodec": "EncodecModel"}


class HubSpeech:
    """Codes of mono waveforms by a pretrained model; code k of quantiser q is q * codebook_size + k.

    Args:
        settings: what `open` found: folder, model_type, n_q, codebook_size, rate, weights (hash).
    """

    id = "hub-speech"
    kind = "discrete"

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.rate, self.n_q = int(settings["rate"]), int(settings["n_q"])
        self.codebook_size = int(settings["codebook_size"])
        self._model: Any = None

    @classmethod
    def open(cls, folder: str | Path, *, n_q: int) -> HubSpeech:
        """A model that `save_pretrained` has written into `folder`, with its first `n_q` quantisers.

        Raises:
            DataError: transformers is missing, or there is no such model or quantiser.
        """
        path = Path(folder).resolve()
        try:
            config = json.loads((path / "config.json").read_text())
            kind = config["model_type"]
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{path} holds no model of Hugging Face ({error})") from error
        if kind not in _KINDS:
            raise DataError(f"{path} holds a {kind}; speech codecs are {', '.join(_KINDS)}")
        settings = {
            "id": cls.id,
            "version": 1,
            "folder": str(path),
            "model_type": kind,
            "n_q": n_q,
            "codebook_size": config.get("codebook_size", 0),
            "rate": config.get("sampling_rate", 24000),
            "weights": _hash_weights(path),
        }
        codec = cls(settings)
        model = codec._load()
        codec.codebook_size = settings["codebook_size"] = int(model.config.codebook_size)
        codec.rate = settings["rate"] = int(model.config.sampling_rate)
        found = codec._codes(np.zeros(codec.rate, dtype=np.float32)).shape[0]
        if not 1 <= n_q <= found:
            raise DataError(f"{path}: quantisers must lie in 1..{found}, got {n_q}")
        return codec

    @property
    def vocab_size(self) -> int:
        """Number of codes, over all quantisers."""
        return self.n_q * self.codebook_size

    @property
    def fingerprint(self) -> str:
        """Changes with the weights, the kind of model or the number of quantisers; not with the folder."""
        fields = {name: value for name, value in self.settings.items() if name != "folder"}
        return fingerprint(json.dumps(fields, sort_keys=True).encode())

    def encode(self, array: np.ndarray) -> np.ndarray:
        """Codes int64 [frames * n_q], frame by frame, of an int16 or float (-1..1) waveform [n] at `rate`.

        Raises:
            DataError: another shape or type, or weights that cannot be loaded.
        """
        from .speech import as_float

        codes = self._codes(as_float(np.asarray(array)).astype(np.float32))[: self.n_q]
        return (codes + np.arange(self.n_q)[:, None] * self.codebook_size).T.reshape(-1)

    def decode(self, codes: Sequence[int] | np.ndarray) -> np.ndarray:
        """The waveform float32 [n] of codes [frames * n_q]; DataError when they are not whole frames of this codec."""
        import torch

        flat = check_codes(np.asarray(codes), self.vocab_size, "speech")
        if flat.size % self.n_q or not flat.size:
            raise DataError(f"speech codes come in frames of {self.n_q}, got {flat.size}")
        table = flat.reshape(-1, self.n_q).T
        if (table // self.codebook_size != np.arange(self.n_q)[:, None]).any():
            raise DataError("speech codes are out of step: a code of another quantiser stands in a frame's place")
        local = torch.from_numpy(np.ascontiguousarray(table % self.codebook_size))
        model = self._load()
        with torch.no_grad():
            # EnCodec has one more axis, for chunks, and a scale for each.
            found = model.decode(local[None, None], [None]) if self._chunked else model.decode(local[None])
        return found[0][0, 0].numpy().astype(np.float32)

    def save(self, path: str | Path) -> None:
        """Writes settings alone, as an .npz without pickle, atomically; the weights are not copied."""
        save_arrays(Path(path), self.settings, np.zeros(0, dtype=np.float32))

    @classmethod
    def load(cls, path: str | Path) -> HubSpeech:
        """Reads `save`'s file; the model itself is loaded when it is first needed."""
        settings, _ = load_arrays(Path(path))
        if settings.get("id") != cls.id or settings.get("version") != 1:
            raise DataError(f"{path} holds codec {settings.get('id')!r} v{settings.get('version')}, not {cls.id} v1")
        return cls(settings)

    def __getstate__(self) -> dict[str, Any]:
        """Workers load the model themselves."""
        return {**self.__dict__, "_model": None}

    @property
    def _chunked(self) -> bool:
        return self.settings["model_type"] == "encodec"

    def _codes(self, wave: np.ndarray) -> np.ndarray:
        """int64 [all quantisers, frames]."""
        import torch

        model = self._load()
        options: dict[str, Any] = {"bandwidth": max(model.config.target_bandwidths)} if self._chunked else {}
        with torch.no_grad():
            found = model.encode(torch.from_numpy(wave)[None, None], **options).audio_codes
        return found.reshape(-1, found.shape[-1]).numpy().astype(np.int64)

    def _load(self) -> Any:
        if self._model is None:
            folder = Path(self.settings["folder"])
            try:
                import transformers
            except ImportError as error:
                raise DataError("pretrained codecs need: pip install polylepis[hf]") from error
            if _hash_weights(folder) != self.settings["weights"]:
                raise DataError(f"{folder}: these are not the weights that the codes were made with")
            kind = getattr(transformers, _KINDS[self.settings["model_type"]])
            try:
                self._model = kind.from_pretrained(folder, local_files_only=True).eval()
            except (OSError, ValueError) as error:
                raise DataError(f"cannot load {folder}: {' '.join(str(error).split())}") from error
        return self._model


def _hash_weights(folder: Path) -> str:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise DataError(f"{folder} holds no weights (*.safetensors)")
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:32]
