"""Schedules as tables: for each rank the order of (operation, micro-batch, stage) that it works off.

F forward, I backward of the inputs, W backward of the weights, B both at once. What torch.distributed.pipelining runs
under the same name has the same order (`tests/parallel/test_schedule.py` compares them), so a simulated table is what
runs. `zb1p` is torch's InterleavedZeroBubble, here with any number of chunks; `dualpipe` (two copies of the model, one
for each direction) has no runtime and is there to compare with.

Sources: Narayanan et al. 2021 (1F1B, interleaved), Qi et al. 2023 (ZB-H1 and ZB-V), DeepSeek-AI 2024 (DualPipe).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import NamedTuple

from ..errors import PlanError
from .config import CHUNKS, V_SHAPED, PipelineConfig


class Op(NamedTuple):
    """One entry of a table: `kind` F, B, I or W; of a micro-batch, in a stage (0 is nearest to the input).

    `with_next` joins a forward to the backward after it: DualPipe runs the two as one, overlapping the communication
    of each with the computation of the other. torch's runtime runs them one after the other.
    """

    kind: str
    micro_batch: int
    stage: int
    with_next: bool = False

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro_batch}"


Table = tuple[tuple[Op, ...], ...]


@dataclass(frozen=True)
class Schedule:
    """A table and where its stages live.

    Attributes:
        name: `gpipe`, `1f1b`, `interleaved`, `zb1p`, `zbv`, `dualpipev` or `dualpipe`.
        n_ranks, chunks, n_micro_batches: pipeline ranks, stages on each, micro-batches of a step.
        table: for each rank its operations in order.
    """

    name: str
    n_ranks: int
    chunks: int
    n_micro_batches: int
    table: Table

    @property
    def n_stages(self) -> int:
        """Parts the model is cut into; DualPipe's two chunks are two copies of one part each."""
        return self.n_ranks if self.name == "dualpipe" else self.n_ranks * self.chunks

    def rank_of(self, stage: int, micro_batch: int) -> int:
        """The rank that a micro-batch meets a stage on."""
        if self.name == "dualpipe":  # the second half of the micro-batches travels the other way
            return stage if micro_batch < self.n_micro_batches // 2 else self.n_ranks - 1 - stage
        return stage_rank(self.name, stage, self.n_ranks)

    def __post_init__(self) -> None:
        check_complete(self)


def stage_rank(name: str, stage: int, n_ranks: int) -> int:
    """The rank that holds a stage: round the ranks for interleaved schedules, down and back up for V-shaped ones."""
    lap, place = divmod(stage, n_ranks)
    return n_ranks - 1 - place if name in V_SHAPED and lap % 2 else place


# Simulated only, besides what runs: the stages per rank that they take.
SIMULATED = MappingProxyType({"zb1p": (1, 64), "dualpipe": (2, 2)})
SCHEDULES = (*CHUNKS, *SIMULATED)


