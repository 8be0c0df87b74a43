"""Schedules that split the backward are honest where they do the work of 1F1B: products and collectives, counted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from counting import Count
from pipelines import Case, build, step
from polylepis.parallel.engines import pipeline as engine_module
from polylepis.parallel.errors import PlanError
from polylepis.parallel.kinds import mamba as mamba_module
from polylepis.parallel.mesh import ContextConfig, MeshConfig
from polylepis.parallel.model import ModelConfig
from polylepis.parallel.pipeline.config import PipelineConfig, check_split_backward
from polylepis.parallel.recompute import RecomputeConfig
from ranks import run_ranks
from toys import ALL_ROUTED, toy

LAYERS = toy("M*M-")
MESH = MeshConfig(dp_shard=1, pp=2, tp=2)


def counted(config: ModelConfig, case: Case, allow: bool = False) -> tuple[int, dict[str, int]]:
    """FLOPs of products and collectives of one step on this rank, after one that warmed up."""
    if allow:
        engine_module.check_split_backward = lambda *args: None  # type: ignore[assignment]
    engine, _ = build(config, case)
    step(engine, case)
    engine.update(1e-3)
    with Count() as count:
        step(engine, case)
    return count.flops, dict(count.collectives)


def totals(config: ModelConfig, case: Case, allow: bool = False) -> tuple[int, dict[str, int]]:
    results = run_ranks(case.mesh.n_processes, counted, config, case, allow, timeout=240)
    names = {name for _, collectives in results for name in collectives}
    return sum(flops for flops, _ in results), {n: sum(c.get(n, 0) for _, c in results) for n in names}


def check(mesh: MeshConfig, schedules: tuple[str, ...], context: ContextConfig | None = None) -> None:
    expected = totals(LAYERS, Case(mesh, PipelineConfig(cuts=(0, 2)), context, count=4))
    assert expected[0] > 0 and sum(expected[1].values()) > 50
    for schedule in schedules:
        actual = totals(LAYERS, Case(mesh, PipelineConfig(schedule), context, count=4))  # type: ignore[arg-type]
        assert actual == expected, schedule


def test_as_much_work_as_1f1b() -> None:
    check(MESH, ("zbv",))


@pytest.mark.full
def test_every_schedule_does_as_much_work() -> None:
    check(MESH, ("interleaved", "dualpipev"))


@pytest.mark.full
@pytest.mark.parametrize("mamba", ["state", "heads"])
def test_as_much_work_with_context_ranks(mamba: str) -> None:
    check(MeshConfig(dp_shard=1, pp=2, cp=2), ("zbv", "dualpipev"), ContextConfig(mamba=mamba))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "recompute", "why"),
    [
        (
            toy("ME-M"),
            "none",
            r"layer 1 is mixture of experts: its experts would be multiplied twice; accepted",
        ),
        (toy("-MM*", ALL_ROUTED), "none", r"layer 1 is Mamba-2: its routed B, C, dt, out, x, z would be multiplied"),
        (LAYERS, "full", r"layer 0 is Mamba-2: recompute\.mamba: full would recompute it twice"),
    ],
)
def test_refused_where_it_repeats_work(config: ModelConfig, recompute: Any, why: str) -> None:
    pipeline = PipelineConfig("zbv")
    with pytest.raises(PlanError, match=why):
        check_split_backward(config, pipeline, RecomputeConfig(mamba=recompute))
    check_split_backward(config, replace(pipeline, schedule="1f1b"), RecomputeConfig(mamba=recompute))


@pytest.mark.full
@pytest.mark.parametrize("config", [toy("EEEE"), toy("MMMM", ALL_ROUTED)], ids=["E", "routed M"])
def test_the_refusal_is_deserved(config: ModelConfig) -> None:
    expected, _ = totals(config, Case(MESH, PipelineConfig(cuts=(0, 2)), count=4))
    actual, _ = totals(config, Case(MESH, PipelineConfig("zbv"), count=4), allow=True)
    assert actual > 1.1 * expected


def operands(case: Case) -> list[dict[str, Any]]:
    """What the scan was called with, under a schedule that splits the backward."""
    calls: list[dict[str, Any]] = []
    original = mamba_module.ssd_core

    def recorded(*args: Any, **kwargs: Any) -> Any:
        calls.append({"D": kwargs.get("D"), "leaves": [x.is_leaf for x in args]})
        return original(*args, **kwargs)

    mamba_module.ssd_core = recorded
    mamba_module.ssd = None  # type: ignore[assignment]
    engine, _ = build(LAYERS, case)
    step(engine, case)
    return calls


def test_no_parameter_enters_the_scan() -> None:
    """On a GPU the scan is one operator; a parameter inside would make both halves of the backward run all of it."""
    for calls in run_ranks(2, operands, Case(MeshConfig(dp_shard=1, pp=2), PipelineConfig("zbv"), count=4)):
        assert len(calls) == 4
        assert all(call == {"D": None, "leaves": [False] * 5} for call in calls)
