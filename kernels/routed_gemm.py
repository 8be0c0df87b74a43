"""The matrix product of routed parameters: rows sorted by bank entry, one contiguous GEMM per entry.

On GPUs that have it, torch's grouped GEMM takes the place of the loop over entries. Not yet run on a GPU.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .operators import check_tensors


def routed_linear(x: Tensor, weight: Tensor, counts: Sequence[int]) -> Tensor:
    """y[rows of entry e] = x[rows of entry e] @ weight[e]ᵀ, the rows of x being sorted by entry.

    Args:
        x: (T, in). weight: (E, out, in), any strides. counts: E row counts that sum to T, on the host, so
            that nothing has to wait for the device.

    Returns:
        (T, out) in x's dtype. An entry without rows gets a gradient of exact zeros, never None.

    Raises:
        ValueError: shapes, dtypes or counts that do not fit.
    """
    if x.dim() != 2 or weight.dim() != 3 or x.shape[1] != weight.shape[2]:
        raise ValueError(f"x {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit (T, in) and (E, out, in)")
    if x.dtype != weight.dtype:
        raise ValueError(f"x is {x.dtype} and weight is {weight.dtype}, expected one dtype")
    check_tensors(x, {"x": x, "weight": weight})
    rows = tuple(int(count) for count in counts)
    if len(rows) != weight.shape[0] or min(rows, default=0) < 0 or sum(rows) != x.shape[0]:
        raise ValueError(
            f"counts {rows} (sum {sum(rows)}) do not fit {weight.shape[0]} bank entries and {x.shape[0]} rows"
        )
    return _RoutedLinear.apply(x, weight, rows)


class _RoutedLinear(torch.autograd.Function):
    """Every product writes straight into its part of one output and one weight-gradient buffer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.counts = counts
        if _can_group(x, weight):
            return grouped_rows(x, weight.transpose(1, 2), _ends(counts, x.device))
        y = x.new_empty(x.shape[0], weight.shape[1])
        for entry, rows in _spans(counts):
            torch.mm(x[rows], weight[entry].t(), out=y[rows])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        dx = dweight = None
        if _can_group(dy, weight):
            dy, ends = dy.contiguous(), _ends(ctx.counts, dy.device)
            if ctx.needs_input_grad[0]:
                dx = grouped_rows(dy, weight, ends)
            if ctx.needs_input_grad[1]:
                dweight = grouped_outer(dy, x.contiguous(), ends, ctx.counts)
            return dx, dweight, None
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(x, memory_format=torch.contiguous_format)
            for entry, rows in _spans(ctx.counts):
                torch.mm(dy[rows], weight[entry], out=dx[rows])
        if ctx.needs_input_grad[1]:
            dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
            for entry, count in enumerate(ctx.counts):
                if count == 0:
                    dweight[entry].zero_()
            for entry, rows in _spans(ctx.counts):
                torch.mm(dy[rows].t(), x[rows], out=dweight[entry])
        return dx, dweight, None


def _can_group(rows: Tensor, weight: Tensor) -> bool:
    """What `grouped_mm` takes: bfloat16 on sm_90 or newer, every row of every operand a multiple of 16 bytes."""
    return (
        rows.is_cuda
        and rows.dtype == weight.dtype == torch.bfloat16
        and rows.shape[0] > 0
        and weight.shape[1] % 8 == 0
        and weight.shape[2] % 8 == 0
        and weight.is_contiguous()
        and hasattr(F, "grouped_mm")
        and torch.cuda.get_device_capability(rows.device) >= (9, 0)
    )


def _ends(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 [E]: where each entry's rows end; the last is T, for rows past it would be left uninitialised."""
    return torch.tensor(tuple(accumulate(counts)), dtype=torch.int32).to(device, non_blocking=True)


def grouped_rows(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """(T, a) × (E, a, b) → (T, b), each entry's rows by its own matrix."""
    return F.grouped_mm(rows.contiguous(), matrices, offs=ends)


def grouped_outer(left: Tensor, right: Tensor, ends: Tensor, counts: Sequence[int]) -> Tensor:
    """(T, a), (T, b) → (E, a, b): leftᵀ · right over each entry's rows; exact zeros without rows."""
    result = F.grouped_mm(left.t(), right, offs=ends)
    for entry, count in enumerate(counts):
        if count == 0:
            result[entry].zero_()
    return result


def _spans(counts: tuple[int, ...]) -> Iterator[tuple[int, slice]]:
    """(entry, its rows) of every entry that has rows."""
    start = 0
    for entry, count in enumerate(counts):
        if count:
            yield entry, slice(start, start + count)
        start += count
