"""Triton kernels of the causal convolution, forward, backward and one step of decoding, and their launches.

``code`` holds 2·run + (1 for padding) per token (int32). Position t < 0 is column k−1+t of the initial state and
belongs to run 0. No atomics: weight gradients are partial sums per program, added up in a fixed order.
"""

# mypy: disable-error-code="no-untyped-def,assignment"

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_math import sigmoid

# A warp takes 128 channels, so that a thread loads 8 bytes of a row; rows of AHEAD tokens are on their way
TOKENS, CHANNELS, AHEAD = 32, 128, 4  # forward: tokens of a program, channels of each of its warps
WALKED, LEAST, PARTS = 128, 64, 64  # backward, one warp: channels; tokens at least, a multiple of AHEAD; parts of a row
SUMMED_PARTS, SUMMED = 32, 128  # parts at a time and channels of a program that adds up the partial sums
STEPPED = 64  # channels of a program of a decode step
WARPS = 4


@triton.jit
def taps_at(weight, bias, ch, c, WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr):
    """The weights of the channels by distance, zero beyond the width, and the bias; weight and bias at their base."""
    w0 = tl.load(weight + ch * WIDTH + WIDTH - 1, mask=ch < c, other=0.0).to(tl.float32)
    w1, w2, w3, shift = tl.zeros_like(w0), tl.zeros_like(w0), tl.zeros_like(w0), tl.zeros_like(w0)
    if WIDTH > 1:
        w1 = tl.load(weight + ch * WIDTH + WIDTH - 2, mask=ch < c, other=0.0).to(tl.float32)
    if WIDTH > 2:
        w2 = tl.load(weight + ch * WIDTH + WIDTH - 3, mask=ch < c, other=0.0).to(tl.float32)
    if WIDTH > 3:
        w3 = tl.load(weight + ch * WIDTH + WIDTH - 4, mask=ch < c, other=0.0).to(tl.float32)
    if HAS_BIAS:
        shift = tl.load(bias + ch, mask=ch < c, other=0.0).to(tl.float32)
    return w0, w1, w2, w3, shift


@triton.jit
def input_at(x, initial, t, ch, c, x_l, WIDTH: tl.constexpr, HAS_INITIAL: tl.constexpr):
    """x[t, ch] in float32 for one position t, before the start from the initial state; x and initial at their base."""
    v = tl.load(x + t * x_l + ch, mask=(ch < c) & (t >= 0), other=0.0).to(tl.float32)
    if HAS_INITIAL:
        before = (ch < c) & (t < 0) & (t >= 1 - WIDTH)
        v += tl.load(initial + ch * (WIDTH - 1) + (t + WIDTH - 1), mask=before, other=0.0).to(tl.float32)
    return v


@triton.jit
def past_at(x, initial, t, ch, c, x_l, WIDTH: tl.constexpr, HAS_INITIAL: tl.constexpr):
    """The inputs t − 1, t − 2 and t − 3; zero beyond the width."""
    zero = tl.zeros(ch.shape, dtype=tl.float32)
    x1, x2, x3 = zero, zero, zero
    if WIDTH > 1:
        x1 = input_at(x, initial, t - 1, ch, c, x_l, WIDTH, HAS_INITIAL)
    if WIDTH > 2:
        x2 = input_at(x, initial, t - 2, ch, c, x_l, WIDTH, HAS_INITIAL)
    if WIDTH > 3:
        x3 = input_at(x, initial, t - 3, ch, c, x_l, WIDTH, HAS_INITIAL)
    return x1, x2, x3


@triton.jit
def code_at(code, t, L):
    """Of the nearest position of the row: position 0 is of the run that the initial state feeds, those behind the end
    are never used."""
    return tl.load(code + tl.minimum(tl.maximum(t, 0), L - 1))


