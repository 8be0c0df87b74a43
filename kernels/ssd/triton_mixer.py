"""Triton kernels of a Mamba-2 layer between its projections: what precedes the scan in one launch, and its backward.

The forward's launch holds two kinds of programs: some turn dt into the decays of a chunk, the others convolve a block
of tokens and channels. x, B and C are read where the projections left them, by their own strides; the backward writes
the gradients of all projections into one buffer. Nothing is atomic; helpers are those of the separate kernels.
"""

# mypy: disable-error-code="no-untyped-def"

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_conv import (
    AHEAD,
    CHANNELS,
    SUMMED,
    SUMMED_PARTS,
    TOKENS,
    WALKED,
    WARPS,
    by_channel,
    conv_flags,
    conv_parameters_kernel,
    conv_tile,
    conv_walk,
    walks,
)
from .triton_forward import prep_tile
from .triton_scan import Discretisation, Scan, plan


@triton.jit
def mixer_prep_kernel(
    x, B, C_, weight, bias, initial, code, convolved, dt, A, dt_bias, segments, cs, scale, L, I: tl.constexpr,
    S: tl.constexpr, H, Lp,
    DECAYS,  # programs that work on decays: chunks × blocks of heads; the others convolve
    x_b, x_l: tl.constexpr, B_b, B_l: tl.constexpr, C_b, C_l: tl.constexpr, dt_b, dt_l, dt_h, A_h, low, high,
    SILU: tl.constexpr, WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr,
    HAS_CODE: tl.constexpr, SOFTPLUS: tl.constexpr, CLAMP: tl.constexpr, HAS_DT_BIAS: tl.constexpr, Q: tl.constexpr,
    BH: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """x (b, L, I), B and C (b, L, S) → convolved (b, L, I + 2S), contiguous; dt (b, L, H) → cs and scale."""
    program, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if program < DECAYS:
        heads = tl.cdiv(H, BH)
        c = (program // heads).to(tl.int64)
        h = (program % heads) * BH + tl.arange(0, BH)
        prep_tile(
            dt, A, dt_bias, segments, cs, scale, b, c, h, L, H, Lp, dt_b, dt_l, dt_h, 0, 0, A_h, low, high, True,
            SOFTPLUS, CLAMP, HAS_DT_BIAS, HAS_CODE, Q,
        )  # fmt: skip
    else:
        conv_block(
            x, B, C_, weight, bias, initial, code, convolved, program - DECAYS, b, L, I, S, x_b, x_l, B_b, B_l, C_b,
            C_l, SILU, WIDTH, HAS_BIAS, HAS_INITIAL, HAS_CODE, BT, BC, AHEAD,
        )  # fmt: skip


@triton.jit
def choose(part, x, B, C_):
    """A scalar or pointer of x (part 0), B (1) or C (2): one body of code for the three, none of which is a branch."""
    return tl.where(part == 0, x, tl.where(part == 1, B, C_))


@triton.jit
def part_of(block, I: tl.constexpr, S: tl.constexpr, BC: tl.constexpr):
    """(part, its first channel, its channels, those of the block within it); no block spans two parts."""
    of_x, of_B = tl.cdiv(I, BC), tl.cdiv(S, BC)
    part = (block >= of_x).to(tl.int32) + (block >= of_x + of_B).to(tl.int32)
    ch = (block - choose(part, 0, of_x, of_x + of_B)) * BC + tl.arange(0, BC)
    return part, choose(part, 0, I, I + S), choose(part, I, S, S), ch


@triton.jit
def conv_block(
    x, B, C_, weight, bias, initial, code, convolved, number, b, L, I: tl.constexpr, S: tl.constexpr, x_b, x_l, B_b,
    B_l, C_b, C_l, SILU: tl.constexpr, WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr,
    HAS_CODE: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Block ``number`` of the convolution."""
    blocks = tl.cdiv(I, BC) + 2 * tl.cdiv(S, BC)
    start = (number // blocks).to(tl.int64) * BT
    part, base, channels, ch = part_of(number % blocks, I, S, BC)
    source = choose(part, x + b * x_b, B + b * B_b, C_ + b * C_b)
    weight += base * WIDTH
    if HAS_BIAS:
        bias += base
    if HAS_INITIAL:
        initial += (b * (I + 2 * S) + base) * (WIDTH - 1)
    if HAS_CODE:
        code += b * L
    conv_tile(
        source, weight, bias, initial, code, convolved + (b * L * (I + 2 * S) + base), start, ch, L, channels,
        choose(part, x_l, B_l, C_l), I + 2 * S, SILU, WIDTH, HAS_BIAS, HAS_INITIAL, HAS_CODE, BT, AHEAD,
    )  # fmt: skip


@triton.jit
def mixer_conv_backward_kernel(
    x, B, C_, weight, bias, initial, code, dx, dB, dC, out, dinitial, partial, L, I: tl.constexpr, S: tl.constexpr, x_b,
    x_l: tl.constexpr, B_b, B_l: tl.constexpr, C_b, C_l: tl.constexpr, out_b, out_l: tl.constexpr, TOKENS_HERE,
    SILU: tl.constexpr, WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr,
    HAS_CODE: tl.constexpr, BC: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """From dx (b, L, I), dB and dC (b, L, S), contiguous, to out: (b, L, I + 2S) by its strides."""
    walk, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    part, base, channels, ch = part_of(tl.program_id(0), I, S, BC)
    source = choose(part, x + b * x_b, B + b * B_b, C_ + b * C_b)
    slopes = choose(part, dx + b * L * I, dB + b * L * S, dC + b * L * S)
    weight += base * WIDTH
    partial += (b * tl.num_programs(1) + walk) * (WIDTH + 1) * (I + 2 * S) + base
    if HAS_BIAS:
        bias += base
    if HAS_CODE:
        code += b * L
    if HAS_INITIAL:
        initial += (b * (I + 2 * S) + base) * (WIDTH - 1)
        dinitial += (b * (I + 2 * S) + base) * (WIDTH - 1)
    conv_walk(
        source, weight, bias, initial, code, slopes, out + b * out_b + base, dinitial, partial, walk * TOKENS_HERE, ch,
        L, channels, I + 2 * S, choose(part, x_l, B_l, C_l), channels, out_l, TOKENS_HERE, SILU, WIDTH, HAS_BIAS,
        HAS_INITIAL, HAS_CODE, AHEAD,
    )  # fmt: skip


class Convolution(NamedTuple):
    """x (b, l, i), B and C (b, l, s) with contiguous channels, and the parameters of their convolution, contiguous."""

    x: Tensor
    B: Tensor
    C: Tensor
    weight: Tensor
    bias: Tensor | None
    initial: Tensor | None
    code: Tensor | None
    silu: bool

    @classmethod
    def of(
        cls,
        tensors: tuple[Tensor, Tensor, Tensor],
        weight: Tensor,
        bias: Tensor | None,
        initial: Tensor | None,
        code: Tensor | None,
        silu: bool,
    ) -> "Convolution":
        x, B, C = (by_channel(t) for t in tensors)
        bias, initial = (None if t is None else t.contiguous() for t in (bias, initial))
        return cls(x, B, C, weight.contiguous(), bias, initial, code, silu)

    @property
    def widths(self) -> tuple[int, int]:
        return self.x.shape[2], self.B.shape[2]

    @property
    def strides(self) -> tuple[int, ...]:
        return (*self.x.stride()[:2], *self.B.stride()[:2], *self.C.stride()[:2])

    @property
    def flags(self) -> dict[str, Any]:
        return conv_flags(self.bias, self.initial, self.code, self.silu, self.weight.shape[1])

    def blocks(self, size: int) -> int:
        """Blocks of ``size`` channels over x, B and C, none of which spans two of them."""
        inner, state = self.widths
        return triton.cdiv(inner, size) + 2 * triton.cdiv(state, size)


class Decays(NamedTuple):
    """dt (b, l, h), its bias (h,), A (h,), D (h,), the scan's segment code and how dt becomes a decay."""

    dt: Tensor
    A: Tensor
    bias: Tensor | None
    D: Tensor | None
    code: Tensor | None
    how: Discretisation
    groups: int


def scan_of(convolved: Tensor, inner: int, decays: Decays, chunk: int) -> Scan:
    """The scan over the convolved x, B and C (b, l, i + 2s)."""
    h, state = decays.dt.shape[2], (convolved.shape[2] - inner) // 2
    x, B, C = convolved.split((inner, state, state), dim=-1)
    B, C = (t.unflatten(-1, (decays.groups, -1)) for t in (B, C))
    x = x.unflatten(-1, (h, -1))
    return plan(x, decays.dt, decays.A, decays.bias, B, C, decays.D, decays.code, decays.how, chunk)


def prepare(conv: Convolution, decays: Decays, chunk: int) -> tuple[Tensor, Scan, Tensor, Tensor]:
    """One launch: (convolved (b, l, i + 2s), the scan over it, cs and scale (b, h, padded length) float32)."""
    (b, l, inner), state = conv.x.shape, conv.B.shape[2]
    convolved = torch.empty((b, l, inner + 2 * state), dtype=conv.x.dtype, device=conv.x.device)
    scan = scan_of(convolved, inner, decays, chunk)
    h, launch = decays.dt.shape[2], scan.config.prep
    cs = conv.x.new_empty(b, h, scan.padded, dtype=torch.float32)
    scale = torch.empty_like(cs)
    how = dict(scan.how.flags)
    how.pop("DISCRETISE")
    programs, block = scan.chunks * triton.cdiv(h, launch.rows), CHANNELS * launch.warps
    mixer_prep_kernel[(programs + triton.cdiv(l, TOKENS) * conv.blocks(block), b)](
        *(conv.x, conv.B, conv.C, conv.weight, conv.bias, conv.initial, conv.code, convolved),
        *(scan.first, scan.second, scan.bias, scan.code, cs, scale, l, inner, state, h, scan.padded, programs),
        *(*conv.strides, *scan.first.stride(), scan.second.stride(0), scan.how.low, scan.how.high),
        **conv.flags,
        **how,
        HAS_DT_BIAS=scan.bias is not None,
        Q=scan.chunk,
        BH=launch.rows,
        BT=TOKENS,
        BC=block,
        AHEAD=AHEAD,
        num_warps=launch.warps,
    )
    return convolved, scan, cs, scale


def conv_gradients(
    conv: Convolution, dx: Tensor, dB: Tensor, dC: Tensor, out: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dweight, dbias and dinitial; the gradients of x, B and C go into ``out`` (b, l, i + 2s), channels contiguous."""
    (b, l, inner), state, (channels, width) = conv.x.shape, conv.B.shape[2], conv.weight.shape
    tokens, parts = walks(l)
    dinitial = None if conv.initial is None else torch.empty_like(conv.initial)
    partial = conv.x.new_empty(b * parts, width + 1, channels, dtype=torch.float32)
    mixer_conv_backward_kernel[(conv.blocks(WALKED), parts, b)](
        *(conv.x, conv.B, conv.C, conv.weight, conv.bias, conv.initial, conv.code, dx, dB, dC, out, dinitial, partial),
        *(l, inner, state, *conv.strides, out.stride(0), out.stride(1), tokens),
        **conv.flags,
        BC=WALKED,
        AHEAD=AHEAD,
        num_warps=1,
    )
    dweight, dbias = torch.empty_like(conv.weight), conv.weight.new_empty(channels)
    conv_parameters_kernel[(triton.cdiv(channels, SUMMED), width + 1)](
        *(partial, dweight, dbias, b * parts, channels), WIDTH=width, BP=SUMMED_PARTS, BC=SUMMED, num_warps=WARPS
    )
    return dweight, dbias, dinitial
