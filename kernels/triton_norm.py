"""Triton kernels of RMSNorm, gated and grouped or with a fused residual addition, and their launches.

Both kernels are bound by memory: they need many bytes in flight and few instructions per byte. One program owns one
group of channels and walks over rows, so that the weight stays in registers. A thread holds 32 channels in the forward
and 16 in the backward: a group of 1024 is one warp's in the forward, and its sum crosses no barrier. Of groups shorter
than a warp's share, several rows are taken at a time. The backward keeps the weight's gradient in float32 registers:
one partial sum per program and no atomic operation. While many of its programs share an SM, some compute as
others wait; wide groups leave room for one or two, which fetch their next row ahead.
"""

# mypy: disable-error-code="no-untyped-def"

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_math import sigmoid

# Warps of the backward that fill 132 SMs, 16 each: all of them run at once. A constant, so that the order of the sums
# (and with it the last bit of the weight's gradient) does not depend on the device
WARPS = 16 * 132
STEPS = 4  # blocks of rows per program of the forward, where there are enough of them for several waves
SHARED = 96 * 1024  # bytes of rows fetched ahead per program at most; an SM of the smallest GPUs has 99 KB


@triton.jit
def load_once(pointers, mask):
    """In float32; nothing of it is read again, so that what is written stays in the L2 cache for the next kernel."""
    return tl.load(pointers, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)


