"""Routed parameters: sort rows by entry, contiguous GEMMs, unsort. One dispatcher for modalities and for experts.

Where ranks share the entries (expert parallelism), the sorted rows travel to them by an all-to-all and back. Both ways
the all-to-all is started and awaited by two autograd nodes, so that what the caller computes between them hides it, in
the backward as in the forward: autograd runs the nodes in reverse order of their making.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

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
    return _sorted(ids, torch.bincount(ids, minlength=n_entries).tolist())


def _sorted(ids: Tensor, counts: Sequence[int]) -> Route:
    order = torch.argsort(ids, stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=ids.device)
    return Route(order, inverse, tuple(counts), ids)


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


@dataclass(frozen=True)
class Dispatch:
    """Where this rank's rows go when ranks share the entries, and what arrives here.

    Attributes:
        route: of this rank's rows among all entries.
        group: the ranks that share the entries, each a run of them in rank order; None where this rank has them all.
        sent, received: rows to and from each rank of the group.
        arrived: the route of the received rows, in order of their senders, among this rank's entries.
    """

    route: Route
    group: dist.ProcessGroup | None
    sent: tuple[int, ...]
    received: tuple[int, ...]
    arrived: Route | None

    @property
    def counts(self) -> tuple[int, ...]:
        """Rows per entry of this rank, all senders together."""
        return self.route.counts if self.arrived is None else self.arrived.counts


def dispatch(ids: Tensor, n_entries: int, group: dist.ProcessGroup | None) -> Dispatch:
    """Plan the journey of rows with entry numbers `ids` (int64 [T]); one host synchronisation, all ranks call it.

    Args:
        group: the ranks that share the entries (their number divides `n_entries`), or None.
    """
    if group is None:
        return Dispatch(route(ids, n_entries), None, (), (), None)
    size, share = group.size(), n_entries // group.size()
    mine = torch.bincount(ids, minlength=n_entries)
    theirs = torch.empty_like(mine)
    dist.all_to_all_single(theirs, mine, group=group)
    here, there = torch.stack((mine, theirs)).tolist()
    sent = tuple(sum(here[rank * share : (rank + 1) * share]) for rank in range(size))
    received = tuple(sum(there[rank * share : (rank + 1) * share]) for rank in range(size))
    entries = torch.arange(share, device=ids.device).repeat(size)
    arriving = torch.repeat_interleave(entries, theirs, output_size=sum(received))
    counts = [sum(there[entry::share]) for entry in range(share)]
    return Dispatch(_sorted(ids, here), group, sent, received, _sorted(arriving, counts))


@dataclass(frozen=True)
class Slots:
    """Where the experts of a layer lie: `placement.py`'s sequence as tensors.

    Attributes:
        order: int64 [S], slots sorted by their expert.
        first: int64 [E], where in `order` an expert's slots begin.
        copies: int64 [E], how many it has.
    """

    order: Tensor
    first: Tensor
    copies: Tensor

    @classmethod
    def of(cls, placement: Tensor, n_experts: int) -> Slots:
        """Of the expert of every slot, int64 [S]; every expert has one."""
        copies = torch.bincount(placement, minlength=n_experts)
        return cls(torch.argsort(placement, stable=True), copies.cumsum(0) - copies, copies)

    def of_rows(self, experts: Tensor, turn: int) -> Tensor:
        """The slot of each row, int64 [T]: the rows of an expert take its slots in turn, beginning with the `turn`-th.

        A pure function of the rows' order. Ranks begin at different turns, so that remainders do not meet on one slot.
        """
        if len(self.order) == len(self.first):
            return self.order[experts]
        by_expert = torch.argsort(experts, stable=True)
        ordered = experts[by_expert]
        begins = torch.searchsorted(ordered, torch.arange(len(self.first), device=experts.device))
        turns = torch.arange(len(experts), device=experts.device) - begins[ordered] + turn
        slots = torch.empty_like(experts)
        slots[by_expert] = self.order[self.first[ordered] + turns % self.copies[ordered]]
        return slots


class Journey:
    """Rows on their way; `arrive` waits for them. Gradients go the same way back."""

    def __init__(
        self, rows: Tensor, group: dist.ProcessGroup | None, sent: Sequence[int], received: Sequence[int]
    ) -> None:
        self.group, self.sent, self.received = group, list(sent), list(received)
        self.work: Any = None
        self.kept: tuple[Tensor, ...] = ()
        self.rows = rows if group is None else _Depart.apply(rows, self)

    def start(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Start the all-to-all of rows [Σ sent, D]; its result [Σ received, D] holds once the work is done."""
        rows = rows.contiguous()
        result = rows.new_empty(sum(received), rows.shape[1])
        self.work = dist.all_to_all_single(result, rows, received, sent, group=self.group, async_op=True)
        self.kept = (rows, result)  # they live until the work is done
        return result

    def wait(self) -> Tensor:
        self.work.wait()
        (_, result), self.work, self.kept = self.kept, None, ()
        return result

    def arrive(self) -> Tensor:
        return self.rows if self.group is None else _Arrive.apply(self.rows, self)


class _Depart(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, journey: Journey) -> Tensor:
        ctx.journey = journey
        return journey.start(rows, journey.sent, journey.received)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.journey.wait(), None  # what `_Arrive` has sent on its way


class _Arrive(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, journey: Journey) -> Tensor:
        ctx.journey = journey
        journey.wait()
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        journey, (grad,) = ctx.journey, grads
        journey.start(grad, journey.received, journey.sent)
        return grad, None  # only a token: `_Depart`'s backward returns what arrives


def send(rows: Tensor, plan: Dispatch) -> Journey:
    """Rows [T, D] sorted by entry → on their way to the ranks that hold the entries."""
    return Journey(rows, plan.group, plan.sent, plan.received)


def by_entry(rows: Tensor, plan: Dispatch) -> Tensor:
    """Arrived rows, in order of their senders → sorted by this rank's entries."""
    return rows if plan.arrived is None else rows[plan.arrived.order]


def send_back(rows: Tensor, plan: Dispatch) -> Journey:
    """Rows sorted by this rank's entries → on their way to where they came from, sorted by entry there."""
    if plan.arrived is not None:
        rows = rows[plan.arrived.inverse]
    return Journey(rows, plan.group, plan.received, plan.sent)
