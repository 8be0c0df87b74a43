"""The one file that touches megatron-core: its tensor- and sequence-parallel regions.

Each region is a pair of collectives, one in the forward and its adjoint in the backward (Korthikanti et al. 2022,
"Reducing Activation Recomputation in Large Transformer Models", §4.2). They take the process group explicitly, so
megatron's `parallel_state` is never needed. A group of one is the identity, and then megatron-core (4 CPU-seconds
of imports) is not even loaded.
"""

from __future__ import annotations

import warnings
from functools import cache
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor


@cache
def _mappings() -> ModuleType:
    """megatron-core's region functions, made to work without CUDA."""
    if not torch.cuda.is_available():
        # Its buffers are allocated on `torch.cuda.current_device()`; without CUDA the only answer is the CPU.
        torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    # It calls collectives by names that newer torch versions have renamed.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\..*is deprecated", category=FutureWarning)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it announces each absent optional accelerator library
        from megatron.core.tensor_parallel import mappings
    return mappings


def preload() -> None:
    """Import megatron-core now: before a pool forks, or before the first step is timed."""
    _mappings()


def gather_sequence(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[T/tp, D] → [T, D]: all-gather along the sequence; the gradient is reduce-scattered (summed)."""
    if group.size() == 1:
        return x
    return _mappings().gather_from_sequence_parallel_region(x, group=group)


def scatter_sum_sequence(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[T, D] partial sums → [T/tp, D]: reduce-scatter along the sequence; the gradient is all-gathered."""
    if group.size() == 1:
        return x
    return _mappings().reduce_scatter_to_sequence_parallel_region(x, group=group)


def sum_gradient(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The identity, whose gradient is all-reduced (summed): for what every rank holds but only partly uses."""
    if group.size() == 1:
        return x
    return _mappings().copy_to_tensor_model_parallel_region(x, group=group)


def all_to_all(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[ranks · n, …] → [ranks · n, …]: the r-th part goes to rank r; the gradient goes back the same way."""
    if group.size() == 1:
        return x
    return _mappings().all_to_all(group, x.contiguous())


def sum_over_both_ways(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All-reduce (sum) whose gradient is all-reduced too: every rank goes on to use the sum differently."""
    if group.size() == 1:
        return x
    return _mappings().copy_to_tensor_model_parallel_region(
        _mappings().reduce_from_tensor_model_parallel_region(x.clone(), group=group), group=group
    )
