"""The names and signatures of mamba_ssm and causal_conv1d over our kernels: a user changes one import line.

Signatures: state-spaces/mamba 2.3 (``ops/triton/ssd_combined.py``, ``selective_state_update.py``) and Dao-AILab
causal-conv1d 1.6 (``causal_conv1d_interface.py``). What is not supported raises ValueError with its name.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .columns import split_columns
from .conv import causal_conv1d, causal_conv1d_step
from .norm import gated_rms_norm, rms_norm
from .operators import check_tensors
from .ssd import ssd, ssd_mixer, ssd_step
from .ssd.inputs import check_groups, expect_shape

FULL_RANGE = (0.0, float("inf"))


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = FULL_RANGE,
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The scan of Mamba-2 as mamba_ssm names it.

    Args:
        x, z: (b, l, h, p). dt: (b, l, h). A: (h,). B, C: (b, l, g, n). D: (h,) or (h, p). dt_bias: (h,).
        initial_states: (b, h, p, n). seq_idx: (b, l).

    Returns:
        out (b, l, h, p), or (out, final states (b, h, p, n) float32) with ``return_final_states``.

    Raises:
        ValueError: cu_seqlens, return_varlen_states or state_dtype (not supported); shapes that do not fit.
    """
    _refuse(
        cu_seqlens=(cu_seqlens, "name documents by seq_idx, or call polylepis.kernels.ssd.ssd, which takes cu_seqlens"),
        return_varlen_states=(return_varlen_states or None, "run the sequences as rows of a batch"),
        state_dtype=(state_dtype, "states are kept in float32"),
    )
    if x.dim() == 4:
        expect_shape("D", D, tuple(x.shape[2:3]), tuple(x.shape[2:]))
        expect_shape("z", z, tuple(x.shape))
    wide = D is not None and D.dim() == 2
    if wide:
        check_tensors(x, {"D": D, "z": z})
    y, final = _both(
        ssd(
            *(x, dt, A, B, C, chunk_size),
            D=None if wide else D,
            z=None if wide else z,
            dt_bias=dt_bias,
            dt_softplus=dt_softplus,
            dt_limit=dt_limit,
            initial_states=initial_states,
            seq_idx=seq_idx,
            return_final_states=True,
        )
    )
    if wide and D is not None:
        skip = x * D if seq_idx is None else x * D * (seq_idx >= 0)[..., None, None]
        y = (y + skip).to(x.dtype)
        y = y if z is None else (y * F.silu(z)).to(x.dtype)
    return (y, final) if return_final_states else y


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = FULL_RANGE,
    return_final_states: bool = False,
    activation: str = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    state_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Everything between the two projections of a Mamba-2 layer, and the second one if its weight is given.

    Args:
        zxbcdt: (b, l, 2·h·p + 2·g·n + h), the output of in_proj. conv1d_weight: (h·p + 2·g·n, width).
        conv1d_bias: (h·p + 2·g·n,). dt_bias, A: (h,). D: (h,) with headdim, or (h, p).
        rmsnorm_weight: (h·p,); without it the gate is silu(z). norm_before_gate: norm(y)·silu(z), else norm(y·silu(z)).
        outproj_weight: (d, h·p).

    Returns:
        out (b, l, h·p or d), or (out, final states) with ``return_final_states``.

    Raises:
        ValueError: state_dtype or channels beside the SSM's in zxbcdt (not supported); shapes that do not fit.
    """
    _refuse(state_dtype=(state_dtype, "states are kept in float32"))
    given = {"zxbcdt": zxbcdt, "conv1d_weight": conv1d_weight, "conv1d_bias": conv1d_bias, "dt_bias": dt_bias, "A": A}
    given |= {"D": D, "initial_states": initial_states, "rmsnorm_weight": rmsnorm_weight}
    given |= {"outproj_weight": outproj_weight, "outproj_bias": outproj_bias}
    _check_layer(given)
    if D.dim() == 1 and headdim is None:
        raise ValueError("headdim is None, expected the head size beside a D of one dimension")
    heads, p = D.shape[0], D.shape[1] if D.dim() == 2 else int(headdim or 0)
    inner, channels = heads * p, conv1d_weight.shape[0]
    _check_sizes(given, inner, channels, heads)
    check_groups(heads, ngroups)
    state = (channels - inner) // 2
    z, x, B, C, dt = split_columns(zxbcdt, (inner, inner, state, state, heads))
    gated = rmsnorm_weight is not None and not norm_before_gate
    wide = D.dim() == 2
    outputs = ssd_mixer(
        *(x, dt, A, B, C, conv1d_weight, conv1d_bias),
        n_groups=ngroups,
        z=z if gated and not wide else None,
        norm_weight=rmsnorm_weight if gated and not wide else None,
        norm_group_size=inner // ngroups,
        norm_eps=rmsnorm_eps,
        D=None if wide else D,
        dt_bias=dt_bias,
        dt_limit=dt_limit,
        activation=_activation(activation),
        initial_states=initial_states,
        seq_idx=seq_idx,
        chunk_size=chunk_size,
        return_final_states=True,
    )
    assert isinstance(outputs, tuple)
    out, final, _ = outputs
    if wide:
        bias = None if conv1d_bias is None else conv1d_bias[:inner]  # convolved again, as the operator returns no x
        xs = causal_conv1d(x, conv1d_weight[:inner], bias, activation=_activation(activation), seq_idx=seq_idx)
        out = (out + xs * D.flatten()).to(out.dtype)  # type: ignore[operator]
        if gated and rmsnorm_weight is not None:
            out = gated_rms_norm(out, z, rmsnorm_weight, group_size=inner // ngroups, eps=rmsnorm_eps)
    if not gated:
        out = _gate(out, z, rmsnorm_weight, inner // ngroups, rmsnorm_eps)
    if outproj_weight is not None:
        out = F.linear(out.to(outproj_weight.dtype), outproj_weight, outproj_bias)
    return (out, final) if return_final_states else out


def _check_layer(given: dict[str, Any]) -> None:
    """What a layer's tensors must be whatever its sizes are."""
    zxbcdt, D, weight = given["zxbcdt"], given["D"], given["outproj_weight"]
    check_tensors(zxbcdt, given, "zxbcdt")
    for name, expected in (("zxbcdt", "b, l, channels"), ("conv1d_weight", "channels, width")):
        if given[name].dim() != expected.count(",") + 1:
            raise ValueError(f"{name} has shape {tuple(given[name].shape)}, expected ({expected})")
    if D.dim() not in (1, 2):
        raise ValueError(f"D has shape {tuple(D.shape)}, expected (heads,) with headdim, or (heads, head_dim)")
    for name in ("dt_bias", "A"):
        expect_shape(name, given[name], (D.shape[0],))
    if weight is not None:
        expect_shape("outproj_bias", given["outproj_bias"], (weight.shape[0],))
    elif given["outproj_bias"] is not None:
        raise ValueError("outproj_bias was given without outproj_weight, expected both or neither")


