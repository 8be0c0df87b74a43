"""Slow ranks: each rank's own work (step time without waiting in collectives) against the median of all."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
import torch.distributed as dist

from .config import HealthConfig


@dataclass(frozen=True)
class Comparison:
    """Attributes:
    own: seconds of own work per step, by rank.
    median: of them.
    slow: ranks above `straggler_factor` × median, slowest first.
    """

    own: list[float]
    median: float
    slow: list[int]

    @property
    def imbalance(self) -> float:
        """Seconds per step that the average rank waits for the slowest."""
        return max(self.own) - sum(self.own) / len(self.own)


class Stragglers:
    """Sums up own work and compares it every `straggler_every` steps: one all-gather of a number per rank."""

    def __init__(self, config: HealthConfig) -> None:
        self.config = config
        self._own, self._steps = 0.0, 0
        self._streaks: dict[int, int] = {}

    def add(self, own_seconds: float) -> None:
        """A step's own work on this rank."""
        self._own += own_seconds
        self._steps += 1

    def due(self) -> bool:
        return self._steps >= self.config.straggler_every

    def compare(self) -> Comparison:
        """All ranks call it at the same step; the same answer on each."""
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        mine = torch.tensor([self._own / max(1, self._steps)], dtype=torch.float64, device=device)
        everyone = mine.new_empty(dist.get_world_size())
        dist.all_gather_into_tensor(everyone, mine)
        self._own, self._steps = 0.0, 0
        own = everyone.tolist()
        # The lower of the two middle ones for an even number: of two ranks, the slower one is slow.
        median = statistics.median_low(own)
        limit = self.config.straggler_factor * median
        slow = sorted((rank for rank, seconds in enumerate(own) if seconds > limit), key=lambda rank: -own[rank])
        self._streaks = {rank: self._streaks.get(rank, 0) + 1 for rank in slow}
        return Comparison(own, median, slow)

    def persistent(self) -> list[int]:
        """Ranks that were slow in `straggler_limit` comparisons in a row."""
        return [rank for rank, streak in self._streaks.items() if streak >= self.config.straggler_limit]
