"""Tensors on disk as lazy sources: our checkpoints and other distributed ones, safetensors folders, `torch.save` files.

None needs a process group, executes a pickle, or holds more than one tensor (or, in pieces, one block of rows).
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from .errors import CheckpointError
from .restricted import load_torch, read_index
from .transforms import PIECE_BYTES, Spec, row_blocks, rows_per_block

NOT_THE_MODEL = ("optimizer.", "random.")


@dataclass(frozen=True)
class _Chunk:
    """One stored block of a tensor: where it lies in the tensor, and where in which file."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    path: Path
    offset: int
    length: int


class Distributed:
    """A PyTorch distributed checkpoint (DCP), whatever mesh wrote it.

    DCP's own reader holds whole stored chunks; this one reads row ranges of them, so that a 4 GB embedding passes
    through a small buffer.

    Args:
        folder: with `.metadata` in it.
        prefix: only names that start with it; without, what belongs to the optimizer and the random states is left out.

    Raises:
        CheckpointError: it is no such checkpoint.
    """

    def __init__(self, folder: Path, prefix: str = "") -> None:
        found = read_index(folder, strict=False)
        self._chunks: dict[str, list[_Chunk]] = {}
        self._specs: dict[str, Spec] = {}
        self._data: dict[_Chunk, int | None] = {}
        for name, entry in found.state_dict_metadata.items():
            wanted = name.startswith(prefix) if prefix else not name.startswith(NOT_THE_MODEL)
            if isinstance(entry, TensorStorageMetadata) and wanted:
                self._specs[name] = Spec(tuple(entry.size), entry.properties.dtype)
                self._chunks[name] = []
        sizes = {
            (name, tuple(chunk.offsets)): tuple(chunk.sizes)
            for name in self._specs
            for chunk in found.state_dict_metadata[name].chunks  # type: ignore[union-attr]
        }
        for index, where in (found.storage_data or {}).items():
            offsets = tuple(index.offset) if index.offset is not None else ()
            if (index.fqn, offsets) in sizes:
                if getattr(where, "transform_descriptors", None):
                    raise CheckpointError(f"{folder}: {index.fqn} is stored with {where.transform_descriptors}")
                place = folder / str(where.relative_path), where.offset, where.length
                self._chunks[index.fqn].append(_Chunk(offsets, sizes[index.fqn, offsets], *place))
        for name, chunks in self._chunks.items():
            covered = sum(int(math.prod(chunk.sizes)) for chunk in chunks)
            if covered != math.prod(self._specs[name].shape):
                raise CheckpointError(f"{folder}: {name} is stored in {covered:,} elements, not in all of its own")

    def specs(self) -> Mapping[str, Spec]:
        return self._specs

    def load(self, name: str) -> Tensor:
        spec = self._specs[name]
        if not spec.shape:
            return self._whole(self._chunks[name][0], spec)
        return self._rows(name, 0, spec.shape[0])

    def pieces(self, name: str) -> Iterator[Tensor]:
        spec = self._specs[name]
        if not spec.shape or not spec.shape[0]:
            yield self.load(name)
            return
        step = rows_per_block(spec, PIECE_BYTES)
        for start in range(0, spec.shape[0], step):
            yield self._rows(name, start, min(start + step, spec.shape[0]))

    def _rows(self, name: str, start: int, stop: int) -> Tensor:
        spec = self._specs[name]
        result = torch.empty((stop - start, *spec.shape[1:]), dtype=spec.dtype)
        for chunk in self._chunks[name]:
            first, last = max(start, chunk.offsets[0]), min(stop, chunk.offsets[0] + chunk.sizes[0])
            if first < last and 0 not in chunk.sizes:
                inside = [slice(first - start, last - start)]
                inside += [slice(o, o + s) for o, s in zip(chunk.offsets[1:], chunk.sizes[1:], strict=True)]
                view = result[tuple(inside)]
                part = self._part(chunk, spec, first - chunk.offsets[0], last - chunk.offsets[0], view)
                if part is not None:
                    view.copy_(part)
        return result

    def _part(self, chunk: _Chunk, spec: Spec, start: int, stop: int, out: Tensor) -> Tensor | None:
        """Rows of a chunk: None where they have been read straight into `out`, a tensor where that cannot be."""
        if chunk not in self._data:
            self._data[chunk] = self._locate(chunk, spec)
        data = self._data[chunk]
        if data is None:
            return self._whole(chunk, spec)[start:stop]
        row = math.prod(chunk.sizes[1:]) * spec.dtype.itemsize
        target = out if out.is_contiguous() else torch.empty(out.shape, dtype=spec.dtype)
        buffer: Any = target.view(-1).view(torch.uint8).numpy()
        with open(chunk.path, "rb") as file:
            file.seek(data + start * row)
            if file.readinto(buffer) != (stop - start) * row:
                raise CheckpointError(f"{chunk.path}: ends before the tensor that it should hold")
        return None if target is out else target

    @staticmethod
    def _blob(chunk: _Chunk) -> io.BufferedReader:
        return io.BufferedReader(_Window(chunk.path, chunk.offset, chunk.length))

    def _whole(self, chunk: _Chunk, spec: Spec) -> Tensor:
        with self._blob(chunk) as blob:
            return torch.load(blob, map_location="cpu", weights_only=True).detach().reshape(chunk.sizes)

    def _locate(self, chunk: _Chunk, spec: Spec) -> int | None:
        """Where the chunk's bytes start in its file; None where they are not simply its elements in order."""
        with self._blob(chunk) as blob:
            try:
                tensor = torch.load(blob, map_location="meta", weights_only=True)
                blob.seek(0)
                with zipfile.ZipFile(blob) as archive:
                    entry = next(e for e in archive.infolist() if e.filename.endswith("/data/0"))
                    stored = entry.compress_type == zipfile.ZIP_STORED
                blob.seek(entry.header_offset)
                header = blob.read(30)
            except (RuntimeError, zipfile.BadZipFile, StopIteration, EOFError) as error:
                raise CheckpointError(f"{chunk.path}: is damaged at byte {chunk.offset:,} ({error})") from error
        if tuple(tensor.shape) != chunk.sizes or tensor.dtype != spec.dtype:
            raise CheckpointError(f"{chunk.path}: holds {tuple(tensor.shape)}, but {chunk.sizes} is declared")
        simple = stored and tensor.is_contiguous() and tensor.storage_offset() == 0
        if not simple:
            return None
        name, extra = (int.from_bytes(header[k : k + 2], "little") for k in (26, 28))
        return chunk.offset + entry.header_offset + 30 + name + extra


