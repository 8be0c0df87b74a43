"""The chunked SSD scan in plain torch, with a hand-written backward.

Notation (Mamba-2, section 6; one chunk of Q tokens, one head): cs is the running sum of log_decay inside the chunk,
L_ij = exp(cs_i − cs_j) for j <= i in one segment, W = (C Bᵀ)∘L, u = scale·x,

    y_i  = Σ_j W_ij u_j + exp(cs_i) H C_i                    H: the state that enters the chunk
    H'   = exp(cs_last) H + Σ_j exp(cs_last − cs_j) u_j B_jᵀ  H': the state that leaves it

C Bᵀ is formed once per group of heads. The scan over chunks is affine: the final state of a scan from zero and the sum
of log_decay are the summary of a whole segment.

Layout: one batched GEMM per kind of product. Products that a group shares (states, C H) see its heads side by side,
(chunk, group, Q, r·p); products with W see one head each, (chunk, head, Q, p). The copy from the token order of the
input into either layout is the same pass that scales it. Chunks are worked off in blocks that fit the cache, so that
every pass over a tile but the first finds it there.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .inputs import accumulation_dtype


class _Sizes(NamedTuple):
    """b batch, c chunks per row, q tokens per chunk, g groups, r heads per group, p head_dim, n state."""

    b: int
    c: int
    q: int
    g: int
    r: int
    p: int
    n: int

    @property
    def h(self) -> int:
        return self.g * self.r

    @property
    def bc(self) -> int:
        return self.b * self.c

    def blocks(self, device: torch.device) -> Iterator[slice]:
        """Ranges of chunks whose tiles of all heads fill about half of the cores' second-level caches (a CPU), or
        enough to keep a GPU busy without holding the tiles of the whole batch at once."""
        elements = torch.get_num_threads() << 17 if device.type == "cpu" else 1 << 26
        size = max(1, elements // (self.h * self.q * max(self.q, self.p)))
        return (slice(start, min(start + size, self.bc)) for start in range(0, self.bc, size))


class _Inputs(NamedTuple):
    """The inputs in the accumulation dtype: x (bc, q, h, p), scale (bc, q, h, 1), B and C (bc, g, q, n)."""

    x: Tensor
    scale: Tensor
    B: Tensor
    C: Tensor


class _Decays(NamedTuple):
    """Everything that follows from log_decay and the segments; factors across a reset are exact zeros.

    cs (bc, h, q); enter, leave (bc, q, h, 1): exp(cs_i) and exp(cs_last − cs_j); carry (b, c, h, 1, 1): exp(cs_last);
    seen (bc or 1, 1, q, q): 1 where token i may see token j, else 0; first (bc, q, 1) bool: tokens that reset, or None.
    """

    cs: Tensor
    enter: Tensor
    leave: Tensor
    carry: Tensor
    seen: Tensor
    first: Tensor | None

    def mask(self, rows: slice) -> Tensor:
        return self.seen if self.seen.shape[0] == 1 else self.seen[rows]


def chunked_scan(
    x: Tensor,
    log_decay: Tensor,
    scale: Tensor,
    B: Tensor,
    C: Tensor,
    initial_states: Tensor | None,
    segments: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Scan of x (b, l, h, p), l a multiple of ``chunk``; log_decay, scale (b, l, h); B, C (b, l, g, n).

    Args:
        initial_states: (b, h, p, n) or None. segments: (b, l) int64, starting at 0 and growing by one at each reset.

    Returns:
        (y (b, l, h, p), final states (b, h, p, n)), both in the accumulation dtype.
    """
    if torch.compiler.is_compiling():
        y, final, _ = chunked_forward(x, log_decay, scale, B, C, initial_states, segments, chunk)
        return y, final
    return _ChunkedScan.apply(x, log_decay, scale, B, C, initial_states, segments, chunk)


