"""Reading shards: `os.pread` at the offsets that an index knows."""

from __future__ import annotations

import os
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

from .errors import BadSampleError


class ShardFiles:
    """Open shards, at most `max_open` at a time, read at offsets.

    `pread` and not mmap: a file that is truncated under a mapping kills the process, a short read is an error that
    can be named.
    """

    def __init__(self, paths: list[Path], *, max_open: int = 64) -> None:
        self.paths = paths
        self.max_open = max_open
        self._open: OrderedDict[int, int] = OrderedDict()

    @property
    def names(self) -> list[str]:
        """File names, for messages."""
        return [path.name for path in self.paths]

    def sizes(self) -> list[int]:
        """Bytes of each shard."""
        return [path.stat().st_size for path in self.paths]

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """`size` bytes of shard number `shard` at `offset`; BadSampleError when it cannot give them."""
        path = self.paths[shard]
        try:
            data = os.pread(self._descriptor(shard), size, offset)
        except OSError as error:
            raise BadSampleError("unreadable", f"cannot read {path} at offset {offset}: {error.strerror}") from error
        if len(data) != size:
            raise BadSampleError("truncated", f"{path.name}: truncated: {len(data)} of {size} bytes at offset {offset}")
        return data

    def read_checked(self, shard: int, offset: int, size: int, crc32: int, key: str) -> bytes:
        """As `read`, and the bytes must have this crc32; BadSampleError names shard, offset and key otherwise."""
        data = self.read(shard, offset, size)
        if zlib.crc32(data) != crc32:
            raise BadSampleError(
                "corrupt",
                f"{self.names[shard]}: corrupt tokens of {key!r} at offset {offset}: "
                f"crc32 {zlib.crc32(data):08x}, the index says {crc32:08x}",
            )
        return data

    def __getstate__(self) -> dict[str, object]:
        """Descriptors do not travel to workers: they open their own."""
        return {"paths": self.paths, "max_open": self.max_open}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["paths"], max_open=state["max_open"])  # type: ignore[misc]

    def _descriptor(self, shard: int) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        descriptor = os.open(self.paths[shard], os.O_RDONLY)
        self._open[shard] = descriptor
        if len(self._open) > self.max_open:
            _, oldest = self._open.popitem(last=False)
            os.close(oldest)
        return descriptor

    def close(self) -> None:
        """Closes every file; a later read opens them again."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __del__(self) -> None:
        self.close()
