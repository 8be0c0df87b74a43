"""Triton kernels of the causal convolution, forward, backward and one step of decoding, and their launches.

``code`` holds 2·run + (1 for padding) per token (int32). Position t < 0 is column k−1+t of the initial state and
belongs to run 0. No atomics: weight gradients are partial sums per program, added up in a fixed order.
"""

# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS, CHANNELS = 16, 64  # of a program of the forward
WALKED, LEAST, PARTS = 256, 32, 64  # backward: channels and tokens of a program at least, parts of a row at most


@triton.jit
def sigmoid(v):
    return 1.0 / (1.0 + tl.exp(-v))


@triton.jit
def run_at(code, first, r, L):
    """(run, real) of the positions first + r: run 0 before the start, run −1 behind the end; code points at its row."""
    t = first + r
    inside = (t >= 0) & (t < L)
    value = tl.load(code + t, mask=inside, other=0)
    return tl.where(t < L, value >> 1, -1), inside & ((value & 1) == 0)


@triton.jit
def input_at(x, initial, first, r, ch, base, L, c, x_l, WIDTH: tl.constexpr, HAS_INITIAL: tl.constexpr):
    """x[first + r, ch] in float32; from the initial state before the start, zero behind the end; both of one row."""
    t = first + r
    good = (ch < c)[None, :]
    inside = ((t >= 0) & (t < L))[:, None] & good
    v = tl.load(x + first * x_l + (r[:, None] * x_l + ch[None, :]), mask=inside, other=0.0).to(tl.float32)
    if HAS_INITIAL:
        if first < WIDTH:
            place = (base + ch)[None, :] * (WIDTH - 1) + (t[:, None] + WIDTH - 1)
            before = ((t < 0) & (t >= 1 - WIDTH))[:, None] & good
            v += tl.load(initial + place, mask=before, other=0.0).to(tl.float32)
    return v


@triton.jit
def convolved_at(
    x, weight, bias, initial, code, first, r, ch, base, L, c, x_l, WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr, HAS_CODE: tl.constexpr,
):  # fmt: skip
    """The convolution before its activation at the positions first + r."""
    u = tl.zeros((r.shape[0], ch.shape[0]), dtype=tl.float32)
    if HAS_BIAS:
        u += tl.load(bias + base + ch, mask=ch < c, other=0.0).to(tl.float32)[None, :]
    for s in tl.static_range(WIDTH):
        v = input_at(x, initial, first, r - s, ch, base, L, c, x_l, WIDTH, HAS_INITIAL)
        w = tl.load(weight + (base + ch) * WIDTH + (WIDTH - 1 - s), mask=ch < c, other=0.0).to(tl.float32)
        if HAS_CODE and s > 0:
            same = run_at(code, first, r, L)[0] == run_at(code, first, r - s, L)[0]
            v = tl.where(same[:, None], v, 0.0)
        u += v * w[None, :]
    return u


@triton.jit
def conv_tile(
    x, weight, bias, initial, code, y, first, r, ch, base, L, c, x_l, y_l, SILU: tl.constexpr, WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_CODE: tl.constexpr,
):  # fmt: skip
    """The outputs first + r of the channels ch < c of x, which are base + ch of the parameters and of y; one row."""
    u = convolved_at(
        x, weight, bias, initial, code, first, r, ch, base, L, c, x_l, WIDTH, HAS_BIAS, HAS_INITIAL, HAS_CODE
    )
    if SILU:
        u = u * sigmoid(u)
    if HAS_CODE:
        u = tl.where(run_at(code, first, r, L)[1][:, None], u, 0.0)
    mask = (first + r < L)[:, None] & (ch < c)[None, :]
    tl.store(y + first * y_l + (r[:, None] * y_l + (base + ch)[None, :]), u.to(y.dtype.element_ty), mask=mask)


