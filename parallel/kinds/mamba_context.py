"""`M` under context parallelism: by passing states between ranks, or by trading the sequence for heads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.conv import causal_conv1d
from ...kernels.ssd import enter, ssd, summarise
from ..context import Context, StateExchange, exchange_halo, halo_places, share_heads, to_heads, to_sequence
from ..layout import HALO, Layout
from ..parts import local
from .base import skip

if TYPE_CHECKING:
    from .mamba import Mamba


def pass_states(mixer: Mamba, h_TD: Tensor, layout: Layout, context: Context) -> Tensor:
    """Each segment is summarised; the state that enters it joins its outputs, as the scan is affine in it.

    Two small exchanges: the convolution's halo, on the layer input, and the segments' summaries, which travel while z
    is projected. Volume per rank: segments · 3 · D and segments · H · (P·N + 1), whatever the sequence length.
    """
    count, length = len(context.mine), context.length
    halo = exchange_halo(h_TD, context, HALO)
    extended = torch.cat((halo, h_TD.view(count, length, -1)), dim=1).flatten(0, 1)
    assert layout.halo is not None
    x, B, C, dt = mixer.project(extended, layout.halo, ("x", "B", "C", "dt"))
    weight, bias = mixer.conv_parameters()
    seq_idx = extended_seq_idx(context)
    xBC = torch.cat((x, B, C), dim=-1).view(count, HALO + length, -1)
    convolved = causal_conv1d(xBC, weight, bias, seq_idx=seq_idx)
    assert isinstance(convolved, Tensor)
    x, B, C = mixer.split(convolved[:, HALO:], mixer.n_heads, mixer.n_groups)

    dt = dt.view(count, HALO + length, -1)[:, HALO:]
    scale = F.softplus(dt + mixer.bias_of_dt(layout.modality, dt.shape))
    own = seq_idx[:, HALO:]
    log_decay = (scale * mixer.decay_rate(dt.dtype)).where(own[..., None] >= 0, 0.0)
    segment, kept = summarise(
        *(x, log_decay, scale, B, C),
        D=None if mixer.split_backward else local(mixer.D),
        seq_idx=own,
        chunk_size=mixer.config.chunk_size,
    )
    exchange = StateExchange(segment.state, segment.log_decay.to(segment.state.dtype), context)
    (z,) = mixer.project(h_TD, layout.modality, ("z",))
    # The scan counts leading padding to the document that follows it; nothing enters where that is a new one. A product
    # keeps the graph, and so the backward collective, on every rank.
    joined = context.entering.any(dim=1)[:, None, None, None]
    y = enter(kept, exchange.entering_states() * joined)
    if mixer.split_backward:
        y = skip(y, x, local(mixer.D))
    return mixer.out(y.flatten(2).flatten(0, 1), z, layout.modality)


def extended_seq_idx(context: Context) -> Tensor:
    """int32 [segments, HALO + length]: documents of the halo and of the segment; nothing comes before the first."""
    places = context.index.view(len(context.mine), -1)
    places = torch.cat((halo_places(context, HALO), places), dim=1)
    seq_idx = context.seq_idx[places.to(context.seq_idx.device)]
    if context.mine[0] == 0:
        seq_idx[0, :HALO] = -1
    return seq_idx


def over_heads(mixer: Mamba, h_TD: Tensor, layout: Layout, context: Context) -> Tensor:
    """All-to-all: every rank runs convolution and scan over all tokens with a part of the heads (and their groups)."""
    z, x, B, C, dt = mixer.project(h_TD, layout.modality, ("z", "x", "B", "C", "dt"))
    dt = dt + mixer.bias_of_dt(layout.modality, dt.shape)
    size, rank = context.mesh.cp_size, context.mesh.cp_rank
    shares = share_heads(mixer.n_heads, mixer.n_groups, size, "model.mamba")
    B, C = (value.unflatten(-1, (mixer.n_groups, -1)) for value in (B, C))
    per_rank = [
        torch.cat((x_r, B[:, share].flatten(1), C[:, share].flatten(1), dt_r), dim=1)
        for x_r, dt_r, share in zip(x.chunk(size, dim=1), dt.chunk(size, dim=1), shares, strict=True)
    ]
    heads, groups = mixer.n_heads // size, len(shares[rank])
    everything = to_heads(per_rank, context)
    xBC, dt = everything[:, :-heads], everything[:, -heads:]
    weight, bias = (_of_share(mixer, value, shares[rank], rank, size) for value in mixer.conv_parameters())
    convolved = causal_conv1d(xBC[None], weight, bias, seq_idx=context.seq_idx[None])
    assert isinstance(convolved, Tensor)
    x, B, C = mixer.split(convolved, heads, groups)
    own = slice(rank * heads, (rank + 1) * heads)
    A, D = mixer.decay_rate(x.dtype)[own], local(mixer.D)[own]
    if mixer.split_backward:
        y: Tensor | tuple[Tensor, Tensor] = mixer.scan_outside(x, dt[None], A, B, C, D, context.seq_idx[None])[0]
    else:
        chunk = mixer.config.chunk_size
        y = ssd(x, dt[None], A, B, C, chunk, D=D, dt_softplus=True, seq_idx=context.seq_idx[None])
    assert isinstance(y, Tensor)
    return mixer.out(to_sequence(y[0].flatten(1), context), z, layout.modality)


def _of_share(mixer: Mamba, value: Tensor, share: list[int], rank: int, size: int) -> Tensor:
    """Of a convolution parameter over x|B|C, the rows of one context rank's heads and groups."""
    inner, state = mixer.n_heads * mixer.config.head_dim, mixer.n_groups * mixer.config.d_state
    x, B, C = value.split((inner, state, state))
    of_groups = [v.unflatten(0, (mixer.n_groups, -1))[share].flatten(0, 1) for v in (B, C)]
    return torch.cat((x.chunk(size)[rank], *of_groups))
