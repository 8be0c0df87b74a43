"""Sharded checkpoints: logical tensors through PyTorch's distributed checkpoint (DCP), a manifest last, one rename.

A checkpoint knows nothing of the mesh that wrote it: its tensors are the logical parts (banks split into entries), so
it loads on any other mesh, optimizer state included, and a reader needs no process group.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ..parallel.model import HybridModel
from ..parallel.parts import named_parts, split_bank
from .errors import CheckpointError

FORMAT = 1
MANIFEST = "manifest.json"
MOMENTS = ("exp_avg", "exp_avg_sq")


def model_tensors(model: HybridModel) -> dict[str, Tensor]:
    """Every logical tensor of the model, sharing its memory: parameters by entry, then persistent buffers."""
    tensors: dict[str, Tensor] = {}
    for name, parameter, part in named_parts(model):
        tensors.update(split_bank(parameter.detach(), part, name))
    parameters = {name for name, _ in model.named_parameters()}
    tensors.update({name: t for name, t in model.state_dict().items() if name not in parameters})
    return tensors


def optimizer_tensors(model: HybridModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Both AdamW moments of every logical parameter, and each parameter's step count; created where absent."""
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
    folder: Path, model: HybridModel, optimizer: torch.optim.Optimizer, extra: Mapping[str, Any], keep: int = 0
) -> Path:
    """Write `folder/step-XXXXXXXX`: aside, then the manifest, then one rename. All ranks call it.

    Args:
        folder: the run's checkpoint folder.
        extra: JSON values kept in the manifest; `step` must be among them.
        keep: how many checkpoints to keep, oldest removed first; 0 keeps all.

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
    if dist.get_rank() == 0:
        manifest = {
            "format": FORMAT,
            **extra,
            "torch": torch.__version__,
            "tensors": {n: {"shape": list(t.shape), "dtype": str(t.dtype)} for n, t in tensors.items()},
        }
        with open(aside / MANIFEST, "w") as file:
            json.dump(manifest, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        if final.exists():
            shutil.rmtree(final)
        aside.rename(final)
        for old in complete_checkpoints(folder)[:-keep] if keep else []:
            shutil.rmtree(old)
    dist.barrier()
    return final


def complete_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step-*/{MANIFEST}"))


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest finished checkpoint, or None."""
    return next(reversed(complete_checkpoints(folder)), None)


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest.

    Raises:
        CheckpointError: no manifest (an unfinished checkpoint), or one of a newer format.
    """
    path = checkpoint / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{checkpoint}: no {MANIFEST} in it, so this is not a finished checkpoint")
    manifest = json.loads(path.read_text())
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format {manifest.get('format')}, but this version reads format {FORMAT}")
    return manifest


def load_checkpoint(
    checkpoint: Path, model: HybridModel, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, Any]:
    """Fill model (and optimizer) in place, re-sharding to their mesh; returns the manifest. All ranks call it.

    Raises:
        CheckpointError: the checkpoint holds another model; names the first tensors that differ.
    """
    manifest = read_manifest(checkpoint)
    tensors = model_tensors(model)
    _check_same_model(checkpoint, manifest["tensors"], tensors)
    if optimizer is not None:
        tensors |= optimizer_tensors(model, optimizer)
    dcp.load(tensors, checkpoint_id=checkpoint)
    return manifest


def _check_same_model(checkpoint: Path, saved: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    saved_shapes = {n: tuple(t["shape"]) for n, t in saved.items() if not n.startswith("optimizer.")}
    shapes = {n: tuple(t.shape) for n, t in tensors.items()}
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
