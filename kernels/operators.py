"""The Triton convolution and norms as PyTorch operators with fake tensors and autograd; Triton is imported by a call.

Names under ``polylepis::``: conv_forward, conv_backward, conv_step, norm_forward, norm_backward.
"""

import os
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_GROUP = 16384


def _has_triton() -> bool:
    try:
        return find_spec("triton") is not None
    except ValueError:  # sys.modules["triton"] is None
        return False


# Read once: torch.compile traces the constants, not the look-ups.
HAS_TRITON = _has_triton()
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def use_triton(backend: str, tensors: dict[str, Tensor | None], limit: str | None = None) -> bool:
    """Whether the Triton path takes these tensors (``x`` among them): "auto" takes it for CUDA tensors it supports,
    "triton" insists.

    Args:
        limit: what else the Triton path does not take, in words, or None.

    Raises:
        ValueError: an unknown backend; tensors of no floating-point dtype or on different devices; "triton" with
            arguments that it does not take. The argument is named.
    """
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend={backend!r} is unknown; accepted are 'auto', 'torch' and 'triton'")
    x = tensors["x"]
    assert x is not None
    check_tensors(x, tensors)
    if backend == "torch" or (backend == "auto" and not x.is_cuda):
        return False
    reason = refusal(x, tensors) or limit
    if reason is not None and backend == "triton":
        raise ValueError(f"backend='triton': {reason}")
    return reason is None


def check_tensors(first: Tensor, tensors: dict[str, Tensor | None], of: str = "x") -> None:
    """Refuse a tensor that is not floating-point or not on the device of ``first``, which is called ``of``."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}, expected a floating-point tensor")
        if tensor.device != first.device:
            raise ValueError(f"{name} is on {tensor.device}, expected {first.device} as {of}")


def check_ids(name: str, ids: Tensor | None, shape: tuple[int, ...], device: torch.device) -> None:
    """Refuse ids (None passes) that are not integers of ``shape`` on ``device``."""
    if ids is None:
        return
    if tuple(ids.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(ids.shape)}, expected integers {shape}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"{name} has dtype {ids.dtype}, expected integers {shape}")
    if ids.device != device:
        raise ValueError(f"{name} is on {ids.device}, expected {device} as x")


def refusal(x: Tensor, tensors: dict[str, Tensor | None]) -> str | None:
    """Why Triton does not take these tensors, or None."""
    if not HAS_TRITON:
        return "triton is not installed"
    if not x.is_cuda and not INTERPRETED:
        return f"x is on {x.device.type}, expected a CUDA tensor (or TRITON_INTERPRET=1 in the environment)"
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in DTYPES:
            return f"{name} is {tensor.dtype}, expected float32, bfloat16 or float16"
    return None


def _like(t: Tensor | None, given: Tensor) -> Tensor:
    return given.new_empty(0) if t is None else t.new_empty(t.shape)


@torch.library.custom_op("polylepis::conv_forward", mutates_args=())
def conv_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial: Tensor | None, code: Tensor | None, silu: bool
) -> Tensor:
    """y (b, l, c) of x (b, l, c), weight (c, k), bias (c,), initial (b, c, k−1), code (b, l) int32."""
    from . import triton_conv

    with torch.cuda.device_of(x):
        return triton_conv.conv_forward(x, weight, bias, initial, code, silu)


@conv_forward.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("polylepis::conv_backward", mutates_args=())
def conv_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, initial: Tensor | None, code: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight, dbias (c,) and dinitial, the last empty without an initial state."""
    from . import triton_conv

    with torch.cuda.device_of(x):
        dx, dweight, dbias, dinitial = triton_conv.conv_backward(dy, x, weight, bias, initial, code, silu)
    return dx, dweight, dbias, x.new_empty(0) if dinitial is None else dinitial


@conv_backward.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, initial: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(x.shape[2]), _like(initial, x)


def _conv_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _conv_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, initial, code = ctx.saved_tensors
    dx, dweight, dbias, dinitial = conv_backward(dy, x, weight, bias, initial, code, ctx.silu)
    dbias = None if bias is None else dbias.to(bias.dtype)
    return dx, dweight, dbias, None if initial is None else dinitial, None, None


conv_forward.register_autograd(_conv_gradients, setup_context=_conv_setup)


@torch.library.custom_op("polylepis::conv_step", mutates_args=())
def conv_step(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> tuple[Tensor, Tensor]:
    """One token: (y (b, c), new state (b, c, k−1)); no gradients."""
    from . import triton_conv

    with torch.cuda.device_of(x):
        return triton_conv.conv_step(x, state, weight, bias, silu)


@conv_step.register_fake
def _(x: Tensor, state: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), state.new_empty(state.shape)


@torch.library.custom_op("polylepis::norm_forward", mutates_args=())
def norm_forward(
    x: Tensor, z: Tensor | None, residual: Tensor | None, weight: Tensor, group_size: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(y like x, x + residual or empty, 1/rms (rows, groups) float32)."""
    from . import triton_norm

    with torch.cuda.device_of(x):
        return triton_norm.norm_forward(x, z, residual, weight, group_size, eps)


@norm_forward.register_fake
def _(
    x: Tensor, z: Tensor | None, residual: Tensor | None, weight: Tensor, group_size: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    d = x.shape[-1]
    rstd = x.new_empty(x.numel() // d, d // group_size, dtype=torch.float32)
    return x.new_empty(x.shape), _like(residual, x), rstd


@torch.library.custom_op("polylepis::norm_backward", mutates_args=())
def norm_backward(
    dy: Tensor, dsummed: Tensor | None, x: Tensor, z: Tensor | None, weight: Tensor, rstd: Tensor, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dz or empty, dweight; x is what was normalised (the sum, where there was a residual)."""
    from . import triton_norm

    with torch.cuda.device_of(x):
        return triton_norm.norm_backward(dy, dsummed, x, z, weight, rstd, group_size)


@norm_backward.register_fake
def _(
    dy: Tensor, dsummed: Tensor | None, x: Tensor, z: Tensor | None, weight: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), _like(z, x), weight.new_empty(weight.shape)


def _norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, z, residual, weight, ctx.group_size, _ = inputs
    _, summed, rstd = output
    ctx.mark_non_differentiable(rstd, *(() if residual is not None else (summed,)))
    ctx.set_materialize_grads(False)
    ctx.dtypes = (x.dtype, None if residual is None else residual.dtype)
    ctx.save_for_backward(x if residual is None else summed, z, weight, rstd)


def _norm_gradients(ctx: Any, dy: Tensor | None, dsummed: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    normed, z, weight, rstd = ctx.saved_tensors
    x_dtype, residual_dtype = ctx.dtypes
    if dy is None:
        if dsummed is None:
            return (None,) * 6
        return dsummed.to(x_dtype), None, dsummed, None, None, None
    dx, dz, dweight = norm_backward(dy, dsummed, normed, z, weight, rstd, ctx.group_size)
    dresidual = None if residual_dtype is None else dx
    return dx.to(x_dtype), None if z is None else dz, dresidual, dweight, None, None


norm_forward.register_autograd(_norm_gradients, setup_context=_norm_setup)
