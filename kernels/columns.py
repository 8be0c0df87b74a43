"""Cutting the output of one projection into its parts, without a copy in the backward where the gradients allow it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def split_columns(packed: Tensor, widths: Sequence[int]) -> tuple[Tensor, ...]:
    """``packed.split(widths, dim=-1)``, whose backward does not copy gradients that lie side by side in one buffer.

    Args:
        packed: (..., Σ widths).

    Returns:
        Views of ``packed``. :func:`polylepis.kernels.ssd.ssd_mixer` returns gradients that lie so; others are copied
        together, as the backward of ``split`` does.
    """
    return _split(packed, tuple(widths))


# Dynamo would trace the backward with gradients of its own invention; AOTAutograd sees those that really come, and
# whether they are columns of one buffer
@torch.compiler.allow_in_graph
def _split(packed: Tensor, widths: tuple[int, ...]) -> tuple[Tensor, ...]:
    views: tuple[Tensor, ...] = _SplitColumns.apply(packed, widths)
    return views


class _SplitColumns(Function):
    @staticmethod
    def forward(ctx: Any, packed: Tensor, widths: tuple[int, ...]) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.widths, ctx.empty = widths, packed.new_empty(0)
        ctx.lead = packed.shape[:-1]
        return packed.split(widths, dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        given = [grad for grad in grads if grad is not None]
        if not given:
            return None, None
        if len(given) == len(grads) and side_by_side(given):
            first = given[0]
            return first.as_strided((*ctx.lead, sum(ctx.widths)), first.stride(), first.storage_offset()), None
        pairs = zip(grads, ctx.widths, strict=True)
        full = [ctx.empty.new_zeros(*ctx.lead, width) if grad is None else grad for grad, width in pairs]
        return torch.cat(full, dim=-1), None


def side_by_side(parts: Sequence[Tensor]) -> bool:
    """Whether the parts are neighbouring columns of one matrix in memory, in this order."""
    first, column = parts[0], 0
    rows, storage = first.stride()[:-1], first.untyped_storage()._cdata  # of traced tensors as well; they have no data
    for part in parts:
        if part.dtype != first.dtype or part.untyped_storage()._cdata != storage or part.stride(-1) != 1:
            return False
        if part.stride()[:-1] != rows or part.storage_offset() != first.storage_offset() + column:
            return False
        column += part.shape[-1]
    # rows that are shorter than the parts together would overlap
    return all(stride >= column for stride, size in zip(rows, first.shape[:-1], strict=True) if size > 1)
