"""What codecs of pretrained models have in common: settings in the data set, weights where they are, a hash of them.

The weights stay where they are, and their licence is the user's choice; a data set remembers the folder and the hash of
the weights. Training never loads them: only encoding and decoding do.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np

from ..errors import DataError
from ..files import fingerprint
from .base import load_arrays, save_arrays


class HubCodec(ABC):
    """A codec whose settings name a folder of weights; the model is loaded when it is first needed.

    Args:
        settings: what the subclass's `open` found; at least id, version, folder and weights (hash).
    """

    id = ""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self._model: Any = None

    @property
    def fingerprint(self) -> str:
        """Changes with the weights and every setting, but not with the folder."""
        fields = {name: value for name, value in self.settings.items() if name != "folder"}
        return fingerprint(json.dumps(fields, sort_keys=True).encode())

    def save(self, path: str | Path) -> None:
        """Writes settings alone, as an .npz without pickle, atomically; the weights are not copied."""
        save_arrays(Path(path), self.settings, np.zeros(0, dtype=np.float32))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads `save`'s file; the model itself is loaded when it is first needed."""
        settings, _ = load_arrays(Path(path))
        if settings.get("id") != cls.id or settings.get("version") != 1:
            raise DataError(f"{path} holds codec {settings.get('id')!r} v{settings.get('version')}, not {cls.id} v1")
        return cls(settings)

    def __getstate__(self) -> dict[str, Any]:
        """Workers load the model themselves."""
        return {**self.__dict__, "_model": None}

    @abstractmethod
    def _build(self, folder: Path) -> Any:
        """The model of `folder`, in evaluation mode; ImportError when its library is missing."""

    def _load(self) -> Any:
        if self._model is None:
            folder = Path(self.settings["folder"])
            if hash_weights(folder) != self.settings["weights"]:
                raise DataError(f"{folder}: these are not the weights that the codes were made with")
            self._model = guarded(folder, self._build)
        return self._model


def guarded(folder: Path, build: Callable[[Path], Any]) -> Any:
    """`build(folder)`, whose errors become a DataError that names the folder."""
    try:
        return build(folder)
    except DataError:
        raise
    except ImportError as error:
        raise DataError(
            f"pretrained codecs need: pip install polylepis[hf,latents] ({' '.join(str(error).split())})"
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise DataError(f"cannot load {folder}: {' '.join(str(error).split())}") from error


def read_config(folder: Path) -> dict[str, Any]:
    """A model's config.json; DataError when there is none."""
    try:
        config = json.loads((folder / "config.json").read_text())
        if not isinstance(config, dict):
            raise ValueError("config.json is no table")
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} holds no model of Hugging Face ({error})") from error
    return config


def hash_weights(folder: Path) -> str:
    """32 hexadecimal digits over a folder's weights; DataError when it has none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise DataError(f"{folder} holds no weights (*.safetensors)")
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:32]
