"""Sharded checkpoints: logical tensors through PyTorch's distributed checkpoint (DCP), a manifest last, one rename.

A checkpoint knows nothing of the mesh that wrote it: its tensors are the logical parts (banks split into entries), so
it loads on any other mesh, optimizer state included, and a reader needs no process group.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ..parallel.engines.base import Optimizer
from ..parallel.replace_experts import refresh_replicas
from .content import content_hash, content_sum, hash_tensor
from .errors import CheckpointError
from .host import random_state, set_random_state
from .reader import Reader
from .rules import OPTIMIZER, RANDOM, is_of_model
from .saving import together, write_checkpoint
from .tensors import MOMENTS, Models, model_tensors, optimizer_tensors, put_back, several, state_tensors

__all__ = [
    "MOMENTS",
    "content_damages",
    "load_checkpoint",
    "model_tensors",
    "optimizer_tensors",
    "read_tensors",
    "save_checkpoint",
    "stream_tensors",
]


def save_checkpoint(
    folder: Path,
    models: Models,
    optimizer: Optimizer,
    extra: Mapping[str, Any],
    keep: int = 0,
    keep_every: int = 0,
) -> Path:
    """Write `folder/step-<8 digits>` and wait for it; see `write_checkpoint`. All ranks call it.

    Args:
        models: the layers of this rank, one model or one per pipeline stage.
        extra: JSON values kept in the manifest; `step` must be among them.
    """
    tensors = state_tensors(models, optimizer) | random_tensors()
    return write_checkpoint(folder, tensors, extra, keep=keep, keep_every=keep_every)


def random_tensors() -> dict[str, Tensor]:
    """This rank's random states, under a name of its own."""
    return {f"{RANDOM}{dist.get_rank()}": random_state()}


def load_checkpoint(
    checkpoint: Path, models: Models, optimizer: Optimizer | None = None, *, check_content: bool = True
) -> dict[str, Any]:
    """Fill models (and optimizer) in place, re-sharding to their mesh; returns the manifest. All ranks call it.

    With an optimizer, training goes on: then each rank's random states come back too, if the number of ranks is the one
    that saved. On another number they are left as they are: nothing maps the states of one set of ranks to another.

    Args:
        check_content: compare what has been read with the content hashes of the manifest, tensor by tensor.

    Raises:
        CheckpointError: on every rank. Files are missing, cut or changed, or it holds another model; then the message
            lists the first ten tensors that are missing, too many or of another shape, and their number.
    """
    problem, reader = None, None
    try:
        reader = Reader(checkpoint)
    except CheckpointError as error:
        problem = str(error)
    for theirs in together(None, lambda: problem):  # a file may be missing on one node alone
        if theirs is not None:
            raise CheckpointError(theirs)
    assert reader is not None
    saved: dict[str, Any] = reader.manifest["tensors"]
    tensors = model_tensors(models) if optimizer is None else state_tensors(models, optimizer)
    _check_same_model(checkpoint, saved, tensors, with_optimizer=optimizer is not None)
    mine = f"{RANDOM}{dist.get_rank()}"
    world = sum(name.startswith(RANDOM) for name in saved)
    generators: dict[str, Tensor] = {}
    if optimizer is not None and world == dist.get_world_size():
        generators[mine] = torch.empty(saved[mine]["shape"], dtype=torch.uint8)
    dcp.load(tensors | generators, storage_reader=reader)
    if check_content:
        _check_content(checkpoint, saved, tensors | generators)
    if optimizer is not None:
        put_back(tensors, optimizer)
    refresh_replicas(several(models), optimizer if isinstance(optimizer, torch.optim.Optimizer) else None)
    if generators:
        set_random_state(generators[mine])
    return reader.manifest