@triton.jit
def codes_at(code, t, L, LINKED: tl.constexpr, AHEAD: tl.constexpr):
    """Of the positions t − 3 … t + AHEAD − 1; nothing where all is LINKED."""
    codes = ()
    if not LINKED:
        for j in tl.static_range(3 + AHEAD):
            codes += (code_at(code, t + (j - 3), L),)
    return codes


@triton.jit
def in_run(values, codes, j: tl.constexpr):
    """The values (of the positions t + j − 1, t + j − 2, t + j − 3, or of t + j for each of them), zero where that
    position is of another run than t + j."""
    own = codes[j + 3]
    return (
        tl.where(codes[j + 2] == own, values[0], 0.0),
        tl.where(codes[j + 1] == own, values[1], 0.0),
        tl.where(codes[j] == own, values[2], 0.0),
    )


@triton.jit
def convolved(x0, seen, taps, WIDTH: tl.constexpr):
    """The convolution of one position before its activation."""
    u = taps[4] + x0 * taps[0]
    if WIDTH > 1:
        u += seen[0] * taps[1]
    if WIDTH > 2:
        u += seen[1] * taps[2]
    if WIDTH > 3:
        u += seen[2] * taps[3]
    return u


@triton.jit
def output_rows(
    rows, past, taps, x, code, y, t, left, L, x_l, y_l, LINKED: tl.constexpr, SILU: tl.constexpr, WIDTH: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """The outputs t … t + AHEAD − 1, of which x and y point at the first; the program has ``left``, per channel.

    ``rows`` are their inputs, and each is replaced by the one AHEAD further as soon as it is read. LINKED: all of them
    and what they see belong to one document.
    """
    ahead, codes = (), codes_at(code, t, L, LINKED, AHEAD)
    for j in tl.static_range(AHEAD):
        x0 = rows[j].to(tl.float32)
        ahead += (tl.load(x + (j + AHEAD) * x_l, mask=j + AHEAD < left, other=0.0),)
        if not LINKED:
            past = in_run(past, codes, j)
        u = convolved(x0, past, taps, WIDTH)
        if SILU:
            u = u * sigmoid(u)
        if not LINKED:
            u = tl.where((codes[j + 3] & 1) == 0, u, 0.0)
        tl.store(y + j * y_l, u.to(y.dtype.element_ty), mask=j < left)
        past = x0, past[0], past[1]
    return ahead, past


@triton.jit
def conv_tile(
    x, weight, bias, initial, code, y, start, ch, L, c, x_l, y_l, SILU: tl.constexpr, WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_CODE: tl.constexpr, BT: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """The outputs start … start + BT − 1 of the channels ch < c of one row; every pointer is at its channel 0.

    Walks over the tokens with the weights and the last inputs in registers, AHEAD rows of x on their way.
    """
    taps = taps_at(weight, bias, ch, c, WIDTH, HAS_BIAS)
    past = past_at(x, initial, start, ch, c, x_l, WIDTH, HAS_INITIAL)
    steps = tl.minimum(L - start, BT).to(tl.int32)
    first, left = start.to(tl.int32), tl.where(ch < c, steps, 0)
    x += start * x_l + ch
    y += start * y_l + ch
    rows = ()
    for j in tl.static_range(AHEAD):
        rows += (tl.load(x + j * x_l, mask=j < left, other=0.0),)
    if HAS_CODE:
        low, high = code_at(code, first + 1 - WIDTH, L), code_at(code, first + AHEAD - 1, L)
    for k in range(0, steps, AHEAD):
        t = first + k
        if HAS_CODE:
            linked = (low == high) & ((high & 1) == 0)
            low = tl.load(code + tl.minimum(t + AHEAD + 1 - WIDTH, L - 1))
            high = tl.load(code + tl.minimum(t + 2 * AHEAD - 1, L - 1))
        if not HAS_CODE or linked:
            rows, past = output_rows(rows, past, taps, x, code, y, t, left, L, x_l, y_l, True, SILU, WIDTH, AHEAD)
        else:
            rows, past = output_rows(rows, past, taps, x, code, y, t, left, L, x_l, y_l, False, SILU, WIDTH, AHEAD)
        x += AHEAD * x_l
        y += AHEAD * y_l
        left -= AHEAD


@triton.jit
def conv_kernel(
    x, weight, bias, initial, code, y, L, c: tl.constexpr, x_b, x_l: tl.constexpr, SILU: tl.constexpr,
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_CODE: tl.constexpr, BT: tl.constexpr,
    BC: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """BT tokens and BC channels of y (b, L, c), contiguous."""
    b, blocks = tl.program_id(1).to(tl.int64), tl.cdiv(c, BC)
    start = (tl.program_id(0) // blocks).to(tl.int64) * BT
    ch = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    if HAS_INITIAL:
        initial += b * c * (WIDTH - 1)
    if HAS_CODE:
        code += b * L
    conv_tile(
        x + b * x_b, weight, bias, initial, code, y + b * L * c, start, ch, L, c, x_l, c, SILU, WIDTH, HAS_BIAS,
        HAS_INITIAL, HAS_CODE, BT, AHEAD,
    )  # fmt: skip


@triton.jit
def gradient_rows(
    rows, slopes, past, open, sums, taps, x, code, dy, dx, dinitial, t, own, left, ch, L, x_l, dy_l, dx_l,
    LINKED: tl.constexpr, LAST: tl.constexpr, SILU: tl.constexpr, WIDTH: tl.constexpr, FIRST: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """What the outputs from t on give to the inputs t … t − 3: AHEAD of them, or the LAST ones, behind the program's.

    x, dy and dx point at t; ``rows`` and ``slopes`` are x and dy there. ``open``: the gradients of the inputs t − 1,
    t − 2 and t − 3 so far, which the program stores if they are its ``own``; one is complete WIDTH − 1 outputs later.
    LINKED as for the outputs. FIRST: t may be 0, and dinitial exists.
    """
    ahead, ahead_slopes, codes = (), (), codes_at(code, t, L, LINKED, AHEAD)
    sum0, sum1, sum2, sum3, sumb = sums
    for j in tl.static_range(WIDTH - 1 if LAST else AHEAD):
        x0, du = rows[j].to(tl.float32), slopes[j].to(tl.float32)
        if not LAST:
            wanted = j + AHEAD < left
            ahead += (tl.load(x + (j + AHEAD) * x_l, mask=wanted, other=0.0),)
            ahead_slopes += (tl.load(dy + (j + AHEAD) * dy_l, mask=wanted, other=0.0),)
        if not LINKED:
            past = in_run(past, codes, j)
            du = tl.where((codes[j + 3] & 1) == 0, du, 0.0)
        if SILU:
            u = convolved(x0, past, taps, WIDTH)
            gate = sigmoid(u)
            du = du * gate * (1.0 + u * (1.0 - gate))
        if not LAST:
            sumb += du
            sum0 += du * x0
            sum1 += du * past[0]
            sum2 += du * past[1]
            sum3 += du * past[2]
        given = du, du, du
        if not LINKED:
            given = in_run(given, codes, j)
        now = du * taps[0], open[0] + given[0] * taps[1], open[1] + given[1] * taps[2], open[2] + given[2] * taps[3]
        done = now[WIDTH - 1].to(dx.dtype.element_ty)
        mask = j - (WIDTH - 1) < left
        if j < WIDTH - 1:
            mask = mask & own
        tl.store(dx + (j - (WIDTH - 1)) * dx_l, done, mask=mask)
        if FIRST and j < WIDTH - 1:
            column = dinitial + ch * (WIDTH - 1) + j
            tl.store(column, now[WIDTH - 1].to(dinitial.dtype.element_ty), mask=(left > 0) & (t == 0))
        open = now[0], now[1], now[2]
        past = x0, past[0], past[1]
    return ahead, ahead_slopes, past, open, (sum0, sum1, sum2, sum3, sumb)


@triton.jit
def conv_walk(
    x, weight, bias, initial, code, dy, dx, dinitial, partial, start, ch, L, c, total, x_l, dy_l, dx_l, TOKENS_HERE,
    SILU: tl.constexpr, WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr,
    HAS_CODE: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """The gradients of the inputs start … start + TOKENS_HERE − 1 of one row; every pointer is at its channel 0.

    Walks over the outputs with the weights and the last inputs in registers, AHEAD rows of x and dy on their way;
    partial (WIDTH + 1, total): dweight by distance and dbias from TOKENS_HERE outputs. The inputs before ``start`` are
    completed by the program before, or by this one where they are of the initial state. Positions have 64 bits: with
    32, ptxas moves the pointers out of the uniform registers, and four programs less fit an SM.
    """
    taps = taps_at(weight, bias, ch, c, WIDTH, HAS_BIAS)
    past = past_at(x, initial, start, ch, c, x_l, WIDTH, HAS_INITIAL)
    zero = tl.zeros(ch.shape, dtype=tl.float32)
    open, sums = (zero, zero, zero), (zero, zero, zero, zero, zero)
    left = tl.where(ch < c, (L - start).to(tl.int32), -AHEAD)  # so far behind the end that nothing is stored
    steps = tl.minimum(L - start, TOKENS_HERE).to(tl.int32)
    x += start * x_l + ch
    dy += start * dy_l + ch
    at = dx + start * dx_l + ch
    rows, slopes = (), ()
    for j in tl.static_range(AHEAD):
        rows += (tl.load(x + j * x_l, mask=j < left, other=0.0),)
        slopes += (tl.load(dy + j * dy_l, mask=j < left, other=0.0),)
    begin = 0
    if HAS_INITIAL:
        rows, slopes, past, open, sums = gradient_rows(
            rows, slopes, past, open, sums, taps, x, code, dy, at, dinitial, start, False, left, ch, L, x_l, dy_l, dx_l,
            not HAS_CODE, False, SILU, WIDTH, True, AHEAD,
        )  # fmt: skip
        begin = AHEAD
        x += AHEAD * x_l
        dy += AHEAD * dy_l
        at += AHEAD * dx_l
        left -= AHEAD
    if HAS_CODE:
        low, high = code_at(code, start + begin + 1 - WIDTH, L), code_at(code, start + begin + AHEAD - 1, L)
    for k in range(begin, steps, AHEAD):
        t = start + k
        if HAS_CODE:
            linked = (low == high) & ((high & 1) == 0)
            low = tl.load(code + tl.minimum(t + AHEAD + 1 - WIDTH, L - 1))
            high = tl.load(code + tl.minimum(t + 2 * AHEAD - 1, L - 1))
        if not HAS_CODE or linked:
            rows, slopes, past, open, sums = gradient_rows(
                rows, slopes, past, open, sums, taps, x, code, dy, at, dinitial, t, k > 0, left, ch, L, x_l, dy_l,
                dx_l, True, False, SILU, WIDTH, False, AHEAD,
            )  # fmt: skip
        else:
            rows, slopes, past, open, sums = gradient_rows(
                rows, slopes, past, open, sums, taps, x, code, dy, at, dinitial, t, k > 0, left, ch, L, x_l, dy_l,
                dx_l, False, False, SILU, WIDTH, False, AHEAD,
            )  # fmt: skip
        x += AHEAD * x_l
        dy += AHEAD * dy_l
        at += AHEAD * dx_l
        left -= AHEAD
    if WIDTH > 1:
        # pointers and mask anew: of those that went through the loop the compiler forgets that channels are contiguous
        t = start + tl.cdiv(steps, AHEAD) * AHEAD
        left = tl.where(ch < c, (L - t).to(tl.int32), -AHEAD)
        gradient_rows(
            rows, slopes, past, open, sums, taps, x, code, dy, dx + t * dx_l + ch, dinitial, t, True, left, ch, L, x_l,
            dy_l, dx_l, not HAS_CODE, True, SILU, WIDTH, False, AHEAD,
        )  # fmt: skip
    for s in tl.static_range(WIDTH):
        tl.store(partial + s * total + ch, sums[s], mask=ch < c)
    tl.store(partial + WIDTH * total + ch, sums[4], mask=ch < c)


@triton.jit
def conv_backward_kernel(
    x, weight, bias, initial, code, dy, dx, dinitial, partial, L, c: tl.constexpr, x_b, x_l: tl.constexpr, dy_b,
    dy_l: tl.constexpr, TOKENS_HERE, SILU: tl.constexpr, WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr, HAS_CODE: tl.constexpr, BC: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """dx (b, L, c), contiguous, dinitial like initial and partial (b, parts, WIDTH + 1, c)."""
    part, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    ch = tl.program_id(0) * BC + tl.arange(0, BC)
    partial += (b * tl.num_programs(1) + part) * (WIDTH + 1) * c
    if HAS_CODE:
        code += b * L
    if HAS_INITIAL:
        initial += b * c * (WIDTH - 1)
        dinitial += b * c * (WIDTH - 1)
    conv_walk(
        x + b * x_b, weight, bias, initial, code, dy + b * dy_b, dx + b * L * c, dinitial, partial, part * TOKENS_HERE,
        ch, L, c, c, x_l, dy_l, c, TOKENS_HERE, SILU, WIDTH, HAS_BIAS, HAS_INITIAL, HAS_CODE, AHEAD,
    )  # fmt: skip


@triton.jit
def conv_parameters_kernel(
    partial, dweight, dbias, parts, c, WIDTH: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """dweight (c, WIDTH) and dbias (c,), contiguous: the sums of partial (parts, WIDTH + 1, c), in a fixed order."""
    s, rows = tl.program_id(1), tl.arange(0, BP)
    ch = tl.program_id(0) * BC + tl.arange(0, BC)
    total = tl.zeros((BP, BC), dtype=tl.float32)
    partial += s * c
    for part in range(0, parts, BP):
        mask = (part + rows < parts)[:, None] & (ch < c)[None, :]
        total += tl.load(partial + (rows[:, None] * (WIDTH + 1) * c + ch[None, :]), mask=mask, other=0.0)
        partial += BP * (WIDTH + 1) * c
    sums = tl.sum(total, axis=0)
    if s < WIDTH:
        tl.store(dweight + ch * WIDTH + WIDTH - 1 - s, sums.to(dweight.dtype.element_ty), mask=ch < c)
    else:
        tl.store(dbias + ch, sums.to(dbias.dtype.element_ty), mask=ch < c)


@triton.jit
def conv_step_kernel(
    x, state, weight, bias, y, new_state, c, x_b, state_b, state_c, state_k, SILU: tl.constexpr,
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """One token: y (b, c) and the state (b, c, k−1) moved by one."""
    b = tl.program_id(1).to(tl.int64)
    ch = tl.program_id(0) * BC + tl.arange(0, BC)
    good = ch < c
    now = tl.load(x + b * x_b + ch, mask=good, other=0.0)
    u = now.to(tl.float32) * tl.load(weight + ch * WIDTH + WIDTH - 1, mask=good, other=0.0).to(tl.float32)
    if HAS_BIAS:
        u += tl.load(bias + ch, mask=good, other=0.0).to(tl.float32)
    for k in tl.static_range(WIDTH - 1):
        v = tl.load(state + b * state_b + ch * state_c + k * state_k, mask=good, other=0.0)
        u += v.to(tl.float32) * tl.load(weight + ch * WIDTH + k, mask=good, other=0.0).to(tl.float32)
        if k > 0:
            tl.store(new_state + (b * c + ch) * (WIDTH - 1) + k - 1, v, mask=good)
    if WIDTH > 1:
        held = now.to(tl.float32).to(new_state.dtype.element_ty)
        tl.store(new_state + (b * c + ch) * (WIDTH - 1) + WIDTH - 2, held, mask=good)
    if SILU:
        u = u * sigmoid(u)
    tl.store(y + b * c + ch, u.to(y.dtype.element_ty), mask=good)


def by_channel(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def conv_flags(
    bias: Tensor | None, initial: Tensor | None, code: Tensor | None, silu: bool, width: int
) -> dict[str, int]:
    flags = {"SILU": silu, "WIDTH": width, "HAS_BIAS": bias is not None, "HAS_INITIAL": initial is not None}
    return {**flags, "HAS_CODE": code is not None}


def conv_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial: Tensor | None, code: Tensor | None, silu: bool
) -> Tensor:
    """y (b, l, c), contiguous; x (b, l, c) by its strides, weight (c, k), bias (c,), initial (b, c, k−1)."""
    x, weight = by_channel(x), weight.contiguous()
    bias, initial = (None if t is None else t.contiguous() for t in (bias, initial))
    b, l, c = x.shape
    y = torch.empty((b, l, c), dtype=x.dtype, device=x.device)
    block = CHANNELS * WARPS
    conv_kernel[(triton.cdiv(l, TOKENS) * triton.cdiv(c, block), b)](
        *(x, weight, bias, initial, code, y, l, c, x.stride(0), x.stride(1)),
        **conv_flags(bias, initial, code, silu, weight.shape[1]),
        BT=TOKENS,
        BC=block,
        AHEAD=AHEAD,
        num_warps=WARPS,
    )
    return y


def walks(length: int) -> tuple[int, int]:
    """(tokens per program, a multiple of AHEAD; programs per row) of the backward."""
    tokens = max(LEAST, AHEAD * triton.cdiv(length, PARTS * AHEAD))
    return tokens, triton.cdiv(length, tokens)


def conv_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, initial: Tensor | None, code: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dx (b, l, c), dweight (c, k), dbias (c,) and dinitial."""
    x, dy, weight = by_channel(x), by_channel(dy), weight.contiguous()
    bias, initial = (None if t is None else t.contiguous() for t in (bias, initial))
    (b, l, c), width = x.shape, weight.shape[1]
    tokens, parts = walks(l)
    dx = torch.empty((b, l, c), dtype=x.dtype, device=x.device)
    dinitial = None if initial is None else torch.empty_like(initial)
    partial = x.new_empty(b * parts, width + 1, c, dtype=torch.float32)
    conv_backward_kernel[(triton.cdiv(c, WALKED), parts, b)](
        *(x, weight, bias, initial, code, dy, dx, dinitial, partial, l, c),
        *(x.stride(0), x.stride(1), dy.stride(0), dy.stride(1), tokens),
        **conv_flags(bias, initial, code, silu, width),
        BC=WALKED,
        AHEAD=AHEAD,
        num_warps=1,
    )
    dweight, dbias = torch.empty_like(weight), weight.new_empty(c)
    conv_parameters_kernel[(triton.cdiv(c, SUMMED), width + 1)](
        *(partial, dweight, dbias, b * parts, c), WIDTH=width, BP=SUMMED_PARTS, BC=SUMMED, num_warps=WARPS
    )
    return dx, dweight, dbias, dinitial


def conv_step(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> tuple[Tensor, Tensor]:
    """y (b, c) and the new state (b, c, k−1) from x (b, c) and the state, by its strides."""
    x, weight = by_channel(x), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    (b, c), width = x.shape, weight.shape[1]
    y = torch.empty((b, c), dtype=x.dtype, device=x.device)
    new_state = torch.empty(state.shape, dtype=state.dtype, device=x.device)
    conv_step_kernel[(triton.cdiv(c, STEPPED), b)](
        *(x, state, weight, bias, y, new_state, c, x.stride(0), *state.stride()),
        SILU=silu,
        WIDTH=width,
        HAS_BIAS=bias is not None,
        BC=STEPPED,
        num_warps=WARPS,
    )
    return y, new_state
