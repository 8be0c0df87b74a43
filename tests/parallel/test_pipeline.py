"""Pipeline stages equal one process: every schedule, every pair of axes, uneven cuts, recompute; what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from equivalence import assert_equal_gradients, gradients_alone, whole_gradients
from pipelines import Case, build, merged, pipelined, step
from polylepis.parallel.engines.pipeline import PipelineEngine
from polylepis.parallel.errors import PlanError
from polylepis.parallel.kinds.moe import MoEConfig
from polylepis.parallel.mesh import ContextConfig, MeshConfig
from polylepis.parallel.model import ModelConfig
from polylepis.parallel.pipeline.config import PipelineConfig, cut_stages
from polylepis.parallel.pipeline.schedule import build_schedule, receive_buffers
from polylepis.parallel.recompute import RecomputeConfig
from ranks import run_ranks
from toys import ALL_ROUTED, flop_costs, toy

ROUTED = toy("M*-EM", ALL_ROUTED)
SHARED = toy("M*-M")


def check(config: ModelConfig, case: Case, tolerance: float = 1e-9) -> None:
    expected = gradients_alone(config, torch.float64, case.absent, count=case.count)
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


def test_experts_over_ranks() -> None:
    """pp 2 × ep 2 of dp 2, every balancing term in use, a layer's terms far from the loss, everything recomputed."""
    moe = MoEConfig(4, 2, d_ff=10, d_ff_shared=12, scale=1.5, aux_sequence=0.1, aux_global=0.2, z_loss=0.3)
    case = Case(MeshConfig(pp=2, dp_shard=2, ep=2), recompute=RecomputeConfig(moe="full"), absent=(1,))
    check(toy("EM*-E", moe=moe), case)


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


def half_precision(config: ModelConfig, case: Case) -> tuple[dict[str, Tensor], set[torch.dtype], set[torch.dtype]]:
    """Gradients in bfloat16, the dtypes that travelled between stages, and those of gradients."""
    engine, _ = build(config, case)
    seen: set[torch.dtype] = set()
    for model in engine.models:
        model.register_forward_pre_hook(lambda _, args: seen.add(args[0].dtype))
    step(engine, case)
    grads = whole_gradients(engine.models)
    return grads, seen - {torch.int64}, {grad.dtype for grad in grads.values()}


@pytest.mark.parametrize("schedule", ["zbv", pytest.param("1f1b", marks=pytest.mark.full)])
def test_bfloat16_travels_and_gradients_stay_float32(schedule: str) -> None:
    """Both ways of accumulating gradients, over the whole backward and in halves."""
    expected = gradients_alone(SHARED, torch.float64, count=8)[2]
    pipeline = PipelineConfig(schedule)  # type: ignore[arg-type]
    case = Case(MeshConfig(dp_shard=1, pp=2), pipeline, dtype=torch.float32, compute_dtype=torch.bfloat16)
    results = run_ranks(2, half_precision, SHARED, case)
    assert set.union(*(travelled for _, travelled, _ in results)) == {torch.bfloat16}
    for grads, _, kept in results:
        assert kept == {torch.float32}
        for name, grad in grads.items():
            difference = (grad.double() - expected[name]).norm() / expected[name].norm()
            assert difference < 0.1, f"{schedule} {name}: {difference:.3f}"


def freed_too_early(config: ModelConfig, case: Case) -> list[str]:
    """What the engine says to a stage that FSDP reshards after the forward, at its root or inside."""
    engine, witness = build(config, case)
    said = []
    for name in ("", "layers.0"):
        (model,) = engine.models
        if name and not model.stage.embeds:
            continue
        module = model.get_submodule(name)
        module.set_reshard_after_forward(True, recurse=False)
        with pytest.raises(PlanError) as caught:
            PipelineEngine(engine.models, engine.optimizer, witness, case.pipeline)
        said.append(str(caught.value))
        module.set_reshard_after_forward(False, recurse=False)
    return said


def test_parameters_freed_too_early_are_refused() -> None:
    first, _ = run_ranks(2, freed_too_early, SHARED, Case(MeshConfig(dp_shard=1, pp=2)))
    assert first == [
        f"pipeline: {where} (stage 0) is sharded with reshard_after_forward; under pp it must be False: gradients "
        "would be silently wrong"
        for where in ("the stage", "layers.0")
    ]


