"""Triton kernels of the SSD forward: decays of a chunk, the pass over the chunk states, the outputs of a group.

The notation is that of :mod:`.chunked`. Tokens are cut into ``C`` chunks of ``Q``; ``cs`` and ``scale`` are kept as
(b, h, C·Q) float32, ``cs`` in units of log 2, so that every factor is one ``exp2`` whose exponent is at most 0.
``code`` holds 2·segment + (1 for padding) per token. Every program writes its own part of the output: there is no
atomic operation, and two runs are bitwise equal. Offsets of a program are int64; inside a chunk they fit int32.
"""

# mypy: disable-error-code="no-untyped-def, attr-defined"

import triton
import triton.language as tl

from ..triton_math import LOG2E, softplus

# exp(−35) is nothing beside 1 in float32. Without the floor per token a chunk of extreme decays would push cs to where
# its differences lose their digits; with it they keep 5e-4 at worst, behind 128 tokens that each forget everything
LOWEST = tl.constexpr(-35.0 * 1.4426950408889634)


@triton.jit
def chunk_segments(code, b, c, L, Q: tl.constexpr):
    """(segment that enters chunk c, segment that leaves it)."""
    base = code + b.to(tl.int64) * L
    entering = tl.load(base + c * Q - 1, mask=c > 0, other=0) >> 1
    last = tl.load(base + tl.minimum(c * Q + Q, L) - 1) >> 1
    return entering, last


