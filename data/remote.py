"""Data sets behind a URL: any file system that fsspec knows, through a cache that the processes of a node share.

A shard is fetched whole when its first sample is read, checked against the manifest (size and sha256), and renamed into
the cache; the least recently used shards make room. Of a shard that is larger than the cache, or than a set size, only
the bytes of each sample are read, and checked by length and crc32. Nothing is unpickled, no shell is started, and the
only lock is one on a file that is being downloaded.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import random
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from .errors import BadSampleError, DataError
from .files import fsync_folder, sha256_file
from .pread import ShardFiles

log = logging.getLogger("polylepis.data")
_TRIES = 6
_CHUNK = 1 << 22
T = TypeVar("T")


class RemoteFolder:
    """A data set's folder on some file system, and its local copy as far as it was needed.

    Args:
        url: of the folder.
        cache: local folder for all data sets (default: $POLYLEPIS_CACHE, else ~/.cache/polylepis).
        cache_bytes: shards of this data set kept at most (default: $POLYLEPIS_CACHE_GB, else 100 GB).
        range_bytes: of larger shards only the ranges of samples are read (default: $POLYLEPIS_RANGE_GB, else 4 GB), as
            of those larger than the cache; a cache of 0 therefore keeps no shard at all.
        first_wait: seconds; the first retry waits up to this long, each further one up to twice as long.

    Raises:
        DataError: no such kind of file system here.
    """

    def __init__(
        self,
        url: str,
        *,
        cache: Path | None = None,
        cache_bytes: int | None = None,
        range_bytes: int | None = None,
        first_wait: float = 0.2,
    ) -> None:
        from fsspec.core import url_to_fs

        self.url = url.rstrip("/")
        try:
            self._fs, self._path = url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise DataError(f"{url}: no file system for it here ({' '.join(str(error).split())})") from error
        base = cache or Path(os.environ.get("POLYLEPIS_CACHE", Path.home() / ".cache" / "polylepis"))
        self.local = base / hashlib.sha256(self.url.encode()).hexdigest()[:24]
        self.cache_bytes = _gigabytes("POLYLEPIS_CACHE_GB", 100) if cache_bytes is None else cache_bytes
        self.range_bytes = _gigabytes("POLYLEPIS_RANGE_GB", 4) if range_bytes is None else range_bytes
        self.first_wait = first_wait
        self.local.mkdir(parents=True, exist_ok=True)

    def shards(self, entries: list[dict[str, Any]]) -> RemoteShards:
        """The shards that a manifest lists."""
        return RemoteShards(self, entries)

    def size(self, name: str) -> int:
        """Bytes of a remote file; DataError when it is missing or cannot be reached."""
        return int(self._again(name, lambda: self._fs.info(f"{self._path}/{name}")["size"]))

    def by_ranges(self, size: int) -> bool:
        """Whether a shard of so many bytes is read by ranges, and not fetched."""
        return size > min(self.cache_bytes, self.range_bytes)

    def read_range(self, name: str, offset: int, size: int, *, crc32: int | None = None) -> bytes:
        """`size` bytes of a remote file at `offset`, asked for again while they are too few or not of this crc32.

        Raises:
            DataError: as `fetch`.
        """

        def attempt() -> bytes:
            data = bytes(self._fs.cat_file(f"{self._path}/{name}", start=offset, end=offset + size))
            if len(data) != size:
                raise OSError(f"{len(data)} of {size} bytes came at offset {offset}")
            if crc32 is not None and zlib.crc32(data) != crc32:
                raise OSError(f"crc32 {zlib.crc32(data):08x} at offset {offset}, the index says {crc32:08x}")
            return data

        return self._again(name, attempt)

    def fetch(self, name: str, *, size: int | None = None, sha256: str | None = None, fresh: bool = False) -> Path:
        """The local copy of a remote file, downloaded if it is not there yet.

        Args:
            name: inside the folder.
            size, sha256: what it must be; a download that is not is tried again.
            fresh: download also when there is a copy.

        Raises:
            DataError: it is missing, cannot be reached, or stays another than expected after six tries.
        """
        target = self.local / name
        if target.exists() and not fresh and (size is None or target.stat().st_size == size):
            os.utime(target)
            return target
        part = target.with_name(name + ".part")
        with open(part, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # Another process may have brought it while this one waited for the lock.
            if target.exists() and not fresh and (size is None or target.stat().st_size == size):
                return target
            self._again(name, lambda: self._download(name, part, size, sha256))
            os.replace(part, target)
        fsync_folder(self.local)
        self._evict(target)
        return target

    def _download(self, name: str, part: Path, size: int | None, sha256: str | None) -> None:
        with self._fs.open(f"{self._path}/{name}", "rb") as source, open(part, "wb") as file:
            while chunk := source.read(_CHUNK):
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        got = part.stat().st_size
        if size is not None and got != size:
            raise OSError(f"{got} of {size} bytes came")
        if sha256 is not None and sha256_file(part) != sha256:
            raise OSError("its sha256 is not the expected one")

    def _again(self, name: str, attempt: Callable[[], T]) -> T:
        """`attempt`, up to six times, with waits that grow and are never the same on two machines."""
        for number in range(_TRIES):
            try:
                return attempt()
            except FileNotFoundError as error:
                raise DataError(f"{self.url}/{name} is missing") from error
            except PermissionError as error:
                raise DataError(f"{self.url}/{name}: access denied ({' '.join(str(error).split())})") from error
            except Exception as error:  # every file system has its own exceptions for a network that fails
                reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
                if number + 1 == _TRIES:
                    raise DataError(f"{self.url}/{name}: {_TRIES} tries failed, the last with {reason}") from error
                log.warning("%s/%s: %s; trying again", self.url, name, reason)
                time.sleep(random.uniform(0, self.first_wait * 2**number))
        raise AssertionError("unreachable")

    def _evict(self, keep: Path) -> None:
        """Removes shards, least recently used first, until they fit; a process that reads one keeps its open file."""
        found = []
        for path in self.local.glob("*.tar"):
            try:
                found.append((path.stat().st_mtime, path.stat().st_size, path))
            except FileNotFoundError:
                continue  # another process was faster
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self.cache_bytes:
                break
            if path != keep:
                path.unlink(missing_ok=True)
                total -= size


def _gigabytes(variable: str, default: float) -> int:
    """Bytes that an environment variable gives in GB; DataError when it is no such number."""
    text = os.environ.get(variable, str(default))
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise DataError(f"{variable} is {text!r}; a number of gigabytes >= 0 is needed")
    return int(value * 1e9)


class RemoteShards(ShardFiles):
    """Shards of a `RemoteFolder`, fetched when they are first read, or read by ranges.

    Args:
        folder: where they are.
        entries: the manifest's, with name, bytes and sha256.
    """

    def __init__(self, folder: RemoteFolder, entries: list[dict[str, Any]], *, max_open: int = 64) -> None:
        super().__init__([folder.local / entry["name"] for entry in entries], max_open=max_open)
        self.folder, self.entries = folder, entries

    def sizes(self) -> list[int]:
        """As the manifest has them: nothing is fetched."""
        return [entry["bytes"] for entry in self.entries]

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """As `ShardFiles.read`; what cannot be fetched is a BadSampleError."""
        if self._by_ranges(shard):
            return self._range(shard, offset, size)
        if shard not in self._open:
            self._fetch(shard, fresh=False)
        return super().read(shard, offset, size)

    def read_checked(self, shard: int, offset: int, size: int, crc32: int, key: str) -> bytes:
        """As `ShardFiles.read_checked`; a copy that has gone bad is fetched once more."""
        if self._by_ranges(shard):
            return self._range(shard, offset, size, crc32=crc32, key=key)
        try:
            return super().read_checked(shard, offset, size, crc32, key)
        except BadSampleError as error:
            if error.reason == "unreadable":
                raise
            log.warning("%s; fetching the shard again", error)
            self._fetch(shard, fresh=True)
            return super().read_checked(shard, offset, size, crc32, key)

    def _by_ranges(self, shard: int) -> bool:
        """A copy that is there already is used all the same."""
        whole = self.entries[shard]["bytes"]
        return shard not in self._open and self.folder.by_ranges(whole) and not self.paths[shard].exists()

    def _range(self, shard: int, offset: int, size: int, *, crc32: int | None = None, key: str = "") -> bytes:
        try:
            return self.folder.read_range(self.entries[shard]["name"], offset, size, crc32=crc32)
        except DataError as error:
            which = f" ({key!r} at offset {offset})" if key else f" (at offset {offset})"
            raise BadSampleError("unreadable", f"{error}{which}") from error

    def _fetch(self, shard: int, *, fresh: bool) -> None:
        entry = self.entries[shard]
        if fresh and shard in self._open:
            os.close(self._open.pop(shard))
        try:
            self.folder.fetch(entry["name"], size=entry["bytes"], sha256=entry["sha256"], fresh=fresh)
        except DataError as error:
            raise BadSampleError("unreadable", str(error)) from error
