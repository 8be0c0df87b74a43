"""Routed parameters: sort rows by entry, contiguous GEMMs, unsort. One dispatcher for modalities and for experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.routed_gemm import routed_linear


@dataclass(frozen=True)
class Route:
    """Which bank entry each row goes to, as a permutation that makes the entries' rows contiguous.

    Attributes:
        order: int64 [T], `x[order]` is sorted by entry (stable).
        inverse: int64 [T], undoes `order`.
        counts: rows per entry, on the host; an entry may have none.
        ids: int64 [T], the entry of each row.
    """

    order: Tensor
    inverse: Tensor
    counts: tuple[int, ...]
    ids: Tensor


def route(ids: Tensor, n_entries: int) -> Route:
    """The route of rows with entry numbers `ids` (int64 [T], 0 ≤ id < n_entries).

    Counts go to the host: give host tensors (then move with `to_device`), or pay one device synchronisation.
    """
    order = torch.argsort(ids, stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=ids.device)
    counts = tuple(torch.bincount(ids, minlength=n_entries).tolist())
    return Route(order, inverse, counts, ids)


def to_device(value: Route, device: torch.device) -> Route:
    if value.ids.device == device:
        return value
    order, inverse, ids = (t.to(device, non_blocking=True) for t in (value.order, value.inverse, value.ids))
    return Route(order, inverse, value.counts, ids)


def linear_by_entry(x_TI: Tensor, bank_EOI: Tensor, plan: Route) -> Tensor:
    """`y[t] = bank[ids[t]] @ x[t]`: [T, I] → [T, O]. Entries without rows take part with zero rows."""
    if max(plan.counts) == x_TI.shape[0]:  # one entry owns every row: the rows are sorted as they are
        return routed_linear(x_TI, bank_EOI, plan.counts)
    return routed_linear(x_TI[plan.order], bank_EOI, plan.counts)[plan.inverse]
