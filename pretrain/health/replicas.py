"""Do replicas hold the same bits? Hashes of what should be equal, compared along the mesh axes that replicate it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ...parallel.engines.base import Engine

CHUNK = 1 << 20
_PRIME = 0x9E3779B97F4A7C15 - (1 << 64)  # 2⁶⁴ / golden ratio, odd, as a signed number
_MASK = (1 << 62) - 1  # so that a hash and its negative both fit


@torch.no_grad()
def content_hash(values: Tensor) -> Tensor:
    """A 62-bit hash of the bits of a tensor and of their order, int64 [] on its device; no synchronisation.

    Σ bits[i]·(odd number of i) modulo 2⁶⁴, in which any one changed element shows, folded to 62 bits.
    """
    flat = values.detach().contiguous().view(-1)
    if flat.element_size() == 8:
        bits = flat.view(torch.int64)
    elif flat.element_size() == 4:
        bits = flat.view(torch.int32)
    elif flat.element_size() == 2:
        bits = flat.view(torch.int16)
    else:
        bits = flat.view(torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    weights = torch.arange(min(CHUNK, max(1, bits.numel())), dtype=torch.int64, device=values.device)
    for start in range(0, bits.numel(), CHUNK):
        piece = bits[start : start + CHUNK].to(torch.int64)
        # Consecutive positions, spread over 64 bits and made odd: an odd factor loses nothing modulo 2⁶⁴.
        odd = ((weights[: piece.numel()] + start) * _PRIME) | 1
        total = total + (piece * odd).sum()
    # The mask drops two bits; folding keeps a change of them alone visible.
    return (total ^ (total >> 29)) & _MASK


@dataclass(frozen=True)
class Replicated:
    """A tensor that is the same on all ranks along one mesh axis."""

    name: str
    values: Tensor
    group: dist.ProcessGroup
    ranks: tuple[int, ...]


def replicated(engine: Engine) -> Iterator[Replicated]:
    """Parameters, their optimizer state, and buffers, once for each mesh axis that holds copies of them."""
    for model in engine.models:
        for name, parameter in model.named_parameters():
            if not isinstance(parameter, DTensor):
                yield from _replicated_under_zero(name, parameter, model.mesh.device_mesh)
                continue
            state = engine.optimizer.state.get(parameter, {}) if isinstance(engine.optimizer, Optimizer) else {}
            tensors = {name: parameter, **{f"{k} of {name}": v for k, v in state.items() if isinstance(v, DTensor)}}
            for label, value in tensors.items():
                for dim, placement in enumerate(value.placements):
                    if placement.is_replicate() and value.device_mesh.size(dim) > 1:
                        yield Replicated(label, value.to_local(), *_axis(value.device_mesh, dim))
        axes = model.mesh.device_mesh
        for name, buffer in model.named_buffers():
            for dim in range(axes.ndim) if name in model.state_dict() else ():
                if axes.mesh_dim_names and axes.mesh_dim_names[dim] != "pp" and axes.size(dim) > 1:
                    yield Replicated(name, buffer, *_axis(axes, dim))


def _replicated_under_zero(name: str, parameter: Any, mesh: DeviceMesh) -> Iterator[Replicated]:
    """DeepSpeed's plain parameters: whole on every data-parallel rank but under ZeRO 3, which cuts them (`ds_tensor`).

    They are written anew from the optimizer's partitions in every step, so partitions that differ show in them.
    """
    cut = getattr(parameter, "ds_tensor", None)
    values = parameter.detach() if cut is None else cut.detach()
    axes = [] if cut is not None else ["fsdp"]
    axes += [] if getattr(parameter, "tensor_model_parallel", False) else ["tp"]
    for axis in axes:
        if mesh[axis].size() > 1:
            yield Replicated(name, values, *_axis(mesh[axis], 0))


def _axis(mesh: DeviceMesh, dim: int) -> tuple[dist.ProcessGroup, tuple[int, ...]]:
    group = mesh.get_group(dim)
    return group, tuple(dist.get_process_group_ranks(group))


def compare(engine: Engine) -> str:
    """Compare all replicas; empty where they agree, else the ranks and tensors that differ, the same on all ranks.

    One small all-reduce per mesh axis and one over the world, read once; more only where something differs.
    """
    by_group: dict[tuple[int, ...], list[Replicated]] = defaultdict(list)
    for item in replicated(engine):
        by_group[item.ranks].append(item)
    device = engine.mesh.device
    differs = torch.zeros((), dtype=torch.int64, device=device)
    hashes: dict[tuple[int, ...], Tensor] = {}
    for ranks, items in by_group.items():  # in the order of the layers, the same on all ranks of a group
        mine = torch.stack([content_hash(item.values) for item in items])
        both = torch.cat((mine, -mine))
        dist.all_reduce(both, op=dist.ReduceOp.MIN, group=items[0].group)
        least, greatest = both[: len(items)], -both[len(items) :]
        differs += (least != greatest).any()
        hashes[ranks] = mine
    dist.all_reduce(differs, op=dist.ReduceOp.MAX)
    return _name(by_group, hashes) if int(differs) else ""


def _name(by_group: dict[tuple[int, ...], list[Replicated]], hashes: dict[tuple[int, ...], Tensor]) -> str:
    """Which rank of which group holds other bits in which tensor, gathered from all ranks."""
    found: list[tuple[str, list[int]]] = []
    for ranks, items in by_group.items():
        everyone = [torch.empty_like(hashes[ranks]) for _ in ranks]
        dist.all_gather(everyone, hashes[ranks], group=items[0].group)
        table = torch.stack(everyone).tolist()
        for column, item in enumerate(items):
            seen = [row[column] for row in table]
            usual, count = Counter(seen).most_common(1)[0]
            if count < len(seen):
                alone = count > len(seen) - count
                found.append((item.name, [r for r, h in zip(ranks, seen, strict=True) if not alone or h != usual]))
    gathered: list[list[tuple[str, list[int]]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, found)
    every = sorted({(name, tuple(ranks)) for one in gathered for name, ranks in one})
    return "; ".join(_line(name, ranks) for name, ranks in every[:4]) + (
        f"; and {len(every) - 4} more" if len(every) > 4 else ""
    )


def _line(name: str, ranks: Sequence[int]) -> str:
    who = ", ".join(map(str, ranks[:8]))
    return f"{name} differs on rank {who}" if len(ranks) == 1 else f"{name} differs between ranks {who}"
