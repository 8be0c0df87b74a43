"""DeepSpeed's ZeRO against FSDP2 and one process: gradients, norm, clipping, steps, checkpoints, refusals."""

from __future__ import annotations

import functools
import os
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from equivalence import batches, start_experts
from polylepis.checkpoints.sharded import model_tensors, optimizer_tensors
from polylepis.parallel import parts
from polylepis.parallel.engines.base import Engine
from polylepis.parallel.engines.deepspeed import DeepSpeedConfig, DeepSpeedEngine
from polylepis.parallel.engines.fsdp import FSDPEngine, build_model
from polylepis.parallel.errors import PlanError
from polylepis.parallel.mesh import MeshConfig, build_mesh
from polylepis.parallel.model import ModelConfig
from polylepis.pretrain.experts import finish_experts
from polylepis.pretrain.objectives.next_token import next_token
from polylepis.pretrain.optim import OptimConfig, build_optimizer
from ranks import run_ranks
from toys import ALL_ROUTED, toy

os.environ.setdefault("DS_ACCELERATOR", "cpu")
pytest.importorskip("deepspeed")
OPTIM = OptimConfig(lr=1e-2, clip=1.2)  # above 1, which DeepSpeed would clip to by default; below the first norms


def deepspeed_engine(config: ModelConfig, mesh_config: MeshConfig, zero: DeepSpeedConfig) -> DeepSpeedEngine:
    mesh = build_mesh(mesh_config, "cpu")
    return DeepSpeedEngine(
        config, mesh, next_token, zero, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, seed=3
    )


def fsdp_engine(config: ModelConfig, mesh_config: MeshConfig) -> FSDPEngine:
    model = build_model(config, build_mesh(mesh_config, "cpu"), seed=3)
    return FSDPEngine(model, build_optimizer(OPTIM, model), next_token)


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for n, t in tensors.items()}


def steps(engine: Engine, count: int, rank: int, size: int, first: int = 0) -> list[tuple[float, list[float]]]:
    """Norm and summed losses of `count` clipped steps on batches without an absent and with an absent modality."""
    seen = []
    for step in range(first, first + count):
        all_batches = batches((1,) if step % 2 else ())
        total = sum(float(b["loss_weight"].sum()) for b in all_batches)
        sums = engine.accumulate(all_batches[rank::size], total)
        dist.all_reduce(sums)
        norm = engine.gradient_norm()
        if norm > OPTIM.clip:
            engine.scale(OPTIM.clip / norm)
        engine.update(OPTIM.lr)
        seen.append((norm, sums.tolist()))
    return seen


def bfloat16_start(stage: Any) -> Any:
    """Weights before the first step, then losses and norms of two steps, with bfloat16 computation.

    Without experts: FSDP keeps their routers in float32, DeepSpeed rounds every parameter.
    """
    mesh = build_mesh(MeshConfig(tp=2), "cpu")
    config, half = toy("M*-", ALL_ROUTED), torch.bfloat16
    if stage:
        zero = DeepSpeedConfig(stage=stage, persistent=100)
        options = {"lr": OPTIM.lr, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "compute_dtype": half}
        engine: Engine = DeepSpeedEngine(config, mesh, next_token, zero, seed=3, **options)
        start = whole(engine.optimizer.tensors())
    else:
        model = build_model(config, mesh, seed=3, compute_dtype=half)
        start = whole(model_tensors(model))
        engine = FSDPEngine(model, build_optimizer(OPTIM, model), next_token)
    return start, steps(engine, 2, mesh.dp_rank, mesh.dp_size)


@pytest.mark.parametrize("stage", [2, 3])
def test_bfloat16_starts_from_the_same_bits_and_stays_close(stage: Any) -> None:
    start, seen = run_ranks(4, bfloat16_start, stage)[0]
    wanted_start, wanted = run_ranks(4, bfloat16_start, 0)[0]
    assert start.keys() >= wanted_start.keys()
    assert all(torch.equal(start[name], value) for name, value in wanted_start.items())
    assert seen[0][1] == pytest.approx(wanted[0][1], rel=1e-6)  # rounded the same way: the same forward
    for (norm, sums), (wanted_norm, wanted_sums) in zip(seen, wanted, strict=True):
        assert norm == pytest.approx(wanted_norm, rel=1e-2)
        assert sums == pytest.approx(wanted_sums, rel=5e-3)


def run_deepspeed(config: ModelConfig, mesh: MeshConfig, zero: DeepSpeedConfig, count: int = 3) -> Any:
    engine = deepspeed_engine(config, mesh, zero)
    seen = steps(engine, count, engine.mesh.dp_rank, engine.mesh.dp_size)
    return seen, whole(engine.optimizer.tensors())


def run_without_the_sum(config: ModelConfig, mesh: MeshConfig, zero: DeepSpeedConfig) -> Any:
    parts.sum_gradient = lambda x, group: x  # a forked rank of its own
    return run_deepspeed(config, mesh, zero, 1)


