"""Pipeline stages under FSDP2: torch's schedules, our model, metadata that is looked up and never sent.

Every rank of a data coordinate reads the same micro-batches, so documents, modalities and weights are known to every
stage by the micro-batch's number; only the residual stream travels (its sequence shard: 1/tp of the tokens, with
context parallelism of this rank's). The loss is computed inside the last stage with W from the plan, so nothing is
averaged: `scale_grads=False`. Shapes are told to the schedules beforehand; asked to infer them, they run a hidden
forward and backward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)

from ..errors import PlanError
from ..kinds.mamba import Mamba
from ..mesh import Mesh
from ..model import HybridModel, ModelConfig
from ..pipeline.config import SPLIT_BACKWARD, PipelineConfig, check_split_backward
from ..pipeline.stage import Stage
from ..recompute import RecomputeConfig
from ..replace_experts import sum_replicas
from .base import Batch, Objective, Prepared
from .fsdp import FSDPEngine, build_model

SCHEDULES = MappingProxyType(
    {
        "gpipe": ScheduleGPipe,
        "1f1b": Schedule1F1B,
        "interleaved": ScheduleInterleaved1F1B,
        "zbv": ScheduleZBVZeroBubble,
        "dualpipev": ScheduleDualPipeV,
    }
)


def build_stages(
    config: ModelConfig, mesh: Mesh, pipeline: PipelineConfig, stages: Sequence[Stage], **options: Any
) -> tuple[HybridModel, ...]:
    """The stages of this rank, ascending; `options` as in `build_model`."""
    mine = pipeline.of_rank(stages, mesh.pp_rank, mesh.pp_size)
    return tuple(build_model(config, mesh, stage=stage, **options) for stage in mine)


def check_stays_gathered(model: HybridModel) -> None:
    """Refuse a stage whose parameters FSDP would free between its forward and its backward.

    Raises:
        PlanError: names the first module. Schedules that split the backward look parameters up after the forward; freed
            ones are other objects than those in the graph, and their gradients vanish without an error.
    """
    for name, module in model.named_modules():
        if isinstance(module, FSDPModule):
            groups = module._get_fsdp_state()._fsdp_param_groups
            if any(group._reshard_after_forward for group in groups):
                raise PlanError(
                    f"pipeline: {name or 'the stage'} (stage {model.stage.index}) is sharded with "
                    f"reshard_after_forward; under pp it must be False: gradients would be silently wrong"
                )


class _Stage(PipelineStage):
    """torch's stage around one of our models: looks its micro-batch up and, at the end, computes the loss."""

    def __init__(self, model: HybridModel, tokens: int, dtype: torch.dtype) -> None:
        mesh, at = model.mesh, model.stage
        shape = (tokens // mesh.tp_size, model.config.d_model)
        stream = torch.empty(shape, dtype=dtype, device="meta").requires_grad_()
        loss = torch.empty((), dtype=torch.promote_types(dtype, torch.float32), device="meta").requires_grad_()
        super().__init__(
            model,
            at.index,
            at.count,
            mesh.device,
            input_args=() if at.embeds else stream,
            output_args=loss if at.predicts else stream,
            group=mesh.pp_group,
        )
        self.micro_batches: list[Prepared] = []
        self.sums: list[Tensor] = []

    def forward_maybe_with_nosync(self, *args: Tensor, number: Tensor) -> Tensor:
        """One micro-batch through the model.

        Args:
            args: what the stage before sent; nothing for the first stage.
            number: int64 [1] on the CPU, of the micro-batch.
        """
        ready = self.micro_batches[int(number)]
        (x,) = args or (ready.tokens,)
        result: Tensor = self.submod(x, ready.layout, ready.labels)
        if not self.is_last:
            return result
        output = ready.finish(result)
        self.sums.append(output.sums)
        return output.loss


class PipelineEngine(FSDPEngine):
    """One or more stages on this rank, micro-batches in the order of a schedule. See `Engine`."""

    def __init__(
        self,
        models: Sequence[HybridModel],
        optimizer: torch.optim.Optimizer,
        objective: Objective,
        config: PipelineConfig,
        compute_dtype: torch.dtype | None = None,
        recompute: RecomputeConfig | None = None,
    ) -> None:
        """
        Args:
            models: what `build_stages` made.
            compute_dtype: of the residual stream; None is that of the parameters.

        Raises:
            PlanError: a stage that FSDP would free too early; a schedule that repeats work in a layer kind.
        """
        self.mesh, self.optimizer, self._objective = models[0].mesh, optimizer, objective
        self.models, self.config = tuple(models), config
        for model in models:
            check_stays_gathered(model)
            for module in model.modules():
                if isinstance(module, Mamba):
                    module.split_backward = config.schedule in SPLIT_BACKWARD
        check_split_backward(models[0].config, config, recompute or RecomputeConfig())
        self._dtype = next(models[0].parameters()).dtype
        self._stream_dtype = compute_dtype or self._dtype
        self._stages: list[_Stage] = []
        self._schedule: Any = None
        self._built_for = (0, 0)

    def accumulate(self, batches: Sequence[Batch], total_weight: float) -> Tensor:
        n_modalities = len(self.models[0].config.modalities)
        ready = [self._objective.prepare(batch, self.mesh, n_modalities, total_weight) for batch in batches]
        self._prepare(ready)
        last = any(stage.is_last for stage in self._stages)
        numbers = torch.arange(len(ready))
        for stage in self._stages:
            stage.micro_batches, stage.sums = ready, []
        self._schedule.step(
            target=numbers if last else None,
            losses=[] if last else None,
            return_outputs=False,  # the loss is a scalar; merging outputs would look for a batch dimension
            number=numbers,
        )
        total = torch.promote_types(self._dtype, torch.float32)
        sums = torch.zeros(n_modalities, dtype=total, device=self.mesh.device)
        sum_replicas(self.models)
        for stage in self._stages:
            for part in stage.sums:
                sums += part
            stage.micro_batches, stage.sums = [], []
        return sums

    def _prepare(self, ready: Sequence[Prepared]) -> None:
        """Build stages and schedule for this number and size of micro-batches, unless they are there already."""
        sizes = {math.prod(batch.tokens.shape) for batch in ready}
        if len(sizes) != 1:
            raise PlanError(f"pipeline: micro-batches of one step must have the same number of tokens, got {sizes}")
        (tokens,) = sizes
        if self._built_for == (len(ready), tokens):
            return
        self.config.check_micro_batches(len(ready), self.mesh.pp_size)
        self._stages = [_Stage(model, tokens, self._stream_dtype) for model in self.models]
        kind: Any = SCHEDULES[self.config.schedule]
        single = self.config.chunks_per_rank == 1
        self._schedule = kind(
            self._stages[0] if single else self._stages,
            n_microbatches=len(ready),
            loss_fn=lambda loss, _: loss,  # the last stage returns the loss already
            scale_grads=False,
        )
        self._built_for = (len(ready), tokens)
