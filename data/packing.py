"""Which documents stand together in which row, as a pure function of (seed, epoch, position).

The order of an epoch is a keyed permutation that needs no memory (a Feistel network); it is cut into windows of a fixed
number of documents, each packed from lengths alone. Every rank computes the same plan, reads only its own rows, and can
start anywhere.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence

import numpy as np

from .errors import DataError

_ROUNDS = 4
_MASK64 = (1 << 64) - 1


def _mix(values: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: every bit of a uint64 depends on every other."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _round_keys(key: Sequence[int]) -> np.ndarray:
    """uint64 [rounds] from any tuple of integers."""
    state = np.array([0x9E3779B97F4A7C15], dtype=np.uint64)
    for word in key:
        state = _mix(state ^ _mix(np.array([(word + 0x632BE59BD9B4E019) & _MASK64], dtype=np.uint64)))
    return _mix(state + np.arange(1, _ROUNDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))


def permute(indices: np.ndarray, n: int, key: Sequence[int]) -> np.ndarray:
    """Images of `indices` under the permutation of 0..n-1 that `key` names.

    A Feistel network permutes the next power of four; values that land at n or beyond are permuted again until they
    land inside ("cycle walking"), which keeps it a permutation.

    Args:
        indices: int64 [m], each in 0..n-1.
        n: size of the set, at least 1.
        key: integers, e.g. (seed, epoch).

    Returns:
        int64 [m], distinct where `indices` are.

    Raises:
        DataError: an index outside 0..n-1.
    """
    indices = np.asarray(indices, dtype=np.int64)
    if indices.size and (indices.min() < 0 or indices.max() >= n):
        raise DataError(f"indices must lie in 0..{n - 1}, got {indices.min()}..{indices.max()}")
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = _round_keys(key)
    values = indices.astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        walking = values[outside]
        left, right = walking >> half, walking & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        values[outside] = (left << half) | right
        outside = values >= np.uint64(n)
    return values.astype(np.int64)


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Packs items of `lengths` int64 [n] into bins of `capacity`; returns the item numbers of every bin, ascending.

    Longest first (ties: lower number first), each into the fullest bin that still has room (ties: the bin that has
    waited longest). About a microsecond per item: bins wait in queues by free room, and the bits of one integer say
    which queues are not empty.

    Raises:
        DataError: an item that is longer than a bin, or empty.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if lengths.size and (lengths.max() > capacity or lengths.min() < 1):
        raise DataError(f"lengths must lie in 1..{capacity}, got {lengths.min()}..{lengths.max()}")
    bins: list[list[int]] = []
    waiting: list[deque[int]] = [deque() for _ in range(capacity + 1)]
    occupied = 0
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        fitting = occupied >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            chosen = waiting[room].popleft()
            if not waiting[room]:
                occupied ^= 1 << room
        else:
            room, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(item)
        rest = room - length
        if rest:
            waiting[rest].append(chosen)
            occupied |= 1 << rest
    return [sorted(items) for items in bins]


class PackPlan:
    """All packs of all epochs of a set of documents, planned window by window on demand.

    Args:
        lengths: int64 [n] tokens per document.
        seq_len: tokens per pack.
        window: documents per window, the radius within which packing may look; the last window may be shorter.
        seed: names the order.
        block: 1 shuffles all documents of an epoch. More keeps that many neighbours together, for stores where reading
            near by is cheaper: blocks are shuffled, and then the documents within each `spread` blocks.
        spread: blocks of a shuffle window; a step then touches about so many places, and a document stays within
            block * spread of its block.

    Raises:
        DataError: no documents, impossible sizes, or documents longer than seq_len (they are counted and named).
    """

    def __init__(
        self, lengths: np.ndarray, *, seq_len: int, window: int, seed: int, block: int = 1, spread: int = 32
    ) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.seq_len, self.window, self.seed = seq_len, window, seed
        self.block, self.spread = block, spread
        if block < 1 or spread < 1:
            raise DataError(f"block >= 1 and spread >= 1 are needed, got {block} and {spread}")
        if not len(self.lengths):
            raise DataError("there are no documents to pack")
        if seq_len < 2 or window < 1:
            raise DataError(f"seq_len >= 2 and window >= 1 are needed, got {seq_len} and {window}")
        too_long = int((self.lengths > seq_len).sum())
        if too_long:
            raise DataError(
                f"{too_long} of {len(self.lengths)} documents are longer than seq_len {seq_len} "
                f"(the longest has {self.lengths.max()} tokens) and are never cut here: raise seq_len to at least "
                f"{self.lengths.max()}, or build the data set with shorter documents"
            )
        self._cache: OrderedDict[tuple[int, int], list[np.ndarray]] = OrderedDict()

    @property
    def n_windows(self) -> int:
        """Windows per epoch."""
        return -(-len(self.lengths) // self.window)

    def documents(self, epoch: int, window: int) -> np.ndarray:
        """Samples int64 [m] of one window, in the epoch's order."""
        start = window * self.window
        positions = np.arange(start, min(start + self.window, len(self.lengths)), dtype=np.int64)
        return self.order(epoch, positions)

    def order(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """The samples int64 [m] at `positions` of an epoch."""
        n = len(self.lengths)
        if self.block == 1:
            return permute(positions, n, (1, self.seed, epoch))
        reach = self.block * self.spread
        inside = np.empty(len(positions), dtype=np.int64)
        for window in np.unique(positions // reach).tolist():
            here = positions // reach == window
            size = min(reach, n - window * reach)
            local = permute(positions[here] - window * reach, size, (4, self.seed, epoch, window))
            inside[here] = window * reach + local
        # Blocks in their new order; the short last one lies somewhere among them and shifts what comes after it.
        blocks = -(-n // self.block)
        short = n - (blocks - 1) * self.block
        at = int(np.flatnonzero(permute(np.arange(blocks), blocks, (5, self.seed, epoch)) == blocks - 1)[0])
        before = inside < at * self.block
        shifted = np.where(before, inside, inside + self.block - short)
        slot, offset = shifted // self.block, shifted % self.block
        in_short = ~before & (inside < at * self.block + short)
        slot = np.where(in_short, at, slot)
        offset = np.where(in_short, inside - at * self.block, offset)
        return permute(slot, blocks, (5, self.seed, epoch)) * self.block + offset

    def packs(self, epoch: int, window: int) -> list[np.ndarray]:
        """The packs of one window, each the samples int64 [k] of one row, in row order."""
        at = (epoch, window)
        if at not in self._cache:
            samples = self.documents(epoch, window)
            bins = best_fit_decreasing(self.lengths[samples], self.seq_len)
            # Packing sorts by length; without another permutation long documents would all come first.
            order = permute(np.arange(len(bins)), len(bins), (2, self.seed, epoch, window))
            self._cache[at] = [samples[bins[i]] for i in order.tolist()]
            while len(self._cache) > 4:
                self._cache.popitem(last=False)
        self._cache.move_to_end(at)
        return self._cache[at]

    def packs_per_epoch(self, epoch: int = 0) -> int:
        """Number of packs of an epoch (plans all of it: about a microsecond per document)."""
        return sum(len(self.packs(epoch, window)) for window in range(self.n_windows))

    def fill(self, epoch: int = 0) -> float:
        """Share of an epoch's positions that hold a token, 0..1."""
        return float(self.lengths.sum() / (self.packs_per_epoch(epoch) * self.seq_len))


def shuffle_quality(plan: PackPlan, epoch: int = 0) -> float:
    """How far documents travel from storage order, relative to a perfect shuffle: about 1.0 is perfect, 0 is none.

    The mean distance between a document's position in the epoch and its position in the shards, over n / 3.
    """
    n = len(plan.lengths)
    if n < 2:
        return 1.0
    order = plan.order(epoch, np.arange(n, dtype=np.int64))
    return float(np.abs(order - np.arange(n)).mean() / ((n * n - 1) / (3 * n)))
