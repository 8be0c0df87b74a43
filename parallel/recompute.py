"""Activation recompute: what a layer keeps for its backward, and what the backward computes again.

`full` keeps a layer's input only. `selective` also keeps the results of what is dear to compute, listed per kind in
`KEPT`, and computes the rest (norms, convolution, activations, gates, gathers) again. The backward repeats the layer's
forward, its collectives included, on every rank alike; what a layer counts it counts in its backward, which runs once
(`kinds.moe_router.join`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from .layout import Layout

Choice = Literal["none", "full", "selective"]
Run = Callable[[Tensor, Layout], Tensor]


@dataclass(frozen=True)
class RecomputeConfig:
    """One choice per layer kind: keep all, keep the layer's input only, or also what is dear to compute.

    Attributes:
        mamba, attention, mlp, moe: `none`, `full` or `selective`.
    """

    mamba: Choice = "none"
    attention: Choice = "none"
    mlp: Choice = "none"
    moe: Choice = "none"

    __pydantic_config__ = {"extra": "forbid"}


SCAN = ("polylepis::ssd_forward", "polylepis::mixer_forward")
ATTENTION = (
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "flash_attn::_flash_attn_varlen_forward",
)
PRODUCTS = ("aten::mm", "aten::addmm")
"""Kept where they widen (more columns out than in): in-projections. An out-projection is the layer's last product, and
nothing that the backward needs comes after it. Routed products write into a shared buffer and are computed again."""

KEPT = MappingProxyType(
    {
        "mamba": (*SCAN, *PRODUCTS),
        "attention": (*ATTENTION, *PRODUCTS),
        "mlp": PRODUCTS,
        "moe": PRODUCTS,
    }
)
"""What `selective` keeps besides the layer's input, by kind: results of these operators."""


def keeps(kind: str, d_model: int, operator: torch._ops.OpOverload, arguments: tuple[Any, ...]) -> bool:
    """Whether `selective` keeps the result of a call in a layer of this kind.

    Only an in-projection takes rows of the model's width. An out-projection also widens, once tensor parallelism has
    cut its input, but nothing that the backward needs comes after it.
    """
    name = operator._schema.name
    if name not in KEPT[kind] or operator._schema.is_mutable:
        return False
    if name in PRODUCTS:
        left, right = arguments[-2:]
        return bool(left.shape[-1] == d_model < right.shape[-1])
    return True


def _policy(kind: str, d_model: int, ctx: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if keeps(kind, d_model, operator, args) else CheckpointPolicy.PREFER_RECOMPUTE


def recomputed(run: Run, kind: str, d_model: int, config: RecomputeConfig) -> Run:
    """`run` (a layer's forward, of the residual stream and a layout) under the choice for its kind."""
    choice: Choice = getattr(config, kind)
    if choice == "none":
        return run

    def checkpointed(x_TD: Tensor, layout: Layout) -> Tensor:
        if not torch.is_grad_enabled():
            return run(x_TD, layout)
        # Nothing here draws random numbers, so their state need not be kept.
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        if choice == "selective":
            options["context_fn"] = partial(create_selective_checkpoint_contexts, partial(_policy, kind, d_model))
        result = checkpoint(run, x_TD, layout, **options)
        assert isinstance(result, Tensor)
        return result

    return checkpointed
