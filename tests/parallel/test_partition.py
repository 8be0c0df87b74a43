"""The partition against brute force."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polylepis.parallel.errors import PlanError
from polylepis.parallel.pipeline.partition import equal_counts, part_sums, partition


def every_cut(n_layers: int, n_parts: int) -> list[tuple[int, ...]]:
    return [(0, *inner) for inner in combinations(range(1, n_layers), n_parts - 1)]


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[float], int]:
    whole = draw(st.booleans())
    cost = st.integers(0, 12).map(float) if whole else st.floats(0, 1e6)
    costs = draw(st.lists(cost, min_size=1, max_size=9))
    return costs, draw(st.integers(1, len(costs)))


@settings(max_examples=150, deadline=None)
@given(cases())
def test_partition_is_the_best_of_all_cuts(case: tuple[list[float], int]) -> None:
    costs, n_parts = case
    firsts = partition(costs, n_parts)
    assert firsts in every_cut(len(costs), n_parts)

    def score(cut: tuple[int, ...]) -> tuple[float, float]:
        sums = part_sums(costs, cut)
        return max(sums), sum(s * s for s in sums)

    best = min(score(cut) for cut in every_cut(len(costs), n_parts))
    got = score(firsts)
    assert got[0] == pytest.approx(best[0], rel=1e-9, abs=1e-9)
    if all(cost == int(cost) for cost in costs):  # floats may tie in the maximum only up to rounding
        assert got == best


def test_equal_counts_covers_all_layers() -> None:
    assert equal_counts(56, 8) == tuple(range(0, 56, 7))
    assert equal_counts(7, 3) == (0, 3, 5)


@pytest.mark.parametrize(("n_layers", "n_parts"), [(3, 4), (3, 0), (1, 2)])
def test_refuses_an_empty_part(n_layers: int, n_parts: int) -> None:
    for cut in (lambda: partition([1.0] * n_layers, n_parts), lambda: equal_counts(n_layers, n_parts)):
        with pytest.raises(PlanError, match=rf"{n_layers} layers cannot be cut into {n_parts} parts"):
            cut()


def test_refuses_negative_costs() -> None:
    with pytest.raises(PlanError, match=r"cost -1\.0 of layer 1 is negative"):
        partition([1.0, -1.0], 2)
