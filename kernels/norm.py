"""RMSNorm and Mamba-2's gated, grouped RMSNorm, with a hand-written backward that keeps one number per group."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .operators import LARGEST_GROUP, norm_forward, use_triton


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5, *, backend: str = "auto") -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension (Zhang and Sennrich 2019).

    Args:
        x: (..., d). weight: (d,).
        backend: "torch", "triton" (groups up to 16,384 channels, no float64), or "auto": Triton for CUDA tensors that
            it takes.

    Returns:
        Like x; half precisions are computed in float32, float64 stays.

    Raises:
        ValueError: weight is not (d,), or a backend that does not take these arguments.
    """
    return grouped_norm(x, None, weight, x.shape[-1], eps, backend)


def rms_norm_residual(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The pre-norm of a residual stream in one pass: s = x + residual, y = rms_norm(s)·weight.

    Args:
        x: (..., d). residual: like x, in its own dtype. weight: (d,). backend: as in :func:`rms_norm`.

    Returns:
        (y in x's dtype, s in the residual's dtype); y is the norm of s as it was rounded.

    Raises:
        ValueError: shapes or a backend that do not fit.
    """
    _check(x, residual, weight, x.shape[-1], "residual")
    if use_triton(backend, {"x": x, "residual": residual, "weight": weight}, _limit(x, x.shape[-1])):
        y, summed, _ = norm_forward(x, None, residual, weight, x.shape[-1], eps)
        return y, summed
    summed = (x.to(torch.promote_types(x.dtype, residual.dtype)) + residual).to(residual.dtype)
    return _RMSNorm.apply(summed, None, weight, x.shape[-1], eps).to(x.dtype), summed


def gated_rms_norm(
    x: Tensor, z: Tensor, weight: Tensor, *, group_size: int, eps: float = 1e-5, backend: str = "auto"
) -> Tensor:
    """RMSNorm of x·silu(z), each contiguous group of ``group_size`` channels by itself (Mamba-2: gate before norm).

    Args:
        x, z: (..., d). weight: (d,). group_size: divides d. backend: as in :func:`rms_norm`.

    Returns:
        Like x; half precisions are computed in float32, float64 stays.

    Raises:
        ValueError: shapes or group_size that do not fit.
    """
    return grouped_norm(x, z, weight, group_size, eps, backend)


def grouped_norm(
    x: Tensor, z: Tensor | None, weight: Tensor, group_size: int, eps: float, backend: str = "auto"
) -> Tensor:
    """:func:`gated_rms_norm`, or without a gate."""
    _check(x, z, weight, group_size)
    if use_triton(backend, {"x": x, "z": z, "weight": weight}, _limit(x, group_size)):
        return norm_forward(x, z, None, weight, group_size, eps)[0]
    return _RMSNorm.apply(x, z, weight, group_size, eps)


def _limit(x: Tensor, group_size: int) -> str | None:
    """What the Triton kernels do not take."""
    if x.numel() == 0:
        return f"x has no elements (shape {tuple(x.shape)})"
    if group_size > LARGEST_GROUP:
        return f"{group_size} channels per group, expected at most {LARGEST_GROUP}"
    return None


def _check(x: Tensor, z: Tensor | None, weight: Tensor, group_size: int, other: str = "z") -> None:
    if x.dim() == 0 or tuple(weight.shape) != (x.shape[-1],):
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected the last dimension of x {tuple(x.shape)}")
    if z is not None and z.shape != x.shape:
        raise ValueError(f"{other} has shape {tuple(z.shape)}, expected that of x {tuple(x.shape)}")
    if group_size < 1 or x.shape[-1] % group_size:
        raise ValueError(f"group_size {group_size} does not divide the {x.shape[-1]} channels")


class _RMSNorm(torch.autograd.Function):
    """Saves x, z and 1/rms per group; the gated product is recomputed in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, z: Tensor | None, weight: Tensor, group_size: int, eps: float) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        gated = x.to(dtype) if z is None else x.to(dtype) * F.silu(z.to(dtype))
        grouped = gated.unflatten(-1, (x.shape[-1] // group_size, group_size))
        rstd = torch.rsqrt(grouped.square().mean(dim=-1, keepdim=True) + eps)
        ctx.save_for_backward(x, z, weight, rstd)
        return ((grouped * rstd).flatten(-2) * weight.to(dtype)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, z, weight, rstd = ctx.saved_tensors
        dtype = rstd.dtype
        xf, dyf = x.to(dtype), dy.to(dtype)
        gate = None if z is None else F.silu(z.to(dtype))
        gated = xf if gate is None else xf * gate
        groups = (rstd.shape[-2], x.shape[-1] // rstd.shape[-2])
        normal = gated.unflatten(-1, groups) * rstd
        dweight = (dyf * normal.flatten(-2)).sum_to_size(weight.shape)
        dnormal = (dyf * weight.to(dtype)).unflatten(-1, groups)
        # d(v/rms) = (dn − n·mean(dn·n)) / rms
        dgated = ((dnormal - normal * (dnormal * normal).mean(dim=-1, keepdim=True)) * rstd).flatten(-2)
        dx, dz = dgated, None
        if gate is not None:
            dx = dgated * gate
            dz = torch.ops.aten.silu_backward(dgated * xf, z.to(dtype)).to(z.dtype)
        return dx.to(x.dtype), dz, dweight.to(weight.dtype), None, None