def check_schedule(name: str, n_ranks: int, n_micro_batches: int, chunks: int) -> None:
    """Refuse unknown names, and numbers that a schedule does not take.

    Raises:
        PlanError: names the nearest schedule or number.
    """
    if name not in SCHEDULES:
        near = difflib.get_close_matches(name, SCHEDULES, n=1, cutoff=0.3)
        hint = f"; nearest is {near[0]}" if near else ""
        raise PlanError(f"pipeline.schedule: unknown {name!r}{hint}; accepted: {', '.join(SCHEDULES)}")
    if n_ranks < 1 or n_micro_batches < 1:
        raise PlanError(f"pipeline: pp {n_ranks} and {n_micro_batches} micro-batches must both be at least 1")
    if name in CHUNKS:
        config = PipelineConfig(schedule=name, chunks=chunks)  # type: ignore[arg-type]
        if config.chunks_per_rank:  # refuses a wrong number
            config.check_micro_batches(n_micro_batches, n_ranks)
    elif name == "zb1p":
        rounds = max(1, n_micro_batches // n_ranks)
        if n_micro_batches % rounds:
            raise PlanError(f"pipeline: zb1p cannot take {n_micro_batches} micro-batches in {rounds} equal rounds")
    elif n_micro_batches % 2 or n_ranks % 2 or n_micro_batches < 2 * n_ranks or chunks != 2:
        raise PlanError(
            f"pipeline: dualpipe needs 2 chunks, an even pp and an even number of at least 2·pp micro-batches, not "
            f"{chunks}, {n_ranks} and {n_micro_batches}"
        )


@cache
def build_schedule(name: str, n_ranks: int, n_micro_batches: int, chunks: int = 1) -> Schedule:
    """The table of a schedule, checked to be complete and free of deadlock.

    Args:
        n_ranks: pipeline ranks.
        n_micro_batches: of a step, per data-parallel rank.
        chunks: stages per rank.

    Raises:
        PlanError: an unknown schedule, or numbers that it does not take.
    """
    check_schedule(name, n_ranks, n_micro_batches, chunks)
    if name == "zbv":
        rows = [_zbv(rank, n_ranks, n_micro_batches) for rank in range(n_ranks)]
    elif name in ("dualpipev", "dualpipe"):
        rows = [_dual_pipe(name, rank, n_ranks, n_micro_batches) for rank in range(n_ranks)]
    else:
        rows = [_one_f_one_b(name, rank, n_ranks, n_micro_batches, chunks) for rank in range(n_ranks)]
    return Schedule(name, n_ranks, chunks, n_micro_batches, tuple(tuple(row) for row in rows))


def _one_f_one_b(name: str, rank: int, n_ranks: int, n_micro_batches: int, chunks: int) -> list[Op]:
    """Forwards until the first backward can have come back, then one of each, then the rest of the backwards.

    Micro-batches go in rounds; in each round all of them pass a chunk before the next chunk. A zero-bubble rank r
    keeps r weight gradients in hand, to fill the time in which it would wait.
    """
    per_round = n_micro_batches // max(1, n_micro_batches // n_ranks)
    order = [
        (first + place, chunk)
        for first in range(0, n_micro_batches, per_round)
        for chunk in range(chunks)
        for place in range(per_round)
    ]
    back = [(m, chunks - 1 - chunk) for m, chunk in order]
    if name in ("1f1b", "gpipe"):
        order = back = [(m, 0) for m in range(n_micro_batches)]
    hops = n_ranks - 1 - rank
    warmup = (
        len(order)
        if name == "gpipe"
        else min((chunks - 1) * per_round + hops * (2 if name == "interleaved" else 1), len(order))
    )
    forwards = [Op("F", m, chunk * n_ranks + rank) for m, chunk in order]
    split = name == "zb1p"
    backwards = [Op("I" if split else "B", m, chunk * n_ranks + rank) for m, chunk in back]
    ops, weights = forwards[:warmup], 0
    for number, backward in enumerate(backwards):
        ops += [*forwards[warmup + number : warmup + number + 1], backward]
        if split and number >= rank:
            ops.append(backwards[weights]._replace(kind="W"))
            weights += 1
    return ops + [op._replace(kind="W") for op in backwards[weights:] if split]


class _Row:
    """A rank's table under construction: counts micro-batches of two chunks and keeps the weight gradients due."""

    def __init__(self, stages: Sequence[int], number: Callable[[int, int], int]) -> None:
        self.ops: list[Op] = []
        self.stages, self.number = stages, number
        self.next = {(kind, chunk): 0 for kind in "FB" for chunk in (0, 1)}
        self.due: list[Op] = []

    def add(self, kind: str, chunk: int, with_next: bool = False) -> None:
        """F, B, or I, whose W is then due."""
        counter = ("F" if kind == "F" else "B", chunk)
        op = Op(kind, self.number(chunk, self.next[counter]), self.stages[chunk], with_next)
        self.next[counter] += 1
        self.ops.append(op)
        if kind == "I":
            self.due.append(op._replace(kind="W"))

    def weights(self) -> None:
        if self.due:
            self.ops.append(self.due.pop(0))


def _zbv(rank: int, n_ranks: int, n_micro_batches: int) -> list[Op]:
    """ZB-V: two chunks per rank, V-shaped. Generated for enough micro-batches to fill it, the excess dropped."""
    count = max(2 * n_ranks - 1, n_micro_batches)
    row = _Row((rank, 2 * n_ranks - 1 - rank), lambda chunk, i: i)
    for _ in range(2 * (n_ranks - rank) - 1):
        row.add("F", 0)
    for _ in range(rank):
        row.add("F", 1)
        row.add("F", 0)
    for _ in range(n_ranks - rank):
        row.add("F", 1)
        row.add("I", 1)
        row.weights()
    while row.next["F", 1] < row.next["F", 0] or row.next["F", 0] < count:
        if row.next["F", 0] < count:
            row.add("F", 0)
        row.add("I", 0)
        row.weights()
        row.add("F", 1)
        row.add("I", 1)
        row.weights()
    for _ in range(rank):
        row.add("I", 0)
        row.add("I", 1)
    # The weight gradients that the last backwards left, chunk 0's beside its own remaining backwards.
    due = {chunk: [w for w in row.due if w.stage == row.stages[chunk]] for chunk in (0, 1)}
    row.due = due[0]
    for _ in range(n_ranks - rank):
        row.add("I", 0)
        row.weights()
    ops = row.ops + due[1] + row.due
    return [op for op in ops if op.micro_batch < n_micro_batches]


def _dual_pipe(name: str, rank: int, n_ranks: int, n_micro_batches: int) -> list[Op]:
    """DualPipe's eight phases; DualPipeV is one half of it, its two directions the two arms of the V."""
    if name == "dualpipev":
        half, depth, each = n_ranks, rank, n_micro_batches
        row = _Row((rank, 2 * n_ranks - 1 - rank), lambda chunk, i: i)
    else:
        half, depth, each = n_ranks // 2, min(rank, n_ranks - 1 - rank), n_micro_batches // 2
        near = 0 if rank < half else 1  # the direction whose entry is on this rank's side
        stages = (rank, n_ranks - 1 - rank) if near == 0 else (n_ranks - 1 - rank, rank)
        row = _Row(stages, lambda chunk, i: i + (each if (chunk == 0) == (near == 1) else 0))
    for _ in range(2 * (half - 1 - depth)):
        row.add("F", 0)
    for _ in range(depth + 1):
        row.add("F", 0)
        row.add("F", 1)
    for _ in range(half - 1 - depth):
        row.add("I", 1)
        row.weights()
        row.add("F", 1)
    for number in range(each - 2 * half + depth + 1):
        row.add("F", 0, with_next=not (number == 0 and depth == half - 1))
        row.add("B", 1)
        row.add("F", 1, with_next=True)
        row.add("B", 0)
    for _ in range(half - 1 - depth):
        row.add("B", 1)
        row.add("F", 1, with_next=True)
        row.add("B", 0)
    # The second half of the last backwards leaves its weight gradients for later, where others still wait.
    last = [1, 0] * (depth + 1)
    split_from = (depth + 1) // 2 * 2 + (0 if depth % 2 else 1)
    for number, chunk in enumerate(last):
        row.add("I" if number >= split_from else "B", chunk)
    for _ in range(half - 1 - depth):
        row.weights()
        row.add("I", 0)
    while row.due:
        row.weights()
    return row.ops


def check_complete(schedule: Schedule) -> None:
    """Every stage sees every micro-batch forwards and backwards once, on its rank, and nobody waits for ever.

    Raises:
        PlanError: names the operation that is missing, doubled or misplaced, or the ones that wait for each other.
    """
    seen: set[tuple[str, int, int]] = set()
    for rank, row in enumerate(schedule.table):
        for op in row:
            for key in done_by(op):
                if key in seen:
                    raise PlanError(f"pipeline: {schedule.name} does {op} twice")
                seen.add(key)
            if schedule.rank_of(op.stage, op.micro_batch) != rank:
                raise PlanError(f"pipeline: {schedule.name} does {op} on rank {rank}, which does not hold its stage")
    for stage in range(schedule.n_stages):
        for micro_batch in range(schedule.n_micro_batches):
            for kind in "FIW":
                if (kind, micro_batch, stage) not in seen:
                    raise PlanError(f"pipeline: {schedule.name} leaves out {Op(kind, micro_batch, stage)}")
    order_of(schedule)


def done_by(op: Op) -> list[tuple[str, int, int]]:
    """What `op` completes; B is I and W at once."""
    return [(kind, op.micro_batch, op.stage) for kind in (("I", "W") if op.kind == "B" else op.kind)]


def needs(op: Op, n_stages: int) -> list[tuple[str, int, int]]:
    """What must be done before `op`: (kind, micro-batch, stage); I stands for the backward of the inputs."""
    if op.kind == "F":
        return [("F", op.micro_batch, op.stage - 1)] if op.stage else []
    if op.kind == "W":
        return [("I", op.micro_batch, op.stage)]
    later = [("I", op.micro_batch, op.stage + 1)] if op.stage < n_stages - 1 else []
    return [("F", op.micro_batch, op.stage), *later]


def order_of(schedule: Schedule) -> list[tuple[int, Op]]:
    """(rank, operation) of all ranks in an order in which each follows what it needs.

    Raises:
        PlanError: there is none: the ranks wait for each other.
    """
    done: set[tuple[str, int, int]] = set()
    position, result = [0] * schedule.n_ranks, []
    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(schedule.table):
            while position[rank] < len(row):
                op = row[position[rank]]
                if any(need not in done for need in needs(op, schedule.n_stages)):
                    break
                done.update(done_by(op))
                result.append((rank, op))
                position[rank] += 1
                moved = True
    stuck = [
        f"rank {rank} at {row[at]}"
        for rank, (row, at) in enumerate(zip(schedule.table, position, strict=True))
        if at < len(row)
    ]
    if stuck:
        raise PlanError(f"pipeline: {schedule.name} deadlocks: {', '.join(stuck[:4])} wait for each other")
    return result


def peak_in_flight(schedule: Schedule, rank: int, weights: Sequence[float]) -> float:
    """The most that is held at once for backward on a rank, `weights[stage]` per micro-batch; W releases it."""
    held = peak = 0.0
    for op in schedule.table[rank]:
        if op.kind == "F":
            held += weights[op.stage]
            peak = max(peak, held)
        elif op.kind in "BW":
            held -= weights[op.stage]
    return peak


def receive_buffers(schedule: Schedule, rank: int) -> int:
    """Tensors of a stage's output that torch's runtime keeps on a rank from the first step on: one per micro-batch for
    what each stage but the first receives, one per micro-batch for the gradients that each but the last does."""
    mine = {op.stage for op in schedule.table[rank]}
    return schedule.n_micro_batches * sum((s > 0) + (s < schedule.n_stages - 1) for s in mine)
