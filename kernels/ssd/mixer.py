"""A Mamba-2 layer between its projections: convolution, scan and gated norm as one operator with one gradient buffer.

On the Triton path one launch convolves x, B and C and computes the decays from dt, and the backward writes the
gradients of z, x, B, C and dt side by side into one buffer, so that the projection's backward reads it as it is.
"""

from typing import Any

import torch
from torch import Tensor

from ..conv import causal_conv1d, check_weight, document_runs, final_state, run_code, width_limit
from ..norm import gated_rms_norm
from ..operators import LARGEST_GROUP, use_triton
from .api import check_core, ssd
from .inputs import (
    FULL_DT_RANGE,
    check_discretisation,
    check_groups,
    check_scan_shapes,
    expect_shape,
    resolve_seq_idx,
)
from .mixer_operators import mixer_forward
from .operators import refusal, segment_code, triton_chunk


def ssd_mixer(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None = None,
    *,
    n_groups: int,
    z: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_group_size: int | None = None,
    norm_eps: float = 1e-5,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    dt_limit: tuple[float, float] = FULL_DT_RANGE,
    activation: str | None = "silu",
    conv_state: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    chunk_size: int = 64,
    return_final_states: bool = False,
    save_states: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """gated_rms_norm(ssd(act(conv(x|B|C)), dt, A, D), z): what a Mamba-2 layer does between its two projections.

    Args:
        x: (b, l, h·p). dt: (b, l, h). B, C: (b, l, g·n), before the convolution. z: (b, l, h·p), with norm_weight
            (h·p,); without both the norm is left out. All of them may be views of one projection's output.
        A: (h,), negative. D: (h,). dt_bias: (h,) or (b, l, h). n_groups: g. norm_group_size: divides h·p (its default).
        conv_weight: (h·p + 2·g·n, k), of the channels x, B, C in this order. conv_bias: (h·p + 2·g·n,).
        conv_state: (b, h·p + 2·g·n, k−1), the inputs before position 0. initial_states: (b, h, p, n).
        seq_idx: (b, l) integers, as in :func:`ssd`. activation: of the convolution, "silu" or None.
        save_states: Triton path: keep convolved tokens and chunk states for the backward, not compute them again.
        backend: "torch", "triton" (what the three operators take; x, B, C and z of one dtype), or "auto": one Triton
            operator for CUDA tensors that it takes, the three operators otherwise, each by its own rules.

    Returns:
        out (b, l, h·p) in x's dtype, or (out, final states (b, h, p, n), final convolution state like conv_state).
        On the Triton path gradients lie in one buffer, which :func:`..columns.split_columns` passes on without a copy.

    Raises:
        ValueError: shapes, dt_limit, activation or a backend that does not fit.
    """
    _check(x, dt, A, B, C, conv_weight, conv_bias, n_groups, z, norm_weight, norm_group_size, conv_state, activation)
    check_discretisation(dt, A, dt_bias, dt_limit)
    heads = dt.shape[2]
    x4, B4, C4 = (t.unflatten(-1, (k, -1)) for t, k in ((x, heads), (B, n_groups), (C, n_groups)))
    check_scan_shapes(x4, {"dt": dt}, B4, C4)
    check_core(x4, B4, D, initial_states, chunk_size)
    seq_idx = resolve_seq_idx(seq_idx, None, x4)
    group = x.shape[2] if norm_group_size is None else norm_group_size
    dt, dt_bias = _with_bias(dt, dt_bias)
    tensors: dict[str, Tensor | None] = {
        **{"x": x4, "B": B4, "C": C4, "dt": dt, "A": A, "conv_weight": conv_weight, "conv_bias": conv_bias, "z": z},
        **{"norm_weight": norm_weight, "D": D, "dt_bias": dt_bias, "initial_states": initial_states},
        "conv_state": conv_state,
    }
    runs, valid = (None, None) if seq_idx is None else document_runs(seq_idx)
    if use_triton(backend, tensors, _limit(tensors, conv_weight.shape[1], group)):
        out, final, *_ = mixer_forward(
            *(x, B, C, dt, z, conv_weight, conv_bias, conv_state, run_code(runs, valid), A, dt_bias, D),
            *(initial_states, segment_code(seq_idx), norm_weight, n_groups, group, norm_eps, activation == "silu"),
            *(dt_softplus, float(dt_limit[0]), float(dt_limit[1])),
            triton_chunk(x, chunk_size),
            save_states,
        )
    else:
        options: dict[str, Any] = {"activation": activation, "seq_idx": seq_idx, "chunk_size": chunk_size}
        options |= {"save_states": save_states, "dt_softplus": dt_softplus, "dt_limit": dt_limit}
        out, final = _separately(tensors, (group, norm_eps), backend, **options)
    if not return_final_states:
        return out
    return out, final, _window((x, B, C), conv_state, runs, valid, conv_weight.shape[1])


def _separately(
    tensors: dict[str, Any], norm: tuple[int, float], backend: str, **options: Any
) -> tuple[Tensor, Tensor]:
    """(out, final states) by the three operators, each by its own rules."""
    x, dt, B, C, z = (tensors[name] for name in ("x", "dt", "B", "C", "z"))
    convolved = causal_conv1d(
        torch.cat([t.flatten(-2) for t in (x, B, C)], dim=-1),
        tensors["conv_weight"],
        tensors["conv_bias"],
        activation=options.pop("activation"),
        seq_idx=options["seq_idx"],
        initial_state=tensors["conv_state"],
        backend=backend,
    )
    assert isinstance(convolved, Tensor)
    parts = convolved.split([t.shape[2] * t.shape[3] for t in (x, B, C)], dim=-1)
    xs, Bs, Cs = (part.unflatten(-1, t.shape[2:]) for part, t in zip(parts, (x, B, C), strict=True))
    options |= {name: tensors[name] for name in ("D", "dt_bias", "initial_states")}
    scanned = ssd(xs, dt, tensors["A"], Bs, Cs, return_final_states=True, backend=backend, **options)
    assert isinstance(scanned, tuple)
    out, final = scanned[0].flatten(-2), scanned[1]
    if z is not None:
        group, eps = norm
        out = gated_rms_norm(out, z, tensors["norm_weight"], group_size=group, eps=eps, backend=backend)
    return out, final


def _with_bias(dt: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(dt, bias per head or None): a bias per token is added here, in at least float32."""
    if bias is None or bias.dim() != 3:
        return dt, bias
    wide = torch.promote_types(torch.promote_types(dt.dtype, bias.dtype), torch.float32)
    return dt.to(wide) + bias.to(wide), None


def _window(
    inputs: tuple[Tensor, ...], start: Tensor | None, runs: Tensor | None, valid: Tensor | None, width: int
) -> Tensor:
    """The convolution's final state over x, B and C."""
    starts = (None,) * 3 if start is None else start.split([t.shape[2] for t in inputs], dim=1)
    ends = [final_state(t, first, runs, valid, width) for t, first in zip(inputs, starts, strict=True)]
    return torch.cat(ends, dim=1)


def _limit(tensors: dict[str, Tensor | None], width: int, group: int) -> str | None:
    """What the one operator does not take."""
    x = tensors["x"]
    assert x is not None
    for name in ("B", "C", "z"):
        other = tensors[name]
        if other is not None and other.dtype != x.dtype:
            return f"{name} is {other.dtype}, expected {x.dtype} as x"
    if group > LARGEST_GROUP:
        return f"norm_group_size is {group}, expected at most {LARGEST_GROUP}"
    return width_limit(width) or refusal(tensors)


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    n_groups: int,
    z: Tensor | None,
    norm_weight: Tensor | None,
    norm_group_size: int | None,
    conv_state: Tensor | None,
    activation: str | None,
) -> None:
    if x.dim() != 3 or x.shape[1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (batch, length >= 1, heads · head_dim)")
    b, l, inner = x.shape
    if dt.dim() != 3 or dt.shape[:2] != x.shape[:2]:
        raise ValueError(f"dt has shape {tuple(dt.shape)}, expected ({b}, {l}, heads)")
    if dt.shape[2] == 0 or inner % dt.shape[2]:
        raise ValueError(f"the {inner} channels of x do not divide into {dt.shape[2]} heads (dt)")
    check_groups(dt.shape[2], n_groups)
    if B.dim() != 3 or B.shape[:2] != x.shape[:2] or B.shape[2] % n_groups or B.shape[2] == 0:
        raise ValueError(f"B has shape {tuple(B.shape)}, expected ({b}, {l}, n_groups {n_groups} · state)")
    expect_shape("C", C, tuple(B.shape))
    channels = inner + 2 * B.shape[2]
    check_weight(conv_weight, conv_bias, channels, activation)
    expect_shape("conv_state", conv_state, (b, channels, conv_weight.shape[1] - 1))
    expect_shape("z", z, tuple(x.shape))
    expect_shape("norm_weight", norm_weight, (inner,))
    if (z is None) != (norm_weight is None):
        given, missing = ("z", "norm_weight") if norm_weight is None else ("norm_weight", "z")
        raise ValueError(f"{given} was given without {missing}, expected both or neither")
    if norm_group_size is not None and (norm_group_size < 1 or inner % norm_group_size):
        raise ValueError(f"norm_group_size {norm_group_size} does not divide the {inner} channels of x")