@triton.jit
def prep_tile(
    first, second, bias, code, cs, scale, b, c, h, L, H, Lp, first_b, first_l, first_h, second_b, second_l, second_h,
    low, high, DISCRETISE: tl.constexpr, SOFTPLUS: tl.constexpr, CLAMP: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_CODE: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """cs and scale of chunk c and the heads h; padding and the tail become identities of the recurrence."""
    t = c * Q + tl.arange(0, Q)
    inside = (t < L)[:, None] & (h < H)[None, :]
    h64 = h.to(tl.int64)
    v = tl.load(first + b * first_b + t[:, None] * first_l + h64[None, :] * first_h, mask=inside, other=0.0)
    v = v.to(tl.float32)
    if DISCRETISE:
        if HAS_BIAS:
            v += tl.load(bias + h, mask=h < H, other=0.0).to(tl.float32)[None, :]
        if SOFTPLUS:
            v = softplus(v)
        if CLAMP:
            v = tl.minimum(tl.maximum(v, low), high)
        s = v
        v = v * tl.load(second + h * second_h, mask=h < H, other=0.0).to(tl.float32)[None, :]
    else:
        s = tl.load(second + b * second_b + t[:, None] * second_l + h64[None, :] * second_h, mask=inside, other=0.0)
        s = s.to(tl.float32)
    if HAS_CODE:
        inside = inside & ((tl.load(code + b * L + t, mask=t < L, other=1) & 1) == 0)[:, None]
    v = tl.where(inside, tl.maximum(v * LOG2E, LOWEST), 0.0)
    s = tl.where(inside, s, 0.0)
    out = (b * H + h64[None, :]) * Lp + t[:, None]
    tl.store(cs + out, tl.cumsum(v, axis=0), mask=(h < H)[None, :])
    tl.store(scale + out, s, mask=(h < H)[None, :])


@triton.jit
def prep_kernel(
    first,  # DISCRETISE: dt, else log_decay; (b, L, H) by its strides
    second,  # DISCRETISE: A (H,), else scale (b, L, H) by its strides
    bias,
    code,
    cs,
    scale,
    L,
    H,
    Lp,
    first_b,
    first_l,
    first_h,
    second_b,
    second_l,
    second_h,
    low,
    high,
    DISCRETISE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    CLAMP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CODE: tl.constexpr,
    Q: tl.constexpr,
    BH: tl.constexpr,
):
    """cs and scale of one chunk and BH heads."""
    c, b = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    prep_tile(
        first, second, bias, code, cs, scale, b, c, h, L, H, Lp, first_b, first_l, first_h, second_b, second_l,
        second_h, low, high, DISCRETISE, SOFTPLUS, CLAMP, HAS_BIAS, HAS_CODE, Q,
    )  # fmt: skip


@triton.jit
def state_pass_kernel(
    u,  # forward: x; REVERSE: dy
    v,  # forward: B; REVERSE: C
    cs,
    scale,
    code,
    initial,  # (b, H, P, N): the state before the first chunk; REVERSE: the gradient of the final state
    states,  # (b, C, H, P, N): the state that enters each chunk; REVERSE: the gradient of the one that leaves it
    final,  # (b, H, P, N) float32: the final state; REVERSE: the gradient of the initial one
    reach,  # (b, H, C) float32: the decay from the start of the row to each chunk, 0 behind a reset
    L,
    H: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    C,
    Lp,
    u_b,
    u_l: tl.constexpr,
    u_h,
    v_b,
    v_l: tl.constexpr,
    v_g,
    REVERSE: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_CODE: tl.constexpr,
    HAS_REACH: tl.constexpr,
    WRITE: tl.constexpr,
    STAGES: tl.constexpr,
    Q: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    DOT: tl.constexpr,
):
    """One head, BP rows of its state: the state stays in float32 registers over all chunks."""
    h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    n = tl.arange(0, BN)
    rows = tl.arange(0, Q)
    cell = p[:, None] * N + n[None, :]
    in_state = (p < P)[:, None] & (n < N)[None, :]
    u += b * u_b + h * u_h
    v += b * v_b + (h // R) * v_g
    cs += (b * H + h) * Lp
    scale += (b * H + h) * Lp
    state = tl.zeros((BP, BN), dtype=tl.float32)
    if HAS_INITIAL:
        state = tl.load(initial + (b * H + h) * P * N + cell, mask=in_state, other=0.0).to(tl.float32)
    lam = tl.full((), 1.0, dtype=tl.float32)
    for k in tl.range(0, C, num_stages=STAGES):
        c = k
        if REVERSE:
            c = C - 1 - k
        first = c.to(tl.int64) * Q
        within = first + rows < L
        ut = tl.load(
            u + first * u_l + rows[None, :] * u_l + p[:, None], mask=(p < P)[:, None] & within[None, :], other=0.0
        )
        vt = tl.load(
            v + first * v_l + rows[:, None] * v_l + n[None, :], mask=within[:, None] & (n < N)[None, :], other=0.0
        )
        cs_rows = tl.load(cs + first + rows)
        total = tl.load(cs + first + Q - 1)
        carry = tl.exp2(tl.minimum(total, 0.0))
        if REVERSE:
            factor = tl.exp2(tl.minimum(cs_rows, 0.0))
        else:
            factor = tl.exp2(tl.minimum(total - cs_rows, 0.0)) * tl.load(scale + first + rows)
        if HAS_CODE:
            entering, last = chunk_segments(code, b, c, L, Q)
            codes = tl.load(code + b * L + first + rows, mask=within, other=1)
            if REVERSE:
                factor = tl.where(((codes >> 1) == entering) & ((codes & 1) == 0), factor, 0.0)
            else:
                factor = tl.where((codes >> 1) == last, factor, 0.0)
            carry = tl.where(entering == last, carry, 0.0)
        place = ((b * C + c) * H + h) * P * N
        if WRITE:
            tl.store(states + place + cell, state.to(states.dtype.element_ty), mask=in_state)
        if HAS_REACH:
            tl.store(reach + (b * H + h) * C + c, lam, mask=tl.program_id(0) == 0)
            lam = lam * carry
        weighted = (ut.to(tl.float32) * factor[None, :]).to(DOT)
        state = tl.dot(weighted, vt.to(DOT), state * carry, input_precision="tf32x3")
    tl.store(final + (b * H + h) * P * N + cell, state, mask=in_state)


@triton.jit
def token_rows(base, i, inside, k, stride, SIZE, DOT: tl.constexpr):
    """Rows i of a token-major matrix, columns k < SIZE; zero where not ``inside``."""
    mask = inside[:, None] & (k < SIZE)[None, :]
    return tl.load(base + i[:, None] * stride + k[None, :], mask=mask, other=0.0).to(DOT)


@triton.jit
def token_columns(base, j, inside, k, stride, SIZE, DOT: tl.constexpr):
    """The transpose of :func:`token_rows`."""
    mask = inside[None, :] & (k < SIZE)[:, None]
    return tl.load(base + j[None, :] * stride + k[:, None], mask=mask, other=0.0).to(DOT)


@triton.jit
def token_codes(code, b, t, L):
    """(segment, real) of the tokens t of row b."""
    value = tl.load(code + b * L + t, mask=t < L, other=1)
    return value >> 1, (value & 1) == 0


@triton.jit
def output_tile(
    x, B, C_, D, cs, scale, code, states, reach, entry, y, start, L, H, R, P, N, C, Lp, x_b, x_l, x_h, B_b, B_l, B_g,
    C_b, C_l, C_g, HEADS, FAR: tl.constexpr, HAS_D: tl.constexpr, HAS_CODE: tl.constexpr, HAS_ENTRY: tl.constexpr,
    STAGES: tl.constexpr, Q: tl.constexpr, ROWS: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The outputs of the ROWS tokens i from ``start`` on in a chunk; with FAR the tile before them, f, joins."""
    c, b = (tl.program_id(0) // (Q // ROWS)).to(tl.int64), tl.program_id(2).to(tl.int64)
    h_first = tl.program_id(1) * HEADS
    g = (h_first // R).to(tl.int64)
    t = tl.arange(0, ROWS)
    i = start + t
    p = tl.arange(0, BP)
    n = tl.arange(0, BN)
    first = c * Q
    B += b * B_b + g * B_g + first * B_l
    C_ += b * C_b + g * C_g + first * C_l
    inside, f_in = first + i < L, first + t < L
    seen, opened, real = t[:, None] >= t[None, :], inside, inside
    if HAS_CODE:
        entering, _ = chunk_segments(code, b, c, L, Q)
        segment, real = token_codes(code, b, first + i, L)
        seen = seen & (segment[:, None] == segment[None, :]) & real[:, None]
        opened = (segment == entering) & real
    c_rows = token_rows(C_, i, inside, n, C_l, N, DOT)
    b_columns = token_columns(B, i, inside, n, B_l, N, DOT)
    similarity = tl.where(seen, tl.dot(c_rows, b_columns, input_precision="tf32x3"), 0.0)
    if FAR:
        far_similarity = tl.dot(c_rows, token_columns(B, t, f_in, n, B_l, N, DOT), input_precision="tf32x3")
        if HAS_CODE:
            f_segment, _ = token_codes(code, b, first + t, L)
            far_seen = (segment[:, None] == f_segment[None, :]) & real[:, None]
            far_similarity = tl.where(far_seen, far_similarity, 0.0)
    for r in tl.range(0, HEADS, num_stages=STAGES):
        h = (h_first + r).to(tl.int64)
        line = (b * H + h) * Lp + first
        x_head = x + b * x_b + h * x_h + first * x_l
        cell = p[None, :] * N + n[:, None]
        in_state = (p < P)[None, :] & (n < N)[:, None]
        state = tl.load(states + ((b * C + c) * H + h) * P * N + cell, mask=in_state, other=0.0)
        if HAS_ENTRY:
            entered = tl.load(entry + (b * H + h) * P * N + cell, mask=in_state, other=0.0)
            state = state.to(tl.float32) + entered * tl.load(reach + (b * H + h) * C + c)
        own, scales = tl.load(cs + line + i), tl.load(scale + line + i)
        values = token_rows(x_head, i, inside, p, x_l, P, DOT)
        out = tl.dot(c_rows, state.to(DOT), input_precision="tf32x3")
        since = own
        if FAR:
            middle = tl.load(cs + line + ROWS - 1)
            since = own - middle
            out = out * tl.where(opened, tl.exp2(tl.minimum(middle, 0.0)), 0.0)[:, None]
            passed = tl.exp2(tl.minimum(middle - tl.load(cs + line + t), 0.0)) * tl.load(scale + line + t)
            further = tl.exp2(tl.minimum(since, 0.0))
            far = token_rows(x_head, t, f_in, p, x_l, P, DOT)
            weights = far_similarity * passed[None, :]
            if DOT == tl.float16:  # whose range needs the whole product: half of it may overflow, or come to nothing
                weights *= further[:, None]
                out = out * further[:, None]
            out = tl.dot(weights.to(DOT), far, out, input_precision="tf32x3")
            if DOT != tl.float16:
                out = out * further[:, None]
        else:
            out = out * tl.where(opened, tl.exp2(tl.minimum(since, 0.0)), 0.0)[:, None]
        weights = similarity * tl.exp2(tl.minimum(own[:, None] - own[None, :], 0.0)) * scales[None, :]
        out = tl.dot(weights.to(DOT), values, out, input_precision="tf32x3")
        if HAS_D:
            out += values.to(tl.float32) * tl.where(real, tl.load(D + h).to(tl.float32), 0.0)[:, None]
        place = ((b * L + first) * H + h) * P + i[:, None] * (H * P) + p[None, :]
        tl.store(y + place, out.to(y.dtype.element_ty), mask=inside[:, None] & (p < P)[None, :])


@triton.jit
def output_kernel(
    x,
    B,
    C_,
    D,
    cs,
    scale,
    code,
    states,
    reach,
    entry,  # (b, H, P, N) float32, the H_in that joins as reach·H_in
    y,  # (b, L, H, P), contiguous
    L,
    H: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    C,
    Lp,
    x_b,
    x_l: tl.constexpr,
    x_h,
    B_b,
    B_l: tl.constexpr,
    B_g,
    C_b,
    C_l: tl.constexpr,
    C_g,
    HEADS,  # heads that one program works off
    HAS_D: tl.constexpr,
    HAS_CODE: tl.constexpr,
    HAS_ENTRY: tl.constexpr,
    STAGES: tl.constexpr,
    Q: tl.constexpr,
    ROWS: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    DOT: tl.constexpr,
):
    """The outputs of one tile of a chunk, the whole of it or a half: C·Bᵀ once, then a loop over heads of the group."""
    if Q == ROWS or tl.program_id(0) % 2 == 0:
        output_tile(
            x, B, C_, D, cs, scale, code, states, reach, entry, y, 0, L, H, R, P, N, C, Lp, x_b, x_l, x_h, B_b, B_l,
            B_g, C_b, C_l, C_g, HEADS, False, HAS_D, HAS_CODE, HAS_ENTRY, STAGES, Q, ROWS, BP, BN, DOT,
        )  # fmt: skip
    else:
        output_tile(
            x, B, C_, D, cs, scale, code, states, reach, entry, y, ROWS, L, H, R, P, N, C, Lp, x_b, x_l, x_h, B_b, B_l,
            B_g, C_b, C_l, C_g, HEADS, True, HAS_D, HAS_CODE, HAS_ENTRY, STAGES, Q, ROWS, BP, BN, DOT,
        )  # fmt: skip
