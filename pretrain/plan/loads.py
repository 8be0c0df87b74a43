"""Expert loads that a run has measured, for predictions: read from its newest checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ...checkpoints.manifest import newest_checkpoint
from ...checkpoints.rules import OPTIMIZER
from ...checkpoints.sharded import read_tensors
from ...parallel.kinds.moe import MoEConfig
from ...parallel.mesh import MeshConfig
from ...parallel.model import ModelConfig
from ...parallel.placement import busiest, first_slots, place_experts, rank_loads
from ..errors import ConfigError

Loads = Mapping[int, Tensor]


def read_loads(path: Path, model: ModelConfig) -> dict[int, Tensor]:
    """Choices [modalities, experts] of a step, averaged over those before a checkpoint, by expert layer.

    Args:
        path: a run folder (its newest checkpoint counts) or a checkpoint.

    Raises:
        ConfigError: no checkpoint there, or one of other expert layers than the model's.
    """
    folder = path if (path / "manifest.json").is_file() else newest_checkpoint(path / "checkpoints")
    if folder is None:
        raise ConfigError(f"loads: {path} is neither a checkpoint nor a run folder that holds one")
    prefix = f"{OPTIMIZER}expert_load_mean."
    found = read_tensors(folder, prefix)
    loads = {}
    for index in range(len(model.symbols)):
        _, config = model.layer(index)
        if not isinstance(config, MoEConfig):
            continue
        load = found.pop(f"{prefix}layers.{index}.mixer", None)
        shape = (len(model.modalities), config.n_experts)
        if load is None or tuple(load.shape) != shape:
            here = "none" if load is None else f"{tuple(load.shape)}"
            raise ConfigError(f"loads: layer {index} has [modalities, experts] {shape}, {folder} holds {here}")
        loads[index] = load.double()
    if found:
        raise ConfigError(f"loads: {folder} holds loads of {sorted(found)[0]}, which is no expert layer of the model")
    if not loads:
        raise ConfigError("loads: the model has no expert layers")
    return loads


def placements(loads: Loads, mesh: MeshConfig, by_load: bool) -> dict[int, tuple[int, ...]]:
    """By layer the expert of each slot: dealt out in runs, or by load."""
    result = {}
    for index, load in loads.items():
        experts = load.shape[1]
        if by_load:
            slots = experts + mesh.ep * mesh.ep_spare
            result[index] = place_experts(load.sum(dim=0).tolist(), slots, mesh.ep)
        else:
            result[index] = first_slots(experts, mesh.ep, mesh.ep_spare)
    return result


def busiest_ranks(loads: Loads, mesh: MeshConfig, by_load: bool = False) -> dict[int, float]:
    """By layer, tokens of the busiest expert-parallel rank over the mean."""
    placed = placements(loads, mesh, by_load)
    return {index: busiest(load.sum(dim=0).tolist(), placed[index], mesh.ep) for index, load in loads.items()}


def modality_pressure(loads: Loads, mesh: MeshConfig, by_load: bool = False) -> dict[int, list[float]]:
    """By layer and modality: choices of a token that go to the layer's busiest rank, over the even share of a rank.

    1 where nothing has been counted. Weighted by the modalities' choices they sum to `busiest_ranks`.
    """
    placed, result, ep = placements(loads, mesh, by_load), {}, mesh.ep
    for index, load in loads.items():
        everyone = rank_loads(load.sum(dim=0).tolist(), placed[index], ep)
        rank = everyone.index(max(everyone))
        mine = [rank_loads(line, placed[index], ep)[rank] for line in load.tolist()]
        result[index] = [
            part * ep / total if total else 1.0 for part, total in zip(mine, load.sum(dim=1).tolist(), strict=True)
        ]
    return result
