"""What this rank is doing right now: told by the loop, read by the threads that watch it, summed up per step."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Beat:
    """One sign of life.

    Attributes:
        step: the step being worked on, from 1; 0 before the first.
        phase: start (everything before the first step), data, compute, update, checkpoint, snapshot or
            between (bookkeeping).
        since: when it began, seconds of the monotonic clock, which no clock adjustment moves.
        count: phases entered so far.
    """

    step: int
    phase: str
    since: float
    count: int


class Pulse:
    """The loop calls `enter`; other threads only read: `beat`, one reference that is replaced whole, and `first`.

    Attributes:
        first: the step that this process began with, from 1; 0 before it.
    """

    def __init__(self) -> None:
        self.first = 0
        self.beat = Beat(0, "start", time.monotonic(), 0)
        self.last: dict[str, float] = {}  # seconds of the newest phase of each kind that has ended
        self._seconds: dict[str, float] = {}

    def enter(self, phase: str, step: int | None = None) -> None:
        """The loop is now in `phase` (of `step`, where a new one begins)."""
        now, old = time.monotonic(), self.beat
        self._seconds[old.phase] = self._seconds.get(old.phase, 0.0) + now - old.since
        self.last[old.phase] = now - old.since
        self.first = self.first or step or 0
        self.beat = Beat(old.step if step is None else step, phase, now, old.count + 1)

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call, the present phase's so far included."""
        self.enter(self.beat.phase)
        seconds, self._seconds = self._seconds, {}
        return seconds
