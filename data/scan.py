"""Making an index by reading a tar alone, block by block.

What a streaming reader would pass over in silence is refused: bad header checksums, truncation, members of a sample
that do not lie together, keys that occur twice.
"""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from .cut import cut_text
from .errors import DataError
from .extended import KINDS, MOST, Extended, parse
from .files import sha256_file
from .index import BLOCK, INDEX_VERSION, ShardIndex
from .latents import MEMBER, LatentRows, parse_member

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


def read_members(file: BinaryIO, size: int, name: str, *, foreign: bool = False) -> Iterator[Member]:
    """All members of a plain ustar archive of `size` bytes, in order.

    Args:
        foreign: PAX and GNU long-name headers are read too, and belong to their member; folders are passed over.

    Raises:
        DataError: a header with a wrong checksum, a member that is no regular file (of ours, PAX and GNU extensions
            included), a name without extension, or an archive that ends early.
    """
    offset, begin, more = 0, 0, Extended()
    while True:
        file.seek(offset)
        block = file.read(BLOCK)
        if len(block) < BLOCK:
            raise DataError(f"{name}: truncated at offset {offset}: the end-of-archive blocks are missing")
        if block == bytes(BLOCK):
            break
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        except (tarfile.HeaderError, ValueError) as error:
            raise DataError(f"{name}: bad tar header at offset {offset} ({error})") from error
        if foreign and info.size >= 0 and info.type in KINDS:
            try:
                if info.size > min(MOST, size - offset - BLOCK):
                    raise ValueError(f"an extended header of {info.size} bytes")
                more = parse(info.type, file.read(info.size), more)
            except ValueError as error:
                raise DataError(f"{name}: bad tar header at offset {offset} ({error})") from error
            offset += BLOCK + -(-info.size // BLOCK) * BLOCK
            continue
        if foreign and info.type == tarfile.DIRTYPE:
            offset += BLOCK
            begin, more = offset, Extended()
            continue
        info.name, info.size = more.name or info.name, info.size if more.size is None else more.size
        if info.size < 0:
            raise DataError(f"{name}: bad tar header at offset {offset} (a size of {info.size})")
        if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            raise DataError(f"{name}: member {info.name!r} at offset {offset} has type {info.type!r}; only plain files")
        folder, slash, base = info.name.rpartition("/")
        stem, dot, extension = base.partition(".")
        if not dot or not stem:
            raise DataError(f"{name}: member {info.name!r} at offset {offset} is not named KEY.EXTENSION")
        member = Member(folder + slash + stem, extension, begin, offset + BLOCK, info.size)
        if member.end > size:
            raise DataError(
                f"{name}: truncated inside {info.name!r} at offset {offset}: {member.end} bytes needed, {size} there"
            )
        yield member
        offset = begin = member.end
        more = Extended()
    # A second zero block closes the archive; writers pad with more.
    file.seek(offset)
    rest = file.read()
    if len(rest) < 2 * BLOCK or rest.strip(b"\0"):
        raise DataError(f"{name}: no proper end of archive at offset {offset}: two zero blocks and nothing else")


def read_groups(file: BinaryIO, size: int, name: str, *, foreign: bool = False) -> Iterator[list[Member]]:
    """Members grouped into samples.

    Raises:
        DataError: as `read_members`; and a key that comes again after others (its members are interleaved, or the key
            is a duplicate), or the same extension twice in one sample.
    """
    group: list[Member] = []
    seen: set[str] = set()
    for member in read_members(file, size, name, foreign=foreign):
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


@dataclass(frozen=True)
class TextReading:
    """How the documents of foreign tars are made: from their text members, tokenised when they are read.

    Attributes:
        extension: of the member that holds the text, UTF-8.
        max_tokens: documents are cut between words so that none is longer, bos and eos included.
        split: of the data set.
        fingerprints: of vocabulary, tokenizer and codecs.
        modalities: of the vocabulary; the documents are of the first.
        encode: text -> ids without bos and eos.
    """

    extension: str
    max_tokens: int
    split: str
    fingerprints: dict[str, str]
    modalities: tuple[str, ...]
    encode: Callable[[str], list[int]]


class _Latents(NamedTuple):
    """Offset, size and crc32 of a document's vectors, their number by modality, and what they are."""

    offset: int
    size: int
    crc32: int
    counts: list[int]
    width: int
    dtype: str


class _Document(NamedTuple):
    """One row: key, offset, size and crc32 of the token (or text) bytes, tokens by modality, latents."""

    key: bytes
    offset: int
    size: int
    crc32: int
    counts: list[int]
    latents: _Latents | None = None


def scan_shard(path: Path, *, name: str | None = None, reading: TextReading | None = None) -> ShardIndex:
    """Indexes a tar from its own bytes.

    Args:
        path: the tar.
        name: what messages and the index call it (default: the file's name); a `.part` file gets its final name.
        reading: how to read a foreign tar; None for one of ours.

    Raises:
        DataError: as `read_groups`; and samples without `json` and `tokens.npy` (or `tok.npy` and `off.npy`), whose
            lengths disagree, or that were made with different vocabularies.
    """
    name = name or path.name
    try:
        size = path.stat().st_size
        file = open(path, "rb", buffering=1 << 20)  # closed below
    except OSError as error:
        raise DataError(f"cannot read shard {path}: {error.strerror}") from error
    spans: list[tuple[int, int]] = []
    documents: list[_Document] = []
    starts = [0]
    common: dict[str, Any] | None = None
    with file:
        for group in read_groups(file, size, name, foreign=reading is not None):
            start, end = group[0].header, group[-1].end
            starts[-1:] = [start, end]
            if reading is not None:
                identity: dict[str, Any] = {
                    "modalities": list(reading.modalities),
                    "fingerprints": reading.fingerprints,
                    "split": reading.split,
                    "text": {"extension": reading.extension, "max_tokens": reading.max_tokens},
                }
                found = _scan_text(file, group, name, reading)
            else:
                meta, found = _scan_sample(file, group, name)
                identity = {field: meta[field] for field in ("modalities", "fingerprints", "split")}
            if common is None:
                common = identity
            elif identity != common:
                raise DataError(
                    f"{name}: key {group[0].key!r} at offset {start} was made with other vocabularies "
                    f"or for another split than the samples before it"
                )
            documents += found
            spans += [(start, end - start)] * len(found)
    if common is None or not documents:
        raise DataError(f"{name}: the shard holds no sample")
    table = np.array(spans, dtype=np.int64)
    header = {"version": INDEX_VERSION, "tar": name, "bytes": size, "sha256": sha256_file(path), **common}
    counts = np.array([document.counts for document in documents], dtype=np.int64)
    latents = _latent_rows(documents, header, name)
    return ShardIndex(
        header=header,
        keys=np.array([document.key for document in documents]),
        span_offset=table[:, 0],
        span_bytes=table[:, 1],
        token_offset=np.array([document.offset for document in documents], dtype=np.int64),
        token_bytes=np.array([document.size for document in documents], dtype=np.int64),
        token_crc32=np.array([document.crc32 for document in documents], dtype=np.uint32),
        lengths=counts.sum(axis=1),
        modality_lengths=counts,
        starts=np.array(starts, dtype=np.int64),
        latents=latents,
    )


def _latent_rows(documents: list[_Document], header: dict[str, Any], name: str) -> LatentRows | None:
    """The documents' latents, whose width and type go into the header; None without any."""
    found = [document.latents for document in documents if document.latents]
    kinds = sorted({(one.width, one.dtype) for one in found})
    if not kinds:
        return None
    if len(kinds) > 1:
        raise DataError(f"{name}: latents of one shard have one width and type, here are {kinds}")
    header["latents"] = {"width": kinds[0][0], "dtype": kinds[0][1]}
    none = _Latents(0, 0, 0, [0] * len(header["modalities"]), 0, "")
    rows = [document.latents or none for document in documents]
    offsets, sizes = (np.array([getattr(row, field) for row in rows], dtype=np.int64) for field in ("offset", "size"))
    crc32 = np.array([row.crc32 for row in rows], dtype=np.uint32)
    return LatentRows(offsets, sizes, crc32, np.array([row.counts for row in rows], dtype=np.int64))


def _scan_sample(file: BinaryIO, group: list[Member], name: str) -> tuple[dict[str, Any], list[_Document]]:
    """Metadata and documents of one sample of ours: one, or all of a block."""
    where = f"{name}: key {group[0].key!r} at offset {group[0].header}"
    members = {member.extension: member for member in group}
    block = "tok.npy" in members
    needed = ("json", "tok.npy", "off.npy") if block else ("json", "tokens.npy")
    if not set(needed) <= set(members):
        raise DataError(f"{where} needs members json and tokens.npy, has {', '.join(sorted(members))}")
    try:
        meta = json.loads(_payload(file, members["json"]))
        counts = [int(meta["lengths"][modality]) for modality in meta["modalities"]]
        if not isinstance(meta["fingerprints"], dict) or not isinstance(meta["split"], str):
            raise TypeError("fingerprints must be a table and split a name")
        if not isinstance(meta["modalities"], list) or not counts or min(counts) < 0:
            raise TypeError("modalities must be a list of names with lengths")
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise DataError(f"{where}: its json lacks lengths, modalities, fingerprints or split ({error!r})") from error
    member = members[needed[1]]
    tokens = _array(_payload(file, member), f"{where}: {needed[1]}", ("<u2", "<u4"))
    if not tokens.size or tokens[0] != _BOS or sum(counts) != tokens.size:
        raise DataError(f"{where}: {tokens.size} tokens that begin with bos expected to match lengths {counts}")
    base = member.offset + member.size - tokens.nbytes
    if not block:
        key = group[0].key.encode()
        latents = _scan_latents(file, members[MEMBER], meta, counts, where) if MEMBER in members else None
        return meta, [_Document(key, base, tokens.nbytes, zlib.crc32(tokens.tobytes()), counts, latents)]
    ends = _array(_payload(file, members["off.npy"]), f"{where}: off.npy", ("<u4", "<u8")).astype(np.int64)
    if len(ends) < 2 or ends[0] != 0 or ends[-1] != tokens.size or (np.diff(ends) < 1).any() or any(counts[1:]):
        raise DataError(f"{where}: off.npy must ascend from 0 to {tokens.size}, and all tokens of a block be text")
    if (tokens[ends[:-1]] != _BOS).any():
        raise DataError(f"{where}: every document of a block begins with bos ({_BOS})")
    documents, zeros, width = [], [0] * (len(counts) - 1), tokens.itemsize
    data = tokens.tobytes()
    for i, (a, b) in enumerate(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)):
        crc32 = zlib.crc32(data[a * width : b * width])
        key = f"{group[0].key}/{i}".encode()
        documents.append(_Document(key, base + a * width, (b - a) * width, crc32, [b - a, *zeros]))
    return meta, documents


