"""Pipeline stages equal one process: every schedule, every pair of axes, uneven cuts, recompute; what is refused."""

from __future__ import annotations

import pytest
import torch

from equivalence import assert_equal_gradients, gradients_alone
from pipelines import Case, merged, pipelined
from polylepis.parallel.mesh import ContextConfig, MeshConfig
from polylepis.parallel.model import ModelConfig
from polylepis.parallel.pipeline.config import PipelineConfig
from polylepis.parallel.recompute import RecomputeConfig
from ranks import run_ranks
from toys import ALL_ROUTED, toy

ROUTED = toy("M*-EM", ALL_ROUTED)
SHARED = toy("M*-M")


def check(config: ModelConfig, case: Case, tolerance: float = 1e-9) -> None:
    expected = gradients_alone(config, torch.float64, case.absent, case.count)
    actual = merged(run_ranks(case.mesh.n_processes, pipelined, config, case, timeout=300))
    assert_equal_gradients(actual, expected, tolerance)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zbv", "dualpipev"])
def test_schedules(schedule: str) -> None:
    check(SHARED, Case(MeshConfig(dp_shard=1, pp=2), PipelineConfig(schedule)))  # type: ignore[arg-type]


PP = {"dp_shard": 1, "pp": 2}
CP = {"cp state": ContextConfig("zigzag", "state", "gather"), "cp heads": ContextConfig("contiguous", "heads", "heads")}
PAIRS = {
    "tp": {"tp": 2},
    "cp state": {"cp": 2},
    "cp heads": {"cp": 2},
    "dp_shard": {"dp_shard": 2},
    "dp_replicate": {"dp_replicate": 2},
}


@pytest.mark.parametrize("axis", PAIRS)
def test_pairs(axis: str) -> None:
    """Uneven cuts, a modality and whole documents absent on some ranks."""
    mesh = MeshConfig(**(PP | PAIRS[axis]))
    check(ROUTED, Case(mesh, PipelineConfig(cuts=(0, 1)), CP.get(axis), absent=(1,)))


def test_triple() -> None:
    """pp 2 × tp 2 × dp 2, interleaved over four stages."""
    mesh = MeshConfig(pp=2, tp=2, dp_shard=2)
    check(ROUTED, Case(mesh, PipelineConfig("interleaved"), absent=(1,)))


@pytest.mark.full
@pytest.mark.parametrize("schedule", ["1f1b", "zbv", "dualpipev"])
def test_triples(schedule: str) -> None:
    for mesh in (MeshConfig(pp=2, tp=2, dp_shard=2), MeshConfig(pp=2, cp=2, dp_shard=2), MeshConfig(pp=2, cp=2, tp=2)):
        check(SHARED, Case(mesh, PipelineConfig(schedule)))  # type: ignore[arg-type]


@pytest.mark.full
def test_four_stages() -> None:
    for schedule in ("1f1b", "interleaved", "zbv", "dualpipev"):
        chunks = 1 if schedule == "1f1b" else 2
        config = toy("M*-M" * chunks)
        check(config, Case(MeshConfig(dp_shard=1, pp=4), PipelineConfig(schedule)))  # type: ignore[arg-type]


@pytest.mark.parametrize("choice", ["full", "selective"])
def test_recompute(choice: str) -> None:
    recompute = RecomputeConfig(choice, choice, choice, choice)  # type: ignore[arg-type]
    check(ROUTED, Case(MeshConfig(dp_shard=1, pp=2, tp=2), recompute=recompute, absent=(1,)))
