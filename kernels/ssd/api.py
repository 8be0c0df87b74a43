"""The public SSD operators: ``ssd`` (Mamba-2's terms), ``ssd_core`` (any decay and scale) and ``ssd_step`` (decode)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..operators import check_ids, check_tensors, use_triton
from .chunked import chunked_scan
from .inputs import (
    FULL_DT_RANGE,
    accumulation_dtype,
    check_discretisation,
    check_groups,
    check_scan_shapes,
    discretise,
    expect_shape,
    resolve_seq_idx,
    segment_numbers,
)
from .operators import refusal, scan_step, scan_step_in_place, segment_code, triton_chunk, triton_scan


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int = 64,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = FULL_DT_RANGE,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    return_final_states: bool = False,
    save_states: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """State-space duality in Mamba-2's terms: h_t = exp(dt_t A) h_{t-1} + dt_t x_t ⊗ B_t, y_t = h_t C_t.

    Source: Dao and Gu 2024, "Transformers are SSMs", the chunked algorithm of section 6.

    Args:
        x: (b, l, h, p), any l >= 1. dt: (b, l, h). A: (h,), negative. B, C: (b, l, g, n), g divides h.
        chunk_size: upper bound of the tokens per chunk (the Triton path on a GPU takes its table's instead); it changes
            speed, and results only by rounding.
        D: (h,), adds D·x. z: like x, multiplies the output by silu(z). dt_bias: (h,) or (b, l, h).
        dt_softplus, dt_limit: dt <- clamp(softplus(dt + dt_bias), *dt_limit).
        initial_states: (b, h, p, n), the state before the first segment.
        seq_idx: (b, l) integers. A change of the last valid id resets the state; a negative id is padding: output 0,
            state unchanged, wherever it stands. What padding holds must be finite.
        cu_seqlens: cumulative document lengths [0, …, l], only with b == 1 and without seq_idx; documents may be empty.
        return_final_states: also return the state after the last token, (b, h, p, n), in the accumulation dtype.
        save_states: Triton path: keep the states that enter each chunk for the backward, or compute them again
            there (the default: less memory, and by bytes as fast).
        backend: "torch", "triton" (head_dim <= 128, state <= 256, no float64), or "auto": Triton for CUDA tensors that
            it takes, torch otherwise.

    FLOPs of the Triton path, chunks of Q (128; float32: 32): forward 2·b·l·(¾·g·Q·n + h·p·(¾·Q + 2n)), backward
    2·b·l·(2.75·g·Q·n + h·p·(1.5·Q + 4n)), and the states again, 2·b·l·h·p·n, unless saved. Bytes, beside B, C, dt and
    y, dx: forward x twice, the b·l/Q·h·p·n elements of the states written and read; backward x twice and dy three
    times, the states read, their gradients written and read twice.

    Returns:
        y like x, or (y, final_states). Half precisions accumulate in float32, float64 stays float64. Gradients reach
        every floating-point argument, through the final states too.

    Raises:
        ValueError: a shape, document description, dt_limit, chunk_size or backend that does not fit.
    """
    check_scan_shapes(x, {"dt": dt}, B, C)
    expect_shape("z", z, tuple(x.shape))
    check_tensors(x, {"z": z})
    seq_idx = resolve_seq_idx(seq_idx, cu_seqlens, x)
    dtype = accumulation_dtype(x, dt, A, B, C, initial_states)
    tensors = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "dt_bias": dt_bias, "initial_states": initial_states}
    if use_triton(backend, tensors, refusal(tensors)):
        check_discretisation(dt, A, dt_bias, dt_limit)
        check_core(x, B, D, initial_states, chunk_size)
        if dt_bias is not None and dt_bias.dim() == 3:
            dt, dt_bias = dt.to(dtype) + dt_bias.to(dtype), None
        y, final = triton_scan(
            *(x, dt, A, dt_bias, B, C, D, initial_states, segment_code(seq_idx)),
            chunk=triton_chunk(x, chunk_size),
            discretise=True,
            softplus=dt_softplus,
            dt_limit=(float(dt_limit[0]), float(dt_limit[1])),
            save_states=save_states,
        )
    else:
        log_decay, scale = discretise(dt, A, dt_bias, dt_softplus, dt_limit, dtype)
        y, final = _core(x, log_decay, scale, B, C, D, initial_states, seq_idx, chunk_size)
    if z is not None:
        y = y * F.silu(z.to(dtype))
    y = y.to(x.dtype)
    return (y, final) if return_final_states else y


def ssd_core(
    x: Tensor,
    log_decay: Tensor,
    scale: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    chunk_size: int = 64,
    return_final_states: bool = False,
    save_states: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """The scan under every parameterisation: h_t = exp(log_decay_t) h_{t-1} + scale_t x_t ⊗ B_t, y_t = h_t C_t + D x_t.

    Mamba-2 is (dt·A, dt), the discrete form (log a, 1), linear attention (0, 1).

    Args:
        log_decay: (b, l, h), <= 0 (−inf forgets, to within exp(−35) in float32). scale: (b, l, h), any sign.
        The rest as in :func:`ssd`.

    Returns:
        y like x, or (y, final_states (b, h, p, n) in the accumulation dtype).

    Raises:
        ValueError: shapes or chunk_size that do not fit.
    """
    check_scan_shapes(x, {"log_decay": log_decay, "scale": scale}, B, C)
    seq_idx = resolve_seq_idx(seq_idx, None, x)
    tensors = {"x": x, "log_decay": log_decay, "scale": scale, "B": B, "C": C, "D": D, "initial_states": initial_states}
    if use_triton(backend, tensors, refusal(tensors)):
        check_core(x, B, D, initial_states, chunk_size)
        y, final = triton_scan(
            *(x, log_decay, scale, None, B, C, D, initial_states, segment_code(seq_idx)),
            chunk=triton_chunk(x, chunk_size),
            discretise=False,
            save_states=save_states,
        )
    else:
        y, final = _core(x, log_decay, scale, B, C, D, initial_states, seq_idx, chunk_size)
    y = y.to(x.dtype)
    return (y, final) if return_final_states else y


def ssd_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = FULL_DT_RANGE,
    in_place: bool = False,
    places: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One token of decoding by the recurrence.

    Args:
        state: (b, h, p, n). x: (b, h, p). dt: (b, h). A: (h,). B, C: (b, g, n). D: (h,). z: like x.
        dt_bias: (h,) or (b, h). dt_softplus, dt_limit: as in :func:`ssd`.
        in_place: overwrite ``state``, which is returned; without gradients.
        places: (b,) integers, with in_place: the rows of a larger state (rows, h, p, n) that these tokens continue, no
            row twice; a negative one is padding: its y is 0 and no state changes.
        backend: as in :func:`ssd`; the Triton kernel has no gradients.

    Returns:
        (y (b, h, p) in x's dtype, the new state in the state's dtype).

    Raises:
        ValueError: shapes or dt_limit that do not fit; places without in_place; in_place where gradients are wanted.
    """
    _check_step(state, x, dt, B, C, D, z, places, in_place)
    low, high = check_discretisation(dt, A, dt_bias, dt_limit)
    tensors = {"x": x, "state": state, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias}
    gradients = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors.values())
    if gradients and in_place:
        raise ValueError("in_place is True, expected no gradients then: call under torch.no_grad()")
    if use_triton(backend, tensors, "the step has no gradients there" if gradients else refusal(tensors)):
        if in_place:
            given = (x, dt, A, B, C, D, z, dt_bias)
            return scan_step_in_place(state, places, *given, dt_softplus, low, high), state
        return scan_step(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, low, high)
    dtype = accumulation_dtype(state, x, dt, A, B, C)
    log_decay, scale = discretise(dt, A, dt_bias, dt_softplus, dt_limit, dtype)
    B_heads, C_heads = (t.to(dtype).repeat_interleave(x.shape[1] // B.shape[1], dim=1) for t in (B, C))
    xf = x.to(dtype)
    update = (xf * scale[..., None])[..., None] * B_heads[:, :, None, :]
    old = state if places is None else state[places.clamp(min=0).long()]
    new_state = torch.addcmul(update, old.to(dtype), log_decay.exp()[..., None, None])
    y = (new_state @ C_heads[..., None]).squeeze(-1)
    if D is not None:
        y = y + D.to(dtype)[:, None] * xf
    if z is not None:
        y = y * F.silu(z.to(dtype))
    new_state = new_state.to(state.dtype)
    if places is not None:
        real = places >= 0
        state[places[real].long()] = new_state[real]
        return torch.where(real[:, None, None], y, 0.0).to(x.dtype), state
    return y.to(x.dtype), state.copy_(new_state) if in_place else new_state


def _check_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    places: Tensor | None,
    in_place: bool,
) -> None:
    if x.dim() != 3:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected 3 dimensions (batch, heads, head_dim)")
    b, h, p = x.shape
    if B.dim() != 3 or B.shape[0] != b:
        raise ValueError(f"B has shape {tuple(B.shape)}, expected ({b}, groups, state)")
    groups, n = B.shape[1:]
    check_groups(h, groups)
    expect_shape("C", C, (b, groups, n))
    expect_shape("dt", dt, (b, h))
    expect_shape("z", z, (b, h, p))
    expect_shape("D", D, (h,))
    if places is None:
        expect_shape("state", state, (b, h, p, n))
        return
    if not in_place:
        raise ValueError("places was given without in_place, expected both: a part of the state is overwritten")
    check_ids("places", places, (b,), x.device)
    if state.dim() != 4 or tuple(state.shape[1:]) != (h, p, n):
        raise ValueError(f"state has shape {tuple(state.shape)}, expected (rows, {h}, {p}, {n})")


def check_core(x: Tensor, B: Tensor, D: Tensor | None, initial_states: Tensor | None, chunk_size: int) -> None:
    b, _, h, p = x.shape
    expect_shape("D", D, (h,))
    expect_shape("initial_states", initial_states, (b, h, p, B.shape[3]))
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}, expected at least 1")


