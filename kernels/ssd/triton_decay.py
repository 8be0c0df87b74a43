"""Triton kernels behind the others of the SSD backward: gradients of the decays and scales, and of a head's parameters.

Notation and layouts are those of :mod:`.triton_forward`.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from ..triton_math import sigmoid, softplus
from .triton_forward import chunk_segments


@triton.jit
def add_behind(sum_later, ends_later, value, ends):
    """Sums that start anew at every end of a segment; the later tokens come first."""
    return tl.where(ends != 0, value, sum_later + value), ends_later | ends


@triton.jit
def decay_kernel(
    drow,
    dfar,
    dcol,
    dopen,
    dgiven,
    dots,
    dscale,
    dskip,
    code,
    first_in,  # DISCRETISE: dt by its strides
    A,
    bias,
    scale,
    dfirst,  # (b, L, H) by its strides, heads contiguous: ddt or dlog_decay
    dsecond,  # (b, L, H): dscale, unless DISCRETISE
    dA,  # (b, C, H) float32: partials
    dbias,  # (b, C, H) float32: partials
    dD,  # (b, C, H) float32: partials
    L,
    H,
    C,
    Lp,
    first_b,
    first_l,
    first_h,
    dfirst_b,
    dfirst_l,
    low,
    high,
    HAS_TILE: tl.constexpr,  # False: only dopen and dots are given, of what entered a segment of the sequence
    DISCRETISE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    CLAMP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_CODE: tl.constexpr,
    Q: tl.constexpr,
    ROWS: tl.constexpr,
    BH: tl.constexpr,
):
    """From the gradient of cs to those of log_decay and scale, or of dt, A and dt_bias; one chunk of BH heads."""
    c, b = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    here = h < H
    i = tl.arange(0, Q)
    t = c * Q + i
    lane = (b * H + h).to(tl.int64)
    line = lane[None, :] * Lp + t[:, None]
    mask = here[None, :]
    inside = (t < L)[:, None] & mask
    dcs = tl.load(dopen + line, mask=mask, other=0.0)
    last = tl.load(dots + lane * C + c, mask=here, other=0.0)
    if HAS_TILE:
        steps = tl.load(scale + line, mask=mask, other=0.0)
        per_scale = tl.load(dgiven + line, mask=mask, other=0.0)
        given = per_scale * steps
        dcs += tl.load(drow + line, mask=mask, other=0.0) - tl.load(dcol + line, mask=mask, other=0.0) - given
        if Q > ROWS:
            dcs += tl.load(dfar + line, mask=mask & (i >= ROWS)[:, None], other=0.0)
        last += tl.sum(given, axis=0)
        ds = tl.load(dscale + line, mask=mask, other=0.0) + per_scale
    dcs += tl.where((i == Q - 1)[:, None], last[None, :], 0.0)
    # cs_i holds log_decay_t for every t <= i of its segment; sums that start anew keep the documents exactly apart
    if HAS_CODE:
        _, ending = chunk_segments(code, b, c, L, Q)
        codes = tl.load(code + b * L + t, mask=t < L, other=1)
        segment = tl.where(t < L, codes >> 1, ending)
        after = tl.load(code + b * L + t + 1, mask=(t + 1 < L) & (i < Q - 1), other=0) >> 1
        ends = (i == Q - 1) | ((t + 1 < L) & (after != segment))
        flags = tl.broadcast_to(ends.to(tl.int32)[:, None], (Q, BH))
        dlog, _ = tl.associative_scan((dcs, flags), 0, add_behind, reverse=True)
        earlier = tl.load(code + b * L + t - 1, mask=(t > 0) & (t < L), other=0) >> 1
        real = (codes & 1) == 0
        dlog = tl.where(((segment == earlier) & real)[:, None], dlog, 0.0)
    else:
        dlog = tl.cumsum(dcs, axis=0, reverse=True)
    partial = (b * C + c) * H + h
    if HAS_D:
        skip = tl.load(dskip + line, mask=mask, other=0.0)
        if HAS_CODE:
            skip = tl.where(real[:, None], skip, 0.0)
        tl.store(dD + partial, tl.sum(skip, axis=0), mask=here)
    place = b * dfirst_b + t[:, None] * dfirst_l + h[None, :]
    if DISCRETISE:
        v = tl.load(
            first_in + b * first_b + t[:, None] * first_l + h.to(tl.int64)[None, :] * first_h, mask=inside, other=0.0
        )
        v = v.to(tl.float32)
        if HAS_BIAS:
            v += tl.load(bias + h, mask=here, other=0.0).to(tl.float32)[None, :]
        step = v
        slope = tl.where(inside, 1.0, 0.0)
        if SOFTPLUS:
            slope = tl.where(v > 20.0, slope, slope * sigmoid(v))
            step = softplus(v)
        if CLAMP:
            slope = tl.where((step >= low) & (step <= high), slope, 0.0)
        if HAS_CODE:
            slope = tl.where(real[:, None], slope, 0.0)
        rate = tl.load(A + h, mask=here, other=0.0).to(tl.float32)
        ddt = (dlog * rate[None, :] + ds) * slope
        tl.store(dA + partial, tl.sum(dlog * steps, axis=0), mask=here)
        if HAS_BIAS:
            tl.store(dbias + partial, tl.sum(ddt, axis=0), mask=here)
        tl.store(dfirst + place, ddt.to(dfirst.dtype.element_ty), mask=inside)
    else:
        tl.store(dfirst + place, dlog.to(dfirst.dtype.element_ty), mask=inside)
        if HAS_TILE:
            if HAS_CODE:
                ds = tl.where(real[:, None], ds, 0.0)
            tl.store(dsecond + (b * L + t)[:, None] * H + h[None, :], ds.to(dsecond.dtype.element_ty), mask=inside)


@triton.jit
def add_parts(partial, out, h, parts, H, BP: tl.constexpr):
    """out (H,), the sums of partial (parts, H) in a fixed order."""
    rows = tl.arange(0, BP)
    total = tl.zeros((BP, h.shape[0]), dtype=tl.float32)
    for part in range(0, parts, BP):
        mask = (part + rows < parts)[:, None] & (h < H)[None, :]
        total += tl.load(partial + (part + rows)[:, None] * H + h[None, :], mask=mask, other=0.0)
    tl.store(out + h, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=h < H)


@triton.jit
def parameter_kernel(
    dA_parts, dbias_parts, dD_parts, dA, dbias, dD, parts, H, HAS_A: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_D: tl.constexpr, BP: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """The gradients of a head's parameters, each a program's, from their partial sums (parts, H)."""
    h, which = tl.program_id(0) * BH + tl.arange(0, BH), tl.program_id(1)
    if HAS_A:
        if which == 0:
            add_parts(dA_parts, dA, h, parts, H, BP)
    if HAS_BIAS:
        if which == 1:
            add_parts(dbias_parts, dbias, h, parts, H, BP)
    if HAS_D:
        if which == 2:
            add_parts(dD_parts, dD, h, parts, H, BP)
