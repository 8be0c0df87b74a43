"""When each operation of a schedule starts and ends, given what each stage costs: step time, bubble, idle ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import PlanError
from .schedule import Op, Schedule, done_by, needs


@dataclass(frozen=True)
class StageTime:
    """Seconds of one stage for one micro-batch.

    Attributes:
        forward, inputs, weights: of F, I and W; B takes inputs + weights.
    """

    forward: float
    inputs: float
    weights: float

    @property
    def backward(self) -> float:
        return self.inputs + self.weights

    @property
    def total(self) -> float:
        return self.forward + self.backward


@dataclass(frozen=True)
class Span:
    """One operation on the time line, seconds from the start of the step."""

    rank: int
    op: Op
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """What the simulation found.

    Attributes:
        schedule: what was simulated.
        spans: every operation, by rank and start.
        seconds: from the first forward to the end of the last operation.
        busy: seconds of work of each rank.
    """

    schedule: Schedule
    spans: tuple[Span, ...]
    seconds: float
    busy: tuple[float, ...]

    @property
    def bubble_seconds(self) -> float:
        """Time in which the busiest rank waits: what the schedule loses, unevenness of the stages left aside."""
        return self.seconds - max(self.busy)

    @property
    def bubble(self) -> float:
        """The share of all ranks' time that is idle, unevenness included."""
        return 1 - sum(self.busy) / (len(self.busy) * self.seconds) if self.seconds else 0.0

    def idle(self, rank: int) -> float:
        return self.seconds - self.busy[rank]


def simulate(
    schedule: Schedule, times: Sequence[StageTime], send: float = 0.0, together: Sequence[float] | None = None
) -> Timeline:
    """Run the table: an operation starts when its rank is free and what it needs has been done, and has arrived.

    Sends overlap with computation, as torch's runtime posts them; a rank waits only for what it receives.

    Args:
        times: of each stage (of each part of the model, for DualPipe).
        send: seconds from the end of a stage on one rank to the arrival of its activations (or gradients) on another.
        together: for each stage, seconds of a forward and a backward that run as one (DualPipe's F&B); None runs one
            after the other, as torch does.

    Raises:
        PlanError: not one time per stage; a table that deadlocks.
    """
    if len(times) != schedule.n_stages:
        raise PlanError(f"simulation: {len(times)} stage times for {schedule.n_stages} stages")
    done: dict[tuple[str, int, int], tuple[float, int]] = {}
    position, free, busy = [[0] * schedule.n_ranks, [0.0] * schedule.n_ranks, [0.0] * schedule.n_ranks]
    spans: list[Span] = []

    def ready(op: Op, rank: int) -> float | None:
        """When everything that `op` needs is on its rank; None while something is not done."""
        latest = 0.0
        for need in needs(op, schedule.n_stages):
            if need not in done:
                return None
            end, origin = done[need]
            latest = max(latest, end + (send if origin != rank else 0.0))
        return latest

    def run(rank: int) -> bool:
        """Do the rank's next operation (or joint pair), if it can start."""
        row, at = schedule.table[rank], int(position[rank])
        pair = list(row[at : at + (2 if row[at].with_next and together is not None else 1)])
        starts = [ready(op, rank) for op in pair]
        if any(start is None for start in starts):
            return False
        start = max(free[rank], *(s for s in starts if s is not None))
        seconds = together[pair[0].stage] if together is not None and len(pair) == 2 else _seconds(pair[0], times)
        for op in pair:
            spans.append(Span(rank, op, start, start + seconds))
            done.update(dict.fromkeys(done_by(op), (start + seconds, rank)))
        free[rank], busy[rank] = start + seconds, busy[rank] + seconds
        position[rank] += len(pair)
        return True

    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(schedule.table):
            while position[rank] < len(row) and run(rank):
                moved = True
    if any(position[rank] < len(row) for rank, row in enumerate(schedule.table)):
        raise PlanError(f"simulation: {schedule.name} deadlocks where F and B run as one")
    spans.sort(key=lambda span: (span.rank, span.start))
    return Timeline(schedule, tuple(spans), max(free), tuple(busy))


def _seconds(op: Op, times: Sequence[StageTime]) -> float:
    time = times[op.stage]
    return {"F": time.forward, "I": time.inputs, "W": time.weights, "B": time.backward}[op.kind]
