"""The sidecar index of a shard: where each sample lies in its tar, how long it is, and what it must hash to."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from safetensors.numpy import load, save

from .errors import DataError
from .files import write_atomic
from .latents import LatentRows

INDEX_VERSION = 2
SUFFIX = ".idx.safetensors"
BLOCK = 512  # bytes of a tar block


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
        starts: int64 [groups + 1], where each group of members begins and the last ends; known after a scan only.
        latents: where the continuous latents are; None for a shard without any (its header then lacks `latents`).

    A document is a sample of its own, or one of many in a block ("KEY/17" is the 17th of block KEY): then they share
    the span, and have their own token offsets.
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
    starts: np.ndarray | None = None
    latents: LatentRows | None = None

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
        """Writes the index as a safetensors file, atomically and with the same bytes for the same shard.

        Its tensors are the arrays of this class, `keys` as uint8 [n, width] and the header as JSON in uint8; the last,
        `crc32`, is over the others.
        """
        header = np.frombuffer(json.dumps(self.header, sort_keys=True).encode(), dtype=np.uint8)
        tensors = {"header": header, **self.arrays()}
        tensors["keys"] = np.ascontiguousarray(self.keys).view(np.uint8).reshape(len(self), self.keys.itemsize)
        tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
        write_atomic(path, save(tensors | {"crc32": _crc32(tensors)}))

    def arrays(self) -> dict[str, np.ndarray]:
        """All arrays by name, as they are stored."""
        latents = self.latents.arrays() if self.latents else {}
        return {name: getattr(self, name) for name in self._ARRAYS} | latents

    @classmethod
    def load(cls, path: Path) -> ShardIndex:
        """Reads `save`'s file; DataError when it is missing, damaged or of another version."""
        hint = f"; make it with: polylepis data index {str(path).removesuffix(SUFFIX)}"
        try:
            tensors = load(path.read_bytes())
            if tensors.pop("crc32").tolist() != _crc32(tensors).tolist():
                raise ValueError("its crc32 differs from its contents'")
            header = json.loads(tensors["header"].tobytes())
            keys = tensors["keys"]
            tensors["keys"] = keys.view(f"S{keys.shape[1]}").reshape(len(keys))
            arrays = {name: tensors[name] for name in cls._ARRAYS}
            problem = None if isinstance(header, dict) else "its header is no table"
            stored = not problem and "latents" in header
            latents = LatentRows(*(tensors[name] for name in LatentRows.ARRAYS)) if stored else None
        except FileNotFoundError:
            raise DataError(f"index {path} is missing{hint}") from None
        except Exception as error:  # damaged bytes make safetensors, json and NumPy raise almost anything
            raise DataError(f"index {path} is damaged ({type(error).__name__}: {error}){hint}") from error
        if problem:
            raise DataError(f"index {path} is damaged ({problem}){hint}")
        if header.get("version") != INDEX_VERSION:
            raise DataError(f"index {path} has version {header.get('version')}, this reads {INDEX_VERSION}{hint}")
        problem = _contradiction(header, arrays)
        if not problem and latents:
            problem = latents.contradiction(header, arrays["modality_lengths"])
        if problem:
            raise DataError(f"index {path} is damaged ({problem}){hint}")
        return cls(header=header, latents=latents, **arrays)


def _crc32(tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """uint32 [1] over the bytes of all, by name."""
    found = 0
    for name in sorted(tensors):
        found = zlib.crc32(tensors[name].data, found)
    return np.array([found], dtype=np.uint32)


def _contradiction(header: dict[str, Any], arrays: dict[str, np.ndarray]) -> str | None:
    """Why these cannot be an index, or None."""
    needed = {"tar": str, "bytes": int, "sha256": str, "modalities": list, "fingerprints": dict, "split": str}
    for name, kind in needed.items():
        if not isinstance(header.get(name), kind):
            return f"its header lacks {name}"
    keys, n = arrays["keys"], len(arrays["lengths"]) if arrays["lengths"].ndim == 1 else -1
    if keys.ndim != 1 or keys.dtype.kind != "S" or len(keys) != n or n < 1:
        return "keys and lengths do not match"
    for name, array in arrays.items():
        shape = (n, len(header["modalities"])) if name == "modality_lengths" else (n,)
        dtype = keys.dtype if name == "keys" else np.dtype(np.uint32 if name == "token_crc32" else np.int64)
        if array.shape != shape or array.dtype != dtype:
            return f"{name} is {array.dtype} {list(array.shape)}"
        if array.dtype == np.int64 and (array.min() < 0 or array.max() > max(header["bytes"], 0)):
            return f"{name} points outside the tar"
    if not np.array_equal(arrays["modality_lengths"].sum(axis=1), arrays["lengths"]) or arrays["lengths"].min() < 1:
        return "tokens per modality do not add up to the lengths"
    inside = (arrays["span_offset"] <= arrays["token_offset"]) & (
        arrays["token_offset"] + arrays["token_bytes"] <= arrays["span_offset"] + arrays["span_bytes"]
    )
    if not inside.all():
        return f"the tokens of row {int(np.argmin(inside))} lie outside their sample"
    return None


def index_path(tar: Path) -> Path:
    """`x.tar` -> `x.tar.idx.safetensors`."""
    return tar.with_name(tar.name + SUFFIX)


def energon_path(tar: Path) -> Path:
    """`x.tar` -> `x.tar.idx`, the file in which Energon looks for sample offsets."""
    return tar.with_name(tar.name + ".idx")


def save_energon(path: Path, index: ShardIndex) -> None:
    """Writes Energon's index: native uint64 offsets of every sample, and of the end of the last."""
    if index.starts is None:
        raise DataError(f"{path}: only a scanned index knows where all samples begin")
    write_atomic(path, index.starts.astype(np.uint64).tobytes())
