"""What lies inside DeepSpeed's ZeRO optimizers: gradients, fp32 weights and moments, as logical tensors.

The one file that knows their insides (0.19.8). ZeRO 1 and 2 keep one flat fp32 partition per parameter group and rank,
in which a parameter may be cut anywhere; ZeRO 3 cuts each parameter into equal padded pieces.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from ..model import HybridModel
from ..parts import Part, initial_shard, named_parts, split_bank

MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroState:
    """The optimizer of a `DeepSpeedEngine`; its state lies in ZeRO's partitions. See `Elsewhere`."""

    def __init__(self, model: HybridModel, optimizer: Any, stage: int) -> None:
        self._model, self._optimizer, self._stage = model, optimizer, stage
        self._mesh = model.mesh

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Of the AdamW underneath; `lr` may be set."""
        return self._optimizer.param_groups

    def pieces(self) -> Iterator[tuple[Any, int, Tensor]]:
        """What this rank keeps of every reduced gradient; the pieces of the data-parallel ranks do not overlap.

        Yields:
            A parameter, where in its flattened tensor-parallel shard the piece begins, and the piece; under stage 3
            the last may be padded with zeros.
        """
        from deepspeed.utils import safe_get_local_grad

        parameter: Any
        for _, parameter, _ in named_parts(self._model):
            if self._stage == 3:
                first = self._mesh.device_mesh.get_local_rank("fsdp") * parameter.partition_numel()
                yield parameter, first, safe_get_local_grad(parameter)
                continue
            mapping = parameter._hp_mapping
            if mapping is not None:
                piece = mapping.get_lp_grad_fragment(parameter._index_in_param_group)
                where = mapping.lp_fragment_address
                if piece.numel() != where.numel:
                    piece = piece.view(-1).narrow(0, where.start, where.numel)
                yield parameter, where.start, piece

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        """Multiply every reduced gradient."""
        from deepspeed.utils import safe_set_local_grad

        for parameter, _, piece in self.pieces():
            if self._stage == 3:  # what was read may be a copy in fp32
                safe_set_local_grad(parameter, piece * factor)
            else:
                piece.mul_(factor)

    def discard(self) -> None:
        """Forget the gradients of this step: what DeepSpeed itself does after an overflow."""
        optimizer = self._optimizer
        optimizer.zero_grad(set_to_none=True)
        if self._stage == 3:
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

    @torch.no_grad()
    def create_moments(self) -> None:
        """DeepSpeed creates them in the first step: a step with zero gradients and lr 0, taken back in its count."""
        optimizer = self._optimizer
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        third = self._stage == 3
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
    def set_initial_values(self, seed: int) -> None:
        """DeepSpeed's fp32 copy starts from rounded weights; give it the same bits as every other engine."""
        from deepspeed.utils import safe_set_full_fp32_param

        for name, parameter, part in named_parts(self._model):
            safe_set_full_fp32_param(parameter, initial_shard(part, name, self._mesh, seed))

    def _states(self) -> list[dict[str, Tensor]]:
        return [state for state in self._optimizer.optimizer.state.values() if "step" in state]

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        """Logical tensors for a checkpoint: copies sharded over the mesh, and the buffers themselves."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        result: dict[str, Tensor] = {}
        names = set()
        for name, parameter, part in named_parts(self._model):
            names.add(name)
            result.update(self._sharded(safe_get_full_fp32_param(parameter), part, name))
            result[f"optimizer.step.{name}"] = self._states()[0]["step"].clone()
            for moment in MOMENTS:
                value = safe_get_full_optimizer_state(parameter, moment)
                result.update(self._sharded(value, part, f"optimizer.{moment}.{name}"))
        return result | {name: value for name, value in self._model.state_dict().items() if name not in names}

    def _sharded(self, value: Tensor, part: Part, name: str) -> dict[str, Tensor]:
        """This rank's tensor-parallel shard, of which it keeps only what no other data-parallel rank keeps."""
        mesh, banked = self._mesh.device_mesh["fsdp", "tp"], len(value.shape) > len(part.shape)
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
    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Write back what has been filled into the result of `tensors`."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        for name, parameter, part in named_parts(self._model):
            value = self._whole(tensors, part, name)
            safe_set_full_fp32_param(parameter, value)
            self._set_working_copy(parameter, value)
            for moment in MOMENTS:
                value = self._whole(tensors, part, f"optimizer.{moment}.{name}")
                safe_set_full_optimizer_state(parameter, value, moment)
            for state in self._states():  # AdamW counts per flat partition; all parameters have taken the same steps
                state["step"].copy_(tensors[f"optimizer.step.{name}"])

    def _whole(self, tensors: Mapping[str, Tensor], part: Part, name: str) -> Tensor:
        """This rank's tensor-parallel shard of a (banked) parameter, gathered over the data-parallel ranks."""
        keys = part.entry_names(name) if part.entries else [name]
        locals_ = []
        for key in keys:
            value = tensors[key]
            assert isinstance(value, DTensor)
            locals_.append(value.redistribute(placements=[Replicate(), value.placements[1]]).to_local())
        return torch.stack(locals_) if part.entries else locals_[0]

    def _set_working_copy(self, parameter: Any, value: Tensor) -> None:
        if self._stage != 3:
            parameter.data.copy_(value)
            return
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
        from deepspeed.utils import safe_get_local_fp32_param

        parameter.ds_tensor.data.copy_(safe_get_local_fp32_param(parameter))
        if parameter.ds_status == ZeroParamStatus.AVAILABLE:  # one of the small ones that stay gathered
            parameter.data.copy_(value)
