"""The stride schedule: never two packs from its shares, entered anywhere, the same whatever was asked before."""

from __future__ import annotations

import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polylepis.data.errors import DataError
from polylepis.data.mixing import Mix, Schedule, Stage

WEIGHTS = st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e6), st.integers(1, 9).map(float)), min_size=1, max_size=24)


@settings(max_examples=150, deadline=None)
@given(WEIGHTS.filter(any), st.integers(0, 10**12))
def test_counts_are_never_two_packs_from_their_shares(weights: list[float], n: int) -> None:
    """Megatron-LM #705 fails for extreme weights; Energon draws at random per worker, and strays."""
    schedule = Schedule(weights)
    total = sum(map(Fraction, weights))
    for draws in (0, 1, 2, 7, 100, n):
        counts = schedule.counts(draws)
        assert sum(counts) == draws
        worst = max(abs(c - draws * Fraction(w) / total) for c, w in zip(counts, weights, strict=True))
        assert worst <= Fraction(168, 100), worst


@settings(max_examples=60, deadline=None)
@given(WEIGHTS.filter(any), st.integers(0, 10**9))
def test_draws_agree_with_counts_wherever_one_enters(weights: list[float], first: int) -> None:
    schedule = Schedule(weights)
    before = schedule.counts(first)
    for draw in range(first, first + 40):
        after = schedule.counts(draw + 1)
        source = schedule.draw(draw)
        assert [b - a for a, b in zip(before, after, strict=True)] == [int(i == source) for i in range(len(weights))]
        before = after


def test_the_worst_case_for_huffman_trees_stays_below_two() -> None:
    """Fibonacci weights make the deepest tree."""
    weights = [1.0, 1.0]
    while len(weights) < 24:
        weights.append(weights[-1] + weights[-2])
    schedule, total, worst = Schedule(weights), sum(weights), 0.0
    for n in range(20_000):
        worst = max(worst, max(abs(c - n * w / total) for c, w in zip(schedule.counts(n), weights, strict=True)))
    assert worst < 1.68, worst


def test_random_access_to_draw_one_billion_is_fast() -> None:
    mix = Mix({f"s{i}": float(w) for i, w in enumerate(np.random.default_rng(0).random(20))})
    started = time.process_time()
    for _ in range(20):
        mix.counts(10**9)
        mix.sources(10**9, 1)
    assert (time.process_time() - started) / 20 < 5e-3


def test_stages_switch_at_their_draw_and_positions_carry_over() -> None:
    mix = Mix({"a": 1.0, "b": 1.0}, [Stage(100, {"b": 1.0, "a": 3.0}), Stage(301, {"b": 1.0})])
    assert mix.counts(100).tolist() == [50, 50] and mix.counts(300).tolist() == [200, 100]
    drawn = mix.sources(0, 500)
    assert (drawn[301:] == 1).all()
    for n in range(0, 501, 7):
        assert np.array_equal(np.bincount(drawn[:n], minlength=2), mix.counts(n))
    assert [mix.stage(n) for n in (0, 99, 100, 300, 301, 10**9)] == [0, 0, 1, 1, 2, 2]
    assert np.array_equal(mix.sources(250, 100), drawn[250:350])


def test_the_schedule_is_frozen() -> None:
    """Golden values: a change here would break the resume of every mixed run."""
    assert Mix({"a": 5.0, "b": 3.0, "c": 2.0}).sources(0, 20).tolist() == GOLDEN


GOLDEN = [0, 1, 0, 2, 0, 1, 0, 2, 0, 1, 0, 1, 0, 2, 0, 1, 0, 2, 0, 1]


@pytest.mark.parametrize(
    ("weights", "stages", "message"),
    [
        ({}, [], "at least one source"),
        ({"a": -1.0, "b": 2.0}, [], r"sources: the weight of a must be finite and not negative, got -1\.0"),
        ({"a": float("nan")}, [], "weight of a must be finite"),
        ({"a": 0.0, "b": 0.0}, [], "weights of a, b are all zero"),
        ({"a": 1.0}, [Stage(5, {"c": 1.0})], r"stages\[0\]\.weights names c; the sources are a"),
        ({"a": 1.0}, [Stage(5, {"a": 0.0})], r"stages\[0\]\.weights: the weights of a are all zero"),
        ({"a": 1.0}, [Stage(5, {"a": 1.0}), Stage(5, {"a": 2.0})], r"stages\[1\]\.first is 5: .* after draw 5"),
        ({"a": 1.0}, [Stage(0, {"a": 1.0})], r"stages\[0\]\.first is 0: .* after draw 0"),
    ],
)
def test_refusals(weights: dict[str, float], stages: list[Stage], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Mix(weights, stages)
