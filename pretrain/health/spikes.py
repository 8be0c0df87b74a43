"""Spikes: a value far above the median of the recent ones, in units of their median deviation.

Median and median absolute deviation do not move for the spike itself, so the second step of a spike is judged by the
same measure as the first. A falling loss makes the median lag behind above it, which errs on the quiet side.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from .config import HealthConfig

NORMAL = 1.4826  # standard deviations per median absolute deviation, of a normal distribution


def deviations(value: float, history: Sequence[float], floor: float) -> float:
    """How many standard deviations `value` lies above the median of `history`.

    Args:
        floor: smallest standard deviation, as a share of the median: a flat history must not make a ripple a spike.
    """
    if not math.isfinite(value):
        return math.inf
    values = np.asarray(history, dtype=np.float64)
    median = float(np.median(values))
    spread = max(NORMAL * float(np.median(np.abs(values - median))), floor * abs(median), 1e-300)
    return (value - median) / spread


class SpikeDetector:
    """Recent losses and gradient norms of accepted steps; deterministic, and its state travels in checkpoints.

    Args:
        config: thresholds.
        warmup: steps of learning-rate warm-up, whose norms say nothing about later ones: nothing is a spike there.
    """

    QUANTITIES = ("loss", "grad_norm")

    def __init__(self, config: HealthConfig, warmup: int) -> None:
        self.config, self.warmup = config, warmup
        self._recent = {name: deque[float](maxlen=config.spike_window) for name in self.QUANTITIES}

    def judge(self, step: int, values: dict[str, float]) -> dict[str, float]:
        """The quantities that spike at this step (from 1), with their deviations; empty if none does."""
        found: dict[str, float] = {}
        for name in self.QUANTITIES:
            history = self._recent[name]
            if step > self.warmup and len(history) >= self.config.spike_history:
                floor = self.config.spike_floor if name == "loss" else self.config.spike_norm_floor
                distance = deviations(values[name], history, floor)
                if distance > self.config.spike_deviations:
                    found[name] = distance
        return found

    def accept(self, step: int, values: dict[str, float]) -> None:
        """A step that was trained on belongs to the history from now on; warm-up steps and the infinite do not."""
        if step > self.warmup and all(math.isfinite(values[name]) for name in self.QUANTITIES):
            for name in self.QUANTITIES:
                self._recent[name].append(values[name])

    def median(self, name: str) -> float:
        return float(np.median(self._recent[name]))

    def state_dict(self) -> dict[str, Any]:
        return {name: list(values) for name, values in self._recent.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.QUANTITIES:
            self._recent[name] = deque(map(float, state.get(name, ())), maxlen=self.config.spike_window)
