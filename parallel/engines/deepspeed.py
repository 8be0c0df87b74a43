"""DeepSpeed's ZeRO 1, 2 and 3 as the data-parallel engine of the same model.

DeepSpeed wants plain local tensors where FSDP2 takes `DTensor`s, and averages where everything here sums. So the
parameters are unwrapped to this rank's tensor-parallel shard; a weight that is replicated under sequence parallelism
carries the group over which its gradient is a partial sum (`parts.local`); and the loss is multiplied by the number of
data-parallel ranks, which DeepSpeed divides by. Norm, clipping and checkpoints are ours: the same numbers, and the
same logical tensors, as under FSDP2.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..errors import PlanError
from ..mesh import Mesh, MeshConfig
from ..model import HybridModel, ModelConfig
from ..parts import materialise, named_parts
from ..recompute import RecomputeConfig
from .base import Batch, Objective
from .fsdp import decay_groups
from .zero import ZeroState


@dataclass(frozen=True)
class DeepSpeedConfig:
    """What DeepSpeed may decide; everything else of its JSON follows from the run's configuration.

    Attributes:
        stage: ZeRO stage; 1 shards the optimizer, 2 the gradients as well, 3 the parameters as well.
        offload_optimizer: keep fp32 parameters, moments and the optimizer step in host memory.
        offload_parameters: keep the parameters there between uses; stage 3 only.
        bucket: elements that are reduced (and, under stage 3, prefetched) together.
        persistent: under stage 3, parameters of at most this many elements stay gathered.
    """

    stage: Literal[1, 2, 3] = 2
    offload_optimizer: bool = False
    offload_parameters: bool = False
    bucket: int = 50_000_000
    persistent: int = 100_000

    __pydantic_config__ = {"extra": "forbid"}

    def check(self, mesh: MeshConfig, compute_dtype: torch.dtype = torch.float32) -> None:
        """Refuse what DeepSpeed cannot do, before it is imported.

        Raises:
            PlanError: with the axis and what would be accepted.
        """
        refused = {
            "pp": (mesh.pp, "its ZeRO 2 and 3 re-partition gradients that pipeline stages still add to"),
            "ep": (getattr(mesh, "ep", 1), "it would average experts over all data-parallel ranks, not over theirs"),
            "dp_replicate": (mesh.dp_replicate, "ZeRO shards over all data-parallel ranks; use dp_shard"),
        }
        for axis, (size, reason) in refused.items():
            if size > 1:
                raise PlanError(
                    f"engine: deepspeed takes mesh.{axis} 1, not {size}: {reason}; use mesh.{axis}=1 or engine=fsdp2"
                )
        if self.stage == 1 and compute_dtype != torch.float32:
            raise PlanError(
                "deepspeed.stage: 1 with bfloat16 runs another of DeepSpeed's optimizers, which is not supported; "
                "stage 2 shards the gradients as well"
            )
        if self.offload_parameters and self.stage != 3:
            raise PlanError(f"deepspeed.offload_parameters: needs stage 3, not {self.stage}")
        if self.bucket < 1 or self.persistent < 0:
            raise PlanError(f"deepspeed: bucket {self.bucket} must be ≥ 1 and persistent {self.persistent} ≥ 0")

    def settings(self, dtype: torch.dtype) -> dict[str, Any]:
        """DeepSpeed's own configuration. Accumulation and clipping are ours, so it sees one micro-batch and no clip."""
        zero: dict[str, Any] = {
            "stage": self.stage,
            "reduce_bucket_size": self.bucket,
            "allgather_bucket_size": self.bucket,
            "overlap_comm": torch.cuda.is_available(),
            "contiguous_gradients": True,
        }
        if self.stage == 3:
            zero["stage3_param_persistence_threshold"] = self.persistent
            zero["stage3_prefetch_bucket_size"] = self.bucket
        if self.offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        if self.offload_parameters:
            zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        half = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "zero_optimization": zero,
            "gradient_clipping": 0.0,  # its default is 1
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # its CPU Adam is compiled for two minutes at the first use
            **(half if dtype == torch.bfloat16 else {}),
        }


@dataclass(frozen=True)
class _Groups:
    """What DeepSpeed calls `mpu`: tensor parallelism is its model parallelism, and dp × cp its data parallelism."""

    mesh: Mesh

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.mesh.tp_group

    def get_model_parallel_rank(self) -> int:
        return self.mesh.tp_rank

    def get_model_parallel_world_size(self) -> int:
        return self.mesh.tp_size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.mesh.device_mesh.get_group("fsdp")

    def get_data_parallel_rank(self) -> int:
        return self.mesh.device_mesh.get_local_rank("fsdp")

    def get_data_parallel_world_size(self) -> int:
        return self.mesh.device_mesh["fsdp"].size()


