"""Speech codecs of Hugging Face (Mimi, EnCodec) as a `Codec`: residual codes, flattened frame by frame."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from .base import check_codes
from .hub_base import HubCodec, hash_weights, read_config

_KINDS = {"mimi": "MimiModel", "encodec": "EncodecModel"}


class HubSpeech(HubCodec):
    """Codes of mono waveforms by a pretrained model; code k of quantiser q is q * codebook_size + k.

    Args:
        settings: what `open` found: folder, model_type, n_q, codebook_size, rate, weights (hash).
    """

    id = "hub-speech"
    kind = "discrete"

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        self.rate, self.n_q = int(settings["rate"]), int(settings["n_q"])
        self.codebook_size = int(settings["codebook_size"])

    @classmethod
    def open(cls, folder: str | Path, *, n_q: int) -> HubSpeech:
        """A model that `save_pretrained` has written into `folder`, with its first `n_q` quantisers.

        Raises:
            DataError: transformers is missing, or there is no such model or quantiser.
        """
        path = Path(folder).resolve()
        config = read_config(path)
        kind = config.get("model_type")
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
            "weights": hash_weights(path),
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

    def _build(self, folder: Path) -> Any:
        import transformers

        kind = getattr(transformers, _KINDS[self.settings["model_type"]])
        return kind.from_pretrained(folder, local_files_only=True).eval()
