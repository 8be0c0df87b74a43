from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polylepis.data.errors import DataError
from polylepis.data.packing import PackPlan, best_fit_decreasing, permute, shuffle_quality

GOLDEN_10 = [6, 1, 4, 0, 5, 9, 2, 7, 8, 3]
GOLDEN_1000 = [859, 982, 584]


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5000), st.lists(st.integers(0, 2**63), min_size=1, max_size=4))
def test_permute_is_a_permutation(n: int, key: list[int]) -> None:
    image = permute(np.arange(n), n, key)
    assert np.array_equal(np.sort(image), np.arange(n))
    # Any subset gives the same images: that is what lets a rank start anywhere.
    some = np.arange(n)[::3]
    assert np.array_equal(permute(some, n, key), image[::3])


def test_permute_works_at_scale_without_memory_and_depends_on_its_key() -> None:
    n = 2**40 + 12345
    some = np.arange(0, 10_000, dtype=np.int64) * 999_983
    image = permute(some, n, (7, 1))
    assert len(np.unique(image)) == len(some) and image.min() >= 0 and image.max() < n
    assert not np.array_equal(image, permute(some, n, (7, 2)))
    assert not np.array_equal(image, permute(some, n, (1, 7)))
    assert 0.45 < image.mean() / n < 0.55
    with pytest.raises(DataError, match=r"indices must lie in 0\.\.9"):
        permute(np.array([10]), 10, (1,))


def test_permutations_are_frozen() -> None:
    """Golden values: a change here would break the resume of every run."""
    assert permute(np.arange(10), 10, (1, 0, 0)).tolist() == GOLDEN_10
    assert permute(np.arange(3), 1000, (1, 42, 7)).tolist() == GOLDEN_1000


def test_permutations_look_uniform() -> None:
    """Every position is taken by every value about equally often over many keys (chi-squared, 47 x 47 degrees)."""
    n, keys = 48, 2000
    counts = np.zeros((n, n))
    for key in range(keys):
        counts[np.arange(n), permute(np.arange(n), n, (9, key))] += 1
    expected = keys / n
    chi = ((counts - expected) ** 2 / expected).sum()
    assert 0.9 < chi / (n - 1) ** 2 < 1.15, chi


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 64), max_size=300))
def test_best_fit_keeps_every_item_once_and_no_bin_overflows(lengths: list[int]) -> None:
    array = np.array(lengths, dtype=np.int64)
    bins = best_fit_decreasing(array, 64)
    assert sorted(i for items in bins for i in items) == list(range(len(lengths)))
    sums = [int(array[items].sum()) for items in bins]
    assert all(0 < s <= 64 for s in sums)
    assert all(items == sorted(items) for items in bins)
    # Any-fit law: at most one bin is half empty or emptier.
    assert sum(s <= 32 for s in sums) <= 1
    assert best_fit_decreasing(array, 64) == bins


def test_best_fit_takes_the_fullest_bin() -> None:
    assert best_fit_decreasing(np.array([6, 7, 3, 4]), 10) == [[1, 2], [0, 3]]
    with pytest.raises(DataError, match=r"lengths must lie in 1\.\.10, got 3\.\.11"):
        best_fit_decreasing(np.array([11, 3]), 10)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 700), st.integers(1, 300), st.integers(0, 5), st.integers(0, 3))
def test_an_epoch_holds_every_document_exactly_once(n: int, window: int, seed: int, epoch: int) -> None:
    lengths = np.random.default_rng(n).integers(1, 100, n)
    plan = PackPlan(lengths, seq_len=100, window=window, seed=seed)
    packs = [pack for w in range(plan.n_windows) for pack in plan.packs(epoch, w)]
    assert np.array_equal(np.sort(np.concatenate(packs)), np.arange(n))
    assert max(int(lengths[pack].sum()) for pack in packs) <= 100
    assert plan.packs_per_epoch(epoch) == len(packs)
    fresh = PackPlan(lengths, seq_len=100, window=window, seed=seed)
    assert all(np.array_equal(a, b) for a, b in zip(fresh.packs(epoch, 0), plan.packs(epoch, 0), strict=True))


def test_fill_grows_with_the_window_and_order_is_well_shuffled() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5.0, 1.0, 8192).astype(np.int64), 8, 1024)
    fills = [PackPlan(lengths, seq_len=1024, window=window, seed=0).fill() for window in (16, 128, 2048)]
    assert fills == sorted(fills) and fills[-1] > 0.97, fills
    assert 0.95 < shuffle_quality(PackPlan(lengths, seq_len=1024, window=2048, seed=0)) < 1.05


def test_long_packs_are_not_all_at_the_front() -> None:
    lengths = np.random.default_rng(0).integers(5, 100, 2048)
    packs = PackPlan(lengths, seq_len=100, window=2048, seed=0).packs(0, 0)
    longest = np.array([lengths[pack].max() for pack in packs])
    half = len(longest) // 2
    assert abs(longest[:half].mean() - longest[half:].mean()) < 0.1 * longest.mean()


def test_refusals_name_the_numbers() -> None:
    lengths = np.array([10, 300, 20, 301])
    with pytest.raises(DataError, match=r"2 of 4 documents are longer than seq_len 256 \(the longest has 301 tokens"):
        PackPlan(lengths, seq_len=256, window=8, seed=0)
    with pytest.raises(DataError, match="no documents"):
        PackPlan(np.array([], dtype=np.int64), seq_len=256, window=8, seed=0)
    with pytest.raises(DataError, match="window >= 1"):
        PackPlan(lengths, seq_len=400, window=0, seed=0)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 900), st.integers(2, 64), st.integers(1, 9), st.integers(0, 3), st.integers(1, 300))
def test_blocks_hold_every_document_once_and_neighbours_together(
    n: int, block: int, spread: int, epoch: int, window: int
) -> None:
    lengths = np.random.default_rng(n).integers(1, 100, n)
    plan = PackPlan(lengths, seq_len=100, window=window, seed=3, block=block, spread=spread)
    order = plan.order(epoch, np.arange(n))
    assert np.array_equal(np.sort(order), np.arange(n))
    assert np.array_equal(plan.order(epoch, np.arange(n)[::5]), order[::5])
    assert np.array_equal(np.concatenate([plan.documents(epoch, w) for w in range(plan.n_windows)]), order)
    # Each shuffle window touches few blocks: its own number, and one more where the short one shifts the cut.
    for start in range(0, n, block * spread):
        assert len(np.unique(order[start : start + block * spread] // block)) <= spread + 1


def test_blocks_still_shuffle_well() -> None:
    plan = PackPlan(np.ones(20_000, dtype=np.int64), seq_len=8, window=512, seed=0, block=64, spread=16)
    assert 0.9 < shuffle_quality(plan) < 1.1
    with pytest.raises(DataError, match="block >= 1 and spread >= 1"):
        PackPlan(np.ones(5), seq_len=8, window=4, seed=0, block=0)
