"""Which source each pack comes from: a deterministic stride schedule that can be entered at any draw.

Weights are token budgets: every pack holds the same number of tokens, so shares of packs are shares of tokens. The
sources are the leaves of a Huffman tree over their weights, and every inner node deals its draws to its two children
like a line on a pixel screen (Bresenham): after n draws the left child has had round(n * p). That is exact integer
arithmetic, the same on every machine; the counts after any number of draws are one walk over the tree.

Each node errs by at most half a pack, scaled by the share of it that reaches the leaf. In a Huffman tree these shares
shrink at least like reciprocal Fibonacci numbers on the way up, so no source is ever further than
(1 + 1 + 1/2 + 1/3 + 1/5 + ...) / 2 = 1.68 packs from its share of a stage.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import gcd

import numpy as np

from .errors import DataError


@dataclass(frozen=True)
class Source:
    """One source of a mix.

    Attributes:
        weight: its share of the tokens, relative to the other sources'; 0 is never drawn.
        path: folder or URL of its data set; empty means the stream's own `path`.
        split: its split.
    """

    weight: float
    path: str = ""
    split: str = "train"

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True)
class Stage:
    """Other weights from a certain pack on.

    Attributes:
        first: the first draw (pack of the whole run) of the stage, from 1.
        weights: source name -> weight; sources that are not named get 0.
    """

    first: int
    weights: dict[str, float] = field(default_factory=dict)

    __pydantic_config__ = {"extra": "forbid"}


class Schedule:
    """The stride schedule of one stage.

    Args:
        weights: one per source, finite, not negative, not all zero; they count exactly, as the binary fractions
            that floats are.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.n_sources = len(weights)
        ratios = [weight.as_integer_ratio() for weight in weights]
        scale = max(denominator for _, denominator in ratios)  # of floats: powers of two
        exact = [numerator * (scale // denominator) for numerator, denominator in ratios]
        # (weight, tie-breaker, leaf number or (left, right, left share, both)); zero weights are never drawn.
        heap: list[tuple[int, int, object]] = [(w, i, i) for i, w in enumerate(exact) if w]
        heapq.heapify(heap)
        order = self.n_sources
        while len(heap) > 1:
            light, heavy = heapq.heappop(heap), heapq.heappop(heap)
            both = light[0] + heavy[0]
            common = gcd(light[0], both)
            node = (light[2], heavy[2], light[0] // common, both // common)
            heapq.heappush(heap, (both, order, node))
            order += 1
        self._root = heap[0][2]

    def counts(self, draws: int) -> list[int]:
        """How often each source was drawn in the first `draws` draws, in closed form."""
        counts = [0] * self.n_sources
        waiting: list[tuple[object, int]] = [(self._root, draws)]
        while waiting:
            node, n = waiting.pop()
            if isinstance(node, tuple):
                left, right, part, whole = node
                first = (2 * n * part + whole) // (2 * whole)
                waiting += [(left, first), (right, n - first)]
            else:
                counts[int(str(node))] = n
        return counts

    def draw(self, n: int) -> int:
        """The source of draw `n` (from 0)."""
        node = self._root
        while isinstance(node, tuple):
            left, right, part, whole = node
            before, after = ((2 * m * part + whole) // (2 * whole) for m in (n, n + 1))
            node, n = (left, before) if after > before else (right, n - before)
        return int(str(node))


class Mix:
    """The sources of all draws of a run, over all its stages.

    Args:
        weights: source name -> weight of the first stage, in bank order.
        stages: later stages, with ascending `first`. A source's own position carries over from stage to stage; the
            shares count from the stage's first draw.

    Raises:
        DataError: no source; a weight that is negative or not finite; weights that are all zero; a stage that names an
            unknown source or does not begin after the one before it.
    """

    def __init__(self, weights: Mapping[str, float], stages: Sequence[Stage] = ()) -> None:
        self.names = tuple(weights)
        if not self.names:
            raise DataError("a mix needs at least one source")
        self.tables = [_check("sources", self.names, weights)]
        self.firsts = [0]
        for number, stage in enumerate(stages, 1):
            if stage.first <= self.firsts[-1]:
                raise DataError(
                    f"stages[{number - 1}].first is {stage.first}: a stage begins after draw {self.firsts[-1]}, where "
                    "the one before it begins"
                )
            self.tables.append(_check(f"stages[{number - 1}].weights", self.names, stage.weights))
            self.firsts.append(stage.first)
        self._schedules = [Schedule(table) for table in self.tables]
        self._before = [np.zeros(len(self.names), dtype=np.int64)]
        for schedule, first, last in zip(self._schedules, self.firsts[:-1], self.firsts[1:], strict=False):
            self._before.append(self._before[-1] + np.array(schedule.counts(last - first), dtype=np.int64))

    def stage(self, draw: int) -> int:
        """The stage that a draw belongs to."""
        return bisect_right(self.firsts, draw) - 1

    def counts(self, draws: int) -> np.ndarray:
        """int64 [sources]: how often each was drawn in the first `draws` draws of the run."""
        stage = self.stage(draws)
        inside = self._schedules[stage].counts(draws - self.firsts[stage])
        return self._before[stage] + np.array(inside, dtype=np.int64)

    def sources(self, first: int, count: int) -> np.ndarray:
        """int64 [count]: the source of each of the draws from `first` on."""
        if len(self.names) == 1:
            return np.zeros(count, dtype=np.int64)
        drawn = []
        for draw in range(first, first + count):
            stage = self.stage(draw)
            drawn.append(self._schedules[stage].draw(draw - self.firsts[stage]))
        return np.array(drawn, dtype=np.int64)


def _check(where: str, names: Sequence[str], weights: Mapping[str, float]) -> list[float]:
    """One weight per name; DataError for an unusable one."""
    unknown = sorted(set(weights) - set(names))
    if unknown:
        raise DataError(f"{where} names {', '.join(unknown)}; the sources are {', '.join(names)}")
    for name, weight in weights.items():
        if not 0.0 <= weight < float("inf"):
            raise DataError(f"{where}: the weight of {name} must be finite and not negative, got {weight}")
    if not any(weights.values()):
        raise DataError(f"{where}: the weights of {', '.join(names)} are all zero: nothing would be drawn")
    return [float(weights.get(name, 0.0)) for name in names]
