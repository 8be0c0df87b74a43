"""The sidecar index of a shard: where each sample lies in its tar, how long it is, and what it must hash to.

An index is made by reading the tar alone, block by block, and refuses what a streaming reader would pass over in
silence: bad header checksums, truncation, members of a sample that do not lie together, keys that occur twice.
"""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np

from .errors import DataError
from .files import sha256_file, write_atomic

INDEX_VERSION = 1
BLOCK = 512  # bytes of a tar block
_BOS = 1


@dataclass(frozen=True)
class Member:
    """One file inside a tar: its name split at the first dot (webdataset's rule), and where it lies, in bytes."""

    key: str
    extension: str
    header: int
    offset: int
    size: int

    @property
    def end(self) -> int:
        """First byte after the member's padding."""
        return self.offset + -(-self.size // BLOCK) * BLOCK


@dataclass(frozen=True)
class ShardIndex:
    """Index of one tar of n samples and M modalities.

    Attributes:
        header: {version, tar, bytes, sha256, modalities, fingerprints, split}.
        keys: bytes [n].
        span_offset, span_bytes: int64 [n], all members of the sample, with their headers.
        token_offset, token_bytes: int64 [n], the token ids alone (after the .npy header).
        token_crc32: uint32 [n], of those bytes.
        lengths: int64 [n] tokens of the document; modality_lengths: int64 [n, M], summing to it.
    """

    header: dict[str, Any]
    keys: np.ndarray
    span_offset: np.ndarray
    span_bytes: np.ndarray
    token_offset: np.ndarray
    token_bytes: np.ndarray
    token_crc32: np.ndarray
    lengths: np.ndarray
    modality_lengths: np.ndarray

    _ARRAYS: ClassVar[tuple[str, ...]] = (
        "keys",
        "span_offset",
        "span_bytes",
        "token_offset",
        "token_bytes",
        "token_crc32",
        "lengths",
        "modality_lengths",
    )

    def __len__(self) -> int:
        return len(self.keys)

    def save(self, path: Path) -> None:
        """Writes the index as an .npz without pickle, atomically and with the same bytes for the same shard."""
        buffer = io.BytesIO()
        header = np.frombuffer(json.dumps(self.header, sort_keys=True).encode(), dtype=np.uint8)
        np.savez(buffer, header=header, **{name: getattr(self, name) for name in self._ARRAYS})
        write_atomic(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> ShardIndex:
        """Reads `save`'s file; DataError when it is missing, damaged or of another version."""
        hint = f"; make it with: polylepis data index {str(path).removesuffix('.idx.npz')}"
        if not path.exists():
            raise DataError(f"index {path} is missing{hint}")
        try:
            with np.load(path, allow_pickle=False) as archive:
                header = json.loads(archive["header"].tobytes())
                arrays = {name: archive[name] for name in cls._ARRAYS}
        except (OSError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            raise DataError(f"index {path} is damaged ({error}){hint}") from error
        if header.get("version") != INDEX_VERSION:
            raise DataError(f"index {path} has version {header.get('version')}, this reads {INDEX_VERSION}{hint}")
        return cls(header=header, **arrays)


def index_path(tar: Path) -> Path:
    """`x.tar` -> `x.tar.idx.npz`."""
    return tar.with_name(tar.name + ".idx.npz")


def read_members(file: BinaryIO, size: int, name: str) -> Iterator[Member]:
    """All members of a plain ustar archive of `size` bytes, in order.

    Raises:
        DataError: a header with a wrong checksum, a member that is no regular file (PAX and GNU extensions included),
            a name without extension, or an archive that ends early.
    """
    offset = 0
    while True:
        file.seek(offset)
        block = file.read(BLOCK)
        if len(block) < BLOCK:
            raise DataError(f"{name}: truncated at offset {offset}: the end-of-archive blocks are missing")
        if block == bytes(BLOCK):
            break
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        except (tarfile.HeaderError, UnicodeDecodeError) as error:
            raise DataError(f"{name}: bad tar header at offset {offset} ({error})") from error
        if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            raise DataError(f"{name}: member {info.name!r} at offset {offset} has type {info.type!r}; only plain files")
        folder, slash, base = info.name.rpartition("/")
        stem, dot, extension = base.partition(".")
        if not dot or not stem:
            raise DataError(f"{name}: member {info.name!r} at offset {offset} is not named KEY.EXTENSION")
        member = Member(folder + slash + stem, extension, offset, offset + BLOCK, info.size)
        if member.end > size:
            raise DataError(
                f"{name}: truncated inside {info.name!r} at offset {offset}: {member.end} bytes needed, {size} there"
            )
        yield member
        offset = member.end
    # A second zero block closes the archive; writers pad with more.
    file.seek(offset)
    rest = file.read()
    if len(rest) < 2 * BLOCK or rest.strip(b"\0"):
        raise DataError(f"{name}: no proper end of archive at offset {offset}: two zero blocks and nothing else")


def read_groups(file: BinaryIO, size: int, name: str) -> Iterator[list[Member]]:
    """Members grouped into samples.

    Raises:
        DataError: as `read_members`; and a key that comes again after others (its members are interleaved, or the key
            is a duplicate), or the same extension twice in one sample.
    """
    group: list[Member] = []
    seen: set[str] = set()
    for member in read_members(file, size, name):
        if group and member.key != group[0].key:
            yield group
            group = []
        if not group:
            if member.key in seen:
                raise DataError(
                    f"{name}: key {member.key!r} comes again at offset {member.header} after other keys: "
                    "duplicate key, or members of two samples interleaved"
                )
            seen.add(member.key)
        if any(other.extension == member.extension for other in group):
            raise DataError(
                f"{name}: duplicate member {member.key}.{member.extension} at offset {member.header}: duplicate key"
            )
        group.append(member)
    if group:
        yield group


def scan_shard(path: Path, *, name: str | None = None) -> ShardIndex:
    """Indexes a tar from its own bytes.

    Args:
        path: the tar.
        name: what messages and the index call it (default: the file's name); a `.part` file gets its final name.

    Raises:
        DataError: as `read_groups`; and samples without `json` or `tokens.npy`, whose lengths disagree, or that were
            made with different vocabularies.
    """
    name = name or path.name
    try:
        size = path.stat().st_size
        file = open(path, "rb", buffering=1 << 20)  # closed below
    except OSError as error:
        raise DataError(f"cannot read shard {path}: {error.strerror}") from error
    rows: list[tuple[int, ...]] = []
    keys: list[bytes] = []
    lengths: list[list[int]] = []
    common: dict[str, Any] | None = None
    with file:
        for group in read_groups(file, size, name):
            meta, row, token_lengths = _scan_sample(file, group, name)
            identity = {field: meta[field] for field in ("modalities", "fingerprints", "split")}
            if common is None:
                common = identity
            elif identity != common:
                raise DataError(
                    f"{name}: key {group[0].key!r} at offset {group[0].header} was made with other vocabularies "
                    f"or for another split than the samples before it"
                )
            keys.append(group[0].key.encode())
            rows.append(row)
            lengths.append(token_lengths)
    if common is None:
        raise DataError(f"{name}: the shard holds no sample")
    table = np.array(rows, dtype=np.int64)
    header = {"version": INDEX_VERSION, "tar": name, "bytes": size, "sha256": sha256_file(path), **common}
    return ShardIndex(
        header=header,
        keys=np.array(keys),
        span_offset=table[:, 0],
        span_bytes=table[:, 1],
        token_offset=table[:, 2],
        token_bytes=table[:, 3],
        token_crc32=table[:, 4].astype(np.uint32),
        lengths=table[:, 5],
        modality_lengths=np.array(lengths, dtype=np.int64),
    )


def _scan_sample(file: BinaryIO, group: list[Member], name: str) -> tuple[dict[str, Any], tuple[int, ...], list[int]]:
    """Metadata, index row and lengths per modality of one sample."""
    where = f"{name}: key {group[0].key!r} at offset {group[0].header}"
    members = {member.extension: member for member in group}
    if "json" not in members or "tokens.npy" not in members:
        raise DataError(f"{where} needs members json and tokens.npy, has {', '.join(sorted(members))}")
    try:
        meta = json.loads(_payload(file, members["json"]))
        counts = [int(meta["lengths"][modality]) for modality in meta["modalities"]]
        if not isinstance(meta["fingerprints"], dict) or not isinstance(meta["split"], str):
            raise TypeError("fingerprints must be a table and split a name")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{where}: its json lacks lengths, modalities, fingerprints or split ({error!r})") from error
    member = members["tokens.npy"]
    payload = _payload(file, member)
    try:
        tokens = np.lib.format.read_array(io.BytesIO(payload), allow_pickle=False)
    except ValueError as error:
        raise DataError(f"{where}: tokens.npy is no NumPy array ({error})") from error
    if tokens.ndim != 1 or tokens.dtype not in (np.dtype("<u2"), np.dtype("<u4")):
        raise DataError(f"{where}: tokens must be 1-D uint16 or uint32, got {tokens.dtype} {tokens.shape}")
    if not tokens.size or tokens[0] != _BOS or sum(counts) != tokens.size:
        raise DataError(f"{where}: {tokens.size} tokens that begin with bos expected to match lengths {counts}")
    data = payload[len(payload) - tokens.nbytes :]
    last = group[-1]
    row = (
        group[0].header,
        last.end - group[0].header,
        member.offset + member.size - tokens.nbytes,
        tokens.nbytes,
        zlib.crc32(data),
        tokens.size,
    )
    return meta, row, counts


def _payload(file: BinaryIO, member: Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.size)
