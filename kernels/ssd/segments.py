"""The scan of one segment of a sequence in two steps, for context parallelism.

A segment maps the state that enters it to the one that leaves it, S_out = exp(log_decay)·S_in + S_ext. The map needs no
S_in: each rank computes its own (:func:`summarise`), the ranks exchange and :func:`combine` them, and :func:`enter`
computes the outputs with the S_in that came of it. On the Triton path the states of the first step are kept, and the
output kernel adds reach·S_in to the tiles that it loads anyway: no second pass over the states, no correction of y. The
backward mirrors it: what S_in gave to y first, so that the exchange gets the gradient of S_in, then the scan's, once.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..operators import check_tensors, use_triton
from .api import ssd_core
from .inputs import accumulation_dtype, check_scan_shapes, expect_shape, resolve_seq_idx, segment_numbers
from .operators import refusal, segment_code, ssd_backward, tokens_per_chunk, triton_chunk


class Segment(NamedTuple):
    """S_out = exp(log_decay)·S_in + state: state (b, h, p, n), log_decay (b, h), −inf behind a document boundary."""

    state: Tensor
    log_decay: Tensor


class Kept(NamedTuple):
    """What :func:`enter` takes over from :func:`summarise`; ``tensors`` is empty on the torch path.

    y (b, l, h, p): the outputs for a state of zero; on the Triton path a stand-in for them (see :func:`ssd_segment`).
    """

    x: Tensor
    log_decay: Tensor
    scale: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    seq_idx: Tensor | None
    chunk_size: int
    y: Tensor
    code: Tensor | None
    tensors: tuple[Tensor, ...]


def combine(earlier: Segment, later: Segment) -> Segment:
    """The map of two segments in a row; associative, so that any order of brackets gives the same map."""
    carried = later.log_decay.exp()[..., None, None] * earlier.state
    return Segment(carried + later.state, earlier.log_decay + later.log_decay)


def summarise(
    x: Tensor,
    log_decay: Tensor,
    scale: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    seq_idx: Tensor | None = None,
    chunk_size: int = 64,
    save_states: bool = False,
    backend: str = "auto",
) -> tuple[Segment, Kept]:
    """The affine summary of a segment. Arguments as in :func:`polylepis.kernels.ssd.ssd_core`; C and D are for
    :func:`enter`, and on the torch path, whose one scan gives the outputs for a state of zero as well, used here.

    The backward of both steps together is the scan's one backward, here, and what the entering state gave to y, there:
    a pass over the states and the far part of dC, two matrix products of the size of C·S.

    Returns:
        (the segment's map, what :func:`enter` needs). Gradients reach x, log_decay, scale and B through the map.

    Raises:
        ValueError: shapes, devices or dtypes that do not fit.
    """
    check_scan_shapes(x, {"log_decay": log_decay, "scale": scale}, B, C)
    expect_shape("D", D, (x.shape[2],))
    seq_idx = resolve_seq_idx(seq_idx, None, x)
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}, expected at least 1")
    tensors: dict[str, Tensor | None] = {"x": x, "log_decay": log_decay, "scale": scale, "B": B, "C": C, "D": D}
    triton = use_triton(backend, tensors, refusal(tensors))
    total = log_decay.to(torch.promote_types(log_decay.dtype, torch.float32))
    if seq_idx is not None:
        segments, valid = segment_numbers(seq_idx)
        total = torch.where(valid[..., None], total, torch.zeros_like(total)).sum(dim=1)
        total = total.masked_fill((segments[:, -1] != 0)[:, None], -torch.inf)
    else:
        total = total.sum(dim=1)
    if not triton:
        options: dict[str, Any] = {"seq_idx": seq_idx, "chunk_size": chunk_size, "backend": "torch"}
        y, state = ssd_core(x, log_decay, scale, B, C, D=D, return_final_states=True, **options)
        return Segment(state, total), Kept(x, log_decay, scale, B, C, D, seq_idx, chunk_size, y, None, ())
    code, chunk = segment_code(seq_idx), triton_chunk(x, chunk_size)
    state, y, *tensors_kept = ssd_segment(x, log_decay, scale, B, C, D, code, chunk, save_states)
    return Segment(state, total), Kept(x, log_decay, scale, B, C, D, seq_idx, chunk, y, code, tuple(tensors_kept))


def enter(kept: Kept, entry: Tensor) -> Tensor:
    """The outputs of a summarised segment when the state ``entry`` (b, h, p, n) enters it.

    Returns:
        y like x; gradients reach entry and, for what y owes them, every argument of :func:`summarise`.

    Raises:
        ValueError: shapes that do not fit.
    """
    x, B = kept.x, kept.B
    b, _, h, p = x.shape
    expect_shape("entry", entry, (b, h, p, B.shape[3]))
    check_tensors(x, {"entry": entry})
    if not kept.tensors:
        return kept.y + _reached(kept, entry).to(kept.y.dtype)
    tensors: dict[str, Tensor | None] = {"x": x, "entry": entry, "B": B}
    use_triton("triton", tensors, refusal(tensors))
    given = (kept.y, x, kept.log_decay, kept.scale, B, kept.C, kept.D, entry, kept.code)
    return ssd_entered(*given, *kept.tensors, kept.chunk_size)


def _reached(kept: Kept, entry: Tensor) -> Tensor:
    """What the entering state adds to y: exp(Σ a up to the token)·entry·C, in the first segment of each row."""
    dtype = accumulation_dtype(kept.x, kept.log_decay, entry)
    decay = kept.log_decay.to(dtype)
    reached = None
    if kept.seq_idx is not None:
        segments, valid = segment_numbers(kept.seq_idx)
        reached = (valid & (segments == 0))[..., None]
        decay = decay.where(reached, 0.0)
    reach = decay.cumsum(dim=1).exp()
    if reached is not None:
        reach = reach * reached
    groups = entry.to(dtype).unflatten(1, (kept.C.shape[2], -1))
    seen = torch.einsum("blgn,bgrpn->blgrp", kept.C.to(dtype), groups).flatten(2, 3)
    return seen * reach[..., None]


@torch.library.custom_op("polylepis::ssd_segment", mutates_args=())
def ssd_segment(
    x: Tensor,
    log_decay: Tensor,
    scale: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    code: Tensor | None,
    chunk: int,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(S_ext, a stand-in for y, the states that enter each chunk from zero, reach (b, h, chunks), cs, scale).

    The stand-in, one zero in y's shape, is what y would be for an entering state of zero: nobody reads it, but its
    gradient is that of y, so that the one backward of this operator is the whole of the scan's.
    """
    from . import triton_scan as launches

    scan = _plan(x, log_decay, scale, B, C, D, code, chunk)
    with torch.cuda.device_of(x):
        cs, steps = launches.decays(scan)
        reach = cs.new_empty(x.shape[0], x.shape[2], scan.chunks)
        states, state = launches.pass_states(scan, cs, steps, None, reach=reach)
    return state, x.new_zeros(1).expand(x.shape), states, reach, cs, steps


def _plan(x: Tensor, log_decay: Tensor, scale: Tensor, B: Tensor, C: Tensor, D: Any, code: Any, chunk: int) -> Any:
    from . import triton_scan as launches

    how = launches.Discretisation(False, False, 0.0, float("inf"))
    return launches.plan(x, log_decay, scale, None, B, C, D, code, how, chunk)


@ssd_segment.register_fake
def _(
    x: Tensor,
    log_decay: Tensor,
    scale: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    code: Tensor | None,
    chunk: int,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    b, l, h, p = x.shape
    n, chunks = B.shape[3], -(-l // tokens_per_chunk(x, B, C, chunk))
    single = x.new_empty(0, dtype=torch.float32)
    dot = torch.promote_types(torch.promote_types(x.dtype, B.dtype), C.dtype)
    cs, steps = (single.new_empty(b, h, chunks * tokens_per_chunk(x, B, C, chunk)) for _ in range(2))
    stand_in, states = x.new_empty(1).expand(x.shape), x.new_empty(b, chunks, h, p, n, dtype=dot)
    return single.new_empty(b, h, p, n), stand_in, states, single.new_empty(b, h, chunks), cs, steps


@torch.library.custom_op("polylepis::ssd_entered", mutates_args=())
def ssd_entered(
    stand_in: Tensor,
    x: Tensor,
    log_decay: Tensor,
    scale: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    entry: Tensor,
    code: Tensor | None,
    states: Tensor,
    reach: Tensor,
    cs: Tensor,
    steps: Tensor,
    chunk: int,
) -> Tensor:
    """y (b, l, h, p) from what :func:`ssd_segment` returned and the state that enters the segment."""
    from . import triton_scan as launches

    scan = _plan(x, log_decay, scale, B, C, D, code, chunk)
    with torch.cuda.device_of(x):
        return launches.outputs(scan, cs, steps, states, reach, entry.to(torch.float32).contiguous())


@ssd_entered.register_fake
def _(stand_in: Tensor, x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("polylepis::ssd_entered_backward", mutates_args=())
def ssd_entered_backward(
    dy: Tensor,
    x: Tensor,
    log_decay: Tensor,
    scale: Tensor,
    B: Tensor,
    C: Tensor,
    entry: Tensor,
    code: Tensor | None,
    reach: Tensor,
    cs: Tensor,
    steps: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of log_decay, C and entry of what the entering state added to y."""
    from . import triton_scan as launches

    scan = _plan(x, log_decay, scale, B, C, None, code, chunk)
    with torch.cuda.device_of(x):
        ddecay, dC, dentry = launches.entry_gradients(scan, cs, steps, reach, entry.to(torch.float32).contiguous(), dy)
    return ddecay, dC, dentry.to(entry.dtype)


@ssd_entered_backward.register_fake
def _(
    dy: Tensor, x: Tensor, log_decay: Tensor, scale: Tensor, B: Tensor, C: Tensor, entry: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return log_decay.new_empty(log_decay.shape), C.new_empty(C.shape), entry.new_empty(entry.shape)


def _segment_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.chunk, save_states = inputs
    _, _, states, reach, cs, steps = output
    ctx.mark_non_differentiable(states, reach, cs, steps)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *((states, cs, steps) if save_states else ()))


def _segment_gradients(ctx: Any, dstate: Tensor | None, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    x, log_decay, scale, B, C, D, code, *states = ctx.saved_tensors
    if dstate is None and dy is None:
        return (None,) * 9
    states = states or [x.new_empty(0, dtype=torch.float32) for _ in range(3)]  # empty: computed again
    dx, ddecay, dscale, _, dB, dC, dD, _ = ssd_backward(
        *(torch.zeros_like(x) if dy is None else dy, dstate, x, log_decay, scale, None, B, C, D, None, code, *states),
        *(False, False, 0.0, float("inf"), ctx.chunk),
    )
    return dx, ddecay, dscale, dB, dC, None if D is None else dD, *(None,) * 3


def _entered_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, x, log_decay, scale, B, C, _, entry, code, _, reach, cs, steps, ctx.chunk = inputs
    ctx.save_for_backward(x, log_decay, scale, B, C, entry, code, reach, cs, steps)


def _entered_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    ddecay, dC, dentry = ssd_entered_backward(dy, *ctx.saved_tensors, ctx.chunk)
    # the rest of what y owes its arguments goes through the stand-in, whose gradient is dy
    return dy, None, ddecay, None, None, dC, None, dentry, *(None,) * 6


ssd_segment.register_autograd(_segment_gradients, setup_context=_segment_setup)
ssd_entered.register_autograd(_entered_gradients, setup_context=_entered_setup)