def _library() -> Any:
    """DeepSpeed, without the shared-memory op that it would otherwise compile for a minute on CPU.

    Raises:
        PlanError: it is not installed.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError:
        raise PlanError(
            "engine: deepspeed is not installed; pip install 'polylepis[deepspeed]', or engine=fsdp2"
        ) from None
    deepspeed.logger.setLevel("WARNING")
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # only inference uses it
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return deepspeed


def build_local_model(
    config: ModelConfig,
    mesh: Mesh,
    settings: dict[str, Any],
    *,
    seed: int = 0,
    recompute: RecomputeConfig | None = None,
) -> HybridModel:
    """The model with this rank's tensor-parallel shards as plain parameters; under ZeRO 3 never whole.

    The same initial values as `fsdp.build_model`: they depend on (seed, name) only.
    """
    deepspeed = _library()
    dtype = torch.bfloat16 if "bf16" in settings else torch.float32
    model = HybridModel(config, mesh, recompute=recompute)
    modules = {f"layers.{index}.": block for index, block in model.layers.items()}
    modules |= {f"{name}.": model.get_submodule(name) for name in ("embed", "final_norm", "lm_head")}
    for prefix, module in modules.items():
        materialise(module, prefix, mesh, seed)
        _unwrap(module, mesh, dtype)
        for name, buffer in list(module.named_buffers()):
            path, _, leaf = name.rpartition(".")
            module.get_submodule(path)._buffers[leaf] = buffer.to(mesh.device)
        if settings["zero_optimization"]["stage"] == 3:
            deepspeed.zero.Init(
                module=module,
                config_dict_or_path=settings,
                mpu=_Groups(mesh),
                data_parallel_group=mesh.device_mesh.get_group("fsdp"),
                dtype=dtype,
            )
    return model


def _unwrap(module: nn.Module, mesh: Mesh, dtype: torch.dtype) -> None:
    """Replace each `DTensor` parameter by this rank's shard in the dtype of computation, marked for DeepSpeed."""
    for name, parameter, _ in list(named_parts(module)):
        assert isinstance(parameter, DTensor)
        plain = nn.Parameter(parameter.to_local().detach().to(dtype))
        sharded = not parameter.placements[0].is_replicate()
        if sharded:
            plain.tensor_model_parallel = plain.model_parallel = True  # type: ignore[attr-defined]
        elif mesh.tp_size > 1:
            plain.sum_group = mesh.tp_group  # type: ignore[attr-defined]
        path, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(path), leaf, plain)


class DeepSpeedEngine:
    """A model under ZeRO, its micro-batches one after another. See `Engine`."""

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        objective: Objective,
        zero: DeepSpeedConfig,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        seed: int = 0,
        compute_dtype: torch.dtype = torch.float32,
        recompute: RecomputeConfig | None = None,
    ) -> None:
        self.mesh, self._objective = mesh, objective
        settings = zero.settings(compute_dtype)
        model = build_local_model(config, mesh, settings, seed=seed, recompute=recompute)
        decayed, plain = decay_groups(model)
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
        base = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps)
        deepspeed = _library()
        if zero.stage == 3:
            # Parameters are read by the block that owns them, not by the module they hang on.
            deepspeed.utils.set_z3_leaf_modules(model, [type(next(iter(model.layers.values())))])
            for name in ("embed", "final_norm", "lm_head"):
                deepspeed.zero.register_external_parameter(model, model.get_submodule(name).weight)
        buffers = {name: value.dtype for name, value in model.named_buffers()}
        engine, optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=base, config=settings, mpu=_Groups(mesh), dist_init_required=False
        )
        for name, dtype in buffers.items():  # it rounds those to the dtype of computation too
            path, _, leaf = name.rpartition(".")
            owner = model.get_submodule(path)
            owner._buffers[leaf] = owner._buffers[leaf].to(dtype)  # type: ignore[union-attr]
        self._engine = engine
        self.models: tuple[HybridModel, ...] = (model,)
        self.optimizer = ZeroState(model, optimizer, zero.stage)
        self.optimizer.create_moments()
        if compute_dtype != torch.float32:
            self.optimizer.set_initial_values(seed)

    def accumulate(self, batches: Sequence[Batch], total_weight: float) -> Tensor:
        (model,) = self.models
        n_modalities = len(model.config.modalities)
        sums = torch.zeros(n_modalities, device=self.mesh.device)
        ranks = self.mesh.device_mesh["fsdp"].size()
        for number, batch in enumerate(batches):
            self._engine.set_gradient_accumulation_boundary(number == len(batches) - 1)
            # DeepSpeed averages over these ranks; W is the divisor of the loss and of every term that layers add to it.
            ready = self._objective.prepare(batch, self.mesh, n_modalities, total_weight / ranks)
            output = ready.finish(self._engine(ready.tokens, ready.layout, ready.labels))
            self._engine.backward(output.loss, scale_wrt_gas=False)
            sums += output.sums
        return sums

    @torch.no_grad()
    def gradient_norm(self) -> float:
        total = torch.zeros((), device=self.mesh.device)
        for parameter, _, piece in self.optimizer.pieces():
            copies = 1 if getattr(parameter, "tensor_model_parallel", False) else self.mesh.tp_size
            total += piece.float().square().sum().to(total.device) / copies
        dist.all_reduce(total)
        return float(total.sqrt())

    def scale(self, factor: float) -> None:
        self.optimizer.scale(factor)

    def update(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()

    def discard(self) -> None:
        self.optimizer.discard()
