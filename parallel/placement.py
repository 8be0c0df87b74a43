"""Where experts lie, from how many tokens they get: EPLB's algorithm as pure functions, one layer at a time.

A *placement* is a sequence with one expert number per slot; slots are dealt out to the ranks in runs, rank 0's first.
Without replicas it is a permutation; of an expert's slots the first is its *primary* one. Source: DeepSeek-AI, EPLB
(2025).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .errors import PlanError


def pack_evenly(weights: Sequence[float], n_packs: int) -> list[list[int]]:
    """Items into packs of equal number, the sums as even as a greedy pass makes them: heaviest first, each to the
    lightest pack that has room (the first of equal ones).

    Returns:
        For each pack its items, in the order in which they were put there.

    Raises:
        PlanError: a number of items that the packs cannot share equally.
    """
    if n_packs < 1 or len(weights) % n_packs:
        raise PlanError(f"placement: {len(weights)} items cannot be packed into {n_packs} packs of equal number")
    room = len(weights) // n_packs
    if room == 1:
        return [[item] for item in range(n_packs)]
    packs: list[list[int]] = [[] for _ in range(n_packs)]
    sums = [0.0] * n_packs
    for item in sorted(range(len(weights)), key=lambda i: -weights[i]):
        pack = min((p for p in range(n_packs) if len(packs[p]) < room), key=sums.__getitem__)
        packs[pack].append(item)
        sums[pack] += weights[item]
    return packs


def replicate(weights: Sequence[float], n_slots: int) -> list[int]:
    """The expert of each slot: every expert once, then, slot by slot, one more of whichever has most per replica.

    Raises:
        PlanError: fewer slots than experts.
    """
    if n_slots < len(weights):
        raise PlanError(f"placement: {n_slots} slots are too few for {len(weights)} experts")
    copies, slots = [1] * len(weights), list(range(len(weights)))
    while len(slots) < n_slots:
        heaviest = max(range(len(weights)), key=lambda e: weights[e] / copies[e])
        slots.append(heaviest)
        copies[heaviest] += 1
    return slots


def place_experts(
    loads: Sequence[float], n_slots: int, n_ranks: int, n_groups: int = 1, n_nodes: int = 1
) -> tuple[int, ...]:
    """The expert of every slot, so that the busiest rank has as few tokens as the algorithm can make it.

    Groups are dealt out to nodes first, so that the experts of a group share one (group-limited routing sends a token
    to few nodes); inside a node experts are replicated, and the replicas dealt out to its ranks. Where groups cannot be
    shared out over the nodes, nodes and groups are left out of account.

    Args:
        loads: tokens of each expert.
        n_slots: experts and replicas in all; a multiple of `n_ranks`.
        n_ranks: expert-parallel ranks, node by node.
        n_groups: equal runs of experts that belong together.
        n_nodes: machines.

    Raises:
        PlanError: numbers that do not divide, fewer slots than experts, a load that is negative or not finite.
    """
    n = len(loads)
    for load in loads:
        if not 0 <= load < float("inf"):
            raise PlanError(f"placement: loads must be finite and not negative, got {load}")
    if n_groups % n_nodes:
        n_groups = n_nodes = 1
    for name, number, divisor in (
        ("experts", n, n_groups),
        ("slots", n_slots, n_ranks),
        ("ranks", n_ranks, n_nodes),
    ):
        if divisor < 1 or number % divisor:
            raise PlanError(f"placement: {number} {name} are not divisible by {divisor}")
    size = n // n_groups
    of_group = [sum(loads[g * size : (g + 1) * size]) for g in range(n_groups)]
    placed: list[int] = []
    for groups in pack_evenly(of_group, n_nodes):
        experts = [g * size + i for g in groups for i in range(size)]
        slots = replicate([loads[e] for e in experts], n_slots // n_nodes)
        share = [loads[experts[s]] / slots.count(s) for s in slots]
        for members in pack_evenly(share, n_ranks // n_nodes):
            placed += [experts[slots[m]] for m in members]
    return tuple(placed)


def first_slots(n_experts: int, n_ranks: int, spare: int = 0) -> tuple[int, ...]:
    """The expert of every slot before anything has been counted: each rank has its run of the experts and, in `spare`
    slots more, copies of those that come next (the first ones after the last)."""
    share = n_experts // n_ranks
    return tuple((rank * share + i) % n_experts for rank in range(n_ranks) for i in range(share + spare))


def primaries(placement: Sequence[Any]) -> list[bool]:
    """Of every slot, whether it is its expert's primary one."""
    first: dict[Any, int] = {}
    return [first.setdefault(expert, slot) == slot for slot, expert in enumerate(placement)]


def rank_loads(loads: Sequence[float], placement: Sequence[int], n_ranks: int) -> list[float]:
    """Tokens of each rank; the replicas of an expert share its tokens equally."""
    share, copies = len(placement) // n_ranks, [0] * len(loads)
    for expert in placement:
        copies[expert] += 1
    return [sum(loads[e] / copies[e] for e in placement[rank * share : (rank + 1) * share]) for rank in range(n_ranks)]


def busiest(loads: Sequence[float], placement: Sequence[int], n_ranks: int) -> float:
    """Tokens of the busiest rank over the mean; 1 where nothing has been counted."""
    found = rank_loads(loads, placement, n_ranks)
    total = sum(found)
    return max(found) * n_ranks / total if total else 1.0
