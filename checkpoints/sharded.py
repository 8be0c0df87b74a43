"""Sharded checkpoints: logical tensors through PyTorch's distributed checkpoint (DCP), a manifest last, one rename.

A checkpoint knows nothing of the mesh that wrote it: its tensors are the logical parts (banks split into entries), so
it loads on any other mesh, optimizer state included, and a reader needs no process group.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.fsdp import FSDPModule

from ..parallel.model import HybridModel
from ..parallel.parts import named_parts, split_bank
from .errors import CheckpointError
from .manifest import damages, hash_file, read_manifest, superfluous, sync_folder, write_manifest

MOMENTS = ("exp_avg", "exp_avg_sq")


Models = HybridModel | Sequence[HybridModel]
"""The model, or the pipeline stages of this rank; names do not depend on how the stack was cut."""


def model_tensors(model: Models) -> dict[str, Tensor]:
    """Every logical tensor of the model, sharing its memory: parameters by entry, then persistent buffers."""
    if not isinstance(model, HybridModel):
        return {name: tensor for stage in model for name, tensor in model_tensors(stage).items()}
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # after a forward without backward the root still holds gathered copies
    tensors: dict[str, Tensor] = {}
    for name, parameter, part in named_parts(model):
        tensors.update(split_bank(parameter.detach(), part, name))
    parameters = {name for name, _ in model.named_parameters()}
    tensors.update({name: t for name, t in model.state_dict().items() if name not in parameters})
    return tensors


def optimizer_tensors(model: Models, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Both AdamW moments of every logical parameter, and each parameter's step count; created where absent."""
    if not isinstance(model, HybridModel):
        return {name: tensor for stage in model for name, tensor in optimizer_tensors(stage, optimizer).items()}
    tensors: dict[str, Tensor] = {}
    for name, parameter, part in named_parts(model):
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state.update({moment: torch.zeros_like(parameter) for moment in MOMENTS})
        tensors[f"optimizer.step.{name}"] = state["step"]
        for moment in MOMENTS:
            tensors.update(split_bank(state[moment], part, f"optimizer.{moment}.{name}"))
    return tensors


def save_checkpoint(
    folder: Path,
    model: Models,
    optimizer: torch.optim.Optimizer,
    extra: Mapping[str, Any],
    keep: int = 0,
    keep_every: int = 0,
) -> Path:
    """Write `folder/step-<8 digits>`: aside, then the manifest, then one rename. All ranks call it.

    Args:
        folder: the run's checkpoint folder.
        extra: JSON values kept in the manifest; `step` must be among them.
        keep: how many checkpoints to keep, oldest removed first; 0 keeps all.
        keep_every: checkpoints at multiples of this many steps are kept for ever; 0 for none.

    Returns:
        The finished checkpoint.
    """
    final = folder / f"step-{extra['step']:08d}"
    aside = folder / f".{final.name}.part"
    if dist.get_rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    dist.barrier()
    tensors = model_tensors(model) | optimizer_tensors(model, optimizer)
    dcp.save(tensors, checkpoint_id=aside)
    files = _hash_own_files(aside)
    described = describe(tensors, model)
    if dist.get_rank() == 0:
        write_manifest(aside, {**extra, "torch": torch.__version__, "files": files, "tensors": described})
        if final.exists():
            shutil.rmtree(final)
        aside.rename(final)
        sync_folder(folder)
        for old in superfluous(folder, keep, keep_every):
            shutil.rmtree(old)
    dist.barrier()
    return final


def describe(tensors: Mapping[str, Tensor], model: Models) -> dict[str, dict[str, Any]]:
    """Shape and dtype by name, gathered over the pipeline stages: the same answer on every rank."""
    mesh = (model if isinstance(model, HybridModel) else model[0]).mesh
    mine = {name: {"shape": list(t.shape), "dtype": str(t.dtype)} for name, t in tensors.items()}
    everyone: list[Any] = [mine]
    if mesh.pp_size > 1:
        everyone = [None] * mesh.pp_size
        dist.all_gather_object(everyone, mine, group=mesh.pp_group)
    return {name: value for stage in everyone for name, value in stage.items()}


def _hash_own_files(aside: Path) -> dict[str, Any]:
    """Size and hash of every file of the checkpoint on rank 0; each rank reads back what it wrote itself."""
    rank = dist.get_rank()
    own = [*aside.glob(f"__{rank}_*"), *([aside / ".metadata"] if rank == 0 else [])]
    mine = {path.name: hash_file(path) for path in sorted(own)}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return {name: value for files in everyone for name, value in files.items()}


def load_checkpoint(checkpoint: Path, model: Models, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Fill model (and optimizer) in place, re-sharding to their mesh; returns the manifest. All ranks call it.

    Raises:
        CheckpointError: files are missing or cut, or it holds another model; names the first that differs.
    """
    manifest = read_manifest(checkpoint)
    for damage in damages(checkpoint, content=False):
        raise CheckpointError(f"{checkpoint}: {damage}; resume from another checkpoint")
    tensors = model_tensors(model)
    _check_same_model(checkpoint, manifest["tensors"], describe(tensors, model))
    if optimizer is not None:
        tensors |= optimizer_tensors(model, optimizer)
    dcp.load(tensors, checkpoint_id=checkpoint)
    return manifest


def _check_same_model(checkpoint: Path, saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    saved_shapes = {n: tuple(t["shape"]) for n, t in saved.items() if not n.startswith("optimizer.")}
    shapes = {n: tuple(t["shape"]) for n, t in own.items()}
    if saved_shapes == shapes:
        return
    name = sorted(n for n in saved_shapes.keys() | shapes.keys() if saved_shapes.get(n) != shapes.get(n))[0]
    raise CheckpointError(
        f"{checkpoint}: holds another model; {name} is {saved_shapes.get(name, 'absent')} in the checkpoint and "
        f"{shapes.get(name, 'absent')} in the model"
    )


def read_tensors(checkpoint: Path, prefix: str = "") -> dict[str, Tensor]:
    """Whole logical tensors on the CPU, no process group needed.

    Args:
        prefix: read only names that start with it; the optimizer's are read only when asked for.
    """
    read_manifest(checkpoint)
    metadata = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    tensors: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata)
        and name.startswith(prefix)
        and (prefix or not name.startswith("optimizer."))
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        dcp.load(tensors, checkpoint_id=checkpoint, no_dist=True)
    return tensors
