"""FSDP2 over the data-parallel axes, with sums everywhere, and the norm of what it leaves behind.

The loss is Σ w·ℓ / W with W counted over the global batch, so every reduction is a plain sum. A wrong divide factor
does not show in an AdamW step (the step is scale-free); it shows in gradients and in their norm.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from ..errors import PlanError
from ..kinds.moe import Bank
from ..kinds.moe_router import Router
from ..mesh import Mesh
from ..model import HybridModel, ModelConfig
from ..parts import fsdp_placement, materialise, named_parts
from ..pipeline.stage import Stage
from ..recompute import RecomputeConfig
from ..replace_experts import counted_rows, sum_replicas
from .base import Batch, Objective


def build_model(
    config: ModelConfig,
    mesh: Mesh,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    compute_dtype: torch.dtype | None = None,
    stage: Stage | None = None,
    recompute: RecomputeConfig | None = None,
) -> HybridModel:
    """The model on its mesh: initial weights that depend on (seed, name) only, sharded layer by layer.

    A pipeline stage stays gathered from its first forward to the last backward of a step: schedules that split the
    backward are silently wrong with anything else.

    Args:
        config: the model.
        mesh: where it lives; never more than one layer exists unsharded.
        seed: of the initial weights.
        dtype: of parameters, gradients and optimizer state.
        compute_dtype: of forward and backward (bfloat16, say); gradients are still reduced in `dtype`.
        stage: the layers to build, None for all.
        recompute: what the backward computes again instead of keeping.

    Raises:
        PlanError: sizes that do not divide over the mesh.
    """
    model = HybridModel(config, mesh, stage, recompute)
    _check_banks(model, mesh)
    policy = MixedPrecisionPolicy()
    if compute_dtype not in (None, dtype):
        policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=dtype, cast_forward_inputs=False)
    for index, block in model.layers.items():
        materialise(block, f"layers.{index}.", mesh, seed, dtype)
        for name, buffer in list(block.named_buffers()):
            owner = block.get_submodule(name.rpartition(".")[0])
            owner._buffers[name.rpartition(".")[2]] = buffer.to(mesh.device)
        _shard(block, mesh, policy)
    for name in ("embed", "final_norm", "lm_head"):
        if hasattr(model, name):
            materialise(model.get_submodule(name), f"{name}.", mesh, seed, dtype)
    _shard(model, mesh, policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
    return model


def _shard(module: nn.Module, mesh: Mesh, policy: MixedPrecisionPolicy) -> None:
    """Also over one rank: an unwrapped replicated weight would keep a partial gradient after sequence parallelism.

    Experts that lie on ranks of their own form a group of their own, and so do routers where the rest is rounded.
    """
    placement = fsdp_placement(module)
    banks: list[nn.Module] = [
        inner for inner in module.modules() if isinstance(inner, Bank) and not isinstance(inner, FSDPModule)
    ]
    reshard = False if mesh.pp_size > 1 else None
    if banks and mesh.experts is not None:
        fully_shard(
            banks,
            mesh=mesh.expert_fsdp,
            mp_policy=policy,
            shard_placement_fn=placement.get,
            reshard_after_forward=reshard,
        )
    for inner in list(module.modules()):
        if isinstance(inner, Router) and policy.param_dtype is not None and not isinstance(inner, FSDPModule):
            exact = MixedPrecisionPolicy(cast_forward_inputs=False)
            fully_shard(inner, mesh=mesh.fsdp, mp_policy=exact, reshard_after_forward=reshard)
    fully_shard(
        module, mesh=mesh.fsdp, mp_policy=policy, shard_placement_fn=placement.get, reshard_after_forward=reshard
    )


def _check_banks(model: HybridModel, mesh: Mesh) -> None:
    everyone, sharing = mesh.device_mesh["fsdp"].size(), mesh.expert_fsdp.shape[-1]
    for name, parameter, part in named_parts(model):
        if part.entries:
            dim, ranks = (2 if part.tp_dim == 0 else 1), sharing if part.expert else everyone
            if parameter.shape[dim] % ranks:
                axes = "dp_shard × cp" + (" / ep" if part.expert and mesh.ep_size > 1 else "")
                raise PlanError(
                    f"{name}: dimension {dim} of the bank {tuple(parameter.shape)} is not divisible by {axes} = "
                    f"{ranks}; raise {'ep or ' if part.expert else ''}dp_replicate instead"
                )


def decay_groups(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters with and without weight decay, as their layer kinds declare."""
    declared = [(parameter, part.decay) for _, parameter, part in named_parts(model)]
    return [p for p, decay in declared if decay], [p for p, decay in declared if not decay]


