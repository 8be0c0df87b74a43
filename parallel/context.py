"""Context parallelism: the tokens of one micro-batch over several ranks, and what layers exchange to see the rest.

The T flat tokens are cut into equal *segments*, one per rank (contiguous) or two (zig-zag). Three exchanges exist:

* **halo**: the last k−1 layer inputs before a segment, for the causal convolution;
* **states**: a segment acts on the SSD state as the affine map H → a·H + F (a = exp Σ log-decay, 0 once a document has
  ended in it), so all ranks gather (F, Σ log-decay) and each computes the state that enters its own segments;
* **heads**: an all-to-all that trades the sequence for heads, for attention or SSD.

All metadata comes with the batch and is the same on every rank; every collective runs on every rank in every step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from .errors import PlanError
from .megatron import all_to_all, gather_sequence
from .mesh import Mesh


@dataclass(frozen=True)
class Context:
    """How one micro-batch lies over the context-parallel ranks.

    Attributes:
        mesh: gives group, size and rank.
        n_tokens: T of the whole micro-batch.
        segments: for each rank, the numbers of its segments, ascending.
        length: tokens per segment.
        seq_idx: int32 [T] of the whole micro-batch (see `Layout`), on the device.
        boundaries: host edges of documents in the whole micro-batch.
        continues: for each segment, whether its first tokens belong to the document that the segment before ended in.
        unbroken: for each segment, whether it lies inside one document that also holds the token before it.
        entering: bool [segments of this rank, length], tokens of the document that enters, on the device.
    """

    mesh: Mesh
    n_tokens: int
    segments: tuple[tuple[int, ...], ...]
    length: int
    seq_idx: Tensor
    boundaries: tuple[int, ...]
    continues: tuple[bool, ...]
    unbroken: tuple[bool, ...]
    entering: Tensor

    @property
    def mine(self) -> tuple[int, ...]:
        return self.segments[self.mesh.cp_rank]

    @property
    def index(self) -> Tensor:
        """int64 [T/cp] (CPU): the places of this rank's tokens in the whole micro-batch."""
        return self.places(self.mesh.cp_rank)

    def places(self, rank: int) -> Tensor:
        runs = [torch.arange(s * self.length, (s + 1) * self.length) for s in self.segments[rank]]
        return torch.cat(runs)

    @property
    def gathered_order(self) -> Tensor:
        """int64 [T] (CPU): `gathered[order]` puts tokens gathered in rank order into document order."""
        return torch.cat([self.places(rank) for rank in range(len(self.segments))]).argsort()


def cut_tokens(total: int, cp: int, tp: int, order: str, halo: int = 0) -> int:
    """Tokens per segment when `total` tokens of a micro-batch are cut over cp × tp ranks.

    Raises:
        PlanError: the tokens do not divide, or segments are shorter than the convolution's reach; with the numbers.
    """
    count = cp * (2 if order == "zigzag" and cp > 1 else 1)
    least = count * tp
    if total % least:
        over = f"cp {cp} ({order}) and tp {tp}" if cp > 1 else f"tp {tp} (sequence parallelism)"
        raise PlanError(
            f"micro_batch × seq_len = {total} tokens cannot be cut into {least} equal parts for {over}; use a multiple "
            f"of {least}, such as {max(least, total // least * least)}"
        )
    if cp > 1 and total // count < halo:
        raise PlanError(f"{total} tokens over cp {cp} leave {total // count} per segment; a convolution needs {halo}")
    return total // count


