"""Triton kernel of one token of decoding by the recurrence, and its launch."""

# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_math import sigmoid, softplus
from .triton_scan import block_of

# Rows of a head's state per program: few where they are needed to occupy 132 SMs, many where there are MANY heads, to
# share the step size and the instructions around it; a program holds at most TILE values
FEW_ROWS, MANY_ROWS, MANY, TILE = 16, 64, 4 * 132, 8192


@triton.jit
def step_kernel(
    state, places, x, dt, A, B, C, D, z, bias, y, new_state, H, R, P, N,
    state_b, state_h, state_p, state_n, new_b, new_h, new_p, new_n, x_b, x_h, x_p, dt_b, dt_h, B_b, B_g, B_n, C_b, C_g,
    C_n, z_b, z_h, z_p, bias_b, bias_h, low, high,
    HAS_PLACES: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    CLAMP: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BP rows of one head's state; y (b, H, P), contiguous; new_state by its strides, it may be the state itself.

    ``places``, where given, says which row of the state is whose; nothing changes and y is 0 where it is negative.

    It is bound by memory: the state is asked for before anything that has to wait for the step size.
    """
    h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    p, n = tl.program_id(0) * BP + tl.arange(0, BP), tl.arange(0, BN)
    good = (p < P)[:, None] & (n < N)[None, :]
    row = b
    if HAS_PLACES:
        row = tl.load(places + b).to(tl.int64)
        good = good & (row >= 0)
    cell = row * state_b + h * state_h + p[:, None] * state_p + n[None, :] * state_n
    old = tl.load(state + cell, mask=good, other=0.0)
    g = h // R
    keys = tl.load(B + b * B_b + g * B_g + n * B_n, mask=n < N, other=0.0)
    query = tl.load(C + b * C_b + g * C_g + n * C_n, mask=n < N, other=0.0)
    values = tl.load(x + b * x_b + h * x_h + p * x_p, mask=p < P, other=0.0).to(tl.float32)
    if HAS_Z:
        gate = tl.load(z + b * z_b + h * z_h + p * z_p, mask=p < P, other=0.0).to(tl.float32)
    skip = tl.load(D + h).to(tl.float32) if HAS_D else 0.0
    rate = tl.load(A + h).to(tl.float32)
    step = tl.load(dt + b * dt_b + h * dt_h).to(tl.float32)
    if HAS_BIAS:
        step += tl.load(bias + b * bias_b + h * bias_h).to(tl.float32)
    if SOFTPLUS:
        step = softplus(step)
    if CLAMP:
        step = tl.minimum(tl.maximum(step, low), high)
    decay = tl.exp(tl.minimum(step * rate, 0.0))
    new = old.to(tl.float32) * decay + (values * step)[:, None] * keys.to(tl.float32)[None, :]
    out = tl.sum(new * query.to(tl.float32)[None, :], axis=1)
    if HAS_D:
        out += values * skip
    if HAS_Z:
        out = out * gate * sigmoid(gate)
    if HAS_PLACES:
        out = tl.where(row >= 0, out, 0.0)
    cell = row * new_b + h * new_h + p[:, None] * new_p + n[None, :] * new_n
    tl.store(new_state + cell, new.to(new_state.dtype.element_ty), mask=good)
    tl.store(y + (b * H + h) * P + p, out.to(y.dtype.element_ty), mask=p < P)


def scan_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    softplus_dt: bool,
    low: float,
    high: float,
    in_place: bool = False,
    places: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(y (b, h, p) in x's dtype, new state in the state's dtype); every stride is taken as it is.

    Args:
        in_place: write the new state over the old one. places: (b,) integers, rows of ``state``, only in place.
    """
    (b, h, p), n = x.shape, B.shape[2]
    y = torch.empty((b, h, p), dtype=x.dtype, device=x.device)
    new_state = state if in_place else torch.empty((b, h, p, n), dtype=state.dtype, device=x.device)
    gate = x if z is None else z
    bias_strides = (0, 0) if bias is None else (0, bias.stride(0)) if bias.dim() == 1 else bias.stride()
    columns = block_of(n)
    rows = max(1, min(MANY_ROWS if b * h >= MANY else FEW_ROWS, block_of(p), TILE // columns))
    step_kernel[(triton.cdiv(p, rows), h, b)](
        *(state, places, x, dt, A.contiguous(), B, C, None if D is None else D.contiguous(), z, bias, y, new_state),
        *(h, h // B.shape[1], p, n, *state.stride(), *new_state.stride(), *x.stride(), *dt.stride(), *B.stride()),
        *(*C.stride(), *gate.stride(), *bias_strides, low, high),
        HAS_PLACES=places is not None,
        HAS_D=D is not None,
        HAS_Z=z is not None,
        HAS_BIAS=bias is not None,
        SOFTPLUS=softplus_dt,
        CLAMP=True,
        BP=rows,
        BN=columns,
        num_warps=4,
    )
    return y, new_state
