"""DCP's reader of our own checkpoints, which executes no pickle.

DCP keeps its index, `.metadata`, as a pickle, which `restricted.py` opens; the tensors themselves are read by
`torch.load(weights_only=True)`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from .errors import CheckpointError
from .manifest import damages, read_manifest
from .restricted import read_index


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
        self._index = read_index(checkpoint)
        if self._index.storage_meta is None:
            self._index.storage_meta = StorageMeta()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._index
