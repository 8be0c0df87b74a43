"""DeepSpeed's ZeRO 1, 2 and 3 as the data-parallel engine of the same model.

DeepSpeed wants plain local tensors where FSDP2 takes `DTensor`s, and averages where everything here sums. So the
parameters are unwrapped to this rank's tensor-parallel shard; a weight that is replicated under sequence parallelism
carries the group over which its gradient is a partial sum (`parts.local`); and the loss is multiplied by the number of
data-parallel ranks, which DeepSpeed divides by. Norm, clipping and checkpoints are ours: the same numbers, and the
same logical tensors, as under FSDP2.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from ..errors import PlanError
from ..mesh import Mesh, MeshConfig
from ..model import HybridModel, ModelConfig
from ..parts import Part, initial_shard, materialise, named_parts, split_bank
from .base import Batch, Objective
from .fsdp import decay_groups

MOMENTS = ("exp_avg", "exp_avg_sq")


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


@dataclass(frozen=True)
class _Through:
    """The model as an objective sees it, its forward passing through DeepSpeed's hooks."""

    engine: Any
    mesh: Mesh
    config: ModelConfig

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.engine(*args, **kwargs)


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
    config: ModelConfig, mesh: Mesh, settings: dict[str, Any], *, seed: int = 0, stage: int = 2
) -> HybridModel:
    """The model with this rank's tensor-parallel shards as plain parameters; under ZeRO 3 never whole.

    The same initial values as `fsdp.build_model`: they depend on (seed, name) only.
    """
    deepspeed = _library()
    dtype = torch.bfloat16 if "bf16" in settings else torch.float32
    model = HybridModel(config, mesh)
    modules = {f"layers.{index}.": block for index, block in model.layers.items()}
    modules |= {f"{name}.": model.get_submodule(name) for name in ("embed", "final_norm", "lm_head")}
    for prefix, module in modules.items():
        materialise(module, prefix, mesh, seed)
        _unwrap(module, mesh, dtype)
        for name, buffer in list(module.named_buffers()):
            path, _, leaf = name.rpartition(".")
            module.get_submodule(path)._buffers[leaf] = buffer.to(mesh.device)
        if stage == 3:
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
    ) -> None:
        self.mesh, self._objective, self._zero = mesh, objective, zero
        settings = zero.settings(compute_dtype)
        model = build_local_model(config, mesh, settings, seed=seed, stage=zero.stage)
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
        self._engine, self.optimizer = engine, optimizer
        self.models: tuple[HybridModel, ...] = (model,)
        self._create_moments()
        if compute_dtype != torch.float32:
            self._set_initial_values(seed)

    def accumulate(self, batches: Sequence[Batch], total_weight: float) -> Tensor:
        (model,) = self.models
        through = _Through(self._engine, self.mesh, model.config)
        sums = torch.zeros(len(model.config.modalities), device=self.mesh.device)
        ranks = self.mesh.device_mesh["fsdp"].size()
        for number, batch in enumerate(batches):
            self._engine.set_gradient_accumulation_boundary(number == len(batches) - 1)
            output = self._objective(through, batch, total_weight)  # type: ignore[arg-type]
            self._engine.backward(output.loss * ranks, scale_wrt_gas=False)  # DeepSpeed averages over these ranks
            sums += output.sums
        return sums

    @torch.no_grad()
    def gradient_norm(self) -> float:
        total = torch.zeros((), device=self.mesh.device)
        for parameter, piece in self._pieces():
            copies = 1 if getattr(parameter, "tensor_model_parallel", False) else self.mesh.tp_size
            total += piece.float().square().sum().to(total.device) / copies
        dist.all_reduce(total)
        return math.sqrt(float(total)) if torch.isfinite(total) else float(total)

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        from deepspeed.utils import safe_set_local_grad

        for parameter, piece in self._pieces():
            if self._zero.stage == 3:
                safe_set_local_grad(parameter, piece * factor)
            else:
                piece.mul_(factor)

    def update(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()

    def discard(self) -> None:
        optimizer = self.optimizer
        optimizer.zero_grad(set_to_none=True)
        if self._zero.stage == 3:
            optimizer._overflow_clean_up(1.0)
            optimizer._pre_step()
            return
        if optimizer.cpu_offload:
            optimizer.reset_cpu_buffers()
        for group in optimizer.averaged_gradients:
            optimizer.averaged_gradients[group] = None
            optimizer.all_grad_tensors[group] = None
        optimizer._release_preflattened_grad_buffers()
        optimizer.micro_step_id = -1

    def _pieces(self) -> Iterator[tuple[Any, Tensor]]:
        """What this rank keeps of every reduced gradient; the pieces of the data-parallel ranks do not overlap."""
        from deepspeed.utils import safe_get_local_grad

        parameter: Any
        for _, parameter, _ in named_parts(self.models[0]):
            if self._zero.stage == 3:
                yield parameter, safe_get_local_grad(parameter)
                continue
            mapping = parameter._hp_mapping
            if mapping is not None:
                piece, where = (
                    mapping.get_lp_grad_fragment(parameter._index_in_param_group),
                    mapping.lp_fragment_address,
                )
                if piece.numel() != where.numel:
                    piece = piece.view(-1).narrow(0, where.start, where.numel)
                yield parameter, piece

    @torch.no_grad()
    def _create_moments(self) -> None:
        """DeepSpeed creates them in the first step: a step with zero gradients and lr 0, taken back in its count."""
        optimizer = self.optimizer
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        third = self._zero.stage == 3
        flat = optimizer.fp32_partitioned_groups_flat if third else optimizer.single_partition_of_fp32_groups
        for index, partition in enumerate(flat):
            kept, partition.grad = partition.grad, torch.zeros_like(partition)
            optimizer._optimizer_step(index)
            partition.grad = kept
        if not third:
            # It links all groups' states after the first group's step, when the others have none (0.19.8).
            optimizer._hp_optimizer_states_linked = False
            optimizer._lazy_init_hp_params_optimizer_state()
        for state in self._states():
            state["step"].zero_()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    @torch.no_grad()
    def _set_initial_values(self, seed: int) -> None:
        """DeepSpeed's fp32 copy starts from rounded weights; give it the same bits as every other engine."""
        from deepspeed.utils import safe_set_full_fp32_param

        for name, parameter, part in named_parts(self.models[0]):
            safe_set_full_fp32_param(parameter, initial_shard(part, name, self.mesh, seed))

    def _states(self) -> list[dict[str, Tensor]]:
        return [state for state in self.optimizer.optimizer.state.values() if "step" in state]

    @torch.no_grad()
    def tensors(self, with_optimizer: bool = True) -> dict[str, Tensor]:
        """Logical tensors for a checkpoint, copies sharded over the mesh; see `Engine.tensors`."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        (model,) = self.models
        result: dict[str, Tensor] = {}
        names = set()
        for name, parameter, part in named_parts(model):
            names.add(name)
            result.update(self._sharded(safe_get_full_fp32_param(parameter), part, name))
            if with_optimizer:
                result[f"optimizer.step.{name}"] = self._states()[0]["step"].clone()
                for moment in MOMENTS:
                    value = safe_get_full_optimizer_state(parameter, moment)
                    result.update(self._sharded(value, part, f"optimizer.{moment}.{name}"))
        result.update({name: value for name, value in model.state_dict().items() if name not in names})
        return result

    def _sharded(self, value: Tensor, part: Part, name: str) -> dict[str, Tensor]:
        """This rank's tensor-parallel shard, of which it keeps only what no other data-parallel rank keeps."""
        mesh, banked = self.mesh.device_mesh["fsdp", "tp"], len(value.shape) > len(part.shape)
        tp_dim = None if part.tp_dim is None else part.tp_dim + banked
        ranks, shape = mesh.size(0), list(value.shape)
        placements: list[Placement] = [Replicate(), Replicate() if tp_dim is None else Shard(tp_dim)]
        if tp_dim is not None:
            shape[tp_dim] *= mesh.size(1)
        free = [d for d in range(banked, value.dim()) if d != tp_dim and value.shape[d] % ranks == 0]
        if free:
            dim = max(free, key=lambda d: value.shape[d])
            value = value.chunk(ranks, dim)[mesh.get_local_rank("fsdp")].contiguous().clone()
            placements[0] = Shard(dim)
        stride = torch.empty(shape, device="meta").stride()
        whole = DTensor.from_local(value, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)
        return split_bank(whole, part, name)

    @torch.no_grad()
    def take(self, tensors: dict[str, Tensor]) -> None:
        """Write back what a checkpoint has filled into the result of `tensors`; see `Engine.take`."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        (model,) = self.models
        for name, parameter, part in named_parts(model):
            value = self._whole(tensors, part, name)
            safe_set_full_fp32_param(parameter, value)
            self._set_working_copy(parameter, value)
            for moment in MOMENTS:
                key = f"optimizer.{moment}.{name}"
                if f"optimizer.step.{name}" in tensors:
                    safe_set_full_optimizer_state(parameter, self._whole(tensors, part, key), moment)
                    for state in self._states():
                        state["step"].copy_(tensors[f"optimizer.step.{name}"])

    def _whole(self, tensors: dict[str, Tensor], part: Part, name: str) -> Tensor:
        """This rank's tensor-parallel shard of a (banked) parameter, gathered over the data-parallel ranks."""
        keys = part.entry_names(name) if part.entries else [name]
        locals_ = []
        for key in keys:
            value = tensors[key]
            assert isinstance(value, DTensor)
            locals_.append(value.redistribute(placements=[Replicate(), value.placements[1]]).to_local())
        return torch.stack(locals_) if part.entries else locals_[0]

    def _set_working_copy(self, parameter: Any, value: Tensor) -> None:
        if self._zero.stage != 3:
            parameter.data.copy_(value)
            return
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
        from deepspeed.utils import safe_get_local_fp32_param

        parameter.ds_tensor.data.copy_(safe_get_local_fp32_param(parameter))
        if parameter.ds_status == ZeroParamStatus.AVAILABLE:  # one of the small ones that stay gathered
            parameter.data.copy_(value)