def test_stages() -> None:
    """By cost, by the pattern's cuts, by hand; every layer in one stage, in order."""
    config = toy("M*-EMM")
    for cuts, pattern in (((), "M*-EMM"), ((0, 1, 4, 5), "M*-EMM"), ((), "M|*-E|M|M")):
        pipeline = PipelineConfig("interleaved", cuts=cuts)
        stages = cut_stages(replace(config, pattern=pattern), pipeline, 2, flop_costs(config, 8.0))
        assert [layer for stage in stages for layer in stage.layers] == list(range(6))
        assert [stage.embeds for stage in stages] == [True, False, False, False]
        assert [stage.predicts for stage in stages] == [False, False, False, True]
        if cuts or "|" in pattern:
            assert [stage.first for stage in stages] == [0, 1, 4, 5]
    folded = PipelineConfig("zbv")
    assert [[s.index for s in folded.of_rank(stages, rank, 2)] for rank in (0, 1)] == [[0, 3], [1, 2]]
    round_robin = PipelineConfig("interleaved")
    assert [[s.index for s in round_robin.of_rank(stages, rank, 2)] for rank in (0, 1)] == [[0, 2], [1, 3]]


REFUSED = [
    (PipelineConfig("fast"), "M*-M", 2, r"pipeline\.schedule: 'fast' is unknown; accepted: gpipe, 1f1b, inter"),  # type: ignore[arg-type]
    (PipelineConfig("zbv", chunks=3), "M*-M", 2, r"pipeline\.chunks: 3, but zbv works with 2 stages .* nearest is 2"),
    (PipelineConfig("interleaved", chunks=1), "M*-M", 2, r"chunks: 1, but interleaved works with 2 to 64 .* is 2"),
    (PipelineConfig(), "M*-", 4, r"= 4 stages, but the pattern has only 3 layers .* choose mesh\.pp at most 3"),
    (PipelineConfig(cuts=(0, 2, 2)), "M*-M", 3, r"cuts: \[0, 2, 2\] must start with 0 and ascend below 4 .* be empty"),
    (PipelineConfig(cuts=(1, 2)), "M*-M", 2, r"cuts: \[1, 2\] must start with 0"),
    (PipelineConfig(cuts=(0, 2)), "M*-M", 3, r"cuts: names 2 stages, but pp 3 × 1 stages per rank \(1f1b\) = 3"),
    (PipelineConfig(), "M*|-M", 3, r"1 cuts \| make 2 stages, but pp 3 × 1 .* = 3; write 2 cuts, or none"),
    (PipelineConfig(), "M*-M|", 2, r"'M\*-M\|' cuts off a stage without layers; remove that \|"),
]


@pytest.mark.parametrize(("pipeline", "pattern", "pp", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_refused_cuts(pipeline: PipelineConfig, pattern: str, pp: int, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        cut_stages(toy(pattern), pipeline, pp, [1.0] * 4)


def test_refused_numbers_of_micro_batches() -> None:
    for schedule, least in (("gpipe", 1), ("1f1b", 4), ("interleaved", 4), ("zbv", 7), ("dualpipev", 8)):
        pipeline = PipelineConfig(schedule)  # type: ignore[arg-type]
        pipeline.check_micro_batches(least, 4)
        with pytest.raises(
            PlanError, match=f"{least - 1} micro-batches .* {schedule} over pp 4 needs at least {least}"
        ):
            pipeline.check_micro_batches(least - 1, 4)
    with pytest.raises(PlanError, match=r"9 micro-batches .* into 2 rounds of interleaved over pp 4; the nearest is 8"):
        PipelineConfig("interleaved").check_micro_batches(9, 4)
    PipelineConfig("interleaved").check_micro_batches(10, 4)


def received_bytes(config: ModelConfig, case: Case) -> tuple[int, int]:
    """Bytes of torch's receive buffers on this rank after a step, and those of one stage's output."""
    engine, _ = build(config, case)
    step(engine, case)
    stages = engine._stages
    infos = [
        i for s in stages for infos in (s.args_recv_info, s.grad_recv_info) for some in infos.values() for i in some
    ]
    held = [info.buffer for info in infos if info.buffer is not None]
    return sum(buffer.nbytes for buffer in held), held[0].nbytes


@pytest.mark.parametrize("pipeline", [PipelineConfig(), PipelineConfig("interleaved", chunks=2)], ids=str)
def test_the_planner_knows_what_stages_receive_into(pipeline: PipelineConfig) -> None:
    case = Case(MeshConfig(dp_shard=1, pp=2), pipeline)
    schedule = build_schedule(pipeline.schedule, 2, case.count, pipeline.chunks_per_rank)
    for rank, (total, one) in enumerate(run_ranks(2, received_bytes, toy("M*-M"), case)):
        assert total == one * receive_buffers(schedule, rank)
