"""Files of a source folder as documents, one after another: what `encode` reads.

A large file is read in parts, so that several workers share it and none holds it whole. Where the parts are cut depends
on the file and the wanted size alone.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .errors import DataError
from .media import EXTRA
from .scan import read_groups

TEXT, IMAGE, SERIES = (".txt", ".md", ".rst"), (".png", ".jpg", ".jpeg", ".webp"), (".csv",)
SOUND, LATENTS = (".wav", ".flac", ".ogg", ".mp3"), (".safetensors",)
LINES, TABLE, TAR = ".jsonl", ".parquet", ".tar"
MEGATRON = ".bin"  # with its .idx beside it
PACKED = (".gz", ".bz2", ".xz", ".zst")  # of texts, lines and tables of numbers
MANY = (LINES, TABLE, TAR, MEGATRON)  # files of many documents

Keep = Callable[[bytes], bool]


class Part(NamedTuple):
    """A range of a file, begin <= x < end: bytes of texts, lines and byte files, documents of a Megatron pair, row
    groups of a table; 0, 0 is the whole file. And about how many bytes of the file it is."""

    begin: int
    end: int
    bytes: int


class Item(NamedTuple):
    """What becomes a document, or several.

    Attributes:
        name: the file, and the key in it where it is a tar.
        modality: of the content.
        content: a text, the ids int64 [n] of one, or another modality's bytes.
        caption: the text beside it, or "".
    """

    name: str
    modality: str
    content: str | bytes | np.ndarray
    caption: str = ""


def ending(name: str) -> str:
    """A file's ending in lower case, ".jsonl" for x.jsonl.gz; "" where only one of `PACKED` is left."""
    suffix = Path(name).suffix.lower()
    if suffix not in PACKED:
        return suffix
    inner = Path(name).with_suffix("").suffix.lower()
    return inner if inner in (*TEXT, LINES, *SERIES) else ""


def parts(path: Path, step: int, *, raw: bool = False) -> Iterator[Part]:
    """The parts of about `step` bytes that a file is read in; none for an empty file.

    Args:
        raw: the file's bytes are its content, and may be cut anywhere.
    """
    kind, size = ending(path.name), path.stat().st_size
    if not size:
        return
    if raw:
        yield from (Part(at, min(at + step, size), min(step, size - at)) for at in range(0, size, step))
    elif size <= step or path.suffix.lower() in PACKED or kind not in (*TEXT, LINES, TABLE, MEGATRON):
        yield Part(0, 0, size)
    elif kind == MEGATRON:
        data = _open_megatron(path)
        ends = np.concatenate(([0], np.cumsum(data.index.sequence_lengths, dtype=np.int64)))[data.document_indices]
        yield from _grouped(np.diff(ends) * (size / max(int(ends[-1]), 1)), step)
    elif kind == TABLE:
        table = _open_table(path).metadata
        yield from _grouped(np.array([table.row_group(i).total_byte_size for i in range(table.num_row_groups)]), step)
    else:
        yield from _line_parts(path, size, step)


def _line_parts(path: Path, size: int, step: int) -> Iterator[Part]:
    """Ranges of whole lines."""
    begin = 0
    with open(path, "rb") as file:
        while begin < size:
            file.seek(min(begin + step, size))
            while (chunk := file.readline(1 << 16)) and not chunk.endswith(b"\n"):
                pass
            yield Part(begin, file.tell(), file.tell() - begin)
            begin = file.tell()


def _grouped(sizes: np.ndarray, step: int) -> Iterator[Part]:
    """Ranges of entries of about `step` bytes together."""
    begin, total = 0, 0.0
    for i, size in enumerate(sizes.tolist()):
        total += size
        if total >= step or i + 1 == len(sizes):
            yield Part(begin, i + 1, int(total))
            begin, total = i + 1, 0.0


def read_items(
    path: Path, name: str, modality: Callable[[str], str], part: Part, caption: Path | None, keep: Keep, eod: int | None
) -> Iterator[Item | DataError]:
    """The documents of a part of a file; in the place of one that cannot be read, the error.

    Args:
        name: how the file is called in messages and metadata.
        modality: of a file, by its name; for the members of tars.
        part: one of `parts`.
        caption: the text file beside it.
        keep: whether a document of a file of many (`MANY`) is wanted, by the bytes that it is told by.
        eod: this id at the end of a Megatron document is left out.

    Raises:
        DataError: the file, or what follows in it, cannot be read.
    """
    kind, main = ending(name), modality(name)
    if main == "bytes":
        yield Item(name, main, _read(path, part), _text(caption))
    elif kind == LINES:
        for text in _read_lines(path, part, keep):
            yield text if isinstance(text, DataError) else Item(name, "text", text)
    elif kind == TABLE:
        yield from (Item(name, "text", text) for text in _read_table(path, part, keep))
    elif kind == MEGATRON:
        yield from (Item(name, "text", ids) for ids in _read_megatron(path, part, keep, eod))
    elif kind == TAR:
        yield from _read_tar(path, name, modality, keep)
    elif main == "text":
        yield Item(name, main, _decode(_read(path, part), name))
    else:
        yield Item(name, main, _read(path, part), _text(caption))