class _Window(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, path: Path, start: int, length: int) -> None:
        try:
            self._file = open(path, "rb")
        except FileNotFoundError:
            raise CheckpointError(f"{path}: is missing") from None
        self._start, self._length, self._position = start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = max(0, min(len(buffer), self._length - self._position))
        self._file.seek(self._start + self._position)
        count = self._file.readinto(memoryview(buffer)[:wanted])
        self._position += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


class Safetensors:
    """The `*.safetensors` of a Hugging Face folder, its index followed where there is one.

    Raises:
        CheckpointError: none there, or one that is damaged or not there any more.
    """

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            try:
                weight_map = json.loads(index.read_text())["weight_map"]
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(f"{index}: is no index of weights") from error
            if any(Path(name).name != name for name in weight_map.values()):
                raise CheckpointError(f"{index}: names a file outside of its folder")
            files = sorted({folder / name for name in weight_map.values()})
        else:
            files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{folder}: no *.safetensors in it")
        self._file_of: dict[str, Path] = {}
        self._open: tuple[Path, Any] | None = None
        self._shown = 0
        self._specs: dict[str, Spec] = {}
        for file in files:
            for name, entry in _header(file).items():
                self._file_of[name] = file
                self._specs[name] = entry

    def specs(self) -> Mapping[str, Spec]:
        return self._specs

    def load(self, name: str) -> Tensor:
        return self._file(name).get_tensor(name).clone()  # not a window into the map

    def pieces(self, name: str) -> Iterator[Tensor]:
        spec = self._specs[name]
        if not spec.shape or not spec.shape[0]:
            yield self.load(name)
            return
        step = rows_per_block(spec)
        for start in range(0, spec.shape[0], step):
            yield self._file(name).get_slice(name)[start : start + step]

    def _file(self, name: str) -> Any:
        """The file open; anew after some reading, since a map counts all that it has shown as resident."""
        path = self._file_of[name]
        if self._open is None or self._open[0] != path or self._shown > 2 * PIECE_BYTES:
            self._open, self._shown = (path, safe_open(path, "pt")), 0
        self._shown += min(self._specs[name].nbytes, PIECE_BYTES)
        return self._open[1]


DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def _header(file: Path) -> dict[str, Spec]:
    try:
        with safe_open(file, "pt") as opened:
            result = {}
            for name in opened.keys():
                entry = opened.get_slice(name)
                result[name] = Spec(tuple(entry.get_shape()), DTYPES[entry.get_dtype()])
            return result
    except FileNotFoundError:
        raise CheckpointError(f"{file}: is missing") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: is no safetensors file ({error})") from error
    except KeyError as error:
        raise CheckpointError(f"{file}: {name} is stored as {error}, which is not read here") from error


class TorchFile:
    """A state dict that `torch.save` wrote (`pytorch_model.bin`), opened by the restricted unpickler, mapped.

    Args:
        values: what the file holds (`load_torch`), a mapping whose tensors are taken; anything else is ignored.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._tensors = {str(name): value for name, value in values.items() if isinstance(value, Tensor)}

    @classmethod
    def open(cls, path: Path) -> TorchFile:
        """Raises: CheckpointError: no such file, or no mapping in it."""
        values = load_torch(path)
        if not isinstance(values, Mapping):
            raise CheckpointError(f"{path}: holds {type(values).__name__}, not a mapping of names to tensors")
        return cls(values)

    def specs(self) -> Mapping[str, Spec]:
        return {name: Spec.of(tensor) for name, tensor in self._tensors.items()}

    def load(self, name: str) -> Tensor:
        return self._tensors[name].detach()

    def pieces(self, name: str) -> Iterator[Tensor]:
        return row_blocks(self.load(name))


class Merged:
    """Several sources as one, each under a prefix of its own."""

    def __init__(self, sources: Mapping[str, Any]) -> None:
        self._sources = dict(sources)
        self._owner = {f"{prefix}{name}": (s, name) for prefix, s in self._sources.items() for name in s.specs()}

    def specs(self) -> Mapping[str, Spec]:
        return {f"{p}{name}": spec for p, source in self._sources.items() for name, spec in source.specs().items()}

    def load(self, name: str) -> Tensor:
        source, own = self._owner[name]
        return source.load(own)

    def pieces(self, name: str) -> Iterator[Tensor]:
        source, own = self._owner[name]
        return source.pieces(own)
