"""Experts moved to other expert-parallel ranks: rows of the banks and of the optimizer's moments, nothing else.

A bank's rows are slots; `Part.entries` says which expert lies in each, so checkpoints name what they hold wherever it
lies. Routers, biases and loads go by expert and stay as they are. What an expert computes does not depend on where it
lies: its rows arrive in the order of their senders.

Where ranks have spare slots an expert may lie in several. Its copies share its tokens (`routing.Slots`), so each has a
part of its gradient: `sum_replicas` adds them up after the last micro-batch, and every copy takes the same optimizer
step from the same moments. The gradient's norm and checkpoints look at the primary slots only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from .errors import PlanError
from .kinds.moe import MoE
from .mesh import Mesh
from .model import Block, HybridModel
from .parts import named_parts
from .placement import primaries


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
        PlanError: a placement of another number of slots, or that leaves an expert out; gradients that wait for an
            optimizer's step.
    """
    for model in models:
        mixers = _mixers(model)
        for index in sorted(set(mixers) & set(placements)):
            _check(index, mixers[index], placements[index])
        _reshard(model)
        for index in sorted(set(mixers) & set(placements)):
            if list(placements[index]) != mixers[index].slots.tolist():
                _move(mixers[index], optimizer, placements[index])


@torch.no_grad()
def refresh_replicas(models: Sequence[HybridModel], optimizer: torch.optim.Optimizer | None) -> None:
    """Copy every expert's primary slot to its others: after a checkpoint, which holds one of each, has been read."""
    for model in models:
        replicated = [mixer for mixer in _mixers(model).values() if mixer.replicated]
        if replicated:
            _reshard(model)
        for mixer in replicated:
            _move(mixer, optimizer, mixer.slots.tolist())


@torch.no_grad()
def sum_replicas(models: Sequence[HybridModel]) -> None:
    """Give every slot of an expert the gradient of all of them: one all-reduce over ep for each layer with replicas.

    After the gradients have been reduced over everything else, and before their norm.
    """
    for model in models:
        for mixer in _mixers(model).values():
            if mixer.replicated:
                _sum_replicas(mixer)


def _sum_replicas(mixer: MoE) -> None:
    slots, share = mixer.slots.tolist(), len(mixer.slots) // mixer.mesh.ep_size
    repeated = {expert: place for place, expert in enumerate(sorted({e for e in slots if slots.count(e) > 1}))}
    if not repeated:
        return
    here = slots[mixer.mesh.ep_rank * share : (mixer.mesh.ep_rank + 1) * share]
    rows = [row for row, expert in enumerate(here) if expert in repeated]
    device = mixer.slots.device
    mine = torch.tensor(rows, dtype=torch.int64, device=device)
    places = torch.tensor([repeated[here[row]] for row in rows], dtype=torch.int64, device=device)
    grads = [p.grad.to_local() for _, p, part in named_parts(mixer) if part.expert and isinstance(p.grad, DTensor)]
    flat = torch.cat([grad[mine].flatten(1) for grad in grads], dim=1)
    total = flat.new_zeros(len(repeated), flat.shape[1]).index_add_(0, places, flat)
    dist.all_reduce(total, group=mixer.mesh.ep_group)
    for grad, summed in zip(grads, total[places].split([g[0].numel() for g in grads], dim=1), strict=True):
        grad[mine] = summed.view(len(rows), *grad.shape[1:])


def counted_rows(models: Sequence[HybridModel]) -> dict[nn.Parameter, Tensor]:
    """Of the banks with replicas, the rows on this rank that are primary slots: what a norm counts."""
    rows: dict[nn.Parameter, Tensor] = {}
    for mixer in (mixer for model in models for mixer in _mixers(model).values() if mixer.replicated):
        share = len(mixer.slots) // mixer.mesh.ep_size
        first = primaries(mixer.slots.tolist())[mixer.mesh.ep_rank * share : (mixer.mesh.ep_rank + 1) * share]
        counted = torch.tensor(first, device=mixer.slots.device)
        rows.update({p: counted for _, p, part in named_parts(mixer) if part.expert})
    return rows


def _mixers(model: HybridModel) -> dict[int, MoE]:
    blocks = ((int(index), block) for index, block in model.layers.items())
    return {i: b.mixer for i, b in blocks if isinstance(b, Block) and isinstance(b.mixer, MoE)}


def _reshard(model: HybridModel) -> None:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # gathered copies would keep the old rows


def _check(index: int, mixer: MoE, placement: Sequence[int]) -> None:
    experts, slots = mixer.config.n_experts, len(mixer.slots)
    if len(placement) != slots or set(placement) != set(range(experts)):
        some = "exactly one slot" if slots == experts else f"at least one of the {slots} slots"
        raise PlanError(
            f"placement of layer {index}: each of the {experts} experts must have {some}, got {list(placement)}"
        )
    waiting = [name for name, parameter, part in named_parts(mixer) if part.expert and parameter.grad is not None]
    if waiting:
        raise PlanError(f"placement of layer {index}: {waiting[0]} has a gradient; experts move between steps only")


def _move(mixer: MoE, optimizer: torch.optim.Optimizer | None, placement: Sequence[int]) -> None:
    before = mixer.slots.tolist()
    source = [before.index(expert) for expert in placement]  # by new slot, the old one: the primary of several
    for _, parameter, part in list(named_parts(mixer)):
        if not part.expert:
            continue
        state = {} if optimizer is None else optimizer.state.get(parameter, {})
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
