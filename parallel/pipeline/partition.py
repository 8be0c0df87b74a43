"""Cut a sequence of layers into contiguous parts so that the dearest part is as cheap as possible."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import PlanError


def partition(costs: Sequence[float], n_parts: int) -> tuple[int, ...]:
    """The first layer of each part of the best cut: no part empty, the largest sum of costs as small as it can be.

    Among cuts with the same maximum the one with the smallest sum of squares wins, so that the other parts are even
    too. What lies before the first or after the last layer (embedding, output projection) always falls on the first or
    the last part: add its cost to that layer's.

    Args:
        costs: of each layer, in order, any unit, not negative.
        n_parts: pipeline stages times chunks per stage.

    Returns:
        `n_parts` ascending indices, the first of them 0.

    Raises:
        PlanError: fewer layers than parts, or no part at all.
    """
    n = len(costs)
    if not 1 <= n_parts <= n:
        raise PlanError(f"pipeline: {n} layers cannot be cut into {n_parts} parts without an empty one; at most {n}")
    if min(costs) < 0:
        raise PlanError(f"pipeline: the cost {min(costs)} of layer {list(costs).index(min(costs))} is negative")
    prefix = [0.0]
    for cost in costs:
        prefix.append(prefix[-1] + cost)
    largest = _smallest_maximum(prefix, n_parts)
    # best[k][j]: smallest sum of squares of k parts that end before layer j, none dearer than `largest`.
    infinite = float("inf")
    best = [[infinite] * (n + 1) for _ in range(n_parts + 1)]
    start = [[0] * (n + 1) for _ in range(n_parts + 1)]
    best[0][0] = 0.0
    for k in range(1, n_parts + 1):
        for j in range(k, n - (n_parts - k) + 1):
            for i in range(j - 1, k - 2, -1):
                cost = prefix[j] - prefix[i]
                if cost > largest:
                    break  # parts only grow from here
                if best[k - 1][i] + cost * cost < best[k][j]:
                    best[k][j], start[k][j] = best[k - 1][i] + cost * cost, i
    firsts, end = [], n
    for k in range(n_parts, 0, -1):
        end = start[k][end]
        firsts.append(end)
    return tuple(reversed(firsts))


def _smallest_maximum(prefix: Sequence[float], n_parts: int) -> float:
    """The largest part of the best cut, computed as `prefix[j] - prefix[i]`, so that it compares exactly."""
    n = len(prefix) - 1
    row = [float("inf"), *(prefix[j] - prefix[0] for j in range(1, n + 1))]
    for k in range(2, n_parts + 1):
        row = [
            min((max(row[i], prefix[j] - prefix[i]) for i in range(k - 1, j)), default=float("inf"))
            for j in range(n + 1)
        ]
    return row[n]


def part_sums(costs: Sequence[float], firsts: Sequence[int]) -> list[float]:
    """Σ cost of each part, given the first layer of each."""
    ends = [*firsts[1:], len(costs)]
    return [sum(costs[first:end]) for first, end in zip(firsts, ends, strict=True)]


def equal_counts(n_layers: int, n_parts: int) -> tuple[int, ...]:
    """The cut by number of layers that frameworks make by default: as equal as can be, longer parts first."""
    if not 1 <= n_parts <= n_layers:
        raise PlanError(f"pipeline: {n_layers} layers cannot be cut into {n_parts} parts without an empty one")
    each, longer = divmod(n_layers, n_parts)
    return tuple(part * each + min(part, longer) for part in range(n_parts))