def run_fsdp(config: ModelConfig, mesh: MeshConfig, count: int = 3) -> Any:
    engine = fsdp_engine(config, mesh)
    seen = steps(engine, count, engine.mesh.dp_rank, engine.mesh.dp_size)
    (model,) = engine.models
    return seen, whole(model_tensors(model) | optimizer_tensors(model, engine.optimizer))


@functools.cache
def expected(pattern: str, count: int = 3) -> Any:
    """FSDP2 with one process."""
    return run_ranks(1, run_fsdp, toy(pattern, ALL_ROUTED), MeshConfig(), count)[0]


def worst(
    actual: dict[str, Tensor], wanted: dict[str, Tensor], prefix: str = "optimizer.exp_avg."
) -> tuple[float, str]:
    """Largest relative error of a tensor's norm of first moments, which are sums of clipped gradients."""
    assert actual.keys() == wanted.keys()
    names = [n for n in wanted if n.startswith("optimizer.exp_avg.") and wanted[n].norm() > 0]
    return max((float((actual[n] - wanted[n]).norm() / wanted[n].norm()), n) for n in names)


def assert_same_run(actual: Any, wanted: Any) -> None:
    """The tolerances are fp32 reduction noise over three steps; a forgotten sum or a wrong factor is of order 1."""
    for (norm, sums), (wanted_norm, wanted_sums) in zip(actual[0], wanted[0], strict=True):
        assert norm == pytest.approx(wanted_norm, rel=2e-5)
        assert sums == pytest.approx(wanted_sums, rel=2e-5)
    error, name = worst(actual[1], wanted[1])
    assert error <= 1e-4, f"first moment of {name}: {error:.1e}"
    for name, value in wanted[1].items():
        if not name.startswith("optimizer."):  # a step is about lr long, whatever the gradient
            assert float((actual[1][name] - value).abs().max()) <= 0.02 * OPTIM.lr, name
        elif name.startswith("optimizer.step."):
            assert float(actual[1][name]) == float(value) == 3


def scaled(run: Any, tp: int) -> Any:
    """Every tensor-parallel rank counts the same tokens."""
    return [(norm, [s / tp for s in sums]) for norm, sums in run[0]], run[1]


@pytest.mark.parametrize(
    ("zero", "mesh"),
    [
        (DeepSpeedConfig(stage=1), MeshConfig(tp=2)),
        (DeepSpeedConfig(stage=2), MeshConfig(tp=2)),
        (DeepSpeedConfig(stage=3, persistent=0), MeshConfig(tp=2)),
        (DeepSpeedConfig(stage=3, persistent=100), MeshConfig(tp=2, cp=2)),
        pytest.param(DeepSpeedConfig(stage=2), MeshConfig(tp=2, cp=2), marks=pytest.mark.full),
        pytest.param(DeepSpeedConfig(stage=1), MeshConfig(cp=2), marks=pytest.mark.full),
        pytest.param(DeepSpeedConfig(stage=2, bucket=500), MeshConfig(), marks=pytest.mark.full),
        (DeepSpeedConfig(stage=2, offload_optimizer=True), MeshConfig(tp=2)),
        (DeepSpeedConfig(stage=3, offload_optimizer=True, offload_parameters=True, persistent=0), MeshConfig()),
    ],
    ids=repr,
)
def test_three_steps_equal_fsdp(zero: DeepSpeedConfig, mesh: MeshConfig) -> None:
    """Norms under sequence parallelism, routed banks, experts; an absent modality in the second step."""
    for actual in run_ranks(4, run_deepspeed, toy("M*-E", ALL_ROUTED), mesh, zero)[:2]:
        assert_same_run(scaled(actual, mesh.tp), expected("M*-E"))


TERMS = {"aux_sequence": 0.7, "aux_global": 0.4, "z_loss": 0.3, "bias_update_rate": 0.01}


def balanced(mesh_config: MeshConfig, zero: DeepSpeedConfig | None) -> Any:
    """Three steps with every balancing term, the selection biases moved after each; the bias at the end as well."""
    config = toy("ME-", ALL_ROUTED)
    config = replace(config, moe=replace(config.moe, **TERMS))
    engine: Engine = fsdp_engine(config, mesh_config) if zero is None else deepspeed_engine(config, mesh_config, zero)
    (model,) = engine.models
    start_experts(model)
    seen = []
    for step in range(3):
        seen += steps(engine, 1, engine.mesh.dp_rank, engine.mesh.dp_size, first=step)
        finish_experts(engine)
    if isinstance(engine, FSDPEngine):
        return seen, whole(model_tensors(model) | optimizer_tensors(model, engine.optimizer))
    return seen, whole(engine.optimizer.tensors())  # type: ignore[union-attr]