@torch.no_grad()
def gradient_norm(
    parameters: Iterable[nn.Parameter], pp_size: int = 1, counted: Mapping[nn.Parameter, Tensor] = MappingProxyType({})
) -> float:
    """The 2-norm of the whole gradient: local squares weighted by replication, one all-reduce over the world.

    `torch.nn.utils.get_total_norm` refuses parameters on different meshes; this works on any.

    Args:
        parameters: of this rank's stages; each lies on the ranks of its stage, one in `pp_size` of the world.
        counted: which rows of a gradient count, where not all do (`replace_experts.counted_rows`).
    """
    total: Tensor | None = None
    for parameter in parameters:
        grad = parameter.grad
        if grad is None:
            continue
        assert isinstance(grad, DTensor)
        shards = math.prod(
            size for size, p in zip(grad.device_mesh.shape, grad.placements, strict=True) if not p.is_replicate()
        )
        local_grad = grad.to_local()
        if parameter in counted:
            local_grad = local_grad[counted[parameter]]
        wide = torch.promote_types(local_grad.dtype, torch.float32)
        square = local_grad.to(wide).square().sum() * (shards * pp_size / dist.get_world_size())
        total = square if total is None else total + square
    if total is None:
        return 0.0
    dist.all_reduce(total)
    return float(total.sqrt())


@torch.no_grad()
def scale_gradients(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Multiply every gradient, in place."""
    grads = [p.grad.to_local() for p in parameters if isinstance(p.grad, DTensor)]
    torch._foreach_mul_(grads, factor)


class FSDPEngine:
    """One sharded model on this rank, its micro-batches one after another, or two at once. See `Engine`."""

    def __init__(
        self, model: HybridModel, optimizer: torch.optim.Optimizer, objective: Objective, in_pairs: bool = False
    ) -> None:
        """
        Args:
            in_pairs: two micro-batches pass the model at once, so that dispatch of one overlaps computation of the
                other (`HybridModel.forward_pair`); the last of an odd number passes alone.
        """
        self.mesh, self.optimizer, self._objective = model.mesh, optimizer, objective
        self.models: tuple[HybridModel, ...] = (model,)
        self.in_pairs = in_pairs
        if in_pairs:
            register_fsdp_forward_method(model, "forward_pair")

    def accumulate(self, batches: Sequence[Batch], total_weight: float) -> Tensor:
        (model,) = self.models
        sums = torch.zeros(len(model.config.modalities), device=self.mesh.device)
        at_once = 2 if self.in_pairs else 1
        for first in range(0, len(batches), at_once):
            ready = [
                self._objective.prepare(batch, self.mesh, len(sums), total_weight)
                for batch in batches[first : first + at_once]
            ]
            inputs = [(prepared.tokens, prepared.layout, prepared.labels) for prepared in ready]
            results = [model(*inputs[0])] if len(inputs) == 1 else model.forward_pair(*zip(*inputs, strict=True))
            outputs = [prepared.finish(ce_T) for prepared, ce_T in zip(ready, results, strict=True)]
            torch.stack([output.loss for output in outputs]).sum().backward()
            for output in outputs:
                sums += output.sums
        sum_replicas(self.models)
        return sums

    def gradient_norm(self) -> float:
        parameters = (p for model in self.models for p in model.parameters())
        return gradient_norm(parameters, self.mesh.pp_size, counted_rows(self.models))

    def scale(self, factor: float) -> None:
        scale_gradients((p for model in self.models for p in model.parameters()), factor)

    def update(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.discard()

    def discard(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
