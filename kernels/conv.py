"""Depthwise causal convolution over packed documents, with a hand-written backward, and its decode step."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .operators import check_ids, conv_forward, conv_step, use_triton

LARGEST_WIDTH = 4  # of the Triton kernels


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """y_t = act(bias + Σ_s weight[:, k−1−s] x_{t−s}), s = 0 … k−1, never across a document boundary.

    Args:
        x: (b, l, c). weight: (c, k). bias: (c,). activation: "silu" or None.
        seq_idx: (b, l) integers; a negative id is padding: output 0, seen by nobody. The tokens of a document
            are contiguous.
        initial_state: (b, c, k−1), the inputs before position 0; it feeds the document at position 0 only.
        return_final_state: also return the last k−1 inputs up to the last token that is not padding, (b, c, k−1), zero
            where they belong to another document than that token.
        backend: "torch", "triton" (width <= 4, no float64), or "auto": Triton for CUDA tensors that it takes.

    Returns:
        y (b, l, c) in x's dtype, or (y, final_state in x's dtype). Half precisions accumulate in float32,
        float64 stays.

    Raises:
        ValueError: shapes or an activation that do not fit.
    """
    if x.dim() != 3 or x.shape[1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (batch, length >= 1, channels)")
    b, l, c = x.shape
    check_weight(weight, bias, c, activation)
    width = weight.shape[1]
    check_ids("seq_idx", seq_idx, (b, l), x.device)
    if initial_state is not None and tuple(initial_state.shape) != (b, c, width - 1):
        raise ValueError(f"initial_state has shape {tuple(initial_state.shape)}, expected ({b}, {c}, {width - 1})")
    triton = use_triton(backend, _tensors(x, weight, bias, initial_state), width_limit(width))
    runs = valid = None
    if seq_idx is not None:
        runs, valid = document_runs(seq_idx)
    if triton:
        y = conv_forward(x, weight, bias, initial_state, run_code(runs, valid), activation == "silu")
    else:
        y = _CausalConv.apply(x, weight, bias, initial_state, runs, valid, activation == "silu")
    return (y, final_state(x, initial_state, runs, valid, width)) if return_final_state else y


def causal_conv1d_step(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One token: x (b, c) and the k−1 inputs before it, state (b, c, k−1) -> (y (b, c), the new state).

    ``backend`` as in :func:`causal_conv1d`; the Triton kernel of one token has no gradients.

    Raises:
        ValueError: shapes or an activation that do not fit.
    """
    if x.dim() != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (batch, channels)")
    b, c = x.shape
    check_weight(weight, bias, c, activation)
    if tuple(state.shape) != (b, c, weight.shape[1] - 1):
        raise ValueError(f"state has shape {tuple(state.shape)}, expected ({b}, {c}, {weight.shape[1] - 1})")
    tensors = {**_tensors(x, weight, bias, None), "state": state}
    gradients = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors.values())
    limit = "the step has no gradients there" if gradients else width_limit(weight.shape[1])
    if use_triton(backend, tensors, limit):
        return conv_step(x, state, weight, bias, activation == "silu")
    dtype = torch.promote_types(x.dtype, torch.float32)
    window = torch.cat([state, x.to(state.dtype).unsqueeze(-1)], dim=-1)
    y = (window.to(dtype) * weight.to(dtype)).sum(dim=-1)
    if bias is not None:
        y = y + bias.to(dtype)
    y = F.silu(y) if activation == "silu" else y
    return y.to(x.dtype), window[..., 1:]


def _tensors(x: Tensor, weight: Tensor, bias: Tensor | None, initial: Tensor | None) -> dict[str, Tensor | None]:
    return {"x": x, "weight": weight, "bias": bias, "initial_state": initial}


def width_limit(width: int) -> str | None:
    return None if width <= LARGEST_WIDTH else f"weight has width {width}, expected at most {LARGEST_WIDTH}"


