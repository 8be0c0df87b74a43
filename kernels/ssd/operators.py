"""The Triton scan as PyTorch operators: fake tensors, autograd, and names that a checkpoint policy can see.

``polylepis::ssd_forward`` and ``polylepis::ssd_backward`` are opaque to torch.compile; what the backward saves are
outputs of the forward operator, so that selective activation checkpointing can keep or recompute them. Triton is
imported by the first call, not with this module.
"""

import math
from typing import Any

import torch
from torch import Tensor

from .inputs import segment_numbers

LARGEST_HEAD, LARGEST_STATE = 128, 256


def refusal(tensors: dict[str, Tensor | None]) -> str | None:
    """Why the Triton scan does not take these arguments (x and B among them), or None."""
    x, B = tensors["x"], tensors["B"]
    assert x is not None and B is not None
    if x.shape[-1] > LARGEST_HEAD or B.shape[-1] > LARGEST_STATE:
        return (
            f"head_dim {x.shape[-1]} (x) and state {B.shape[-1]} (B), expected at most {LARGEST_HEAD} and "
            f"{LARGEST_STATE}"
        )
    return None


def triton_chunk(x: Tensor, chunk_size: int) -> int:
    """Tokens between two states: 0, which is the table's, on a GPU; in the interpreter the power of two up to
    chunk_size, at least 16."""
    return 0 if x.is_cuda else max(16, 1 << (chunk_size.bit_length() - 1))


def tokens_per_chunk(x: Tensor, B: Tensor, C: Tensor, chunk: int) -> int:
    """What a chunk of 0 stands for; x (b, l, h, p), B and C (b, l, g, n), fake tensors as well."""
    if chunk:
        return chunk
    from .triton_scan import configuration

    return configuration(x, B, C).chunk


def segment_code(seq_idx: Tensor | None) -> Tensor | None:
    """2·segment + (1 for padding) per token, (b, l) int32: what the kernels read of the documents."""
    if seq_idx is None:
        return None
    segments, valid = segment_numbers(seq_idx)
    return (2 * segments + (~valid).to(segments.dtype)).to(torch.int32).contiguous()


def triton_scan(
    x: Tensor,
    first: Tensor,
    second: Tensor,
    bias: Tensor | None,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial: Tensor | None,
    code: Tensor | None,
    *,
    chunk: int,
    discretise: bool,
    softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    save_states: bool = False,
) -> tuple[Tensor, Tensor]:
    """y (b, l, h, p) in x's dtype and the final states (b, h, p, n) float32.

    Args:
        first, second: (dt (b, l, h), A (h,)) with ``discretise``, else (log_decay, scale), each (b, l, h).
        bias: (h,), added to dt. code: :func:`segment_code`.
        chunk: tokens between two states, a power of two >= 16, or 0: the table's.
        save_states: keep the states that enter each chunk for the backward (b·l/chunk·h·p·n elements); otherwise the
            backward computes them again.
    """
    low, high = dt_limit
    y, final, _, _, _ = ssd_forward(
        x, first, second, bias, B, C, D, initial, code, discretise, softplus, low, high, chunk, save_states
    )
    return y, final


def _plan(
    x: Tensor,
    first: Tensor,
    second: Tensor,
    bias: Tensor | None,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    code: Tensor | None,
    discretise: bool,
    softplus: bool,
    low: float,
    high: float,
    chunk: int,
) -> Any:
    from . import triton_scan as launches

    how = launches.Discretisation(discretise, softplus, low, high)
    return launches.plan(x, first, second, bias, B, C, D, code, how, chunk)