def _core(
    x: Tensor,
    log_decay: Tensor,
    scale: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Padding, segments and the D skip around the chunked scan; y in the accumulation dtype."""
    b, l = x.shape[:2]
    check_core(x, B, D, initial_states, chunk_size)
    segments = None
    skip = None if D is None else D[:, None]
    if seq_idx is not None:
        segments, valid = segment_numbers(seq_idx)
        real = valid[..., None]
        # a padding token is an identity of the recurrence (decay 1, input 0) that reads nothing (C = 0)
        log_decay = torch.where(real, log_decay, torch.zeros_like(log_decay))
        scale = torch.where(real, scale, torch.zeros_like(scale))
        C = torch.where(real[..., None], C, torch.zeros_like(C))
        skip = None if D is None else (D * real)[..., None]
    # equal chunks waste the fewest padding tokens: 130 tokens are 3 × 44, not 3 × 64
    chunks = -(-l // chunk_size)
    chunk = -(-l // chunks)
    missing = chunks * chunk - l
    xs = x
    if missing:
        xs, log_decay, scale, B, C = (
            F.pad(t, (0, 0) * (t.dim() - 2) + (0, missing)) for t in (x, log_decay, scale, B, C)
        )
        if segments is not None:
            segments = torch.cat([segments, segments[:, -1:].expand(b, missing)], dim=1)
    y, final = chunked_scan(xs, log_decay, scale, B, C, initial_states, segments, chunk)
    y = y[:, :l]
    if skip is not None:
        y = torch.addcmul(y, x.to(y.dtype), skip.to(y.dtype))
    return y, final
