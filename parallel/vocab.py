"""The vocabulary-parallel ends of the model: embedding, output projection, cross-entropy.

megatron's own cross-entropy casts to float32 inside and takes no group, so it can meet no fp64 test; this one keeps
`promote_types(dtype, float32)` and two all-reduces.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function


def embed_local(tokens_T: Tensor, weight_VD: Tensor, tp_rank: int) -> Tensor:
    """Rows of the local vocabulary shard, zero for tokens of other shards: int64 [T] → [T, D] partial sums."""
    start = tp_rank * weight_VD.shape[0]
    inside = (tokens_T >= start) & (tokens_T < start + weight_VD.shape[0])
    rows = torch.nn.functional.embedding((tokens_T - start).where(inside, 0), weight_VD)
    return rows.where(inside[:, None], 0.0)


def mask_pad_logits(logits_TV: Tensor, used: int, tp_rank: int) -> Tensor:
    """Logits of the vocabulary's padding become −∞: entries ≥ `used`, counted over all shards."""
    start = tp_rank * logits_TV.shape[1]
    if start + logits_TV.shape[1] <= used:
        return logits_TV
    ids = torch.arange(start, start + logits_TV.shape[1], device=logits_TV.device)
    return logits_TV.masked_fill(ids >= used, float("-inf"))


class _VocabParallelCrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, target_T: Tensor, group: dist.ProcessGroup) -> Tensor:
        parallel = group.size() > 1
        logits = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
        largest = logits.amax(dim=1)
        if parallel:
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        start = group.rank() * logits.shape[1]
        inside = (target_T >= start) & (target_T < start + logits.shape[1])
        column = (target_T - start).where(inside, 0)[:, None]
        shifted = logits - largest[:, None]
        at_target = shifted.gather(1, column)[:, 0].where(inside, 0.0)
        weights = shifted.exp_()
        sums = torch.stack((weights.sum(dim=1), at_target))
        if parallel:
            dist.all_reduce(sums, group=group)
        ctx.save_for_backward(weights.div_(sums[0][:, None]), column, inside)
        ctx.dtype = logits_TV.dtype
        return sums[0].log() - sums[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        probabilities, column, inside = ctx.saved_tensors
        grad = probabilities.scatter_add(1, column, -inside.to(probabilities.dtype)[:, None])
        return (grad * grads[0][:, None]).to(ctx.dtype), None, None


def vocab_parallel_cross_entropy(logits_TV: Tensor, target_T: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Per-token −log softmax(logits)[target] over logits that are sharded along the vocabulary.

    Args:
        logits_TV: this rank's logits [T, V/tp]; −∞ is allowed where no target points.
        target_T: int64 [T], ids in the whole vocabulary.
        group: the tensor-parallel group, shards in rank order.

    Returns:
        [T] in `promote_types(dtype, float32)`, the same on every rank. Targets to be ignored must be masked by the
        caller's weights: their value is finite, never special.
    """
    return _VocabParallelCrossEntropy.apply(logits_TV, target_T, group)