class _ChunkedScan(torch.autograd.Function):
    """Saves the inputs and the state that enters each chunk; W is recomputed in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        log_decay: Tensor,
        scale: Tensor,
        B: Tensor,
        C: Tensor,
        initial_states: Tensor | None,
        segments: Tensor | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        y, final, states = _scan(x, log_decay, scale, B, C, initial_states, segments, chunk)
        ctx.save_for_backward(x, log_decay, scale, B, C, initial_states, segments, states)
        ctx.chunk = chunk
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None and dfinal is None:
            return (None,) * 8
        saved = ctx.saved_tensors  # once: a checkpoint lets them be unpacked only once
        *grads, dinitial = _scan_gradients(dy, dfinal, *saved, chunk=ctx.chunk)
        return (*grads, None if saved[5] is None else dinitial, None, None)


def _scan(
    x: Tensor,
    log_decay: Tensor,
    scale: Tensor,
    B: Tensor,
    C: Tensor,
    initial_states: Tensor | None,
    segments: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, final states, the states that enter each chunk (b·chunks, h, p, n))."""
    dtype = accumulation_dtype(x, log_decay, scale, B, C, initial_states)
    sizes = _sizes(x, B, chunk)
    with torch.autocast(x.device.type, enabled=False):  # it would undo the accumulation dtype
        inputs = _prepare(x, scale, B, C, sizes, dtype)
        decays = _decays(log_decay.to(dtype), segments, sizes)
        states, final = _states(inputs, initial_states, decays, sizes)
        y = _outputs(inputs, states, decays, sizes)
    return y.view(x.shape), final, states


def _scan_gradients(
    dy: Tensor | None,
    dfinal: Tensor | None,
    x: Tensor,
    log_decay: Tensor,
    scale: Tensor,
    B: Tensor,
    C: Tensor,
    initial_states: Tensor | None,
    segments: Tensor | None,
    states: Tensor,
    *,
    chunk: int,
) -> tuple[Tensor, ...]:
    """Gradients of x, log_decay, scale, B, C and the initial states, each in the dtype of what it is for."""
    sizes, dtype = _sizes(x, B, chunk), states.dtype
    dy = torch.zeros(x.shape, dtype=dtype, device=x.device) if dy is None else dy
    with torch.autocast(x.device.type, enabled=False):
        inputs = _prepare(x, scale, B, C, sizes, dtype)
        decays = _decays(log_decay.to(dtype), segments, sizes)
        dyf = dy.to(dtype).reshape(inputs.x.shape)
        dleft, dinitial = _state_gradients(dyf, inputs, dfinal, decays, sizes)
        grads = _input_gradients(dyf, inputs, states, dleft, decays, sizes)
    shaped = [grad.reshape(t.shape).to(t.dtype) for grad, t in zip(grads, (x, log_decay, scale, B, C), strict=True)]
    return (*shaped, dinitial if initial_states is None else dinitial.to(initial_states.dtype))


