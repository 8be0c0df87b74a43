"""Which packs of a global batch go to which rank and micro-batch, by what each is predicted to cost.

Sequence lengths and modalities make some packs dearer than others. Ranks that gather parameters layer by layer, or
send tokens to each other's experts, wait for the slowest of them in every micro-batch; others wait at the step's end.
The batch stays the same set of packs, so sums over it do too.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import PlanError
from ..placement import pack_evenly


def deal(costs: Sequence[float], n_ranks: int, micro_batch: int, lockstep: bool = True) -> list[int]:
    """A new order of the packs, cut as the stream cuts it: equal runs for the ranks, in them runs of `micro_batch`.

    Packs of like cost meet in the same micro-batch of all ranks, dearest first; inside it they are shared out evenly,
    and the dearest share goes to the rank that has least so far. Where that predicts no gain the given order stays.

    Args:
        costs: of each pack, any unit.
        n_ranks: data-parallel ranks.
        lockstep: see `straggler_time`.

    Raises:
        PlanError: packs that do not divide over ranks and micro-batches.
    """
    at_once, given = n_ranks * micro_batch, list(range(len(costs)))
    _check(costs, n_ranks, micro_batch)
    ordered = sorted(given, key=lambda pack: (-costs[pack], pack))
    totals, shares = [0.0] * n_ranks, [list[int]() for _ in range(n_ranks)]
    for first in range(0, len(ordered), at_once):
        chunk = ordered[first : first + at_once]
        groups = [[chunk[i] for i in group] for group in pack_evenly([costs[pack] for pack in chunk], n_ranks)]
        groups.sort(key=lambda group: -sum(costs[pack] for pack in group))
        ranks = sorted(range(n_ranks), key=lambda rank: totals[rank])
        for rank, group in zip(ranks, groups, strict=True):
            shares[rank] += sorted(group)
            totals[rank] += sum(costs[pack] for pack in group)
    dealt = [pack for share in shares for pack in share]
    better = straggler_time(costs, dealt, n_ranks, micro_batch, lockstep) < straggler_time(
        costs, given, n_ranks, micro_batch, lockstep
    )
    return dealt if better else given


def straggler_time(
    costs: Sequence[float], order: Sequence[int], n_ranks: int, micro_batch: int, lockstep: bool = True
) -> float:
    """Cost of the step for the ranks together, each waiting for the slowest.

    Args:
        order: the packs as the stream cuts them.
        lockstep: ranks wait for each other in every micro-batch (FSDP's gathers, experts' all-to-alls), not only at
            the end of the step.
    """
    _check(costs, n_ranks, micro_batch)
    share = len(order) // n_ranks
    times = [
        [
            sum(costs[pack] for pack in order[start : start + micro_batch])
            for start in range(rank * share, (rank + 1) * share, micro_batch)
        ]
        for rank in range(n_ranks)
    ]
    if lockstep:
        return sum(max(column) for column in zip(*times, strict=True))
    return max(sum(row) for row in times)


def imbalance(
    costs: Sequence[float], order: Sequence[int], n_ranks: int, micro_batch: int, lockstep: bool = True
) -> float:
    """`straggler_time` over what it would be if all ranks were equally busy."""
    total = sum(costs)
    return straggler_time(costs, order, n_ranks, micro_batch, lockstep) * n_ranks / total if total else 1.0


def _check(costs: Sequence[float], n_ranks: int, micro_batch: int) -> None:
    if min(n_ranks, micro_batch) < 1 or len(costs) % (n_ranks * micro_batch):
        raise PlanError(
            f"assignment: {len(costs)} packs do not divide over {n_ranks} ranks with micro-batches of {micro_batch}"
        )