@pytest.mark.parametrize("stage", [2, *(pytest.param(stage, marks=pytest.mark.full) for stage in (1, 3))])
def test_balancing_terms_and_biases_equal_fsdp(stage: Any) -> None:
    """They are divided by W as the loss is, whatever DeepSpeed averages over."""
    wanted = run_ranks(1, balanced, MeshConfig(), None)[0]
    plain = run_ranks(1, run_fsdp, toy("ME-", ALL_ROUTED), MeshConfig())[0]
    assert abs(wanted[0][0][0] - plain[0][0][0]) > 0.01 * plain[0][0][0], "the terms must matter to the norm"
    actual = run_ranks(4, balanced, MeshConfig(tp=2), DeepSpeedConfig(stage=stage, persistent=100))[0]
    assert_same_run(scaled(actual, 2), wanted)
    biases = [name for name in wanted[1] if name.endswith("selection_bias")]
    assert biases and all(wanted[1][n].abs().max() > 0 and torch.equal(actual[1][n], wanted[1][n]) for n in biases)


@pytest.mark.parametrize("stage", [2, 3])
def test_the_sum_over_tp_is_needed(stage: Any) -> None:
    """Weights replicated under sequence parallelism hold a partial sum each; leaving the sum out is not small."""
    config, zero = toy("M-", ALL_ROUTED), DeepSpeedConfig(stage=stage)
    tensors = run_ranks(2, run_without_the_sum, config, MeshConfig(tp=2), zero)[0][1]
    error, name = worst(tensors, expected("M-", 1)[1])
    assert error > 0.1 and "norm" in name


def resumed(zero: DeepSpeedConfig, other: DeepSpeedConfig) -> Any:
    """Two steps, then the tensors taken over by an engine of another seed, then a third step on both."""
    config, mesh = toy("M*-E", ALL_ROUTED), MeshConfig(tp=2)
    first = deepspeed_engine(config, mesh, zero)
    rank, size = first.mesh.dp_rank, first.mesh.dp_size
    steps(first, 2, rank, size)
    second = deepspeed_engine(replace(config, init_std=0.1), mesh, other)
    tensors = second.optimizer.tensors()
    saved = first.optimizer.tensors()
    for name, value in tensors.items():
        value.copy_(saved[name])
    second.optimizer.take(tensors)
    loaded = whole(second.optimizer.tensors())
    before = whole(saved)
    return (
        before,
        loaded,
        steps(first, 1, rank, size),
        steps(second, 1, rank, size),
        whole(first.optimizer.tensors()),
        whole(second.optimizer.tensors()),
    )


@pytest.mark.parametrize(("stage", "other"), [(2, 2), (3, 3), (1, 3)])
def test_tensors_are_taken_over_to_the_bit(stage: Any, other: Any) -> None:
    result = run_ranks(4, resumed, DeepSpeedConfig(stage=stage, persistent=100), DeepSpeedConfig(stage=other))[0]
    before, loaded, continued, again, after, after_again = result
    assert all(torch.equal(before[name], loaded[name]) for name in before)
    if stage == other:  # the same reductions in the same order
        assert continued == again
        assert all(torch.equal(after[name], after_again[name]) for name in after)
    else:
        assert again[0][0] == pytest.approx(continued[0][0], rel=1e-5)


def discarded(zero: DeepSpeedConfig, first: bool) -> Any:
    engine = deepspeed_engine(toy("M-", ALL_ROUTED), MeshConfig(), zero)
    if first:
        engine.accumulate(batches((2,)), 7.0)
        engine.discard()
    return steps(engine, 2, engine.mesh.dp_rank, engine.mesh.dp_size), whole(engine.optimizer.tensors())


@pytest.mark.parametrize(
    "zero",
    [
        pytest.param(DeepSpeedConfig(stage=1), marks=pytest.mark.full),
        DeepSpeedConfig(stage=2),
        DeepSpeedConfig(stage=3, persistent=100),
        DeepSpeedConfig(stage=2, offload_optimizer=True),
        DeepSpeedConfig(stage=3, offload_optimizer=True),
    ],
    ids=repr,
)
def test_discarded_gradients_leave_no_trace(zero: DeepSpeedConfig) -> None:
    (seen, tensors), (wanted, wanted_tensors) = (run_ranks(2, discarded, zero, first)[0] for first in (True, False))
    assert seen == wanted
    assert all(torch.equal(tensors[name], value) for name, value in wanted_tensors.items())


@pytest.mark.parametrize(
    ("config", "mesh", "message"),
    [
        (DeepSpeedConfig(), MeshConfig(dp_replicate=2), r"mesh\.dp_replicate 1, not 2.*dp_shard"),
        (DeepSpeedConfig(), MeshConfig(pp=4), r"mesh\.pp 1, not 4.*engine=fsdp2"),
        (DeepSpeedConfig(stage=2, offload_parameters=True), MeshConfig(), "needs stage 3, not 2"),
        (DeepSpeedConfig(bucket=0), MeshConfig(), "bucket 0 must be"),
    ],
)
def test_refusals_name_the_numbers(config: DeepSpeedConfig, mesh: MeshConfig, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        config.check(mesh)


def test_stage_1_in_bfloat16_is_refused() -> None:
    with pytest.raises(PlanError, match="stage 2 shards"):
        DeepSpeedConfig(stage=1).check(MeshConfig(), torch.bfloat16)
