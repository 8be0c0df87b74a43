"""Expert layers at the end of a step: refuse one that a router spoiled, balance the next, say how even the load was."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..parallel.engines.base import Engine
from ..parallel.kinds.moe import MoE, MoEConfig
from ..parallel.kinds.moe_router import fair_share, open_experts
from ..parallel.model import Block, ModelConfig
from ..parallel.placement import busiest, place_experts
from ..parallel.replace_experts import replace_experts
from .errors import RouterError

TERMS = ("aux_sequence", "aux_global", "z_loss")


def expert_configs(config: ModelConfig) -> dict[int, MoEConfig]:
    """The expert layers of the whole model, by global index."""
    layers = ((index, config.layer(index)[1]) for index in range(len(config.symbols)))
    return {index: layer for index, layer in layers if isinstance(layer, MoEConfig)}


def expert_layers(engine: Engine) -> dict[int, MoE]:
    """Those that live on this rank, by global index."""
    blocks = [(int(index), block) for model in engine.models for index, block in model.layers.items()]
    return {i: b.mixer for i, b in blocks if isinstance(b, Block) and isinstance(b.mixer, MoE)}


def check_routers(engine: Engine, norm: float) -> None:
    """Refuse a step whose gradient is not finite because a router's logits were not; before the optimizer's step.

    A broken logit always breaks the gradient's norm, which every rank knows already: the healthy step pays nothing.

    Raises:
        RouterError: on every rank; names the first layer, the ranks and how many of their tokens it was.
    """
    configs = expert_configs(engine.models[0].config)
    if math.isfinite(norm) or not configs:
        return
    mine = torch.zeros(len(configs), 2, device=engine.mesh.device)
    for place, index in enumerate(configs):
        layer = expert_layers(engine).get(index)
        if layer is not None:
            weight = layer.router.weight
            shard = weight.to_local() if isinstance(weight, DTensor) else weight
            mine[place] = torch.stack((layer.unsound, (~shard.isfinite()).any().to(layer.unsound.dtype)))
    gathered = mine.new_empty(dist.get_world_size() * len(configs), 2)
    dist.all_gather_into_tensor(gathered, mine)
    everyone = gathered.view(-1, *mine.shape)
    for place, index in enumerate(configs):
        tokens = everyone[:, place, 0].tolist()
        ranks = [f"rank {rank} ({int(count)} tokens)" for rank, count in enumerate(tokens) if count]
        if not ranks:
            continue
        spoiled = [str(rank) for rank, flag in enumerate(everyone[:, place, 1].tolist()) if flag]
        cause = (
            f"its weight is not finite on rank {', '.join(spoiled)}"
            if spoiled
            else "its weight is finite: they came in with its input"
        )
        engine.discard()
        for layer in expert_layers(engine).values():
            layer.forget()
        raise RouterError(
            f"the router of layer {index} gave logits that are not finite on {', '.join(ranks[:8])}; {cause}. "
            f"The step is refused on all ranks, the weights are those before it"
        )


def finish_experts(engine: Engine) -> dict[str, list[float] | float]:
    """Sum the loads of all layers over all ranks, once; move the selection biases; metrics of the step.

    Returns:
        `expert_load_cv` and `expert_load_max`, one number per expert layer of the model: the coefficient of variation
        over experts, and the maximum, of load / fair share; the same per modality where there are several; and the mean
        per token and layer of each balancing term that is in use, without its coefficient. Under expert parallelism
        also `expert_rank_max`, the load of the busiest ep rank over the mean, of the expert layers on this rank.
    """
    model = engine.models[0].config
    configs, own = expert_configs(model), expert_layers(engine)
    if not configs:
        return {}
    shape = (len(model.modalities), max(config.n_experts for config in configs.values()))
    packed = torch.zeros(len(configs), math.prod(shape) + len(TERMS), device=engine.mesh.device)
    for place, (index, config) in enumerate(configs.items()):
        if index in own:
            load = packed.new_zeros(shape)
            load[:, : config.n_experts] = own[index].load
            packed[place] = torch.cat((load.reshape(-1), own[index].terms))
    dist.all_reduce(packed)
    packed /= engine.mesh.tp_size  # every tp rank counted the same tokens
    loads = {
        index: line[: math.prod(shape)].view(shape)[:, : config.n_experts]
        for line, (index, config) in zip(packed, configs.items(), strict=True)
    }
    for index, layer in own.items():
        layer.finish_step(loads[index])
    host = {index: load.cpu() for index, load in loads.items()}
    metrics = load_metrics(model, host)
    if engine.mesh.ep_size > 1:
        metrics["expert_rank_max"] = [
            round(busiest(host[i].sum(dim=0).tolist(), layer.slots.tolist(), engine.mesh.ep_size), 4)
            for i, layer in own.items()
        ]
    choices = sum(float(load.sum()) / configs[index].top_k for index, load in host.items())
    for name, total in zip(TERMS, packed[:, -len(TERMS) :].sum(dim=0).tolist(), strict=True):
        if any(getattr(config, name) for config in configs.values()):
            metrics[name] = total / max(1.0, choices)
    return metrics


def place_by_load(engine: Engine) -> None:
    """Move (and, in spare slots, replicate) the experts of all layers so that the ep ranks would have had even loads.

    A pure function of `expert_load_mean`, which checkpoints hold: a run that resumes where it was called moves them
    alike.
    """
    assert isinstance(engine.optimizer, torch.optim.Optimizer), "checked before start"
    placements = {}
    for index, layer in expert_layers(engine).items():
        loads = layer.expert_load_mean.double().sum(dim=0).tolist()
        if any(loads):
            placements[index] = place_experts(loads, len(layer.slots), engine.mesh.ep_size)
    replace_experts(engine.models, engine.optimizer, placements)


def load_metrics(model: ModelConfig, loads: dict[int, Tensor]) -> dict[str, list[float] | float]:
    """See `finish_experts`; loads [M, E] by global index."""
    metrics: dict[str, list[float] | float] = {}
    for place in (None, *range(len(model.modalities))):
        if place is not None and len(model.modalities) == 1:
            continue
        suffix = "" if place is None else f"/{model.modalities[place]}"
        ratios = [_ratios(model, model.layer(index)[1], load, place) for index, load in loads.items()]
        metrics[f"expert_load_cv{suffix}"] = [
            round(float(r.std(correction=0) / r.mean()), 4) if r.any() else 0.0 for r in ratios
        ]
        metrics[f"expert_load_max{suffix}"] = [round(float(r.max()), 4) for r in ratios]
    return metrics


def _ratios(model: ModelConfig, config: MoEConfig, load: Tensor, modality: int | None) -> Tensor:
    """Load over fair share of each expert that the tokens of a modality (or any) may choose; zeros without tokens."""
    opened = open_experts(config, model.modalities)
    if modality is None:
        pooled = load if config.partition else load.sum(dim=0, keepdim=True)
        return load.sum(dim=0) / fair_share(pooled, opened).clamp(min=1e-20)
    mine = opened[modality if config.partition else 0]
    return load[modality][mine] / (load[modality].sum() / mine.sum()).clamp(min=1e-20)
