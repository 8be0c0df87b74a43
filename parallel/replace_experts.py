"""Experts moved to other expert-parallel ranks: rows of the banks and of the optimizer's moments, nothing else.

A bank's rows are slots; `Part.entries` says which expert lies in each, so checkpoints name what they hold wherever it
lies. Routers, biases and loads go by expert and stay as they are. What an expert computes does not depend on where it
lies: its rows arrive in the order of their senders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from .errors import PlanError
from .kinds.moe import MoE
from .mesh import Mesh
from .model import Block, HybridModel
from .parts import named_parts


@torch.no_grad()
def replace_experts(
    models: Sequence[HybridModel], optimizer: torch.optim.Optimizer, placements: Mapping[int, Sequence[int]]
) -> None:
    """Move the experts of layers to their new slots; between steps, by all ranks of these stages together.

    Args:
        models: this rank's.
        optimizer: over their parameters; moments that it has not made yet are left to it.
        placements: by global index of the layer, the expert of each slot.

    Raises:
        PlanError: a placement that is no permutation of the layer's experts (replicas among them), or gradients that
            wait for an optimizer's step.
    """
    for model in models:
        mixers = {int(i): b.mixer for i, b in model.layers.items() if isinstance(b, Block) and isinstance(b.mixer, MoE)}
        for index in sorted(set(mixers) & set(placements)):
            _check(index, mixers[index], placements[index])
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # gathered copies would keep the old rows
        for index in sorted(set(mixers) & set(placements)):
            _move(mixers[index], optimizer, placements[index])


def _check(index: int, mixer: MoE, placement: Sequence[int]) -> None:
    if sorted(placement) != list(range(mixer.config.n_experts)):
        raise PlanError(
            f"placement of layer {index}: each of the {mixer.config.n_experts} experts must have exactly one slot, "
            f"got {list(placement)}"
        )
    waiting = [name for name, parameter, part in named_parts(mixer) if part.expert and parameter.grad is not None]
    if waiting:
        raise PlanError(f"placement of layer {index}: {waiting[0]} has a gradient; experts move between steps only")


def _move(mixer: MoE, optimizer: torch.optim.Optimizer, placement: Sequence[int]) -> None:
    before = mixer.slots.tolist()
    if list(placement) == before:
        return
    source = [before.index(expert) for expert in placement]  # by new slot, the old one
    for _, parameter, part in list(named_parts(mixer)):
        if not part.expert:
            continue
        state = optimizer.state.get(parameter, {})
        for value in (parameter, *(v for v in state.values() if isinstance(v, DTensor) and v.shape == parameter.shape)):
            assert isinstance(value, DTensor)
            bank = value.to_local()
            bank.copy_(exchange(bank, source, mixer.mesh))
    for owner in mixer.modules():
        parts = owner.__dict__.get("leaf_parts", {})
        for leaf, part in parts.items():
            if part.expert:
                parts[leaf] = replace(part, entries=tuple(str(expert) for expert in placement))
    mixer.place(placement)


def exchange(bank: Tensor, source: Sequence[int], mesh: Mesh) -> Tensor:
    """This rank's rows of a bank after each slot has taken the row of slot `source[slot]`, of whichever ep rank.

    Args:
        bank: [slots of this rank, …], cut alike on all ep ranks.
    """
    if mesh.ep_group is None:
        return bank[torch.tensor(source, device=bank.device)]
    share, rank, size = len(bank), mesh.ep_rank, mesh.ep_size
    wanted = [[s for s in source[there * share : (there + 1) * share] if s // share == rank] for there in range(size)]
    out = bank[torch.tensor([s - rank * share for row in wanted for s in row], dtype=torch.int64, device=bank.device)]
    mine = source[rank * share : (rank + 1) * share]
    order = sorted(range(share), key=lambda slot: mine[slot] // share)  # rows arrive by sender, each in slot order
    received = [sum(s // share == sender for s in mine) for sender in range(size)]
    rows = torch.empty_like(bank)
    dist.all_to_all_single(rows, out.contiguous(), received, [len(row) for row in wanted], group=mesh.ep_group)
    result = torch.empty_like(bank)
    result[torch.tensor(order, device=bank.device)] = rows
    return result
