"""The two readable forms of SSD: the sequential recurrence (the oracle of the tests) and the mixing matrix."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .inputs import (
    FULL_DT_RANGE,
    accumulation_dtype,
    check_groups,
    check_scan_shapes,
    discretise,
    expect_shape,
    resolve_seq_idx,
    segment_numbers,
)


def ssd_reference(
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
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """SSD one token at a time, h_t = exp(dt_t A) h_{t-1} + dt_t x_t ⊗ B_t, y_t = h_t C_t + D x_t (Mamba-2, eq. 1).

    Arguments, results and errors are those of :func:`polylepis.kernels.ssd.ssd`. Autograd does the backward; run it in
    float64 to judge the other forms.
    """
    check_scan_shapes(x, {"dt": dt}, B, C)
    b, l, h, p = x.shape
    groups, n = B.shape[2:]
    expect_shape("D", D, (h,))
    expect_shape("z", z, (b, l, h, p))
    expect_shape("initial_states", initial_states, (b, h, p, n))
    seq_idx = resolve_seq_idx(seq_idx, cu_seqlens, x)
    dtype = accumulation_dtype(x, dt, A, B, C, initial_states)
    log_decay, scale = discretise(dt, A, dt_bias, dt_softplus, dt_limit, dtype)
    B_heads, C_heads = (t.to(dtype).repeat_interleave(h // groups, dim=2) for t in (B, C))
    xf = x.to(dtype)
    state = x.new_zeros(b, h, p, n, dtype=dtype) if initial_states is None else initial_states.to(dtype)
    segments, valid = (None, None) if seq_idx is None else segment_numbers(seq_idx)
    outputs = []
    for t in range(l):
        decay = log_decay[:, t].exp()[..., None, None]
        update = torch.einsum("bh,bhp,bhn->bhpn", scale[:, t], xf[:, t], B_heads[:, t])
        kept = state
        if segments is not None and t > 0:
            same = (segments[:, t] == segments[:, t - 1])[:, None, None, None]
            kept = torch.where(same, state, torch.zeros_like(state))
        new_state = decay * kept + update
        y = torch.einsum("bhpn,bhn->bhp", new_state, C_heads[:, t])
        if D is not None:
            y = y + D.to(dtype)[:, None] * xf[:, t]
        if z is not None:
            y = y * F.silu(z[:, t].to(dtype))
        if valid is not None:
            real = valid[:, t][:, None, None]
            new_state = torch.where(real[..., None], new_state, state)
            y = torch.where(real, y, torch.zeros_like(y))
        state = new_state
        outputs.append(y)
    out = torch.stack(outputs, dim=1).to(x.dtype)
    return (out, state) if return_final_states else out


def ssd_matrix(
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = FULL_DT_RANGE,
    seq_idx: Tensor | None = None,
) -> Tensor:
    """The materialised mixing matrix M with y = M x: M_ij = C_i·B_j exp(Σ_{j<t<=i} dt_t A) dt_j (SSD paper, eq. 16).

    Args:
        dt: (b, l, h). A: (h,). B, C: (b, l, g, n). D: (h,), added to the diagonal.
        seq_idx: (b, l), negative is padding. dt_bias, dt_softplus, dt_limit: as in :func:`polylepis.kernels.ssd.ssd`.

    Returns:
        M (b, h, l, l), lower triangular, in the accumulation dtype; entries between two documents, rows and columns of
        padding are exactly zero. Memory grows with l²: for distillation and tests.
    """
    if dt.dim() != 3 or B.dim() != 4 or B.shape[:2] != dt.shape[:2] or C.shape != B.shape:
        raise ValueError(
            f"dt {tuple(dt.shape)}, B {tuple(B.shape)}, C {tuple(C.shape)} do not fit (b, l, h) and twice (b, l, g, n)"
        )
    _, l, h = dt.shape
    if l == 0:
        raise ValueError("dt has length 0; the mixing matrix needs at least one token")
    check_groups(h, B.shape[2])
    expect_shape("D", D, (h,))
    expect_shape("seq_idx", seq_idx, tuple(dt.shape[:2]))
    dtype = accumulation_dtype(dt, A, B, C)
    log_decay, scale = discretise(dt, A, dt_bias, dt_softplus, dt_limit, dtype)
    keep = torch.ones(l, l, dtype=torch.bool, device=dt.device).tril()[None]
    if seq_idx is not None:
        segments, valid = segment_numbers(seq_idx)
        keep = keep & (segments[:, :, None] == segments[:, None, :]) & valid[:, :, None] & valid[:, None, :]
        log_decay = torch.where(valid[..., None], log_decay, torch.zeros_like(log_decay))
    total = log_decay.cumsum(dim=1).transpose(1, 2)
    # mask before exp: above the diagonal the difference is positive and may overflow
    difference = (total[..., :, None] - total[..., None, :]).masked_fill(~keep[:, None], -torch.inf)
    similarity = torch.einsum("bign,bjgn->bgij", C.to(dtype), B.to(dtype)).repeat_interleave(h // B.shape[2], dim=1)
    matrix = similarity * difference.exp() * scale.transpose(1, 2)[:, :, None, :]
    if D is not None:
        diagonal = torch.diag_embed(D.to(dtype)[None, :, None].expand(1, h, l))
        matrix = matrix + (diagonal if seq_idx is None else diagonal * valid[:, None, :, None])
    return matrix