def check_weight(weight: Tensor, bias: Tensor | None, channels: int, activation: str | None) -> None:
    if weight.dim() != 2 or weight.shape[0] != channels or weight.shape[1] < 1:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected ({channels}, width >= 1)")
    if bias is not None and tuple(bias.shape) != (channels,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, expected ({channels},)")
    if activation not in (None, "silu"):
        raise ValueError(f"activation={activation!r} is unknown; accepted are 'silu' and None")


def document_runs(seq_idx: Tensor) -> tuple[Tensor, Tensor]:
    """(runs (b, l) int64, counted from 0, one more at every change of the id; valid (b, l) bool: not padding)."""
    changes = torch.zeros_like(seq_idx, dtype=torch.bool)
    changes[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    return changes.cumsum(dim=1), seq_idx >= 0


def run_code(runs: Tensor | None, valid: Tensor | None) -> Tensor | None:
    """2·run + (1 for padding) per token, (b, l) int32: what the kernels read of the documents."""
    if runs is None or valid is None:
        return None
    return (2 * runs + (~valid).to(runs.dtype)).to(torch.int32).contiguous()


class _Tap(NamedTuple):
    """One distance s > 0: y[late] += weight[:, k−1−s] · x[early], where ``same`` (b, l−s, 1) tells the documents agree;
    the first ``head`` outputs reach into the initial state instead, from column ``column`` on."""

    column: int
    late: slice
    early: slice
    same: Tensor | None
    head: int


def _taps(length: int, width: int, runs: Tensor | None, dtype: torch.dtype) -> list[_Tap]:
    taps = []
    for s in range(1, width):
        late, early = slice(min(s, length), None), slice(0, max(length - s, 0))
        same = None if runs is None else (runs[:, late] == runs[:, early]).to(dtype).unsqueeze(-1)
        taps.append(_Tap(width - 1 - s, late, early, same, min(s, length)))
    return taps


class _CausalConv(torch.autograd.Function):
    """Shifted multiply-adds; saves x and the values before the activation."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        initial: Tensor | None,
        runs: Tensor | None,
        valid: Tensor | None,
        silu: bool,
    ) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        xf, w = x.to(dtype), weight.to(dtype).t().contiguous()
        width = w.shape[0]
        u = xf * w[-1] if bias is None else torch.addcmul(bias.to(dtype), xf, w[-1])
        for column, late, early, same, head in _taps(x.shape[1], width, runs, dtype):
            reach = xf[:, early] if same is None else xf[:, early] * same
            u[:, late].addcmul_(reach, w[column])
            if initial is not None:
                before = _before(initial, column, head, runs, dtype)
                u[:, :head].addcmul_(before, w[column])
        if valid is not None:
            u.masked_fill_(~valid.unsqueeze(-1), 0.0)  # silu(0) = 0
        # without an activation the backward does not look at u
        ctx.save_for_backward(x, weight, bias, initial, runs, valid, u if silu else None)
        return (F.silu(u) if silu else u).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, initial, runs, valid, u = ctx.saved_tensors
        dtype = torch.promote_types(x.dtype, torch.float32)
        xf, w = x.to(dtype), weight.to(dtype).t().contiguous()
        width, length = w.shape[0], x.shape[1]
        du = dy.to(dtype)
        if u is not None:
            du = torch.ops.aten.silu_backward(du.contiguous(), u)
        if valid is not None:
            du = du.masked_fill(~valid.unsqueeze(-1), 0.0)
        dx = du * w[-1]
        dw = torch.empty_like(w)
        dw[-1] = (du * xf).sum(dim=(0, 1))
        dinitial = None if initial is None else torch.zeros_like(initial, dtype=dtype)
        for column, late, early, same, head in _taps(length, width, runs, dtype):
            back = du[:, late] if same is None else du[:, late] * same
            dx[:, early].addcmul_(back, w[column])
            dw[column] = (back * xf[:, early]).sum(dim=(0, 1))
            if initial is not None and dinitial is not None:
                first = du[:, :head] if runs is None else du[:, :head] * (runs[:, :head] == 0).unsqueeze(-1)
                dw[column] += (first * _before(initial, column, head, None, dtype)).sum(dim=(0, 1))
                dinitial[:, :, column : column + head] += (first * w[column]).transpose(1, 2)
        dbias = None if bias is None else du.sum(dim=(0, 1)).to(bias.dtype)
        if initial is not None and dinitial is not None:
            dinitial = dinitial.to(initial.dtype)
        return dx.to(x.dtype), dw.t().to(weight.dtype), dbias, dinitial, None, None, None


def _before(initial: Tensor, column: int, head: int, runs: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The ``head`` inputs before position 0 that one tap reaches, (b, head, c); zero outside the first document."""
    part = initial[:, :, column : column + head].transpose(1, 2).to(dtype)
    return part if runs is None else part * (runs[:, :head] == 0).unsqueeze(-1)


def final_state(x: Tensor, initial: Tensor | None, runs: Tensor | None, valid: Tensor | None, width: int) -> Tensor:
    """The k−1 inputs up to the last token that is not padding, (b, c, k−1); a differentiable gather."""
    b, l, c = x.shape
    start = x.new_zeros(b, width - 1, c) if initial is None else initial.transpose(1, 2).to(x.dtype)
    recent = x[:, max(0, l - width + 1) :]
    if runs is None or valid is None:
        return torch.cat([start[:, recent.shape[1] :], recent], dim=1).transpose(1, 2)
    position = torch.arange(l, device=x.device)
    last = torch.where(valid, position, -1).amax(dim=1, keepdim=True)
    wanted = last + torch.arange(2 - width, 1, device=x.device)  # (b, k−1), negative: before position 0
    inside = wanted.clamp(min=0)
    run = runs.gather(1, inside)  # of position 0 where wanted is before it: the document that the initial state feeds
    same = (run == runs.gather(1, last.clamp(min=0))) | (last < 0)
    taken = x.gather(1, inside.unsqueeze(-1).expand(-1, -1, c))
    # column k−1+t of the initial state is position t < 0; an all-padding row keeps its initial state
    earlier = start.gather(1, (wanted + width - 1).clamp(0, max(width - 2, 0)).unsqueeze(-1).expand(-1, -1, c))
    state = torch.where((wanted >= 0).unsqueeze(-1), taken, earlier)
    return torch.where(same.unsqueeze(-1), state, torch.zeros_like(state)).transpose(1, 2)
