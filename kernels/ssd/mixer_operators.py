"""The Triton path of :func:`.mixer.ssd_mixer` as PyTorch operators, ``polylepis::mixer_forward`` and ``_backward``.

Triton is imported by the first call. What the backward keeps are inputs and outputs of the forward operator, so that a
checkpoint policy can save or recompute the whole by its name.
"""

from typing import Any

import torch
from torch import Tensor

from .operators import tokens_per_chunk

TENSORS = 15  # arguments of the forward before its numbers


def _parts(
    tensors: tuple[Tensor | None, ...], groups: int, silu: bool, softplus: bool, low: float, high: float
) -> tuple[Any, Any]:
    """(convolution, decays) of the operator's tensor arguments."""
    from . import triton_mixer as launches

    x, B, C, dt, _, weight, bias, conv_state, conv_code, A, dt_bias, D, _, code, _ = tensors
    assert x is not None and B is not None and C is not None and dt is not None and weight is not None
    assert A is not None
    how = launches.Discretisation(True, softplus, low, high)
    conv = launches.Convolution.of((x, B, C), weight, bias, conv_state, conv_code, silu)
    return conv, launches.Decays(dt, A, dt_bias, D, code, how, groups)


@torch.library.custom_op("polylepis::mixer_forward", mutates_args=())
def mixer_forward(
    x: Tensor,
    B: Tensor,
    C: Tensor,
    dt: Tensor,
    z: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    conv_state: Tensor | None,
    conv_code: Tensor | None,
    A: Tensor,
    dt_bias: Tensor | None,
    D: Tensor | None,
    initial: Tensor | None,
    code: Tensor | None,
    norm_weight: Tensor | None,
    groups: int,
    group_size: int,
    eps: float,
    silu: bool,
    softplus: bool,
    low: float,
    high: float,
    chunk: int,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(out (b, l, h·p), final states, y and 1/rms before the norm, convolved x|B|C, cs, scale, entering states).

    y and 1/rms are empty without a norm; the last four unless ``save_states``. See :func:`.mixer.ssd_mixer`.
    """
    from .. import triton_norm
    from . import triton_mixer, triton_scan

    tensors = (x, B, C, dt, z, weight, bias, conv_state, conv_code, A, dt_bias, D, initial, code, norm_weight)
    conv, decays = _parts(tensors, groups, silu, softplus, low, high)
    with torch.cuda.device_of(x):
        convolved, scan, cs, scale = triton_mixer.prepare(conv, decays, chunk)
        start = None if initial is None else initial.contiguous()
        states, final = triton_scan.pass_states(scan, cs, scale, start)
        out = triton_scan.outputs(scan, cs, scale, states).view(x.shape)
        y, rstd = x.new_empty(0), cs.new_empty(0)
        if z is not None and norm_weight is not None:
            y = out
            out, _, rstd = triton_norm.norm_forward(y, z, None, norm_weight, group_size, eps)
    if not save_states:
        convolved, (cs, scale, states) = x.new_empty(0), (cs.new_empty(0) for _ in range(3))
    return out, final, y, rstd, convolved, cs, scale, states


@mixer_forward.register_fake
def _(
    x: Tensor,
    B: Tensor,
    C: Tensor,
    dt: Tensor,
    z: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    conv_state: Tensor | None,
    conv_code: Tensor | None,
    A: Tensor,
    dt_bias: Tensor | None,
    D: Tensor | None,
    initial: Tensor | None,
    code: Tensor | None,
    norm_weight: Tensor | None,
    groups: int,
    group_size: int,
    eps: float,
    silu: bool,
    softplus: bool,
    low: float,
    high: float,
    chunk: int,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (b, l, inner), h, state = x.shape, dt.shape[2], B.shape[2]
    p, n = inner // h, state // groups
    chunk = tokens_per_chunk(x.unflatten(-1, (h, p)), B.unflatten(-1, (groups, n)), C.unflatten(-1, (groups, n)), chunk)
    chunks = -(-l // chunk)
    single = x.new_empty(0, dtype=torch.float32)
    y, rstd = x.new_empty(0), single.new_empty(0)
    if z is not None:
        y, rstd = x.new_empty(b, l, inner), single.new_empty(b * l, inner // group_size)
    convolved = x.new_empty((b, l, inner + 2 * state) if save_states else (0,))
    cs, scale = (single.new_empty((b, h, chunks * chunk) if save_states else (0,)) for _ in range(2))
    states = x.new_empty(b, chunks, h, p, n) if save_states else single.new_empty(0)
    return x.new_empty(b, l, inner), single.new_empty(b, h, p, n), y, rstd, convolved, cs, scale, states


@torch.library.custom_op("polylepis::mixer_backward", mutates_args=())
def mixer_backward(
    dout: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    B: Tensor,
    C: Tensor,
    dt: Tensor,
    z: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    conv_state: Tensor | None,
    conv_code: Tensor | None,
    A: Tensor,
    dt_bias: Tensor | None,
    D: Tensor | None,
    initial: Tensor | None,
    code: Tensor | None,
    norm_weight: Tensor | None,
    y: Tensor,
    rstd: Tensor,
    convolved: Tensor,
    cs: Tensor,
    scale: Tensor,
    states: Tensor,
    groups: int,
    group_size: int,
    silu: bool,
    softplus: bool,
    low: float,
    high: float,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One buffer (b, l, z|x|B|C|dt) of gradients, then those of dt (empty if it is in the buffer), weight, bias,
    conv_state, A, dt_bias, D, initial and norm_weight; empty where there is no such argument."""
    from .. import triton_norm
    from . import triton_mixer, triton_scan

    tensors = (x, B, C, dt, z, weight, bias, conv_state, conv_code, A, dt_bias, D, initial, code, norm_weight)
    conv, decays = _parts(tensors, groups, silu, softplus, low, high)
    buffer = x.new_empty(*x.shape[:2], sum(_widths(x, B, dt, z)))
    dz, dxBC, ddt = buffer.split((0 if z is None else x.shape[2], x.shape[2] + 2 * B.shape[2], _own(dt, x)), dim=-1)
    if dt.dtype != x.dtype:
        ddt = dt.new_empty(dt.shape)
    dfinal = None if dfinal is None else dfinal.contiguous()
    start, dnorm = None if initial is None else initial.contiguous(), None
    with torch.cuda.device_of(x):
        if z is not None and norm_weight is not None:
            dout, _, dnorm = triton_norm.norm_backward(dout, None, y, z, norm_weight, rstd, group_size, dz)
        if states.numel() == 0:
            convolved, scan, cs, scale = triton_mixer.prepare(conv, decays, chunk)
            states, _ = triton_scan.pass_states(scan, cs, scale, start)
        else:
            scan = triton_mixer.scan_of(convolved, x.shape[2], decays, chunk)
        dy = dout.unflatten(-1, (dt.shape[2], -1))
        grads = triton_scan.gradients(scan, cs, scale, states, dy, dfinal, ddt)
        dweight, dbias, dstate = triton_mixer.conv_gradients(conv, grads.x, grads.B, grads.C, dxBC)

    def given(grad: Tensor | None, like: Tensor | None) -> Tensor:
        return x.new_empty(0) if like is None or grad is None else grad.to(like.dtype)

    return (
        *(buffer, x.new_empty(0) if _own(dt, x) else ddt, dweight, given(dbias, bias), given(dstate, conv_state)),
        *(given(grads.second, A), given(grads.bias, dt_bias), given(grads.D, D), given(grads.initial, initial)),
        given(dnorm, norm_weight),
    )


def _own(dt: Tensor, x: Tensor) -> int:
    """Columns that dt has in the buffer: none if its dtype is another."""
    return dt.shape[2] if dt.dtype == x.dtype else 0


def _widths(x: Tensor, B: Tensor, dt: Tensor, z: Tensor | None) -> tuple[int, int, int, int, int]:
    """Columns of z, x, B, C and dt in the buffer."""
    return (0 if z is None else x.shape[2], x.shape[2], B.shape[2], B.shape[2], _own(dt, x))


@mixer_backward.register_fake
def _(
    dout: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    B: Tensor,
    C: Tensor,
    dt: Tensor,
    z: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    conv_state: Tensor | None,
    conv_code: Tensor | None,
    A: Tensor,
    dt_bias: Tensor | None,
    D: Tensor | None,
    initial: Tensor | None,
    code: Tensor | None,
    norm_weight: Tensor | None,
    y: Tensor,
    rstd: Tensor,
    convolved: Tensor,
    cs: Tensor,
    scale: Tensor,
    states: Tensor,
    groups: int,
    group_size: int,
    silu: bool,
    softplus: bool,
    low: float,
    high: float,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def like(t: Tensor | None) -> Tensor:
        return x.new_empty(0) if t is None else t.new_empty(t.shape)

    ddt = x.new_empty(0) if _own(dt, x) else like(dt)
    return (
        *(x.new_empty(*x.shape[:2], sum(_widths(x, B, dt, z))), ddt, like(weight), like(bias), like(conv_state)),
        *(like(A), like(dt_bias), like(D), like(initial), like(norm_weight)),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, (groups, size, _, silu, softplus, low, high, chunk, _) = inputs[:TENSORS], inputs[TENSORS:]
    ctx.numbers = (groups, size, silu, softplus, low, high, chunk)
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[2:])


def _backward(ctx: Any, dout: Tensor | None, dfinal: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    x, B, _, dt, z, _, bias, conv_state, _, _, dt_bias, D, initial, _, norm_weight = tensors[:TENSORS]
    if dout is None and dfinal is None:
        return (None,) * (TENSORS + 9)
    dout = torch.zeros_like(x) if dout is None else dout
    buffer, ddt, dweight, dbias, dstate, dA, ddt_bias, dD, dinitial, dnorm = mixer_backward(
        dout, dfinal, *tensors, *ctx.numbers
    )
    dz, dx, dB, dC, own = buffer.split(_widths(x, B, dt, z), dim=-1)

    def of(grad: Tensor, argument: Tensor | None) -> Tensor | None:
        return None if argument is None else grad

    return (
        *(dx, dB, dC, own if _own(dt, x) else ddt, of(dz, z), dweight, of(dbias, bias), of(dstate, conv_state), None),
        *(dA, of(ddt_bias, dt_bias), of(dD, D), of(dinitial, initial), None, of(dnorm, norm_weight)),
        *(None,) * 9,
    )


mixer_forward.register_autograd(_backward, setup_context=_setup)
