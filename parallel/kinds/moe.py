"""`E`: a mixture of experts, dropless: sigmoid router with a selection bias, top-k, one shared expert.

The router is that of DeepSeek-V3 and NemotronH: scores = sigmoid(logits); the bias chooses but does not weigh
("auxiliary-loss-free" balancing, Wang et al. 2024); the chosen scores are renormalised and scaled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.routed_gemm import routed_linear
from ..errors import PlanError
from ..layout import Layout
from ..linear import packed_linear
from ..mesh import Mesh
from ..parts import Init, Part, local
from ..recompute import recomputing
from ..routing import Route, route
from .base import HFKey, Kind, Mixer, NewTokens, Shape, flat, squared_relu


@dataclass(frozen=True)
class MoEConfig:
    """Sizes of an expert layer; its experts are squared-ReLU MLPs.

    Attributes:
        n_experts, top_k: routed experts, and how many each token goes to.
        d_ff: inner width of each routed expert.
        d_ff_shared: inner width of the shared expert that every token passes.
        scale: factor on the renormalised weights of the chosen experts.
        bias_update_rate: after each step, an expert's selection bias moves by this much towards a balanced load.
    """

    n_experts: int = 8
    top_k: int = 2
    d_ff: int = 4096
    d_ff_shared: int = 4096
    scale: float = 1.0
    bias_update_rate: float = 1e-3

    __pydantic_config__ = {"extra": "forbid"}


def check(config: MoEConfig, shape: Shape, tp: int) -> None:
    if not 1 <= config.top_k <= config.n_experts:
        raise PlanError(f"model.moe: top_k {config.top_k} must lie between 1 and n_experts {config.n_experts}")
    if config.d_ff % tp or config.d_ff_shared % tp:
        raise PlanError(
            f"model.moe: d_ff {config.d_ff} and d_ff_shared {config.d_ff_shared} must both be divisible by tp {tp}"
        )


def parts(config: MoEConfig, shape: Shape) -> dict[str, Part]:
    """Logical parameters; experts are numbered bank entries, keys end in `.experts.{j}`."""
    d, normal, output = shape.d_model, Init("normal", shape.init_std), Init("normal", shape.output_std)
    experts = tuple(str(j) for j in range(config.n_experts))
    return {
        "router.weight": Part((config.n_experts, d), normal),
        "up_proj.weight": Part((config.d_ff, d), normal, 0, entries=experts, suffix="experts."),
        "down_proj.weight": Part((d, config.d_ff), output, 1, entries=experts, suffix="experts."),
        "shared.up_proj.weight": Part((config.d_ff_shared, d), normal, 0),
        "shared.down_proj.weight": Part((d, config.d_ff_shared), output, 1),
    }


class MoE(Mixer):
    """Experts with this rank's columns of their inner width; the choice of experts is the same on all tp ranks."""

    config: MoEConfig

    def __init__(self, config: MoEConfig, shape: Shape, mesh: Mesh, parts: Mapping[str, Part]) -> None:
        super().__init__(config, shape, mesh, parts)
        self.register_buffer("selection_bias", torch.zeros(config.n_experts))
        self.register_buffer("load", torch.zeros(config.n_experts), persistent=False)
        # For comparisons: what to choose instead of choosing (so that near-ties do not flip), and what was chosen.
        self.replay: Tensor | None = None
        self.chosen: Tensor | None = None

    def forward(self, h_TD: Tensor, layout: Layout) -> Tensor:
        real = (layout.seq_idx[0] >= 0).to(self.load.dtype)
        chosen, weights = self._choose(h_TD)
        if self.training and not recomputing():
            with torch.no_grad():  # padding is routed like everything else, but it is nobody's load
                self.load.index_add_(0, chosen.reshape(-1), real.repeat_interleave(self.config.top_k))
        return self._mix(h_TD, chosen, weights, layout.modality)

    def extend(self, h_bsD: Tensor, new: NewTokens, cache: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        h_TD = flat(h_bsD)
        return self._mix(h_TD, *self._choose(h_TD), new.modality).view(h_bsD.shape), {}

    def _choose(self, h_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Experts [T, k] and their weights [T, k], the router in at least float32.

        Every tp rank computes all of it, but its gradient holds only what flows back through its own columns, so the
        router's gradient is a partial sum.
        """
        compute = torch.promote_types(h_TD.dtype, torch.float32)
        scores = (h_TD.to(compute) @ local(self.router.weight, partial=True).to(compute).T).sigmoid()
        chosen = (scores.detach() + self.selection_bias.to(compute)).topk(self.config.top_k, dim=-1).indices
        if self.replay is not None:
            chosen = self.replay
        self.chosen = chosen
        weights = scores.gather(1, chosen)
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20) * self.config.scale
        return chosen, weights

    def _mix(self, h_TD: Tensor, chosen: Tensor, weights: Tensor, plan: Route) -> Tensor:
        n_tokens, top_k = chosen.shape
        experts = route(chosen.reshape(-1), self.config.n_experts)
        rows = h_TD[experts.order // top_k]
        hidden = squared_relu(routed_linear(rows, local(self.up_proj.weight), experts.counts))
        out = routed_linear(hidden, local(self.down_proj.weight), experts.counts)[experts.inverse]
        out = (out.view(n_tokens, top_k, -1) * weights.to(out.dtype)[..., None]).sum(dim=1)
        shared = squared_relu(packed_linear(h_TD, [self.shared.up_proj.weight], plan))
        return out + packed_linear(shared, [self.shared.down_proj.weight], plan)

    @torch.no_grad()
    def balance(self, load: Tensor) -> None:
        """Move the selection bias towards a balanced load.

        Args:
            load: tokens per expert [E] over the global batch, summed over all ranks by the caller.
        """
        self.selection_bias += self.config.bias_update_rate * torch.sign(load.mean() - load)
        self.load.zero_()


def flops(config: MoEConfig, shape: Shape, mean_keys: float) -> float:
    width = config.top_k * config.d_ff + config.d_ff_shared
    return float(2 * shape.d_model * config.n_experts + 4 * shape.d_model * width)


def hf_keys(config: MoEConfig) -> tuple[HFKey, ...]:
    """NemotronH's names on disk: one tensor per expert."""
    return (
        HFKey("gate.weight", ("router.weight",)),
        HFKey("experts.{j}.up_proj.weight", ("up_proj.weight.experts.{j}",)),
        HFKey("experts.{j}.down_proj.weight", ("down_proj.weight.experts.{j}",)),
        HFKey("shared_experts.up_proj.weight", ("shared.up_proj.weight",)),
        HFKey("shared_experts.down_proj.weight", ("shared.down_proj.weight",)),
    )


KIND = Kind("E", "mixture of experts", "moe", MoE, parts, check, flops, hf_keys)
