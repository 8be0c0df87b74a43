"""Reading DCP's files without executing a pickle.

DCP keeps its index, `.metadata`, as a pickle. It is opened by an unpickler that knows DCP's own data classes, sizes and
dtypes and nothing else, so a checkpoint of unknown origin cannot run code; the tensors themselves are read by
`torch.load(weights_only=True)`.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from .errors import CheckpointError
from .manifest import INDEX, damages, read_manifest

_DCP = "torch.distributed.checkpoint"
_KNOWN = {
    *(
        (f"{_DCP}.metadata", name)
        for name in (
            "Metadata",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "MetadataIndex",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    (f"{_DCP}.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_index(file: IO[bytes], path: Path) -> Metadata:
    """DCP's index of a checkpoint.

    Raises:
        CheckpointError: it is damaged, or holds anything but an index.
    """
    try:
        index = _IndexUnpickler(file).load()
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{path}: is not the index of a checkpoint ({reason}); nothing was executed") from None
    if not isinstance(index, Metadata):
        raise CheckpointError(f"{path}: holds a {type(index).__name__}, not the index of a checkpoint")
    return index


class Reader(FileSystemReader):
    """DCP's reader of a finished checkpoint, its index opened once, by `read_index`.

    Attributes:
        manifest: the checkpoint's.

    Raises:
        CheckpointError: no finished checkpoint; files are missing, cut or, the index, changed.
    """

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(checkpoint)
        self.manifest = read_manifest(checkpoint)
        for damage in damages(checkpoint, content=False):
            raise CheckpointError(f"{checkpoint}: {damage}; take another checkpoint")
        with open(checkpoint / INDEX, "rb") as file:
            self._index = read_index(file, checkpoint / INDEX)
        if self._index.storage_meta is None:
            self._index.storage_meta = StorageMeta()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._index
