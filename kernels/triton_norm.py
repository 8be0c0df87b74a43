"""Triton kernels of RMSNorm, gated and grouped or with a fused residual addition, and their launches.

One program owns one group of channels of a row; the backward walks over rows and keeps the weight's gradient in float32
registers, so that there is one partial sum per program and no atomic operation.
"""

# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

PARTS = 256  # programs of the backward per group of channels at most


@triton.jit
def norm_kernel(
    x, z, residual, weight, y, summed, rstd, G, x_l, z_l, residual_l, eps,
    HAS_Z: tl.constexpr, HAS_RESIDUAL: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = norm(x·silu(z))·weight or norm(x + residual)·weight, of one group of one row."""
    row, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    k = tl.arange(0, BLOCK)
    good = k < SIZE
    ch = g * SIZE + k
    v = tl.load(x + row * x_l + ch, mask=good, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        v += tl.load(residual + row * residual_l + ch, mask=good, other=0.0).to(tl.float32)
        rounded = v.to(summed.dtype.element_ty)
        tl.store(summed + row * G * SIZE + ch, rounded, mask=good)
        v = rounded.to(tl.float32)
    if HAS_Z:
        gate = tl.load(z + row * z_l + ch, mask=good, other=0.0).to(tl.float32)
        v = v * gate / (1.0 + tl.exp(-gate))
    inverse = 1.0 / tl.sqrt(tl.sum(v * v, axis=0) / SIZE + eps)
    tl.store(rstd + row * G + g, inverse)
    w = tl.load(weight + ch, mask=good, other=0.0).to(tl.float32)
    tl.store(y + row * G * SIZE + ch, (v * inverse * w).to(y.dtype.element_ty), mask=good)


@triton.jit
def norm_backward_kernel(
    x, z, weight, rstd, dy, dsummed, dx, dz, partial, ROWS, STEPS, G, x_l, z_l, dy_l, dsummed_l, dz_l,
    HAS_Z: tl.constexpr, HAS_DSUMMED: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """STEPS rows of one group: dx, dz and a partial dweight. x is what was normalised, dsummed its other gradient."""
    part, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    k = tl.arange(0, BLOCK)
    good = k < SIZE
    ch = g * SIZE + k
    w = tl.load(weight + ch, mask=good, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for step in range(STEPS):
        row = part * STEPS + step
        here = good & (row < ROWS)
        v = tl.load(x + row * x_l + ch, mask=here, other=0.0).to(tl.float32)
        d = tl.load(dy + row * dy_l + ch, mask=here, other=0.0).to(tl.float32)
        inverse = tl.load(rstd + row * G + g, mask=row < ROWS, other=0.0)
        gated = v
        if HAS_Z:
            gate = tl.load(z + row * z_l + ch, mask=here, other=0.0).to(tl.float32)
            sigmoid = 1.0 / (1.0 + tl.exp(-gate))
            gated = v * gate * sigmoid
        normal = gated * inverse
        total += d * normal
        dnormal = d * w
        dgated = (dnormal - normal * (tl.sum(dnormal * normal, axis=0) / SIZE)) * inverse
        out = row * G * SIZE + ch
        if HAS_Z:
            dgate = dgated * v * sigmoid * (1.0 + gate * (1.0 - sigmoid))
            tl.store(dz + row * dz_l + ch, dgate.to(dz.dtype.element_ty), mask=here)
            dgated = dgated * gate * sigmoid
        if HAS_DSUMMED:
            dgated += tl.load(dsummed + row * dsummed_l + ch, mask=here, other=0.0).to(tl.float32)
        tl.store(dx + out, dgated.to(dx.dtype.element_ty), mask=here)
    tl.store(partial + part * G * SIZE + ch, total, mask=good)


def _rows(t: Tensor) -> Tensor:
    """(rows, d) with contiguous channels; a view wherever the strides allow."""
    rows = t.reshape(-1, t.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _warps(block: int) -> int:
    return 4 if block <= 2048 else 8 if block <= 8192 else 16


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
    block = triton.next_power_of_2(group_size)
    norm_kernel[(rows, groups)](
        *(x2, z2, residual2, weight.contiguous(), y, summed, rstd, groups),
        *(x2.stride(0), z2.stride(0), residual2.stride(0), eps),
        HAS_Z=z is not None,
        HAS_RESIDUAL=residual is not None,
        SIZE=group_size,
        BLOCK=block,
        num_warps=_warps(block),
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
    steps = max(1, triton.cdiv(rows, PARTS))
    parts = triton.cdiv(rows, steps)
    dx = torch.empty(shape, dtype=x.dtype, device=x.device)
    dz = torch.empty(shape if z is not None else (0,), dtype=z2.dtype, device=x.device) if out is None else out
    dz2 = x2 if z is None else dz.view(-1, d)
    partial = x.new_empty(parts, d, dtype=torch.float32)
    block = triton.next_power_of_2(group_size)
    norm_backward_kernel[(parts, groups)](
        *(x2, z2, weight.contiguous(), rstd, dy2, dsummed2, dx, dz2, partial, rows, steps, groups),
        *(x2.stride(0), z2.stride(0), dy2.stride(0), dsummed2.stride(0), dz2.stride(0)),
        HAS_Z=z is not None,
        HAS_DSUMMED=dsummed is not None,
        SIZE=group_size,
        BLOCK=block,
        num_warps=_warps(block),
    )
    return dx, dz, partial.sum(dim=0).to(weight.dtype)