def _check_sizes(given: dict[str, Any], inner: int, channels: int, heads: int) -> None:
    width, weight = given["zxbcdt"].shape[-1], given["outproj_weight"]
    if width != (expected := inner + channels + heads):
        raise ValueError(
            f"zxbcdt has {width} channels, expected {expected} (z {inner}, xBC {channels}, dt {heads}); "
            "channels beside the SSM's (d_nonssm) are not supported"
        )
    expect_shape("rmsnorm_weight", given["rmsnorm_weight"], (inner,))
    if weight is not None:
        expect_shape("outproj_weight", weight, (weight.shape[0], inner))


def _gate(y: Tensor, z: Tensor, norm_weight: Tensor | None, group_size: int, eps: float) -> Tensor:
    """y·silu(z), y normed before the gate where there is a weight."""
    if norm_weight is None:
        return (y * F.silu(z)).to(y.dtype)
    grouped = y.unflatten(-1, (-1, group_size))
    normal = rms_norm(grouped, norm_weight.new_ones(group_size), eps).flatten(-2)
    return (normal * norm_weight * F.silu(z)).to(y.dtype)


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """One token of decoding; ``state`` is overwritten, as upstream does.

    Args:
        state: (b, h, p, n). x, z: (b, h, p). dt: (b, h, p). A: (h, p, n). B, C: (b, g, n). D, dt_bias: (h, p).
            Mamba-2's decay is one number per head: dt, A and dt_bias have to be expanded views (stride 0 there).

    Returns:
        out (b, h, p).

    Raises:
        ValueError: state_batch_indices, a state without heads (Mamba-1), or dt, A, dt_bias that differ within a head.
    """
    _refuse(state_batch_indices=(state_batch_indices, "index the state before the call"))
    if state.dim() != 4:
        raise ValueError(f"state has shape {tuple(state.shape)}, expected (b, h, p, n): Mamba-1 is not supported")
    b, h, p, n = state.shape
    expect_shape("x", x, (b, h, p))
    for name, tensor, shape in (("A", A, (h, p, n)), ("dt", dt, (b, h, p)), ("D", D, (h, p)), ("z", z, (b, h, p))):
        expect_shape(name, tensor, shape)
    expect_shape("dt_bias", dt_bias, (h, p))
    check_tensors(x, {"D": D, "z": z})
    A_h, dt_bh = _per_head("A", A, 2), _per_head("dt", dt, 1)
    bias = None if dt_bias is None else _per_head("dt_bias", dt_bias, 1)
    y, new_state = ssd_step(state, x, dt_bh, A_h, B, C, dt_bias=bias, dt_softplus=dt_softplus)
    state.copy_(new_state)
    if D is not None:
        y = (y + D * x).to(x.dtype)
    return y if z is None else (y * F.silu(z)).to(x.dtype)


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The depthwise causal convolution as causal_conv1d names it; seq_idx and initial_states may come together.

    Args:
        x: (b, c, l), best with contiguous channels (a transposed (b, l, c)). weight: (c, width). bias: (c,).
        seq_idx: (b, l). initial_states: (b, c, width − 1).
        final_states_out: like them, receives the final states if they are asked for.
        activation: None, "silu" or "swish".

    Returns:
        out (b, c, l), or (out, final states (b, c, width − 1)).

    Raises:
        ValueError: an activation or shapes that do not fit.
    """
    if x.dim() != 3:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (b, c, l)")
    expect_shape("final_states_out", final_states_out, (*x.shape[:2], weight.shape[-1] - 1))
    out, final = _both(
        causal_conv1d(
            *(x.transpose(1, 2), weight, bias),
            activation=_activation(activation),
            seq_idx=seq_idx,
            initial_state=initial_states,
            return_final_state=True,
        )
    )
    out = out.transpose(1, 2)
    if not return_final_states:
        return out
    return out, final if final_states_out is None else final_states_out.copy_(final)


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """One token of the convolution; ``conv_state`` is overwritten, as upstream does.

    Args:
        x: (b, c). conv_state: (b, c, k) with k >= width − 1, the last inputs. weight: (c, width). bias: (c,).

    Returns:
        out (b, c).

    Raises:
        ValueError: cache_seqlens, conv_state_indices or several tokens (not supported); shapes that do not fit.
    """
    _refuse(
        cache_seqlens=(cache_seqlens, "the state holds the last inputs in order"),
        conv_state_indices=(conv_state_indices, "index the state before the call"),
    )
    if x.dim() != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (b, c): one token per call")
    recent = weight.shape[1] - 1
    if conv_state.dim() != 3 or conv_state.shape[2] < recent:
        raise ValueError(f"conv_state has shape {tuple(conv_state.shape)}, expected (b, c, at least {recent})")
    window = conv_state[..., conv_state.shape[2] - recent :]
    y, _ = causal_conv1d_step(x, window, weight, bias, activation=_activation(activation))
    if conv_state.shape[2]:
        conv_state.copy_(torch.cat([conv_state[..., 1:], x.to(conv_state.dtype).unsqueeze(-1)], dim=-1))
    return y


def _refuse(**arguments: tuple[Any, str]) -> None:
    """Refuse every argument that is not None, with what to do instead."""
    for name, (value, instead) in arguments.items():
        if value is not None:
            raise ValueError(f"{name} is not supported: {instead}")


def _activation(activation: str | None) -> str | None:
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"activation={activation!r} is unknown; accepted are 'silu', 'swish' and None")
    return None if activation is None else "silu"


def _per_head(name: str, t: Tensor, inner: int) -> Tensor:
    """The one number per head of a tensor that is expanded over its last ``inner`` dimensions."""
    if t.dim() <= inner or any(
        size > 1 and stride for size, stride in zip(t.shape[-inner:], t.stride()[-inner:], strict=True)
    ):
        raise ValueError(
            f"{name} has shape {tuple(t.shape)} and strides {t.stride()}, expected one number per head, expanded over "
            f"the last {inner} dimension(s): a decay that differs within a head (Mamba-1) is not supported"
        )
    return t[..., 0, 0] if inner == 2 else t[..., 0]


def _both(outputs: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    assert isinstance(outputs, tuple)
    return outputs
