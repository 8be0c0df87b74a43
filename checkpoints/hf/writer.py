"""Sharded safetensors, written tensor by tensor in pieces, and read back: the memory of one piece, not of one shard.

The library's `save_file` wants all tensors of a file at once, 2 GB and more. The format is a length, a JSON header
and the bytes, so it is written here directly; reading back is the library's.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..sources import DTYPES, Safetensors
from ..transforms import Source, Spec

INDEX = "model.safetensors.index.json"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def plan_shards(specs: Mapping[str, Spec], limit: int) -> list[list[str]]:
    """Names in order, each shard filled up to `limit` bytes; one tensor larger than that has a shard of its own."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + spec.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec.nbytes
    return shards


def write_weights(folder: Path, source: Source, limit: int) -> dict[str, str]:
    """Write all tensors and, for more than one file, the index.

    Returns:
        The sha256 of each tensor's bytes.
    """
    specs = source.specs()
    shards = plan_shards(specs, limit)
    weight_map: dict[str, str] = {}
    hashes: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        hashes |= _write_file(folder / file, source, {name: specs[name] for name in names})
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        total = sum(spec.nbytes for spec in specs.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return hashes


def _write_file(path: Path, source: Source, specs: Mapping[str, Spec]) -> dict[str, str]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, spec in specs.items():
        header[name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [position, position + spec.nbytes],
        }
        position += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    hashes: dict[str, str] = {}
    with open(path, "wb") as file, ThreadPoolExecutor(1) as beside:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, spec in specs.items():
            digest, written = hashlib.sha256(), 0
            for block in _bytes(source.pieces(name)):
                hashed = beside.submit(digest.update, block)  # hashing and writing both release the GIL
                written += file.write(block)
                hashed.result()
            if written != spec.nbytes:
                raise CheckpointError(f"{name}: {written:,} bytes came, {spec.nbytes:,} were announced")
            hashes[name] = digest.hexdigest()
        file.flush()
        os.fsync(file.fileno())
    return hashes


def _bytes(pieces: Iterator[Tensor]) -> Iterator[memoryview]:
    for piece in pieces:
        flat = piece.detach().cpu().contiguous().view(-1)
        if flat.numel():
            buffer: Any = flat.view(torch.uint8).numpy()
            yield memoryview(buffer)


def tensor_hashes(source: Source, names: Sequence[str] | None = None) -> dict[str, str]:
    """The sha256 of each tensor's bytes, in pieces."""
    result = {}
    for name in source.specs() if names is None else names:
        digest = hashlib.sha256()
        for block in _bytes(source.pieces(name)):
            digest.update(block)
        result[name] = digest.hexdigest()
    return result


def verify_weights(folder: Path, hashes: Mapping[str, str]) -> None:
    """Read every tensor back with the safetensors library.

    Raises:
        CheckpointError: a tensor is absent, too many, or not what was written.
    """
    found = tensor_hashes(Safetensors(folder))
    wrong = sorted(name for name in found.keys() | hashes.keys() if found.get(name) != hashes.get(name))
    if wrong:
        raise CheckpointError(
            f"{folder}: {len(wrong)} tensors do not read back as they were written: {', '.join(wrong[:10])}"
        )