@triton.jit
def conv_kernel(
    x, weight, bias, initial, code, y, L, c, x_b, x_l, SILU: tl.constexpr, WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_CODE: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """BT tokens and BC channels of y (b, L, c), contiguous."""
    b = tl.program_id(2).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * BT
    ch = tl.program_id(1) * BC + tl.arange(0, BC)
    x += b * x_b
    y += b * L * c
    if HAS_INITIAL:
        initial += b * c * (WIDTH - 1)
    if HAS_CODE:
        code += b * L
    conv_tile(
        x, weight, bias, initial, code, y, first, tl.arange(0, BT), ch, 0, L, c, x_l, c, SILU, WIDTH, HAS_BIAS,
        HAS_INITIAL, HAS_CODE,
    )  # fmt: skip


@triton.jit
def line_at(x, initial, t, ch, base, L, c, x_l, WIDTH: tl.constexpr, HAS_INITIAL: tl.constexpr):
    """x[t, ch] in float32 for one position t; from the initial state before the start, zero behind the end."""
    v = tl.load(x + t * x_l + ch, mask=(ch < c) & (t >= 0) & (t < L), other=0.0).to(tl.float32)
    if HAS_INITIAL:
        before = (ch < c) & (t < 0) & (t >= 1 - WIDTH)
        v += tl.load(initial + (base + ch) * (WIDTH - 1) + (t + WIDTH - 1), mask=before, other=0.0).to(tl.float32)
    return v


@triton.jit
def line_run(code, t, L, HAS_CODE: tl.constexpr):
    """(run, real) of one position."""
    run, real = 0, (t >= 0) & (t < L)
    if HAS_CODE:
        value = tl.load(code + t, mask=real, other=0)
        run, real = value >> 1, real & ((value & 1) == 0)
    return run, real


@triton.jit
def conv_walk(
    x, weight, bias, initial, code, dy, dx, dinitial, partial, start, ch, base, L, c, total, x_l, dy_l, dx_l,
    TOKENS_HERE, SILU: tl.constexpr, WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr,
    HAS_CODE: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Walks over positions of one row with the last inputs in registers; partial (5, total): dweight, dbias.

    dweight is kept by distance. The channels ch < c of x, dy and dx are base + ch of the parameters, of dinitial and of
    partial. An output t gives to the inputs t … t−3; the gradient of an input is complete three outputs later.
    """
    good = ch < c
    zero = tl.zeros((BC,), dtype=tl.float32)
    w0 = tl.load(weight + (base + ch) * WIDTH + WIDTH - 1, mask=good, other=0.0).to(tl.float32)
    w1, w2, w3, x1, x2, x3 = zero, zero, zero, zero, zero, zero
    run1, _ = line_run(code, start - 1, L, HAS_CODE)
    run2, _ = line_run(code, start - 2, L, HAS_CODE)
    run3, _ = line_run(code, start - 3, L, HAS_CODE)
    if WIDTH > 1:
        w1 = tl.load(weight + (base + ch) * WIDTH + WIDTH - 2, mask=good, other=0.0).to(tl.float32)
        x1 = line_at(x, initial, start - 1, ch, base, L, c, x_l, WIDTH, HAS_INITIAL)
    if WIDTH > 2:
        w2 = tl.load(weight + (base + ch) * WIDTH + WIDTH - 3, mask=good, other=0.0).to(tl.float32)
        x2 = line_at(x, initial, start - 2, ch, base, L, c, x_l, WIDTH, HAS_INITIAL)
    if WIDTH > 3:
        w3 = tl.load(weight + (base + ch) * WIDTH + WIDTH - 4, mask=good, other=0.0).to(tl.float32)
        x3 = line_at(x, initial, start - 3, ch, base, L, c, x_l, WIDTH, HAS_INITIAL)
    shift = zero
    if HAS_BIAS:
        shift = tl.load(bias + base + ch, mask=good, other=0.0).to(tl.float32)
    sum0, sum1, sum2, sum3, sumb = zero, zero, zero, zero, zero
    open1, open2, open3 = zero, zero, zero  # gradients of the inputs t − 1, t − 2, t − 3 so far
    for k in range(TOKENS_HERE + WIDTH - 1):
        t = start + k
        run0, real = line_run(code, t, L, HAS_CODE)
        x0 = line_at(x, initial, t, ch, base, L, c, x_l, WIDTH, HAS_INITIAL)
        seen1, seen2, seen3 = x1, x2, x3
        if HAS_CODE:
            seen1 = tl.where(run1 == run0, x1, 0.0)
            seen2 = tl.where(run2 == run0, x2, 0.0)
            seen3 = tl.where(run3 == run0, x3, 0.0)
        du = tl.load(dy + t * dy_l + ch, mask=good & real, other=0.0).to(tl.float32)
        if SILU:
            u = shift + x0 * w0 + seen1 * w1 + seen2 * w2 + seen3 * w3
            gate = sigmoid(u)
            du = du * gate * (1.0 + u * (1.0 - gate))
        mine = tl.where(k < TOKENS_HERE, du, 0.0)
        sumb += mine
        sum0 += mine * x0
        sum1 += mine * seen1
        sum2 += mine * seen2
        sum3 += mine * seen3
        open0 = du * w0
        if HAS_CODE:
            open1 += tl.where(run1 == run0, du, 0.0) * w1
            open2 += tl.where(run2 == run0, du, 0.0) * w2
            open3 += tl.where(run3 == run0, du, 0.0) * w3
        else:
            open1 += du * w1
            open2 += du * w2
            open3 += du * w3
        done = open0
        if WIDTH == 2:
            done = open1
        if WIDTH == 3:
            done = open2
        if WIDTH == 4:
            done = open3
        at = t - (WIDTH - 1)
        inside = good & (k >= WIDTH - 1) & (at < L)
        tl.store(dx + at * dx_l + ch, done.to(dx.dtype.element_ty), mask=inside & (at >= 0))
        if HAS_INITIAL:
            column = (base + ch) * (WIDTH - 1) + (at + WIDTH - 1)
            tl.store(dinitial + column, done.to(dinitial.dtype.element_ty), mask=inside & (at < 0))
        open3, open2, open1 = open2, open1, open0
        x3, x2, x1 = x2, x1, x0
        run3, run2, run1 = run2, run1, run0
    row = partial + base + ch
    tl.store(row, sum0, mask=good)
    tl.store(row + total, sum1, mask=good)
    tl.store(row + 2 * total, sum2, mask=good)
    tl.store(row + 3 * total, sum3, mask=good)
    tl.store(row + 4 * total, sumb, mask=good)


@triton.jit
def conv_backward_kernel(
    x, weight, bias, initial, code, dy, dx, dinitial, partial, L, c, x_b, x_l, dy_b, dy_l, TOKENS_HERE,
    SILU: tl.constexpr, WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr,
    HAS_CODE: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dx (b, L, c), contiguous, dinitial like initial and partial (b, parts, 5, c)."""
    b = tl.program_id(2).to(tl.int64)
    ch = tl.program_id(1) * BC + tl.arange(0, BC)
    partial += (b * tl.num_programs(0) + tl.program_id(0)) * 5 * c
    start = tl.program_id(0).to(tl.int64) * TOKENS_HERE
    if HAS_CODE:
        code += b * L
    if HAS_INITIAL:
        initial += b * c * (WIDTH - 1)
        dinitial += b * c * (WIDTH - 1)
        start -= WIDTH - 1
    conv_walk(
        x + b * x_b, weight, bias, initial, code, dy + b * dy_b, dx + b * L * c, dinitial, partial, start, ch, 0, L, c,
        c, x_l, dy_l, c, TOKENS_HERE, SILU, WIDTH, HAS_BIAS, HAS_INITIAL, HAS_CODE, BC,
    )  # fmt: skip


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
    conv_kernel[(triton.cdiv(l, TOKENS), triton.cdiv(c, CHANNELS), b)](
        *(x, weight, bias, initial, code, y, l, c, x.stride(0), x.stride(1)),
        **conv_flags(bias, initial, code, silu, weight.shape[1]),
        BT=TOKENS,
        BC=CHANNELS,
        num_warps=4,
    )
    return y


def walks(length: int, width: int, initial: Tensor | None) -> tuple[int, int]:
    """(tokens per program, programs per row) of the backward."""
    positions = length + (width - 1 if initial is not None else 0)
    tokens = max(LEAST, triton.cdiv(positions, PARTS))
    return tokens, triton.cdiv(positions, tokens)


def parameter_gradients(partial: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """dweight (c, k) and dbias (c,) from the partial sums (b, parts, 5, c), added up in a fixed order."""
    sums = partial.sum(dim=(0, 1))
    return sums[: weight.shape[1]].flip(0).t().to(weight.dtype).contiguous(), sums[4].to(weight.dtype)


def conv_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, initial: Tensor | None, code: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dx (b, l, c), dweight (c, k), dbias (c,) and dinitial."""
    x, dy, weight = by_channel(x), by_channel(dy), weight.contiguous()
    bias, initial = (None if t is None else t.contiguous() for t in (bias, initial))
    (b, l, c), width = x.shape, weight.shape[1]
    tokens, parts = walks(l, width, initial)
    dx = torch.empty((b, l, c), dtype=x.dtype, device=x.device)
    dinitial = None if initial is None else torch.empty_like(initial)
    partial = x.new_empty(b, parts, 5, c, dtype=torch.float32)
    conv_backward_kernel[(parts, triton.cdiv(c, WALKED), b)](
        *(x, weight, bias, initial, code, dy, dx, dinitial, partial, l, c),
        *(x.stride(0), x.stride(1), dy.stride(0), dy.stride(1), tokens),
        **conv_flags(bias, initial, code, silu, width),
        BC=WALKED,
        num_warps=4,
    )
    return dx, *parameter_gradients(partial, weight), dinitial


def conv_step(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> tuple[Tensor, Tensor]:
    """y (b, c) and the new state (b, c, k−1) from x (b, c) and the state, by its strides."""
    x, weight = by_channel(x), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    (b, c), width = x.shape, weight.shape[1]
    y = torch.empty((b, c), dtype=x.dtype, device=x.device)
    new_state = torch.empty(state.shape, dtype=state.dtype, device=x.device)
    conv_step_kernel[(triton.cdiv(c, CHANNELS), b)](
        *(x, state, weight, bias, y, new_state, c, x.stride(0), *state.stride()),
        SILU=silu,
        WIDTH=width,
        HAS_BIAS=bias is not None,
        BC=CHANNELS,
        num_warps=4,
    )
    return y, new_state
