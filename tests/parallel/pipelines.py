"""Gradients of the system under pipeline parallelism, for comparison with one process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from equivalence import batches, start_experts, whole_gradients
from polylepis.parallel.engines.fsdp import FSDPEngine, build_model
from polylepis.parallel.engines.pipeline import PipelineEngine, build_stages
from polylepis.parallel.mesh import ContextConfig, MeshConfig, build_mesh
from polylepis.parallel.model import ModelConfig
from polylepis.parallel.pipeline.config import PipelineConfig, cut_stages
from polylepis.parallel.recompute import RecomputeConfig
from polylepis.pretrain.objectives.next_token import NextToken, ObjectiveOutput, PreparedTokens, next_token
from polylepis.pretrain.optim import OptimConfig, build_optimizer
from toys import flop_costs


@dataclass(frozen=True)
class Case:
    """What runs: `count` micro-batches in all, of which each data-parallel rank takes its share."""

    mesh: MeshConfig
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    context: ContextConfig | None = None
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    absent: tuple[int, ...] = ()
    count: int = 8
    dtype: torch.dtype = torch.float64
    compute_dtype: torch.dtype | None = None


class Witness(NextToken):
    """Next-token prediction that remembers the loss."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []

    def prepare(self, *args: Any) -> PreparedTokens:
        return Watched(**vars(super().prepare(*args)), losses=self.losses)


@dataclass(frozen=True)
class Watched(PreparedTokens):
    losses: list[Tensor]

    def finish(self, ce_T: Tensor) -> ObjectiveOutput:
        output = super().finish(ce_T)
        self.losses.append(output.loss.detach())
        return output


def build(config: ModelConfig, case: Case) -> tuple[PipelineEngine, Witness]:
    mesh, witness = build_mesh(case.mesh, "cpu", case.context), Witness()
    stages = cut_stages(config, case.pipeline, mesh.pp_size, flop_costs(config, 8.0))
    options: dict[str, Any] = {"dtype": case.dtype, "compute_dtype": case.compute_dtype, "recompute": case.recompute}
    models = build_stages(config, mesh, case.pipeline, stages, seed=3, **options)
    for model in models:
        start_experts(model)
    optimizer = torch.optim.AdamW([p for model in models for p in model.parameters()], lr=1e-3)
    engine = PipelineEngine(models, optimizer, witness, case.pipeline, case.compute_dtype, case.recompute)
    return engine, witness


def step(engine: PipelineEngine, case: Case) -> Tensor:
    mine = batches(case.absent, case.count)[engine.mesh.dp_rank :: engine.mesh.dp_size]
    total = sum(float(b["loss_weight"].double().sum()) for b in batches(case.absent, case.count))
    return engine.accumulate(mine, total)


def pipelined(config: ModelConfig, case: Case) -> tuple[float, float, dict[str, Tensor], list[int]]:
    """Loss, gradient norm, the gradients of this rank's stages, and the layers that it holds."""
    engine, witness = build(config, case)
    step(engine, case)
    loss = torch.stack(witness.losses).sum().double() if witness.losses else torch.zeros((), dtype=torch.float64)
    dist.all_reduce(loss)
    layers = [index for model in engine.models for index in model.stage.layers]
    return float(loss) / engine.mesh.tp_size, engine.gradient_norm(), whole_gradients(engine.models), layers


def merged(
    results: Sequence[tuple[float, float, dict[str, Tensor], list[int]]],
) -> tuple[float, float, dict[str, Tensor]]:
    """The stages' answers as one: all ranks agree on loss and norm; ranks of one stage on its gradients."""
    loss, norm, grads = results[0][0], results[0][1], {}
    for other_loss, other_norm, stage_grads, _ in results:
        assert (other_loss, other_norm) == (loss, norm)
        for name, grad in stage_grads.items():
            assert torch.equal(grads.setdefault(name, grad), grad), name
    return loss, norm, grads


def placed_engine(
    config: ModelConfig, mesh_config: MeshConfig, context: ContextConfig | None = None, bias: tuple[float, ...] = ()
) -> FSDPEngine:
    """fp64 model, optimizer and objective on any mesh; a layer per stage under pp, and 1F1B.

    Args:
        bias: of every router's selection, see `start_experts`.
    """
    mesh = build_mesh(mesh_config, "cpu", context)
    options: dict[str, Any] = {"seed": 3, "dtype": torch.float64}
    engine: FSDPEngine
    if mesh.pp_size > 1:
        pipeline = PipelineConfig("1f1b")
        stages = cut_stages(config, pipeline, mesh.pp_size, [1.0] * len(config.symbols))
        models = build_stages(config, mesh, pipeline, stages, **options)
        engine = PipelineEngine(models, build_optimizer(OptimConfig(lr=0.01), *models), next_token, pipeline)
    else:
        model = build_model(config, mesh, **options)
        engine = FSDPEngine(model, build_optimizer(OptimConfig(lr=0.01), model), next_token)
    for model in engine.models:
        start_experts(model, bias)
    return engine
