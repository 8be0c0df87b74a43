"""Schedules against torch's own, simulated bubbles against the published formulas."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.pipelining import schedules as torch_schedules

from polylepis.parallel.errors import PlanError
from polylepis.parallel.pipeline.schedule import (
    Op,
    Schedule,
    build_schedule,
    order_of,
    peak_in_flight,
    stage_rank,
)
from polylepis.parallel.pipeline.simulate import StageTime, simulate
from polylepis.parallel.pipeline.stage import stage_indices

KINDS = {
    torch_schedules.FORWARD: "F",
    torch_schedules.BACKWARD_INPUT: "I",
    torch_schedules.BACKWARD_WEIGHT: "W",
    torch_schedules.FULL_BACKWARD: "B",
}
CLASSES = {
    "1f1b": torch_schedules.Schedule1F1B,
    "gpipe": torch_schedules.ScheduleGPipe,
    "interleaved": torch_schedules.ScheduleInterleaved1F1B,
    "zb1p": torch_schedules.ScheduleInterleavedZeroBubble,
    "zbv": torch_schedules.ScheduleZBVZeroBubble,
    "dualpipev": torch_schedules.ScheduleDualPipeV,
}
CASES = [
    ("1f1b", 1),
    ("gpipe", 1),
    ("interleaved", 2),
    ("interleaved", 3),
    ("zb1p", 1),
    ("zb1p", 2),
    ("zbv", 2),
    ("dualpipev", 2),
]


def torch_order(name: str, n_ranks: int, n_micro_batches: int, chunks: int) -> list[list[Op]]:
    """What torch's schedule of this name does on each rank, waits left out."""
    n_stages = n_ranks * chunks

    def stage(index: int) -> Any:
        return SimpleNamespace(
            num_stages=n_stages,
            group_size=n_ranks,
            group_rank=0,
            stage_index=index,
            is_first=index == 0,
            is_last=index == n_stages - 1,
            has_backward=True,
            submod=None,
        )

    if name in ("1f1b", "gpipe"):
        order: Any = CLASSES[name](stage(0), n_micro_batches)._get_pipeline_order()
    else:
        order = CLASSES[name]([stage(i) for i in range(chunks)], n_micro_batches).pipeline_order
    rows = []
    for rank in range(n_ranks):
        flat = [part for action in order[rank] if action for part in (action.sub_actions or [action])]
        rows.append(
            [
                Op(KINDS[a.computation_type], a.microbatch_index, a.stage_index)
                for a in flat
                if a.computation_type in KINDS
            ]
        )
    return rows


@pytest.mark.parametrize(("name", "chunks"), CASES)
@pytest.mark.parametrize("n_ranks", [2, 3, 4, 8])
def test_tables_are_what_torch_runs(name: str, chunks: int, n_ranks: int) -> None:
    compared = 0
    for n_micro_batches in (2, 3, 7, 8, 16, 20):
        try:
            ours = build_schedule(name, n_ranks, n_micro_batches, chunks)
        except PlanError:  # torch takes some numbers that leave ranks idle throughout
            continue
        theirs = torch_order(name, n_ranks, n_micro_batches, chunks)
        plain = [[op._replace(with_next=False) for op in row] for row in ours.table]
        # torch's listing of 1F1B begins its last rank with micro-batch 1; what its `step` runs does not.
        last = n_ranks - 1 if name == "1f1b" else n_ranks
        assert plain[:last] == theirs[:last]
        compared += 1
    assert compared


def test_placement_is_torchs() -> None:
    from torch.distributed.pipelining._utils import generate_stage_to_rank_mapping

    for name, style in (("interleaved", "loop"), ("zb1p", "loop"), ("zbv", "v"), ("dualpipev", "v")):
        theirs = generate_stage_to_rank_mapping(4, 8, style=style)
        assert {stage: stage_rank(name, stage, 4) for stage in range(8)} == theirs
        assert stage_indices(1, 4, 2, style == "v") == tuple(s for s, r in theirs.items() if r == 1)


fractions = st.integers(1, 9)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([4, 8]), fractions, fractions, fractions, st.integers(0, 9))
def test_published_bubbles(n_ranks: int, forward: int, inputs: int, weights: int, more: int) -> None:
    """1F1B (P−1)(F+B); ZB1P (P−1)(F+B−2W) where W ≤ F and W ≤ I, so that W delays neither."""
    backward = inputs + weights
    time = StageTime(forward, inputs, weights)
    count = 2 * n_ranks
    line = simulate(build_schedule("1f1b", n_ranks, count + more), [time] * n_ranks)
    assert line.bubble_seconds == (n_ranks - 1) * (forward + backward)
    assert line.seconds == (count + more) * (forward + backward) + line.bubble_seconds
    if weights <= min(forward, inputs):
        line = simulate(build_schedule("zb1p", n_ranks, count), [time] * n_ranks)
        assert line.bubble_seconds == (n_ranks - 1) * (forward + backward - 2 * weights)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([4, 8]), st.integers(2, 9), st.integers(1, 9), st.integers(0, 3), st.integers(0, 2))
