"""What a checkpoint holds, as logical tensors: parameters by entry, persistent buffers, both moments, step counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from ..parallel.engines.base import Elsewhere, Optimizer
from ..parallel.kinds.moe import MoE
from ..parallel.model import HybridModel
from ..parallel.parts import named_parts, split_bank
from .rules import OPTIMIZER

MOMENTS = ("exp_avg", "exp_avg_sq")
Models = HybridModel | Sequence[HybridModel]


def model_tensors(models: Models) -> dict[str, Tensor]:
    """Every logical tensor of the layers on this rank, sharing its memory: parameters by entry, persistent buffers."""
    tensors: dict[str, Tensor] = {}
    for model in several(models):
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # after a forward without backward the root still holds gathered copies
        for name, parameter, part in named_parts(model):
            tensors.update(split_bank(parameter.detach(), part, name))
        parameters = {name for name, _ in model.named_parameters()}
        tensors.update({name: t for name, t in model.state_dict().items() if name not in parameters})
    return tensors


def optimizer_tensors(models: Models, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Both AdamW moments of every logical parameter, and each parameter's step count; created where absent."""
    tensors: dict[str, Tensor] = {}
    for model in several(models):
        for name, parameter, part in named_parts(model):
            state = optimizer.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state.update({moment: torch.zeros_like(parameter) for moment in MOMENTS})
            tensors[f"{OPTIMIZER}step.{name}"] = state["step"]
            for moment in MOMENTS:
                tensors.update(split_bank(state[moment], part, f"{OPTIMIZER}{moment}.{name}"))
    return tensors


def load_tensors(models: Models) -> dict[str, Tensor]:
    """The expert loads [modalities, experts] of the last step, and their moving average: no weights, but the next step
    looks at the one and the next placement at the other."""
    return {
        f"{OPTIMIZER}{kind}.{name}": getattr(layer, kind)
        for model in several(models)
        for name, layer in model.named_modules()
        if isinstance(layer, MoE)
        for kind in ("expert_load", "expert_load_mean")
    }


def state_tensors(models: Models, optimizer: Optimizer) -> dict[str, Tensor]:
    """All of the above; copies where the state lies elsewhere (see `put_back`)."""
    if isinstance(optimizer, Elsewhere):
        return dict(optimizer.tensors()) | load_tensors(models)
    return model_tensors(models) | optimizer_tensors(models, optimizer) | load_tensors(models)


def put_back(tensors: Mapping[str, Tensor], optimizer: Optimizer) -> None:
    """Call it after the result of `state_tensors` has been filled."""
    if isinstance(optimizer, Elsewhere):
        optimizer.take(tensors)


def several(models: Models) -> Sequence[HybridModel]:
    """A model alone, or those of several pipeline stages."""
    return (models,) if isinstance(models, HybridModel) else models
