"""What every form of the SSD operator shares: checks, discretisation and document segments."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ..operators import check_ids

FULL_DT_RANGE = (0.0, math.inf)


def accumulation_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The widest dtype among ``tensors`` and float32: half precisions accumulate in float32, float64 stays."""
    dtype = torch.float32
    for tensor in tensors:
        if tensor is not None:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def expect_shape(name: str, tensor: Tensor | None, *shapes: tuple[int, ...]) -> None:
    """Refuse ``tensor`` (None passes) unless it has one of ``shapes``."""
    if tensor is not None and tuple(tensor.shape) not in shapes:
        wanted = " or ".join(str(shape) for shape in shapes)
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {wanted}")


def check_scan_shapes(x: Tensor, per_token: dict[str, Tensor], B: Tensor, C: Tensor) -> None:
    """Check x (b, l, h, p), the (b, l, h) tensors of ``per_token`` and B, C (b, l, g, n) against each other."""
    if x.dim() != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected 4 dimensions (batch, length, heads, head_dim)")
    b, l, h, _ = x.shape
    if l == 0:
        raise ValueError(f"x has length 0 (shape {tuple(x.shape)}); the scan needs at least one token")
    for name, tensor in per_token.items():
        expect_shape(name, tensor, (b, l, h))
    if B.dim() != 4 or B.shape[:2] != x.shape[:2]:
        raise ValueError(f"B has shape {tuple(B.shape)}, expected ({b}, {l}, groups, state)")
    expect_shape("C", C, tuple(B.shape))
    check_groups(h, B.shape[2])


def check_groups(heads: int, groups: int) -> None:
    """Refuse a number of B/C groups that does not divide the heads."""
    if groups < 1 or heads % groups:
        raise ValueError(f"{groups} groups of B and C do not divide {heads} heads")


def discretise(
    dt: Tensor,
    A: Tensor,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Mamba-2's zero-order hold: (log_decay, scale) = (dt·A, dt), dt after bias, softplus and clamp.

    Args:
        dt: (..., h). A: (h,). dt_bias: (h,) or the shape of dt. dtype: in which the result is computed.
    """
    low, high = check_discretisation(dt, A, dt_bias, dt_limit)
    scale = dt.to(dtype)
    if dt_bias is not None:
        scale = scale + dt_bias.to(dtype)
    if dt_softplus:
        scale = F.softplus(scale)
    # softplus is positive already: the default range cannot change it, so the pass is spared
    if not (dt_softplus and (low, high) == FULL_DT_RANGE):
        scale = scale.clamp(low, high)
    return scale * A.to(dtype), scale


def check_discretisation(
    dt: Tensor, A: Tensor, dt_bias: Tensor | None, dt_limit: tuple[float, float]
) -> tuple[float, float]:
    """Check the arguments of :func:`discretise`; returns dt_limit."""
    expect_shape("A", A, (dt.shape[-1],))
    expect_shape("dt_bias", dt_bias, (dt.shape[-1],), tuple(dt.shape))
    low, high = float(dt_limit[0]), float(dt_limit[1])
    if math.isnan(low) or math.isnan(high) or low < 0 or low > high:
        raise ValueError(f"dt_limit is ({low}, {high}), expected 0 <= low <= high")
    return low, high


def segment_numbers(seq_idx: Tensor) -> tuple[Tensor, Tensor]:
    """Canonical segments of a packed row.

    Args:
        seq_idx: (b, l) integers; a negative id is padding. Ids need not be monotone.

    Returns:
        (segments, valid): segments (b, l) int64 count from 0 and grow by one at every change of the last valid id,
        so that padding belongs to the segment before it (leading padding to the first); valid (b, l) bool.
    """
    valid = seq_idx >= 0
    position = torch.arange(seq_idx.shape[1], device=seq_idx.device).expand_as(seq_idx)
    last_valid = torch.where(valid, position, -1).cummax(dim=1).values
    filled = seq_idx.gather(1, last_valid.clamp(min=0))
    reset = torch.zeros_like(valid)
    reset[:, 1:] = (filled[:, 1:] != filled[:, :-1]) & (last_valid[:, :-1] >= 0)
    return reset.cumsum(dim=1), valid


def seq_idx_from_cu_seqlens(
    cu_seqlens: Tensor | Sequence[int], batch: int, length: int, device: torch.device
) -> Tensor:
    """(1, length) document ids from cumulative lengths [0, …, length]; documents may be empty.

    A CUDA tensor is not inspected (that would synchronise); everything else is checked.
    """
    if batch != 1:
        raise ValueError(f"cu_seqlens needs a packed batch of 1 row, got {batch} rows")
    bounds = torch.as_tensor(cu_seqlens)
    if bounds.dim() != 1 or bounds.numel() < 2 or bounds.is_floating_point():
        raise ValueError(f"cu_seqlens has shape {tuple(bounds.shape)} and dtype {bounds.dtype}, expected >= 2 integers")
    if bounds.device.type == "cpu":
        ends = bounds.tolist()
        if ends[0] != 0 or ends[-1] != length or any(a > b for a, b in pairwise(ends)):
            raise ValueError(f"cu_seqlens runs from {ends[0]} to {ends[-1]}, expected 0 to {length} without decrease")
    position = torch.arange(length, device=device)
    return torch.searchsorted(bounds[1:].to(device=device, dtype=torch.int64), position, right=True)[None]


def resolve_seq_idx(seq_idx: Tensor | None, cu_seqlens: Tensor | Sequence[int] | None, x: Tensor) -> Tensor | None:
    """The one (b, l) document-id tensor that the two ways of naming documents come down to."""
    b, l = x.shape[:2]
    if cu_seqlens is not None:
        if seq_idx is not None:
            raise ValueError("seq_idx and cu_seqlens were both given, expected at most one of them")
        return seq_idx_from_cu_seqlens(cu_seqlens, b, l, x.device)
    check_ids("seq_idx", seq_idx, (b, l), x.device)
    return seq_idx