def test_published_bubble_of_dualpipe(n_ranks: int, forward: int, weights: int, saved: int, more: int) -> None:
    """(P/2−1)(F&B + B − 3W), which presumes F = I ≥ W; the ranks in the middle have it where F&B < F + B."""
    weights = min(weights, forward)
    time, backward = StageTime(forward, forward, weights), forward + weights
    together = forward + backward - saved / 4 * weights
    schedule = build_schedule("dualpipe", n_ranks, 2 * n_ranks + 2 * more, 2)
    line = simulate(schedule, [time] * n_ranks, together=[together] * n_ranks)
    expected = (n_ranks // 2 - 1) * (together + backward - 3 * weights)
    assert line.idle(n_ranks // 2) == pytest.approx(expected, abs=1e-9)
    if not saved:
        assert {line.idle(rank) for rank in range(n_ranks)} == {expected}


def test_interleaving_halves_the_bubble_and_sends_cost_time() -> None:
    whole, half = StageTime(2.0, 2.0, 2.0), StageTime(1.0, 1.0, 1.0)
    plain = simulate(build_schedule("1f1b", 4, 8), [whole] * 4)
    folded = simulate(build_schedule("interleaved", 4, 8, 2), [half] * 8)
    assert folded.bubble_seconds == plain.bubble_seconds / 2 == 9.0
    assert simulate(build_schedule("1f1b", 4, 8), [whole] * 4, send=0.5).seconds > plain.seconds


def test_in_flight() -> None:
    """1F1B holds P − rank micro-batches, and no more; the time line never runs two operations of a rank at once."""
    schedule = build_schedule("1f1b", 4, 16)
    assert [peak_in_flight(schedule, rank, [1.0] * 4) for rank in range(4)] == [4, 3, 2, 1]
    assert peak_in_flight(build_schedule("zbv", 4, 16, 2), 0, [0.5] * 8) == 4
    spans = simulate(schedule, [StageTime(1, 2, 3)] * 4, send=0.1).spans
    for earlier, later in zip(spans, spans[1:], strict=False):
        assert earlier.rank != later.rank or earlier.end <= later.start


@pytest.mark.parametrize(
    ("mutate", "message"),
    [
        (lambda rows: [[*rows[0][:-1]], rows[1]], r"leaves out 0I2"),
        (lambda rows: [[*rows[0], rows[0][-1]], rows[1]], r"does 0B2 twice"),
        (lambda rows: [rows[1], rows[0]], r"on rank 0, which does not hold its stage"),
        (lambda rows: [rows[0][::-1], rows[1]], r"deadlocks: rank 0 at 0B2, rank 1 at 1F0 wait for each other"),
    ],
)
def test_a_broken_table_is_refused(mutate: Any, message: str) -> None:
    schedule = build_schedule("1f1b", 2, 3)
    with pytest.raises(PlanError, match=message):
        replace(schedule, table=tuple(map(tuple, mutate([list(row) for row in schedule.table]))))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("1f1bb", 2, 4, 1), r"unknown '1f1bb'; nearest is 1f1b"),
        (("1f1b", 4, 3, 1), r"3 micro-batches per rank and step, but 1f1b over pp 4 needs at least 4"),
        (("dualpipev", 4, 7, 2), r"dualpipev over pp 4 needs at least 8"),
        (("interleaved", 4, 9, 2), r"9 micro-batches .* cannot be divided into 2 rounds.*nearest is 8"),
        (("zbv", 4, 8, 3), r"zbv works with 2 stages per rank; the nearest is 2"),
        (("1f1b", 4, 8, 2), r"1f1b works with 1 stages"),
        (("interleaved", 4, 8, 1), r"interleaved works with 2 to 64 stages"),
        (("dualpipe", 3, 8, 2), r"even pp"),
        (("zb1p", 4, 9, 1), r"9 micro-batches in 2 equal rounds"),
        (("1f1b", 0, 9, 1), r"pp 0 and 9 micro-batches must both be at least 1"),
    ],
)
def test_refusals(arguments: tuple[str, int, int, int], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        build_schedule(*arguments)


def test_simulation_wants_one_time_per_stage() -> None:
    with pytest.raises(PlanError, match="1 stage times for 2 stages"):
        simulate(build_schedule("1f1b", 2, 2), [StageTime(1, 1, 1)])


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([*CASES, ("dualpipe", 2)]), st.integers(1, 6), st.integers(1, 17), st.data())
def test_every_schedule_is_complete_and_runs(
    case: tuple[str, int], n_ranks: int, count: int, data: st.DataObject
) -> None:
    """Whatever is accepted is complete, free of deadlock, and simulates to at least the work of its busiest rank."""
    name, chunks = case
    try:
        schedule: Schedule = build_schedule(name, n_ranks, count, chunks)
    except PlanError:
        return
    assert len(order_of(schedule)) == sum(map(len, schedule.table))
    cost = st.floats(0.01, 10)
    times = [StageTime(*data.draw(st.tuples(cost, cost, cost))) for _ in range(schedule.n_stages)]
    line = simulate(schedule, times, send=0.05)
    assert line.seconds >= max(line.busy) - 1e-9
    assert sum(line.busy) == pytest.approx(count * sum(time.total for time in times))
