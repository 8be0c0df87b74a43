"""Which experts a token goes to: scores, choice, capacity, and the terms that keep the choice spread.

Two scores: `sigmoid` (DeepSeek-V3, NemotronH) and `softmax` (Switch, Mixtral), always in at least float32. A selection
bias takes part in the choice but not in the weights ("auxiliary-loss-free" balancing, Wang et al. 2024). `docs/moe.md`
defines every term; none depends on how the batch is cut into micro-batches or over ranks.

Shape suffixes: T tokens, E experts, k choices of a token, R rows of the micro-batch, M modalities, G pools (one per
modality where experts are partitioned, else one).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function

from ..errors import PlanError
from ..parts import PartModule, local

COMMON = "shared"
EPSILON = 1e-20  # under the sum of the chosen scores, as NemotronH has it


@dataclass(frozen=True)
class RouterConfig:
    """How tokens choose experts.

    Attributes:
        n_experts, top_k: routed experts, and how many each token goes to.
        scale: factor on the weights of the chosen experts.
        bias_update_rate: after each step, an expert's selection bias moves by this much towards its share of the load.
        router: `sigmoid` scores each expert by itself, `softmax` among all that the token may choose.
        renormalise: whether the weights of the chosen experts are divided by their sum.
        n_groups, top_groups: experts in groups, of which a token first chooses the best (by the sum of their two best
            biased scores), then its experts inside them; 1 and 1 for no groups.
        partition: experts per modality, and under `shared` those that all may choose, numbered in the order of the
            model's modalities with the common ones last; {} lets every token choose among all.
        aux_sequence, aux_global: coefficients of the load-balancing loss over each row, and over the global batch.
        z_loss: coefficient of the squared log-sum-exp of the logits.
        capacity_factor: in training, an expert takes at most this many times its fair share of a row's tokens, best
            scores first; 0 drops none.
    """

    n_experts: int = 8
    top_k: int = 2
    scale: float = 1.0
    bias_update_rate: float = 1e-3
    router: Literal["sigmoid", "softmax"] = "sigmoid"
    renormalise: bool = True
    n_groups: int = 1
    top_groups: int = 1
    partition: dict[str, int] = field(default_factory=dict)
    aux_sequence: float = 0.0
    aux_global: float = 0.0
    z_loss: float = 0.0
    capacity_factor: float = 0.0

    __pydantic_config__ = {"extra": "forbid"}


def check_router(config: RouterConfig, modalities: tuple[str, ...]) -> None:
    """Refuse a choice that cannot be made.

    Raises:
        PlanError: with the numbers.
    """
    if not 1 <= config.top_k <= config.n_experts:
        raise PlanError(f"model.moe: top_k {config.top_k} must lie between 1 and n_experts {config.n_experts}")
    for name in ("aux_sequence", "aux_global", "z_loss", "capacity_factor"):
        if getattr(config, name) < 0:
            raise PlanError(f"model.moe.{name}: {getattr(config, name)} must not be negative")
    _check_partition(config, modalities)
    if config.n_groups == 1 and config.top_groups == 1:
        return
    if config.n_groups < 1 or config.n_experts % config.n_groups:
        raise PlanError(f"model.moe: {config.n_experts} experts do not divide into n_groups {config.n_groups}")
    size = config.n_experts // config.n_groups
    if size < 2:
        raise PlanError(
            f"model.moe: n_groups {config.n_groups} leaves {size} expert in a group; a group is judged by its two "
            f"best, so n_groups may be {config.n_experts // 2} at most"
        )
    uneven = [f"{name} {count}" for name, count in config.partition.items() if count % size]
    if uneven:
        raise PlanError(f"model.moe.partition: {', '.join(uneven)} not divisible by the {size} experts of a group")
    open_groups = min(open_experts(config, modalities).sum(dim=1).tolist()) // size
    if not 1 <= config.top_groups <= open_groups or config.top_groups * size < config.top_k:
        raise PlanError(
            f"model.moe: top_groups {config.top_groups} of {size} experts each must hold top_k {config.top_k} experts "
            f"and be no more than the {open_groups} groups that a token may choose from"
        )


def _check_partition(config: RouterConfig, modalities: tuple[str, ...]) -> None:
    if not config.partition:
        return
    if COMMON in modalities:
        raise PlanError(f"model.moe.partition: {COMMON!r} names the common experts and cannot be a modality")
    names = set(config.partition) - {COMMON}
    if names != set(modalities):
        raise PlanError(
            f"model.moe.partition: names {sorted(names)} (besides {COMMON}), but the model's modalities are "
            f"{list(modalities)}"
        )
    total = sum(config.partition.values())
    if min(config.partition.values()) < 0 or total != config.n_experts:
        raise PlanError(f"model.moe.partition: {config.partition} sums to {total}, not to n_experts {config.n_experts}")
    for name in modalities:
        mine = config.partition[name] + config.partition.get(COMMON, 0)
        if mine < config.top_k:
            raise PlanError(
                f"model.moe.partition: {name} has {config.partition[name]} experts of its own and "
                f"{config.partition.get(COMMON, 0)} common ones, fewer than top_k {config.top_k}"
            )


def open_experts(config: RouterConfig, modalities: tuple[str, ...]) -> Tensor:
    """bool [G, E]: which experts the tokens of a pool may choose."""
    if not config.partition:
        return torch.ones(1, config.n_experts, dtype=torch.bool)
    result = torch.zeros(len(modalities), config.n_experts, dtype=torch.bool)
    result[:, config.n_experts - config.partition.get(COMMON, 0) :] = True
    first = 0
    for index, name in enumerate(modalities):
        result[index, first : first + config.partition[name]] = True
        first += config.partition[name]
    return result


class Router(PartModule):
    """Logits in at least float32.

    Every tp rank computes all of them, but its gradient holds only what flows back through its own columns, so the
    router's gradient is a partial sum.
    """

    def forward(self, h_TD: Tensor) -> Tensor:
        """[T, D] → logits [T, E]."""
        compute = torch.promote_types(h_TD.dtype, torch.float32)
        return h_TD.to(compute) @ local(self.weight, partial=True).to(compute).T


def score(logits_TE: Tensor, config: RouterConfig) -> Tensor:
    """Scores [T, E]; logits of experts that a token may not choose are −∞."""
    return logits_TE.sigmoid() if config.router == "sigmoid" else logits_TE.softmax(dim=-1)


def select(biased_TE: Tensor, config: RouterConfig) -> Tensor:
    """The chosen experts [T, k] by biased scores, which are −∞ where a token may not choose."""
    if config.n_groups > 1:
        groups = biased_TE.unflatten(1, (config.n_groups, -1))
        best = groups.topk(2, dim=-1).values.sum(dim=-1).topk(config.top_groups, dim=-1).indices
        chosen = torch.zeros(groups.shape[:2], dtype=torch.bool, device=groups.device).scatter_(1, best, True)
        biased_TE = groups.masked_fill(~chosen[..., None], float("-inf")).flatten(1)
    return biased_TE.topk(config.top_k, dim=-1).indices


def weigh(scores_TE: Tensor, chosen_Tk: Tensor, config: RouterConfig) -> Tensor:
    """Weights [T, k] of the chosen experts."""
    weights = scores_TE.gather(1, chosen_Tk)
    if config.renormalise:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + EPSILON)
    return weights * config.scale


def count_choices(chosen_Tk: Tensor, cells_T: Tensor, real_T: Tensor, n_cells: int, n_experts: int) -> Tensor:
    """Choices [cells, E] of real tokens; `cells_T` numbers the cell that each token lies in."""
    places = (cells_T[:, None] * n_experts + chosen_Tk).reshape(-1)
    counts = real_T.new_zeros(n_cells * n_experts)
    return counts.index_add_(0, places, real_T.repeat_interleave(chosen_Tk.shape[1])).view(n_cells, n_experts)


def excess(counts: Tensor, open_GE: Tensor) -> Tensor:
    """f = choices of an expert over its fair share [..., G, E]; 1 in a pool without tokens, whose term is then flat."""
    fair = counts.sum(dim=-1, keepdim=True) / open_GE.sum(dim=-1, keepdim=True)
    return torch.where(fair > 0, counts / fair.clamp(min=EPSILON), torch.ones_like(counts))


def fair_share(counts: Tensor, open_GE: Tensor) -> Tensor:
    """Choices [..., E] that each expert would get if every pool spread its own evenly."""
    fair = counts.sum(dim=-1, keepdim=True) / open_GE.sum(dim=-1, keepdim=True)
    return (fair * open_GE).sum(dim=-2)


def within_capacity(chosen_Tk: Tensor, scores_Tk: Tensor, rows_T: Tensor, real_T: Tensor, limits_RE: Tensor) -> Tensor:
    """Which choices [T, k] an expert takes: in each row the `limits_RE` best by score, earlier tokens first in a tie.

    Padding is never taken. The rule looks at whole rows, which no mesh and no micro-batch cuts.
    """
    n_rows, n_experts = limits_RE.shape
    trash = n_rows * n_experts
    keys = torch.where(real_T[:, None] > 0, rows_T[:, None] * n_experts + chosen_Tk, trash).reshape(-1)
    by_score = scores_Tk.reshape(-1).argsort(stable=True, descending=True)
    order = by_score[keys[by_score].argsort(stable=True)]
    sizes = torch.bincount(keys, minlength=trash + 1)
    place = torch.arange(len(keys), device=keys.device) - (sizes.cumsum(0) - sizes)[keys[order]]
    limits = torch.cat((limits_RE.reshape(-1), limits_RE.new_zeros(1)))
    taken = torch.empty(len(keys), dtype=torch.bool, device=keys.device)
    taken[order] = place < limits[keys[order]]
    return taken.view(chosen_Tk.shape)


class _Join(Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, term: Tensor, scale: float, passed: Callable[[], None]) -> Tensor:
        ctx.scale, ctx.passed, ctx.like = scale, passed, term.detach()
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        ctx.passed()
        return grads[0], torch.full_like(ctx.like, ctx.scale), None, None


def join(value: Tensor, term: Tensor, scale: float, passed: Callable[[], None]) -> Tensor:
    """`value`, with scale · term added to whatever loss its gradient comes from.

    So a loss term made in the middle of a pipeline needs no way to the last stage. `passed` is called once per
    backward: a forward that is run again for recomputation counts nothing twice.
    """
    return _Join.apply(value, term, scale, passed)