def _read(path: Path, part: Part) -> bytes:
    with _open(path) as file:
        if not part.end:
            return file.read()
        file.seek(part.begin)
        return file.read(part.end - part.begin)


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """The file for reading, unpacked where its ending says that it is packed; DataError for whatever goes wrong."""
    try:
        if path.suffix.lower() not in PACKED:
            with open(path, "rb") as plain:
                yield plain
        else:
            import fsspec

            try:
                opened = fsspec.open(str(path), "rb", compression="infer")
            except ValueError as error:  # zstandard is not there
                raise DataError(f"cannot unpack {path} ({error}): {EXTRA}") from error
            with opened as packed:
                yield io.BufferedReader(packed)
    except DataError:
        raise
    except Exception as error:  # the unpackers have errors of their own
        raise DataError(f"cannot read {path}: {' '.join(str(error).split())}") from error


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8 at byte {error.start}") from error


def _text(path: Path | None) -> str:
    return _decode(_read(path, Part(0, 0, 0)), str(path)).strip() if path else ""


def _read_lines(path: Path, part: Part, keep: Keep) -> Iterator[str | DataError]:
    """The field `text` of every line of a .jsonl that is wanted, by its bytes."""
    with _open(path) as file:
        if part.begin:
            file.seek(part.begin)
        at = part.begin
        for number, line in enumerate(file, 1):  # at b"\n" alone: JSON strings may hold the other separators
            if part.end and at >= part.end:
                return
            at += len(line)
            line = line.strip()
            if not line or not keep(line):
                continue
            try:
                text = json.loads(line)["text"]
                if not isinstance(text, str):
                    raise TypeError(f"text is {type(text).__name__}, not a string")
                yield text
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                where = f"{path}, line {number + _lines_before(path, part.begin)}"
                yield DataError(f"{where}: no JSON object with a string text ({error!r})")


def _lines_before(path: Path, offset: int) -> int:
    with open(path, "rb") as file:
        return sum(file.read(min(1 << 20, offset - at)).count(b"\n") for at in range(0, offset, 1 << 20))


def _open_table(path: Path) -> Any:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"reading {path} needs pyarrow: {EXTRA}") from error
    try:
        table = parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} is no Parquet file ({' '.join(str(error).split())})") from error
    columns = {field.name: str(field.type) for field in table.schema_arrow}
    if columns.get("text") not in ("string", "large_string", "string_view"):
        raise DataError(f"{path} has no column text of strings; its columns are {columns}")
    return table


def _read_table(path: Path, part: Part, keep: Keep) -> Iterator[str]:
    """The column `text` of a .parquet, row by row; rows without one are passed over."""
    table = _open_table(path)
    groups = range(part.begin, part.end) if part.end else range(table.metadata.num_row_groups)
    try:
        for batch in table.iter_batches(batch_size=1024, row_groups=list(groups), columns=["text"]):
            yield from (text for text in batch.column(0).to_pylist() if text and keep(text.encode()))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}") from error


def _open_megatron(path: Path) -> Any:
    try:
        from megatron.core.datasets.indexed_dataset import IndexedDataset
    except ImportError as error:
        raise DataError(f"reading {path} needs megatron-core") from error
    index = path.with_suffix(".idx")
    try:
        with open(index, "rb") as file:  # looked at first: megatron's own refusal leaves a half-made object behind
            magic, _, _, sequences, documents = struct.unpack("<9sQBQQ", file.read(34))
        needed = 34 + 12 * sequences + 8 * documents
        if magic != b"MMIDIDX\x00\x00" or index.stat().st_size < needed:
            raise ValueError(f"{index.stat().st_size} bytes that begin with {magic!r}, {needed} are needed")
        return IndexedDataset(str(path.with_suffix("")))
    except Exception as error:  # damaged headers make it raise assertions and NumPy's errors
        raise DataError(f"{index} is no Megatron index ({type(error).__name__}: {error})") from error


def _read_megatron(path: Path, part: Part, keep: Keep, eod: int | None) -> Iterator[np.ndarray]:
    """Ids int64 [n] of the documents of a Megatron .bin/.idx pair."""
    found = _open_megatron(path)
    edges = found.document_indices.tolist()
    for i in range(part.begin, part.end or len(edges) - 1):
        pieces = [np.asarray(found[j]) for j in range(edges[i], edges[i + 1])]
        ids = np.concatenate(pieces or [np.zeros(0)]).astype(np.int64)
        if eod is not None and ids.size and ids[-1] == eod:
            ids = ids[:-1]
        if keep(ids.tobytes()):
            yield ids


def _read_tar(path: Path, name: str, modality: Callable[[str], str], keep: Keep) -> Iterator[Item | DataError]:
    """The samples of a webdataset tar, wanted by their keys: a text, or one other member with a text as its caption.

    Members of unknown endings (json, cls, …) are left alone.
    """
    with open(path, "rb") as file:
        for group in read_groups(file, path.stat().st_size, str(path), foreign=True):
            place = f"{name}/{group[0].key}"
            if not keep(place.encode()):
                continue
            texts = [member for member in group if f".{member.extension.lower()}" in TEXT]
            others = [m for m in group if modality(f"x.{m.extension}") not in ("", "text") and "." not in m.extension]
            if len(texts) > 1 or len(others) > 1 or not (texts or others):
                has = ", ".join(member.extension for member in group)
                yield DataError(f"{path}: key {group[0].key!r} has {has}: one text, one other member or both are read")
                continue
            contents = []
            for member in (*texts, *others):
                file.seek(member.offset)
                contents.append(file.read(member.size))
            try:
                text = _decode(contents[0], f"{place}.{texts[0].extension}") if texts else ""
            except DataError as error:
                yield error
                continue
            if others:
                kind = others[0].extension
                yield Item(f"{place}.{kind}", modality(f"x.{kind}"), contents[-1], text.strip())
            else:
                yield Item(place, "text", text)