def cut(mesh: Mesh, seq_idx: Tensor, boundaries: tuple[int, ...], halo: int) -> Context:
    """Cut a micro-batch over the context-parallel ranks.

    Args:
        seq_idx: int32 [T] on the CPU, −1 on padding.
        boundaries: host edges of documents and padding runs.
        halo: tokens that a segment must at least hold, so that a convolution reaches into one neighbour only.

    Raises:
        PlanError: see `cut_tokens`.
    """
    total, size = seq_idx.numel(), mesh.cp_size
    length = cut_tokens(total, size, mesh.tp_size, mesh.context.order, halo)
    count = total // length
    zigzag = count > size
    segments: tuple[tuple[int, ...], ...] = tuple((r, count - 1 - r) if zigzag else (r,) for r in range(size))
    documents = forward_fill(seq_idx).view(count, length)
    before = [-2, *documents[:-1, -1].tolist()]
    continues = tuple(int(documents[s, 0]) == before[s] for s in range(count))
    unbroken = tuple(bool((documents[s] == before[s]).all()) for s in range(count))
    mine = list(segments[mesh.cp_rank])
    entering = documents[mine] == torch.tensor([before[s] for s in mine])[:, None]
    entering &= seq_idx.view(count, length)[mine] >= 0
    device = mesh.device
    return Context(
        mesh, total, segments, length, seq_idx.to(device), boundaries, continues, unbroken, entering.to(device)
    )


def forward_fill(seq_idx: Tensor) -> Tensor:
    """Padding takes the document before it, which it neither changes nor ends; leading padding stays −1."""
    places = torch.where(seq_idx >= 0, torch.arange(seq_idx.numel()), 0).cummax(0).values
    return seq_idx[places]


def exchange_halo(x_TD: Tensor, context: Context, width: int) -> Tensor:
    """The `width` inputs before each of this rank's segments: [T/cp, D] → [segments, width, D]; zeros before the first.

    One all-gather forward, one reduce-scatter backward, on every rank.
    """
    mine = context.mine
    tails = x_TD.view(len(mine), context.length, -1)[:, context.length - width :]
    gathered = gather_sequence(tails.reshape(len(mine) * width, -1), context.mesh.cp_group)
    everyone = gathered.view(len(context.segments) * len(mine), width, -1)
    owner = {s: rank * len(mine) + i for rank, own in enumerate(context.segments) for i, s in enumerate(own)}
    before = everyone[[owner[max(s - 1, 0)] for s in mine]]
    first = torch.tensor([float(s > 0) for s in mine], dtype=x_TD.dtype, device=x_TD.device)
    return before * first[:, None, None]  # a product keeps the graph, and so the backward collective, on every rank


def halo_places(context: Context, width: int) -> Tensor:
    """int64 [segments, width] (CPU): where the halo's tokens lie in the micro-batch (0 before the first segment)."""
    starts = torch.tensor(context.mine)[:, None] * context.length
    return (starts - width + torch.arange(width)).clamp(min=0)


class StateExchange:
    """Gathers the segments' affine summaries while the caller computes something else.

    Args:
        final: [segments, H, P, N], the state that each segment of this rank leaves behind, started from zero.
        log_decay: [segments, H], Σ log-decay of each.
    """

    def __init__(self, final: Tensor, log_decay: Tensor, context: Context) -> None:
        self.final, self.log_decay, self.context = final, log_decay, context
        packed = torch.cat((final.detach().flatten(1), log_decay.detach()), dim=1).contiguous()
        size = context.mesh.cp_size
        self.gathered = packed.new_empty(size * packed.shape[0], packed.shape[1])
        self.work = dist.all_gather_into_tensor(self.gathered, packed, group=context.mesh.cp_group, async_op=True)

    def entering_states(self) -> Tensor:
        """[segments, H, P, N]: the state that enters each of this rank's segments; zero where a document starts."""
        return _EnteringStates.apply(self.final, self.log_decay, self)