def _sizes(x: Tensor, B: Tensor, chunk: int) -> _Sizes:
    (b, l, h, p), (g, n) = x.shape, B.shape[2:]
    return _Sizes(b, l // chunk, chunk, g, h // g, p, n)


# The same scan as operators, opaque to torch.compile. Eager calls take the autograd function: fewer layers per call.
@torch.library.custom_op("polylepis::chunked_forward", mutates_args=())
def chunked_forward(
    x: Tensor,
    log_decay: Tensor,
    scale: Tensor,
    B: Tensor,
    C: Tensor,
    initial_states: Tensor | None,
    segments: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, final states, the states that enter each chunk (b·chunks, h, p, n))."""
    y, final, states = _scan(x, log_decay, scale, B, C, initial_states, segments, chunk)
    return y, final, states.clone()  # a view of the line of slots


@chunked_forward.register_fake
def _(
    x: Tensor,
    log_decay: Tensor,
    scale: Tensor,
    B: Tensor,
    C: Tensor,
    initial_states: Tensor | None,
    _: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    (b, l, h, p), n = x.shape, B.shape[3]
    y = x.new_empty(b, l, h, p, dtype=accumulation_dtype(x, log_decay, scale, B, C, initial_states))
    return y, y.new_empty(b, h, p, n), y.new_empty(b * (l // chunk), h, p, n)


@torch.library.custom_op("polylepis::chunked_backward", mutates_args=())
def chunked_backward(
    dy: Tensor | None,
    dfinal: Tensor | None,
    x: Tensor,
    log_decay: Tensor,
    scale: Tensor,
    B: Tensor,
    C: Tensor,
    initial_states: Tensor | None,
    segments: Tensor | None,
    states: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, log_decay, scale, B, C and the initial states."""
    grads = _scan_gradients(dy, dfinal, x, log_decay, scale, B, C, initial_states, segments, states, chunk=chunk)
    dx, ddecay, dscale, dB, dC, dinitial = (grad.contiguous() for grad in grads)
    return dx, ddecay, dscale, dB, dC, dinitial


@chunked_backward.register_fake
def _(
    dy: Tensor | None,
    dfinal: Tensor | None,
    x: Tensor,
    log_decay: Tensor,
    scale: Tensor,
    B: Tensor,
    C: Tensor,
    initial_states: Tensor | None,
    segments: Tensor | None,
    states: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (b, _, h, p), n = x.shape, B.shape[3]
    initial = states.new_empty(b, h, p, n) if initial_states is None else initial_states
    dx, ddecay, dscale, dB, dC, dinitial = (t.new_empty(t.shape) for t in (x, log_decay, scale, B, C, initial))
    return dx, ddecay, dscale, dB, dC, dinitial


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.chunk = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[2])


def _operator_gradients(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if dy is None and dfinal is None:
        return (None,) * 8
    saved = ctx.saved_tensors
    *grads, dinitial = chunked_backward(dy, dfinal, *saved, ctx.chunk)
    return (*grads, None if saved[5] is None else dinitial, None, None)


chunked_forward.register_autograd(_operator_gradients, setup_context=_setup)


def _prepare(x: Tensor, scale: Tensor, B: Tensor, C: Tensor, sizes: _Sizes, dtype: torch.dtype) -> _Inputs:
    """Cast and cut into chunks; B and C group by group (one group needs no copy)."""
    bc, q, g, n = sizes.bc, sizes.q, sizes.g, sizes.n
    B, C = (t.to(dtype).reshape(bc, q, g, n).transpose(1, 2).contiguous() for t in (B, C))
    x = x.to(dtype).reshape(bc, q, sizes.h, sizes.p)
    return _Inputs(x, scale.to(dtype).reshape(bc, q, sizes.h, 1), B, C)


def _exp_floor(dtype: torch.dtype) -> float:
    """Exponents below it count as it: exp() is negligible there, and the floor keeps subnormal numbers out, which cost
    a CPU two orders of magnitude in speed."""
    return -70.0 if dtype == torch.float32 else -600.0


def _decays(log_decay: Tensor, segments: Tensor | None, sizes: _Sizes) -> _Decays:
    """Running sums, decay factors and masks of every chunk."""
    bc, q, h = sizes.bc, sizes.q, sizes.h
    floor = _exp_floor(log_decay.dtype)
    # Also per token: a chunk of extreme decays would push cs to magnitudes where its differences lose their digits, and
    # −inf would make them nan.
    cs = log_decay.clamp(min=floor).reshape(bc, q, h).cumsum(dim=1)
    total = cs[:, -1:]
    enter, leave, carry = (t.clamp(min=floor).exp() for t in (cs, total - cs, total))
    seen = torch.ones(q, q, dtype=torch.bool, device=cs.device).tril()[None]
    first = None
    if segments is not None:
        before = torch.cat([torch.zeros_like(segments[:, :1]), segments[:, :-1]], dim=1).view(bc, q)
        segments = segments.reshape(bc, q)
        entering, last = before[:, :1], segments[:, -1:]
        enter = torch.where((segments == entering)[..., None], enter, 0.0)
        leave = torch.where((segments == last)[..., None], leave, 0.0)
        carry = torch.where((entering == last)[..., None], carry, 0.0)
        seen = seen & (segments[:, :, None] == segments[:, None, :])
        first = (segments != before)[..., None]
    cs = cs.transpose(1, 2).contiguous()
    carry = carry.view(sizes.b, sizes.c, h, 1, 1)
    return _Decays(cs, enter.unsqueeze(-1), leave.unsqueeze(-1), carry, seen.to(cs.dtype).unsqueeze(1), first)


def _states(inputs: _Inputs, initial: Tensor | None, decays: _Decays, sizes: _Sizes) -> tuple[Tensor, Tensor]:
    """The states that enter each chunk (bc, h, p, n) and the final states (b, h, p, n)."""
    bc, c = sizes.bc, sizes.c
    # Slot i + 1 first receives what chunk i adds to the state and becomes the state after it. The slots of all rows lie
    # in one line, for one GEMM: a row's last slot is the next row's first, which is settled at the end.
    slots = inputs.x.new_empty(bc + 1, sizes.h, sizes.p, sizes.n)
    factor = inputs.scale * decays.leave
    for rows in sizes.blocks(slots.device):
        weighted = _by_group(inputs.x[rows], factor[rows], sizes)
        torch.bmm(weighted.transpose(1, 2), inputs.B[rows].flatten(0, 1), out=_stacked(slots[1:][rows], sizes))
    carried = initial
    for k in range(c):
        after = slots[k + 1 :: c]
        if carried is not None:
            after.addcmul_(carried, decays.carry[:, k])
        carried = after
    final = slots[c::c].clone()
    slots[:-1:c] = 0.0 if initial is None else initial
    return slots[:bc], final


def _outputs(inputs: _Inputs, states: Tensor, decays: _Decays, sizes: _Sizes) -> Tensor:
    """y (bc, q, h, p)."""
    y = torch.empty_like(inputs.x, memory_format=torch.contiguous_format)
    for rows in sizes.blocks(y.device):
        B, C = (t[rows].flatten(0, 1) for t in (inputs.B, inputs.C))
        carried = torch.bmm(C, _stacked(states[rows], sizes).transpose(1, 2))
        W = _tile(rows, decays)
        _per_group(W, sizes).mul_(_similarity(B, C, rows, decays, sizes).unsqueeze(2))
        u = _by_head(inputs.x[rows], inputs.scale[rows])
        own = torch.bmm(W.flatten(0, 1), u.flatten(0, 1)).view_as(u)
        torch.addcmul(own.transpose(1, 2), _by_token(carried, sizes), decays.enter[rows], out=y[rows])
    return y


def _state_gradients(
    dy: Tensor, inputs: _Inputs, dfinal: Tensor | None, decays: _Decays, sizes: _Sizes
) -> tuple[Tensor, Tensor]:
    """Gradients of the states that leave each chunk (bc, h, p, n) and of the initial states (b, h, p, n)."""
    c = sizes.c
    # the forward's line of slots, read backwards: slot i receives the gradient of the state that enters chunk i
    slots = dy.new_empty(sizes.bc + 1, sizes.h, sizes.p, sizes.n)
    for rows in sizes.blocks(dy.device):
        entered = _by_group(dy[rows], decays.enter[rows], sizes)
        torch.bmm(entered.transpose(1, 2), inputs.C[rows].flatten(0, 1), out=_stacked(slots[rows], sizes))
    later = dfinal
    for k in reversed(range(c)):
        entering = slots[k:-1:c]
        if later is not None:
            entering.addcmul_(later, decays.carry[:, k])
        later = entering
    dinitial = slots[:-1:c].clone()
    slots[c::c] = 0.0 if dfinal is None else dfinal
    return slots[1:], dinitial


def _input_gradients(
    dy: Tensor, inputs: _Inputs, states: Tensor, dleft: Tensor, decays: _Decays, sizes: _Sizes
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx (bc, q, h, p), dlog_decay and dscale (bc, q, h), dB and dC (bc, q, g, n)."""
    dx = torch.empty_like(dy, memory_format=torch.contiguous_format)
    dcs = dy.new_empty(sizes.bc, sizes.q, sizes.h)
    dscale = torch.empty_like(dcs)
    dB, dC = torch.empty_like(inputs.B), torch.empty_like(inputs.C)
    factor = inputs.scale * decays.leave
    carry = decays.carry.view(sizes.bc, sizes.h)
    for rows in sizes.blocks(dy.device):
        B, C = (t[rows].flatten(0, 1) for t in (inputs.B, inputs.C))
        x, G = inputs.x[rows], _stacked(dleft[rows], sizes)
        # what the chunk gave to the state that leaves it: its B, its inputs, the exponents cs_last − cs_j
        weighted = _by_group(x, factor[rows], sizes)
        torch.bmm(weighted, G, out=dB[rows].flatten(0, 1))
        dgiven = torch.bmm(B, G.transpose(1, 2))
        given = _by_token(weighted.mul_(dgiven), sizes).sum(dim=-1)
        last = given.sum(dim=1) + carry[rows] * (states[rows] * dleft[rows]).sum(dim=(-2, -1))
        # what the entering state and the tokens of the chunk gave to y
        dy_head = _by_head(dy[rows], None)
        dC_rows, dcs_rows = _entering_gradients(dy_head, rows, C, states, decays, sizes)
        du, dcs_tile = _tile_gradients(x, dy_head, rows, inputs, (dB[rows], dC_rows), decays, sizes)
        dC[rows] = dC_rows
        torch.add(dcs_rows, dcs_tile, out=dcs[rows].transpose(1, 2))
        dcs[rows].sub_(given)[:, -1].add_(last)
        torch.addcmul(du.transpose(1, 2), _by_token(dgiven, sizes), decays.leave[rows], out=dx[rows])
        torch.sum(dx[rows] * x, dim=-1, out=dscale[rows])
        dx[rows].mul_(inputs.scale[rows])
    # cs_i holds log_decay_t for every t <= i of its segment: one product with the 0/1 mask sums them, and keeps the
    # derivative across a document boundary exactly zero, which a plain reverse cumsum would not
    dlog_decay = decays.seen.squeeze(1).transpose(1, 2) @ dcs
    if decays.first is not None:
        dlog_decay.masked_fill_(decays.first, 0.0)
    return dx, dlog_decay, dscale, dB.transpose(1, 2), dC.transpose(1, 2)


def _entering_gradients(
    dy: Tensor, rows: slice, C: Tensor, states: Tensor, decays: _Decays, sizes: _Sizes
) -> tuple[Tensor, Tensor]:
    """dC (m, g, q, n) and d(cs) (m, h, q) of the term exp(cs_i) H C_i; dy (m, h, q, p)."""
    entered = dy * decays.enter[rows].transpose(1, 2)
    per_head = _per_group(torch.bmm(entered.flatten(0, 1), states[rows].flatten(0, 1)), sizes)
    dC = per_head.sum(dim=2)
    dcs = per_head.mul_(C.view(-1, sizes.g, 1, sizes.q, sizes.n)).sum(dim=-1)
    return dC, dcs.view(-1, sizes.h, sizes.q)


def _tile_gradients(
    x: Tensor,
    dy: Tensor,
    rows: slice,
    inputs: _Inputs,
    sums: tuple[Tensor, Tensor],
    decays: _Decays,
    sizes: _Sizes,
) -> tuple[Tensor, Tensor]:
    """Gradients of the term W u: du (m, h, q, p) and d(cs) (m, h, q); dB and dC (m, g, q, n) are added to ``sums``."""
    B, C = (t[rows].flatten(0, 1) for t in (inputs.B, inputs.C))
    L, similarity = _tile(rows, decays), _similarity(B, C, rows, decays, sizes)
    W = (_per_group(L, sizes) * similarity.unsqueeze(2)).view_as(L)
    du = torch.bmm(W.flatten(0, 1).transpose(1, 2), dy.flatten(0, 1)).view_as(dy)
    u = _by_head(x, inputs.scale[rows])
    dW = torch.bmm(dy.flatten(0, 1), u.flatten(0, 1).transpose(1, 2)).view_as(L)
    # Row sums minus column sums of one and the same tile: what must cancel, cancels. The diagonal, often the largest
    # entry, cancels by itself; leaving it in would only leave its rounding error.
    P = W.mul_(dW)
    P.diagonal(dim1=-2, dim2=-1).zero_()
    dcs = P.sum(dim=-1) - P.sum(dim=-2)
    dCB = _per_group(dW.mul_(L), sizes).sum(dim=2).mul_(decays.mask(rows)).flatten(0, 1)
    dB, dC = (t.flatten(0, 1) for t in sums)
    dC.baddbmm_(dCB, B)
    dB.baddbmm_(dCB.transpose(1, 2), C)
    return du, dcs


def _similarity(B: Tensor, C: Tensor, rows: slice, decays: _Decays, sizes: _Sizes) -> Tensor:
    """C Bᵀ once per group, zero where a token is not seen: (m, g, q, q)."""
    return torch.bmm(C, B.transpose(1, 2)).view(-1, sizes.g, sizes.q, sizes.q).mul_(decays.mask(rows))


def _tile(rows: slice, decays: _Decays) -> Tensor:
    """exp(cs_i − cs_j), (m, h, q, q). Above the diagonal, where the difference is positive and might overflow, it is
    clamped to 1; the similarity is zero there."""
    cs = decays.cs[rows]
    return torch.sub(cs.unsqueeze(-1), cs.unsqueeze(-2)).clamp_(_exp_floor(cs.dtype), 0.0).exp_()


def _by_group(tokens: Tensor, factor: Tensor, sizes: _Sizes) -> Tensor:
    """tokens·factor, (m, q, h, p) -> (m·g, q, r·p): the heads of a group side by side."""
    grouped, factor = (t.unflatten(2, (sizes.g, sizes.r)).transpose(1, 2) for t in (tokens, factor))
    out = tokens.new_empty(grouped.shape)
    return torch.mul(grouped, factor, out=out).view(-1, sizes.q, sizes.r * sizes.p)


def _by_token(grouped: Tensor, sizes: _Sizes) -> Tensor:
    """The inverse of _by_group's layout, (m·g, q, r·p) -> (m, q, g, r, p) -> (m, q, h, p); a view with one group."""
    return grouped.view(-1, sizes.g, sizes.q, sizes.r, sizes.p).transpose(1, 2).flatten(2, 3)


def _by_head(tokens: Tensor, factor: Tensor | None) -> Tensor:
    """tokens·factor, (m, q, h, p) -> (m, h, q, p)."""
    heads = tokens.transpose(1, 2)
    if factor is None:
        return heads.contiguous()
    return torch.mul(heads, factor.transpose(1, 2), out=tokens.new_empty(heads.shape))


def _per_group(per_head: Tensor, sizes: _Sizes) -> Tensor:
    """(m, h, q, k) or (m·h, q, k) -> (m, g, r, q, k), a view."""
    return per_head.view(-1, sizes.g, sizes.r, *per_head.shape[-2:])


def _stacked(states: Tensor, sizes: _Sizes) -> Tensor:
    """The states of a group below each other: (m, h, p, n) -> (m·g, r·p, n), a view."""
    return states.view(-1, sizes.r * sizes.p, sizes.n)