@torch.library.custom_op("polylepis::ssd_forward", mutates_args=())
def ssd_forward(
    x: Tensor,
    first: Tensor,
    second: Tensor,
    bias: Tensor | None,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial: Tensor | None,
    code: Tensor | None,
    discretise: bool,
    softplus: bool,
    low: float,
    high: float,
    chunk: int,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, final states, entering states, cs, scale), the last three empty unless saved; see :func:`triton_scan`."""
    from . import triton_scan as launches

    scan = _plan(x, first, second, bias, B, C, D, code, discretise, softplus, low, high, chunk)
    with torch.cuda.device_of(x):
        cs, scale = launches.decays(scan)
        states, final = launches.pass_states(scan, cs, scale, None if initial is None else initial.contiguous())
        y = launches.outputs(scan, cs, scale, states)
    if not save_states:
        states, cs, scale = (cs.new_empty(0) for _ in range(3))
    return y, final, states, cs, scale


@ssd_forward.register_fake
def _(
    x: Tensor,
    first: Tensor,
    second: Tensor,
    bias: Tensor | None,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial: Tensor | None,
    code: Tensor | None,
    discretise: bool,
    softplus: bool,
    low: float,
    high: float,
    chunk: int,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    b, l, h, p = x.shape
    chunk = tokens_per_chunk(x, B, C, chunk)
    n, chunks = B.shape[3], -(-l // chunk)
    dot = torch.promote_types(torch.promote_types(x.dtype, B.dtype), C.dtype)
    single = x.new_empty(0, dtype=torch.float32)
    cs, scale = (single.new_empty((b, h, chunks * chunk) if save_states else (0,)) for _ in range(2))
    states = x.new_empty(b, chunks, h, p, n, dtype=dot) if save_states else single
    return x.new_empty(x.shape), single.new_empty(b, h, p, n), states, cs, scale


@torch.library.custom_op("polylepis::ssd_backward", mutates_args=())
def ssd_backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    first: Tensor,
    second: Tensor,
    bias: Tensor | None,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial: Tensor | None,
    code: Tensor | None,
    states: Tensor,
    cs: Tensor,
    scale: Tensor,
    discretise: bool,
    softplus: bool,
    low: float,
    high: float,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, first, second, bias, B, C, D and initial; empty where there is no such argument."""
    from . import triton_scan as launches

    scan = _plan(x, first, second, bias, B, C, D, code, discretise, softplus, low, high, chunk)
    initial = None if initial is None else initial.contiguous()
    dfinal = None if dfinal is None else dfinal.contiguous()
    with torch.cuda.device_of(x):
        if states.numel() == 0:
            cs, scale = launches.decays(scan)
            states, _ = launches.pass_states(scan, cs, scale, initial)
        grads = launches.gradients(scan, cs, scale, states, dy, dfinal)
    dinitial = None if initial is None else grads.initial.to(initial.dtype)
    dbias, dD, dinitial = (cs.new_empty(0) if t is None else t for t in (grads.bias, grads.D, dinitial))
    return grads.x, grads.first, grads.second, dbias, grads.B, grads.C, dD, dinitial


@ssd_backward.register_fake
def _(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    first: Tensor,
    second: Tensor,
    bias: Tensor | None,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial: Tensor | None,
    code: Tensor | None,
    states: Tensor,
    cs: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def like(t: Tensor | None) -> Tensor:
        return cs.new_empty(0) if t is None else t.new_empty(t.shape)

    return like(x), like(first), like(second), like(bias), like(B), like(C), like(D), like(initial)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, ctx.flags = inputs[:9], inputs[9:14]
    _, _, states, cs, scale = output
    ctx.mark_non_differentiable(states, cs, scale)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, states, cs, scale)


def _backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    *tensors, states, cs, scale = ctx.saved_tensors
    unused = (None,) * 6
    if dy is None and dfinal is None:
        return (None,) * 9 + unused
    dy = torch.zeros_like(tensors[0]) if dy is None else dy
    grads = ssd_backward(dy, dfinal, *tensors, states, cs, scale, *ctx.flags)
    dx, dfirst, dsecond, dbias, dB, dC, dD, dinitial = (
        grad if given is not None else None for grad, given in zip(grads, (*tensors[:8],), strict=True)
    )
    return dx, dfirst, dsecond, dbias, dB, dC, dD, dinitial, None, *unused


ssd_forward.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("polylepis::ssd_step", mutates_args=())
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
    softplus: bool,
    low: float,
    high: float,
) -> tuple[Tensor, Tensor]:
    """One token of decoding, without gradients: (y (b, h, p), new state (b, h, p, n))."""
    from . import triton_step

    with torch.cuda.device_of(x):
        return triton_step.scan_step(state, x, dt, A, B, C, D, z, bias, softplus, low, high)


@scan_step.register_fake
def _(state: Tensor, x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), state.new_empty(state.shape)


@torch.library.custom_op("polylepis::ssd_step_in_place", mutates_args=("state",))
def scan_step_in_place(
    state: Tensor,
    places: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    softplus: bool,
    low: float,
    high: float,
) -> Tensor:
    """y (b, h, p); the rows ``places`` of the state, or all, become the new state. Nothing waits for the device."""
    from . import triton_step

    places = None if places is None else places.contiguous()
    with torch.cuda.device_of(x):
        return triton_step.scan_step(state, x, dt, A, B, C, D, z, bias, softplus, low, high, True, places)[0]


@scan_step_in_place.register_fake
def _(state: Tensor, places: Tensor | None, x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)
