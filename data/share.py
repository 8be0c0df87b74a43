"""One reader per data-parallel coordinate: its model-parallel group plans alike, one rank reads, the others receive."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import numpy as np

from .batch import Batch, Rows, Slots

if TYPE_CHECKING:
    import torch.distributed as dist

# Every field but the weights fits int64; positions in this order.
_WHOLE = ("tokens", "labels", "modality_ids", "doc_ids", "position_ids")


def is_reader(group: dist.ProcessGroup | None) -> bool:
    """Whether this rank reads for its group (its first rank does); without a group every rank reads."""
    if group is None:
        return True
    import torch.distributed as dist

    return dist.get_group_rank(group, dist.get_rank()) == 0


def share(
    rows: Rows | None,
    n_bad: int,
    *,
    shape: tuple[int, int],
    most: int,
    group: dist.ProcessGroup,
    slots: Slots | None = None,
) -> Rows:
    """The reader's rows on every rank of `group`: broadcasts of fixed size, whatever the batch holds.

    Args:
        rows: the reader's batch; None on the others.
        n_bad: bad samples that the reader met.
        shape: rows and seq_len, as the plan has them on every rank.
        most: documents per row that `cu_seqlens` has room for, also from the plan.
        group: the model-parallel group.
        slots: how latents lie in the batch, where there are such.

    Returns:
        The batch; `n_bad` comes along as an array of one element under "n_bad".
    """
    import torch
    import torch.distributed as dist

    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    n, seq_len = shape
    room = slots.most if slots else 0
    sizes = [n * seq_len] * len(_WHOLE) + [n * (most + 1), n * room, 1]
    if rows is None:
        whole = torch.empty(sum(sizes), dtype=torch.int64, device=device)
        weights = torch.empty(n, seq_len + room, dtype=torch.float32, device=device)
    else:
        names = [*_WHOLE, "cu_seqlens", *(["latent_pos"] if slots else [])]
        fields = [rows[name].reshape(-1).astype(np.int64) for name in names]
        whole = torch.from_numpy(np.concatenate([*fields, [n_bad]])).to(device)
        loss = [rows["loss_weight"], *([rows["latent_weight"]] if slots else [])]
        weights = torch.from_numpy(np.concatenate(loss, axis=1)).to(device)
    dist.broadcast(whole, group_src=0, group=group)
    dist.broadcast(weights, group_src=0, group=group)
    parts, both = np.split(whole.cpu().numpy(), np.cumsum(sizes)[:-1]), weights.cpu().numpy()
    batch = {name: part.reshape(shape) for name, part in zip(_WHOLE, parts, strict=False)}
    batch["loss_weight"] = np.ascontiguousarray(both[:, :seq_len])
    batch["cu_seqlens"] = parts[-3].reshape(n, most + 1).astype(np.int32)
    if slots:
        # As bytes: not every backend sends 16-bit types.
        found = np.empty((n, room, slots.width), dtype=np.uint16) if rows is None else rows["latents"]
        bits = torch.from_numpy(np.ascontiguousarray(found).view(np.uint8)).to(device)
        dist.broadcast(bits, group_src=0, group=group)
        batch["latents"] = bits.cpu().numpy().view(np.uint16)
        batch["latent_pos"] = parts[-2].reshape(n, room)
        batch["latent_weight"] = np.ascontiguousarray(both[:, seq_len:])
    batch["n_bad"] = parts[-1]
    return batch


def same_everywhere(batch: Batch, group: dist.ProcessGroup) -> bool:
    """Whether all ranks of `group` hold the same bits: a check for tests and for every so many steps."""
    import torch
    import torch.distributed as dist

    total = 0
    for name in sorted(batch):
        bits = batch[name].contiguous().view(torch.uint8)  # NumPy has no bfloat16
        total = zlib.crc32(np.ascontiguousarray(bits.numpy()).tobytes(), total)
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    edges = torch.tensor([total, -total], dtype=torch.int64, device=device)
    dist.all_reduce(edges, op=dist.ReduceOp.MAX, group=group)
    return int(edges[0]) == -int(edges[1])
