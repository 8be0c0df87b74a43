"""One reader per data-parallel coordinate: its model-parallel group plans alike, one rank reads, the others receive."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist

from .batch import Batch, Slots

# Every field but the weights fits int64; positions in this order.
_WHOLE = ("tokens", "labels", "modality_ids", "doc_ids", "position_ids")


def is_reader(group: dist.ProcessGroup | None) -> bool:
    """Whether this rank reads for its group (its first rank does); without a group every rank reads."""
    return group is None or dist.get_group_rank(group, dist.get_rank()) == 0


def share(
    rows: Batch | None,
    n_bad: int,
    *,
    shape: tuple[int, int],
    most: int,
    group: dist.ProcessGroup,
    slots: Slots | None = None,
) -> Batch:
    """The reader's rows on every rank of `group`: broadcasts of fixed size, whatever the batch holds.

    Args:
        rows: the reader's batch; None on the others.
        n_bad: bad samples that the reader met.
        shape: rows and seq_len, as the plan has them on every rank.
        most: documents per row that `cu_seqlens` has room for, also from the plan.
        group: the model-parallel group.
        slots: how latents lie in the batch, where there are such.

    Returns:
        The batch; `n_bad` comes along as a tensor of one element under "n_bad".
    """
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    n, seq_len = shape
    room = slots.most if slots else 0
    sizes = [n * seq_len] * len(_WHOLE) + [n * (most + 1), n * room, 1]
    if rows is None:
        whole = torch.empty(sum(sizes), dtype=torch.int64, device=device)
        weights = torch.empty(n, seq_len + room, dtype=torch.float32, device=device)
    else:
        fields = [rows[name].reshape(-1) for name in _WHOLE]
        fields += [rows["cu_seqlens"].reshape(-1).long(), *([rows["latent_pos"].reshape(-1)] if slots else [])]
        whole = torch.cat([*fields, torch.tensor([n_bad])]).to(device)
        weights = torch.cat([rows["loss_weight"], *([rows["latent_weight"]] if slots else [])], dim=1).to(device)
    dist.broadcast(whole, group_src=0, group=group)
    dist.broadcast(weights, group_src=0, group=group)
    parts = torch.split(whole.cpu(), sizes)
    batch = {name: part.reshape(shape).clone() for name, part in zip(_WHOLE, parts, strict=False)}
    batch["loss_weight"] = weights[:, :seq_len].cpu().contiguous()
    batch["cu_seqlens"] = parts[-3].reshape(n, most + 1).to(torch.int32)
    if slots:
        # As bytes: not every backend sends both 16-bit types.
        empty = torch.empty(n, room, slots.width, dtype=getattr(torch, slots.dtype))
        bits = (empty if rows is None else rows["latents"].contiguous()).view(torch.uint8).to(device)
        dist.broadcast(bits, group_src=0, group=group)
        batch["latents"] = bits.cpu().view(empty.dtype)
        batch["latent_pos"] = parts[-2].reshape(n, room).clone()
        batch["latent_weight"] = weights[:, seq_len:].cpu().contiguous()
    batch["n_bad"] = parts[-1]
    return batch


def same_everywhere(batch: Batch, group: dist.ProcessGroup) -> bool:
    """Whether all ranks of `group` hold the same bits: a check for tests and for every so many steps."""
    import zlib

    total = 0
    for name in sorted(batch):
        bits = batch[name].contiguous().view(torch.uint8)  # NumPy has no bfloat16
        total = zlib.crc32(np.ascontiguousarray(bits.numpy()).tobytes(), total)
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    edges = torch.tensor([total, -total], dtype=torch.int64, device=device)
    dist.all_reduce(edges, op=dist.ReduceOp.MAX, group=group)
    return int(edges[0]) == -int(edges[1])
