"""Dealing packs out by cost: always the same packs, never worse, and near the best of all ways."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polylepis.parallel.errors import PlanError
from polylepis.parallel.pipeline.deal import deal, imbalance, straggler_time

SIZES = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4))


@settings(max_examples=100, deadline=None)
@given(SIZES, st.booleans(), st.data())
def test_laws(sizes: tuple[int, int, int], lockstep: bool, data: st.DataObject) -> None:
    n_ranks, micro_batch, count = sizes
    n = n_ranks * micro_batch * count
    costs = data.draw(st.lists(st.integers(1, 50).map(float), min_size=n, max_size=n))
    order = deal(costs, n_ranks, micro_batch, lockstep)
    assert sorted(order) == list(range(n)) and order == deal(costs, n_ranks, micro_batch, lockstep)
    after = straggler_time(costs, order, n_ranks, micro_batch, lockstep)
    assert sum(costs) / n_ranks - 1e-9 <= after
    assert after <= straggler_time(costs, range(n), n_ranks, micro_batch, lockstep)
    assert imbalance(costs, order, n_ranks, micro_batch, lockstep) == pytest.approx(after * n_ranks / sum(costs))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 20).map(float), min_size=6, max_size=6))
def test_in_lockstep_with_one_pack_at_a_time_it_is_the_best(costs: list[float]) -> None:
    best = min(straggler_time(costs, order, 2, 1) for order in itertools.permutations(range(6)))
    assert straggler_time(costs, deal(costs, 2, 1), 2, 1) == best


def test_by_hand() -> None:
    """Two ranks, two micro-batches of one: 9 and 8 meet, 1 and 2 meet; the rank with 9 gets the 1."""
    costs = [9.0, 1.0, 2.0, 8.0]
    assert straggler_time(costs, range(4), 2, 1) == 9 + 8
    assert [costs[pack] for pack in deal(costs, 2, 1)] == [9, 1, 8, 2]
    assert straggler_time(costs, deal(costs, 2, 1), 2, 1) == 9 + 2
    assert straggler_time(costs, range(4), 2, 1, lockstep=False) == 10


def test_equal_costs_stay_in_order() -> None:
    assert deal([3.0] * 8, 2, 2) == list(range(8))


def test_refusal() -> None:
    with pytest.raises(PlanError, match="10 packs do not divide over 2 ranks with micro-batches of 2"):
        deal([1.0] * 10, 2, 2)
