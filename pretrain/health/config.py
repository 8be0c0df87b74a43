"""What each guard does and when it speaks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import ConfigError

Mode = Literal["off", "warn", "act"]


@dataclass(frozen=True)
class HealthConfig:
    """Guards, each `off`, `warn` (an event is recorded) or `act` (and something is done about it).

    Attributes:
        hang: watchdog; acts by ending the process, so that the launcher restarts the run.
        hang_seconds: so long in one phase of one step is a hang, if it is also three times what that phase took in the
            step before. Keep it below `train.timeout`, which ends the process without saying where it was.
        slow_seconds: the same for starting (the first step compiles kernels) and for saving and loading.
        nan: a gradient norm that is not finite; acts by leaving the step out.
        nan_limit: so many such steps in a row stop the run.
        spike: a loss or gradient norm far above the recent ones; acts by rolling back and leaving the batches out.
        spike_window: accepted steps that "recent" means.
        spike_history: accepted steps without which nothing is called a spike; warm-up steps do not count.
        spike_deviations: how far above the median, in standard deviations estimated from the median deviation.
        spike_floor, spike_norm_floor: the smallest such standard deviation of the loss, and of the gradient norm, as a
            share of the median; norms have heavy tails, and clipping bears several times the usual.
        spike_before, spike_after: batches before and after the one that spiked which are left out with it.
        max_rollbacks: rollbacks within `spike_window` steps after which the run stops.
        snapshot_every: steps between the two states in memory that a rollback returns to (with `spike: act`).
        straggler: a rank whose own work takes longer than the others'; acts by stopping the run, naming it.
        straggler_every: steps between comparisons.
        straggler_factor: so many times the median is slow.
        straggler_limit: so many comparisons in a row make a rank a straggler to act on.
        replicas: state that should be the same on several ranks and is not; acts by stopping the run.
        replicas_every: steps between comparisons.
        memory: writes a report when memory runs out; `act` also keeps CUDA's allocation history for it.
    """

    hang: Mode = "act"
    hang_seconds: float = 300.0
    slow_seconds: float = 3600.0
    nan: Mode = "act"
    nan_limit: int = 3
    spike: Mode = "warn"
    spike_window: int = 128
    spike_history: int = 32
    spike_deviations: float = 12.0
    spike_floor: float = 0.01
    spike_norm_floor: float = 0.5
    spike_before: int = 1
    spike_after: int = 0
    max_rollbacks: int = 3
    snapshot_every: int = 100
    straggler: Mode = "warn"
    straggler_every: int = 50
    straggler_factor: float = 1.5
    straggler_limit: int = 3
    replicas: Mode = "act"
    replicas_every: int = 500
    memory: Mode = "warn"

    __pydantic_config__ = {"extra": "forbid"}

    def check(self) -> None:
        """Refuse thresholds that mean nothing.

        Raises:
            ConfigError: names the key, the value and what is accepted.
        """
        least = {
            "nan_limit": 1,
            "spike_window": 4,
            "spike_history": 4,
            "spike_before": 0,
            "spike_after": 0,
            "max_rollbacks": 1,
            "snapshot_every": 1,
            "straggler_every": 1,
            "straggler_limit": 1,
            "replicas_every": 1,
        }
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ConfigError(f"health.{name}: must be at least {smallest}, not {getattr(self, name)}")
        for name in ("hang_seconds", "slow_seconds", "spike_deviations", "spike_floor", "spike_norm_floor"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"health.{name}: must be positive and finite, not {getattr(self, name)}")
        if not self.straggler_factor > 1:
            raise ConfigError(f"health.straggler_factor: must be above 1, not {self.straggler_factor}")
        if self.spike_history > self.spike_window:
            raise ConfigError(
                f"health.spike_history: {self.spike_history} steps never come together in a spike_window of "
                f"{self.spike_window}"
            )