def _check_same_model(
    checkpoint: Path, saved: Mapping[str, Any], tensors: Mapping[str, Tensor], with_optimizer: bool
) -> None:
    """Names and shapes; what is too many in the checkpoint is known only from the names of all ranks."""
    there = {n: tuple(t["shape"]) for n, t in saved.items() if not n.startswith(RANDOM)}
    if not with_optimizer:
        there = {n: shape for n, shape in there.items() if not n.startswith(OPTIMIZER)}
    here = {n: tuple(t.shape) for n, t in tensors.items()}
    mine = {n: f"{n} is {there.get(n, 'absent')} in it and {s} here" for n, s in here.items() if there.get(n) != s}
    problems = {name: line for theirs in together(None, lambda: mine) for name, line in theirs.items()}
    names = sorted(there)
    holders = _summed(torch.tensor([name in here for name in names], dtype=torch.int64))
    nobody = [name for name, ranks in zip(names, holders, strict=True) if not ranks]
    problems |= {name: f"{name} is {there[name]} in it and absent here" for name in nobody}
    if problems:
        lines = [problems[name] for name in sorted(problems)]
        rest = f"; and {len(lines) - 10:,} more" if len(lines) > 10 else ""
        raise CheckpointError(
            f"{checkpoint}: holds another model: {len(lines):,} tensors differ: {'; '.join(lines[:10])}{rest}"
        )


def _check_content(checkpoint: Path, saved: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Sums over the blocks of all ranks, each element counted once, against the manifest's hashes."""
    names = sorted(saved)
    place = {name: index for index, name in enumerate(names)}
    halves = torch.zeros(2, len(names), dtype=torch.int64)  # of 32 bits each: 64-bit sums would overflow
    wrong = []
    for name, tensor in tensors.items():
        if str(tensor.dtype) != saved[name]["dtype"]:
            continue  # converted while it was read
        if not isinstance(tensor, DTensor):
            if hash_tensor(tensor) != saved[name]["hash"]:
                wrong.append(name)
        elif _is_first_replica(tensor):
            _, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
            total = content_sum(tensor.to_local(), offsets)
            halves[:, place[name]] += torch.tensor([total >> 32, total & 0xFFFFFFFF])
    high, low = (_summed(half) for half in halves)
    for name, tensor in tensors.items():
        entry, at = saved[name], place[name]
        if isinstance(tensor, DTensor) and str(tensor.dtype) == entry["dtype"]:
            total = (high[at] << 32) + low[at]
            if content_hash(total, tensor.shape, tensor.dtype) != entry["hash"]:
                wrong.append(name)
    found = sorted({name for theirs in together(None, lambda: wrong) for name in theirs})
    if found:
        raise CheckpointError(
            f"{checkpoint}: {len(found):,} tensors are not what was saved: {', '.join(found[:10])}"
            f"{' …' if len(found) > 10 else ''}; resume from another checkpoint"
        )


def _is_first_replica(tensor: DTensor) -> bool:
    """Whether this rank, among those that hold the same block, is the one that counts it."""
    coordinate = tensor.device_mesh.get_coordinate() or ()
    return not any(at for at, p in zip(coordinate, tensor.placements, strict=True) if p.is_replicate())


def _summed(values: Tensor) -> list[int]:
    """Σ over all ranks."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    values = values.to(device)
    dist.all_reduce(values)
    return values.tolist()


def content_damages(checkpoint: Path) -> Iterator[str]:
    """Read every tensor and compare it with its content hash, one at a time; one line for each that differs."""
    reader = Reader(checkpoint)
    for name, tensor in stream_tensors(reader, list(reader.manifest["tensors"])):
        if hash_tensor(tensor) != reader.manifest["tensors"][name]["hash"]:
            yield f"{name}: is not what the ranks held when they saved"


def stream_tensors(reader: Reader, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Whole logical tensors on the CPU, one at a time; the index is read once, no process group is needed."""
    for name in names:
        yield name, _read(reader, [name])[name]


def read_tensors(checkpoint: Path, prefix: str = "") -> dict[str, Tensor]:
    """Whole logical tensors on the CPU, no process group needed.

    Args:
        prefix: read only names that start with it; what is not the model's is read only when asked for.

    Raises:
        CheckpointError: an unfinished or foreign checkpoint.
    """
    reader = Reader(checkpoint)
    stored = reader.read_metadata().state_dict_metadata
    return _read(reader, [name for name in stored if name.startswith(prefix) and (prefix or is_of_model(name))])


def _read(reader: Reader, names: Iterable[str]) -> dict[str, Tensor]:
    stored = reader.read_metadata().state_dict_metadata
    tensors: dict[str, Any] = {}
    for name in names:
        entry = stored[name]
        if isinstance(entry, TensorStorageMetadata):
            tensors[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors
