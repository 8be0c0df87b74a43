"""Writing one checkpoint: aside, every file flushed and hashed, the manifest last, one rename. All or nothing.

Every stage is agreed on by all ranks: where one of them fails (a full disk, say), all of them raise the same error and
what was written is removed; older checkpoints are touched only after the new one is in place.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from .content import content_hash, content_sum
from .errors import CheckpointError
from .manifest import INDEX, discard, hash_file, superfluous, sync_folder, write_manifest

Group = dist.ProcessGroup | None


class _Planner(DefaultSavePlanner):
    """Plans by the live tensors (names, shapes, placements), takes the values from their copies where there are any."""

    def __init__(self, copies: Mapping[str, Tensor] | None) -> None:
        super().__init__()
        self._copies = copies

    def lookup_object(self, index: MetadataIndex) -> Any:
        return super().lookup_object(index) if self._copies is None else self._copies[index.fqn]


class _Writer(FileSystemWriter):
    """DCP's writer, which also sums the content of what this rank writes and notes where it writes the first block.

    After DCP has removed replicas, every element is written by exactly one rank, so the sums of all ranks add up.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, sync_files=True)
        self.sums: dict[str, int] = {}
        self.first: list[str] = []

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        for item in plan.items:
            assert item.tensor_data is not None, f"{item.index.fqn} is no tensor"
            offsets, name = item.tensor_data.chunk.offsets, item.index.fqn
            value = planner.resolve_data(item)
            assert isinstance(value, Tensor)
            self.sums[name] = self.sums.get(name, 0) + content_sum(value, offsets)
            if not any(offsets):
                self.first.append(name)
        return super().write_data(plan, planner)


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, Tensor],
    values: Mapping[str, Any],
    *,
    copies: Mapping[str, Tensor] | None = None,
    group: Group = None,
    keep: int = 0,
    keep_every: int = 0,
    problem: Exception | None = None,
) -> Path:
    """Write `folder/step-<8 digits>`. All ranks of `group` call it.

    Args:
        folder: the run's checkpoint folder.
        tensors: this rank's logical tensors by name; DTensors carry shape and placement.
        values: JSON values for the manifest; `step` must be among them.
        copies: local tensors by name that hold the values; without them, `tensors` must not change meanwhile.
        group: of CPU tensors (gloo); the default group without it.
        keep: how many checkpoints to keep, oldest removed first; 0 keeps all.
        keep_every: checkpoints at multiples of this many steps are kept for ever; 0 for none.
        problem: what kept this rank from making its copies: then nothing is written, and all ranks hear of it.

    Returns:
        The finished checkpoint.

    Raises:
        CheckpointError: on every rank, when it fails on any; says why, and how much space is left.
    """
    final = folder / f"step-{values['step']:08d}"
    aside = folder / f".{final.name}.part"
    first = dist.get_rank(group) == 0
    try:
        together(group, lambda: _prepare(aside, first, problem))
        writer = _Writer(aside)
        index = _save(tensors, writer, _Planner(copies), group)
        reports = together(group, lambda: _report(aside, writer, tensors, group))
        together(group, lambda: _commit(aside, final, values, index, reports) if first else None)
    except CheckpointError as error:
        if first:
            shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(f"{final}: could not be saved: {error}{_space(folder)}") from None
    try:
        together(group, lambda: _remove_old(folder, keep, keep_every) if first else None)
    except CheckpointError as error:
        raise CheckpointError(f"{final}: is saved, but an older one could not be removed: {error}") from None
    return final


def together(group: Group, action: Callable[[], Any]) -> list[Any]:
    """Do something on every rank; the results of all ranks, in their order.

    Raises:
        CheckpointError: on every rank, when it fails on any; names the first that failed.
    """
    result, failure = None, None
    try:
        result = action()
    except Exception as error:
        failure = f"{type(error).__name__}: {' '.join(str(error).split())}"
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, (result, failure), group=group)
    for rank, (_, failed) in enumerate(everyone):
        if failed is not None:
            raise CheckpointError(f"rank {rank}: {failed}")
    return [answer for answer, _ in everyone]


def _prepare(aside: Path, first: bool, problem: Exception | None) -> None:
    if problem is not None:
        raise problem
    if first:
        aside.parent.mkdir(parents=True, exist_ok=True)
        if aside.exists():
            shutil.rmtree(aside)
        aside.mkdir()


def _save(tensors: Mapping[str, Tensor], writer: _Writer, planner: _Planner, group: Group) -> Metadata:
    try:
        return dcp.save(dict(tensors), storage_writer=writer, planner=planner, process_group=group)
    except CheckpointException as error:  # no Exception; it is the same on all ranks
        rank, (cause, _) = next(iter(error.failures.items()))
        root = cause.__cause__ or cause.__context__ or cause  # torch wraps the operating system's reason
        reason = " ".join(str(root).split())
    raise CheckpointError(f"rank {rank}: {type(root).__name__}: {reason}")


def _report(aside: Path, writer: _Writer, tensors: Mapping[str, Tensor], group: Group) -> dict[str, Any]:
    """What this rank has written: its files (read back), the sums of its blocks, placements by the first block."""
    rank = dist.get_rank(group)
    own = [*aside.glob(f"__{rank}_*"), *([aside / INDEX] if rank == 0 else [])]
    return {
        "files": {path.name: hash_file(path) for path in sorted(own)},
        "sums": writer.sums,
        "placements": {name: _placement(tensors[name]) for name in writer.first},
    }


def _placement(tensor: Tensor) -> str:
    """How a tensor lay on its mesh, `fsdp4=S(0) tp2=R` say; `whole` for one that every rank had."""
    if not isinstance(tensor, DTensor):
        return "whole"
    names = tensor.device_mesh.mesh_dim_names or tuple(f"axis{i}" for i in range(tensor.device_mesh.ndim))
    sizes = tensor.device_mesh.shape
    return " ".join(f"{n}{size}={_short(p)}" for n, size, p in zip(names, sizes, tensor.placements, strict=True))


def _short(placement: Any) -> str:
    return f"S({placement.dim})" if placement.is_shard() else "R" if placement.is_replicate() else str(placement)


def _commit(
    aside: Path, final: Path, values: Mapping[str, Any], index: Metadata, reports: list[dict[str, Any]]
) -> None:
    """Manifest, then the rename that makes the checkpoint exist."""
    placements = {name: text for report in reports for name, text in report["placements"].items()}
    described: dict[str, Any] = {}
    for name, entry in sorted(index.state_dict_metadata.items()):
        assert isinstance(entry, TensorStorageMetadata)
        dtype = entry.properties.dtype
        total = sum(report["sums"].get(name, 0) for report in reports)
        described[name] = {
            "shape": list(entry.size),
            "dtype": str(dtype),
            "placement": placements.get(name, "whole"),
            "hash": content_hash(total, entry.size, dtype),
        }
    files = {name: file for report in reports for name, file in report["files"].items()}
    if absent := sorted(name for name in files if not (aside / name).is_file()):
        raise CheckpointError(
            f"rank 0 does not see {absent[0]} (one of {len(absent)}): the folder must be shared by all nodes"
        )
    write_manifest(aside, {**values, "torch": torch.__version__, "files": files, "tensors": described})
    if final.exists():
        discard(final)
    aside.rename(final)
    sync_folder(final.parent)


def _remove_old(folder: Path, keep: int, keep_every: int) -> None:
    for old in superfluous(folder, keep, keep_every):
        discard(old)


def _space(folder: Path) -> str:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return f" ({shutil.disk_usage(existing).free:,} bytes are free there); older checkpoints are untouched"