class _EnteringStates(Function):
    @staticmethod
    def forward(ctx: Any, final: Tensor, log_decay: Tensor, exchange: StateExchange) -> Tensor:
        context = exchange.context
        exchange.work.wait()
        heads = log_decay.shape[1]
        order = [s for own in context.segments for s in own]
        rows = exchange.gathered[torch.tensor(order).argsort().to(final.device)]
        finals = rows[:, :-heads].view(-1, *final.shape[1:])
        decays = rows[:, -heads:].exp()[:, :, None, None]
        states = [torch.zeros_like(finals[0])]
        for s in range(len(order) - 1):
            carried = decays[s] * states[s] if context.unbroken[s] else 0.0
            states.append(carried + finals[s])
        entering = [state if context.continues[s] else torch.zeros_like(state) for s, state in enumerate(states)]
        ctx.save_for_backward(decays, torch.stack(states))
        ctx.context = context
        return torch.stack([entering[s] for s in context.mine])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        """Each rank runs the reverse scan on its own gradients; one reduce-scatter adds the ranks' shares up."""
        (grad,), context = grads, ctx.context
        decays, states = ctx.saved_tensors
        d_final, d_decay = torch.zeros_like(states), torch.zeros_like(decays[:, :, 0, 0])
        own = {s: grad[i] for i, s in enumerate(context.mine)}
        carry = torch.zeros_like(states[0])  # gradient of the state that enters segment s + 1
        for s in reversed(range(len(states))):
            d_final[s] = carry
            inside = torch.zeros_like(carry)
            if context.unbroken[s]:
                d_decay[s] = (carry * states[s]).sum((-1, -2)) * decays[s, :, 0, 0]
                inside = decays[s] * carry
            carry = inside + own[s] if s in own and context.continues[s] else inside
        packed = torch.cat((d_final.flatten(1), d_decay), dim=1)
        packed = packed[[s for owned in context.segments for s in owned]].contiguous()
        mine = packed.new_empty(len(context.mine), packed.shape[1])
        dist.reduce_scatter_tensor(mine, packed, group=context.mesh.cp_group)
        heads = d_decay.shape[1]
        return mine[:, :-heads].view(-1, *states.shape[1:]), mine[:, -heads:], None


def share_heads(n_heads: int, n_shared: int, ranks: int, what: str) -> list[list[int]]:
    """Which shared heads (groups of B and C, key/value heads) each rank needs for its run of `n_heads / ranks` heads.

    Raises:
        PlanError: heads do not divide over the ranks, or a rank's heads would need an uneven number of shared ones.
    """
    fitting = [d for d in range(1, n_heads + 1) if n_heads % d == 0 and (n_shared % d == 0 or d % n_shared == 0)]
    if ranks not in fitting:
        raise PlanError(
            f"{what}: {n_heads} heads and {n_shared} groups or key/value heads of a tp rank do not divide over cp "
            f"{ranks}; choose cp {min(fitting, key=lambda d: abs(d - ranks))}, or another exchange"
        )
    repeat, per_rank = n_heads // n_shared, n_heads // ranks
    return [sorted({h // repeat for h in range(r * per_rank, (r + 1) * per_rank)}) for r in range(ranks)]


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` that is nearest to `wanted`."""
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: abs(d - wanted))


def to_heads(per_rank: list[Tensor], context: Context) -> Tensor:
    """Sequence → heads: `per_rank[r]` [T/cp, W] goes to rank r; returns [T, W] in document order."""
    received = all_to_all(torch.cat(per_rank), context.mesh.cp_group)
    return received[context.gathered_order.to(received.device)]


def to_sequence(x_TW: Tensor, context: Context) -> Tensor:
    """Heads → sequence: [T, W] of this rank's heads → [T/cp, cp · W], the heads of all ranks side by side."""
    by_rank = torch.cat([context.places(rank) for rank in range(len(context.segments))])
    received = all_to_all(x_TW[by_rank.to(x_TW.device)], context.mesh.cp_group)
    size = context.mesh.cp_size
    return received.view(size, -1, x_TW.shape[-1]).transpose(0, 1).flatten(1)


def gather_tokens(x_TW: Tensor, context: Context) -> Tensor:
    """[T/cp, W] → [T, W] in document order; the gradient is reduce-scattered."""
    return gather_sequence(x_TW, context.mesh.cp_group)[context.gathered_order.to(x_TW.device)]
