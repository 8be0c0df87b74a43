"""`-`: the feed-forward layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from ..errors import PlanError
from ..layout import Layout
from ..linear import packed_linear, project
from ..parts import Init, Part
from ..routing import Route
from .base import HFKey, Kind, Load, Mixer, NewTokens, Shape, Work, flat, squared_relu

Activation = Literal["relu2", "gelu", "swiglu"]


@dataclass(frozen=True)
class MLPConfig:
    """Sizes of an MLP layer.

    Attributes:
        d_ff: inner width.
        activation: `relu2` (squared ReLU), `gelu` (exact), or `swiglu` (gated, with a third matrix).
    """

    d_ff: int = 16384
    activation: Activation = "relu2"

    __pydantic_config__ = {"extra": "forbid"}


def check(config: MLPConfig, shape: Shape, tp: int) -> None:
    if config.d_ff % tp:
        raise PlanError(f"model.mlp: d_ff {config.d_ff} is not divisible by tp {tp}")


def parts(config: MLPConfig, shape: Shape) -> dict[str, Part]:
    names = ("gate", "up") if config.activation == "swiglu" else ("up",)
    normal = Init("normal", shape.init_std)
    result = {f"{name}_proj.weight": Part((config.d_ff, shape.d_model), normal, 0) for name in names}
    result["down_proj.weight"] = Part((shape.d_model, config.d_ff), Init("normal", shape.output_std), 1)
    return result


class MLP(Mixer):
    """Up, activation, down, with this rank's columns of the inner width."""

    config: MLPConfig

    def forward(self, h_TD: Tensor, layout: Layout) -> Tensor:
        return self._mix(h_TD, layout.modality)

    def extend(self, h_bsD: Tensor, new: NewTokens, cache: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return self._mix(flat(h_bsD), new.modality).view(h_bsD.shape), {}

    def _mix(self, h_TD: Tensor, plan: Route) -> Tensor:
        if self.config.activation == "swiglu":
            gate, up = project(h_TD, [self.gate_proj.weight, self.up_proj.weight], plan)
            hidden = F.silu(gate) * up
        else:
            up = packed_linear(h_TD, [self.up_proj.weight], plan)
            hidden = squared_relu(up) if self.config.activation == "relu2" else F.gelu(up)
        return packed_linear(hidden, [self.down_proj.weight], plan)


def flops(config: MLPConfig, shape: Shape, mean_keys: float) -> float:
    return float(2 * shape.d_model * config.d_ff * (3 if config.activation == "swiglu" else 2))


def work(config: MLPConfig, shape: Shape, load: Load) -> Work:
    weights = load.tokens * flops(config, shape, load.mean_keys) / load.tp
    return Work(weights, weights / (3 if config.activation == "swiglu" else 2))


def saved(config: MLPConfig, shape: Shape, load: Load) -> float:
    """The input, the inner activations, and gate and up packed into one weight."""
    width = config.d_ff // load.tp
    inner, packed = (4, 2 * width * shape.d_model) if config.activation == "swiglu" else (2, 0)
    return load.itemsize * (load.tokens * (shape.d_model + inner * width) + packed)


def kept(config: MLPConfig, shape: Shape, load: Load) -> float:
    """What the up-projection (and gate) gives, where it widens."""
    width = config.d_ff // load.tp * (2 if config.activation == "swiglu" else 1)
    return load.itemsize * load.tokens * width if width > shape.d_model else 0.0


def hf_keys(config: MLPConfig) -> tuple[HFKey, ...]:
    names = ("gate", "up", "down") if config.activation == "swiglu" else ("up", "down")
    return tuple(HFKey(f"{name}_proj.weight", (f"{name}_proj.weight",)) for name in names)


KIND = Kind("-", "MLP", "mlp", MLP, parts, check, flops, hf_keys, work, saved, kept)