def _scan_latents(file: BinaryIO, member: Member, meta: dict[str, Any], lengths: list[int], where: str) -> _Latents:
    """The vectors of a sample, whose numbers by modality its json must hold."""
    payload = _payload(file, member)
    rows, width, dtype = parse_member(payload, where)
    try:
        counts = [int(meta["latents"].get(modality, 0)) for modality in meta["modalities"]]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DataError(f"{where}: its json does not say how many latents each modality has ({error!r})") from error
    if sum(counts) != rows or any(not 0 <= n <= most for n, most in zip(counts, lengths, strict=True)):
        raise DataError(f"{where}: {rows} latents, its json says {counts} of {lengths} tokens")
    size = rows * width * 2
    vectors = payload[len(payload) - size :]
    return _Latents(member.offset + member.size - size, size, zlib.crc32(vectors), counts, width, dtype)


def _scan_text(file: BinaryIO, group: list[Member], name: str, reading: TextReading) -> list[_Document]:
    """The documents of one foreign sample: its text, cut where it is too long; none where it is empty."""
    where = f"{name}: key {group[0].key!r} at offset {group[0].header}"
    member = {member.extension: member for member in group}.get(reading.extension)
    if member is None:
        has = ", ".join(sorted(m.extension for m in group))
        raise DataError(f"{where} has no member {reading.extension!r}, only {has}; name the text's with --text")
    payload = _payload(file, member)
    try:
        text = payload.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: {reading.extension} is not UTF-8 at byte {error.start}") from error
    documents: list[_Document] = []
    offset, zeros = member.offset, [0] * (len(reading.modalities) - 1)
    for piece, ids in cut_text(text, reading.max_tokens - 2, reading.encode):
        data = piece.encode()
        if piece.strip():
            key = f"{group[0].key}/{len(documents)}".encode()
            documents.append(_Document(key, offset, len(data), zlib.crc32(data), [len(ids) + 2, *zeros]))
        offset += len(data)
    return documents


def _array(payload: bytes, where: str, dtypes: tuple[str, ...]) -> np.ndarray:
    """A 1-D array of one of `dtypes` from .npy bytes; nothing larger than the bytes is ever allocated."""
    file = io.BytesIO(payload)
    try:
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            raise ValueError(f"version {version}")
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    except Exception as error:  # the header is a Python literal: damaged ones make its parser raise almost anything
        raise DataError(f"{where} is no NumPy array ({type(error).__name__}: {error})".replace("\n", " ")) from error
    if len(shape) != 1 or dtype not in [np.dtype(name) for name in dtypes]:
        raise DataError(f"{where}: tokens must be 1-D uint16 or uint32, got {dtype} {shape}")
    if shape[0] * dtype.itemsize != len(payload) - file.tell():
        raise DataError(f"{where}: {shape[0]} entries announced, {len(payload) - file.tell()} bytes there")
    return np.frombuffer(payload, dtype=dtype, offset=file.tell())


def _payload(file: BinaryIO, member: Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.size)
