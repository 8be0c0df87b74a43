"""Pipeline stages equal one process: every schedule, every pair of axes, uneven cuts, recompute; what is refused."""

from __future__ import annotations

import pytest
import torch
from pipelines import Case, merged, pipelined

from equivalence import assert_equal_gradients, gradients_alone
from polylepis.parallel.mesh import MeshConfig
from polylepis.parallel.model import ModelConfig
from polylepis.parallel.pipeline.config import PipelineConfig
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
