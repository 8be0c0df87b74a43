"""Linear maps over parts: packed into one GEMM, routed or not.

One shared gather (the block's) and a plain `F.linear`, not megatron's fused linear: that one breaks compile graphs,
gathers once per projection and runs its backward twice under zero-bubble schedules.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.columns import split_columns
from .parts import local
from .routing import Route, linear_by_entry


def packed_linear(x_TI: Tensor, weights: Sequence[Tensor], plan: Route) -> Tensor:
    """Apply parts that are all routed (banks [E, O, I]) or all shared ([O, I]) as one GEMM: [T, I] → [T, ΣO].

    Concatenating local shards is a local operation: the logical parameters stay parts.
    """
    locals_ = [local(weight) for weight in weights]
    weight = locals_[0] if len(locals_) == 1 else torch.cat(locals_, dim=-2)
    if weight.dim() == 2:
        return F.linear(x_TI, weight)
    return linear_by_entry(x_TI, weight, plan)


def project(x_TI: Tensor, weights: Sequence[Tensor], plan: Route) -> list[Tensor]:
    """Like `packed_linear` for a mixture of routed and shared parts: one GEMM for each group, one output per part."""
    outputs: dict[int, Tensor] = {}
    for dimensions in (2, 3):
        group = [i for i, weight in enumerate(weights) if weight.dim() == dimensions]
        if group:
            packed = packed_linear(x_TI, [weights[i] for i in group], plan)
            widths = [local(weights[i]).shape[-2] for i in group]
            outputs.update(zip(group, split_columns(packed, widths), strict=True))
    return [outputs[i] for i in range(len(weights))]