@triton.jit
def norm_kernel(
    x, z, residual, weight, y, summed, rstd, ROWS, G, x_l, z_l, residual_l, eps,
    HAS_Z: tl.constexpr, HAS_RESIDUAL: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, R: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """y = norm(x·silu(z))·weight or norm(x + residual)·weight, of one group of STEPS·R rows."""
    part, g = (tl.program_id(0) // G).to(tl.int64), tl.program_id(0) % G
    k = tl.arange(0, BLOCK)[None, :]
    good = k < SIZE
    ch = g * SIZE + k
    w = tl.load(weight + ch, mask=good, other=0.0).to(tl.float32)
    for step in range(STEPS):
        row = (part * STEPS + step) * R + tl.arange(0, R)[:, None]
        here = good & (row < ROWS)
        out = row * G * SIZE + ch
        v = load_once(x + row * x_l + ch, here)
        if HAS_RESIDUAL:
            v += load_once(residual + row * residual_l + ch, here)
            rounded = v.to(summed.dtype.element_ty)
            tl.store(summed + out, rounded, mask=here)
            v = rounded.to(tl.float32)
        if HAS_Z:
            gate = load_once(z + row * z_l + ch, here)
            v = v * gate * sigmoid(gate)
        inverse = tl.rsqrt(tl.sum(v * v, axis=1, keep_dims=True) / SIZE + eps)
        tl.store(rstd + row * G + g, inverse, mask=row < ROWS)
        tl.store(y + out, (v * inverse * w).to(y.dtype.element_ty), mask=here)


@triton.jit
def norm_backward_kernel(
    x, z, weight, rstd, dy, dsummed, dx, dz, partial, ROWS, STEPS, G, x_l, z_l, dy_l, dsummed_l, dz_l,
    HAS_Z: tl.constexpr, HAS_DSUMMED: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, R: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """STEPS·R rows of one group: dx, dz and a partial dweight. x is what was normalised, dsummed its other gradient."""
    part, g = (tl.program_id(0) // G).to(tl.int64), tl.program_id(0) % G
    k = tl.arange(0, BLOCK)[None, :]
    good = k < SIZE
    ch = g * SIZE + k
    w = tl.load(weight + ch, mask=good, other=0.0).to(tl.float32)
    total = tl.zeros((R, BLOCK), dtype=tl.float32)
    for step in tl.range(STEPS, num_stages=STAGES):
        row = (part * STEPS + step) * R + tl.arange(0, R)[:, None]
        here = good & (row < ROWS)
        v = load_once(x + row * x_l + ch, here)
        d = load_once(dy + row * dy_l + ch, here)
        inverse = tl.load(rstd + row * G + g, mask=row < ROWS, other=0.0)
        gated = v
        if HAS_Z:
            gate = load_once(z + row * z_l + ch, here)
            half = sigmoid(gate)
            silu = gate * half
            gated = v * silu
        normal = gated * inverse
        total += d * normal
        dnormal = d * w
        dgated = (dnormal - normal * (tl.sum(dnormal * normal, axis=1, keep_dims=True) / SIZE)) * inverse
        if HAS_Z:
            dgate = dgated * v * (half + silu * (1.0 - half))
            tl.store(dz + row * dz_l + ch, dgate.to(dz.dtype.element_ty), mask=here)
            dgated = dgated * silu
        if HAS_DSUMMED:
            dgated += load_once(dsummed + row * dsummed_l + ch, here)
        tl.store(dx + row * G * SIZE + ch, dgated.to(dx.dtype.element_ty), mask=here)
    tl.store(partial + part * G * SIZE + ch, tl.sum(total, axis=0, keep_dims=True), mask=good)


class Tile(NamedTuple):
    """Of a group: channels (a power of two), rows at a time, warps."""

    block: int
    rows: int
    warps: int


def _tile(group_size: int, per_thread: int) -> Tile:
    """``per_thread`` channels a thread, in whole warps."""
    block, warp = triton.next_power_of_2(group_size), 32 * per_thread
    return Tile(block, max(1, warp // block), min(32, max(1, block // warp)))


def _rows(t: Tensor) -> Tensor:
    """(rows, d) with contiguous channels; a view wherever the strides allow."""
    rows = t.reshape(-1, t.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def norm_forward(
    x: Tensor, z: Tensor | None, residual: Tensor | None, weight: Tensor, group_size: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(y like x, x + residual in the residual's dtype or empty, 1/rms (rows, groups) float32)."""
    shape, d = x.shape, x.shape[-1]
    x2 = _rows(x)
    z2, residual2 = (x2 if t is None else _rows(t) for t in (z, residual))
    rows, groups = x2.shape[0], d // group_size
    y = torch.empty(shape, dtype=x.dtype, device=x.device)
    summed = torch.empty(shape if residual is not None else (0,), dtype=residual2.dtype, device=x.device)
    rstd = x.new_empty(rows, groups, dtype=torch.float32)
    tile = _tile(group_size, 32)
    blocks = triton.cdiv(rows, tile.rows)
    many = tile.warps <= 8 and blocks * groups * tile.warps >= 3 * STEPS * WARPS  # and room for two rows in an SM
    steps = STEPS if many else 1
    norm_kernel[(triton.cdiv(blocks, steps) * groups,)](
        *(x2, z2, residual2, weight.contiguous(), y, summed, rstd, rows, groups),
        *(x2.stride(0), z2.stride(0), residual2.stride(0), eps),
        HAS_Z=z is not None,
        HAS_RESIDUAL=residual is not None,
        SIZE=group_size,
        BLOCK=tile.block,
        R=tile.rows,
        STEPS=steps,
        num_warps=tile.warps,
    )
    return y, summed, rstd


def norm_backward(
    dy: Tensor,
    dsummed: Tensor | None,
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    rstd: Tensor,
    group_size: int,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (of x + residual where there was one), dz (in ``out`` if given, like z with rows of one stride) or empty,
    dweight."""
    shape, d = x.shape, x.shape[-1]
    x2, dy2 = _rows(x), _rows(dy)
    z2, dsummed2 = (x2 if t is None else _rows(t) for t in (z, dsummed))
    rows, groups = x2.shape[0], d // group_size
    tile = _tile(group_size, 16)
    blocks = triton.cdiv(rows, tile.rows)
    steps = triton.cdiv(blocks, max(1, WARPS // (groups * tile.warps)))
    parts = triton.cdiv(blocks, steps)
    read = (x2, dy2, *(() if z is None else (z2,)), *(() if dsummed is None else (dsummed2,)))
    fetched = tile.block * tile.rows * sum(t.element_size() for t in read)
    dx = torch.empty(shape, dtype=x.dtype, device=x.device)
    dz = torch.empty(shape if z is not None else (0,), dtype=z2.dtype, device=x.device) if out is None else out
    dz2 = x2 if z is None else dz.view(-1, d)
    partial = x.new_empty(parts, d, dtype=torch.float32)
    norm_backward_kernel[(parts * groups,)](
        *(x2, z2, weight.contiguous(), rstd, dy2, dsummed2, dx, dz2, partial, rows, steps, groups),
        *(x2.stride(0), z2.stride(0), dy2.stride(0), dsummed2.stride(0), dz2.stride(0)),
        HAS_Z=z is not None,
        HAS_DSUMMED=dsummed is not None,
        SIZE=group_size,
        BLOCK=tile.block,
        R=tile.rows,
        STAGES=3 if tile.warps >= 8 and 2 * fetched <= SHARED else 1,  # of 2, a copy begins where its row is needed
        num_warps=tile.warps,
    )
    return dx, dz, partial.sum(dim=0).to(weight.dtype)
