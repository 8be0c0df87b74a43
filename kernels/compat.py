"""The names and signatures of mamba_ssm and causal_conv1d over our kernels: a user changes one import line.

Signatures: state-spaces/mamba 2.3 (``ops/triton/ssd_combined.py``, ``selective_state_update.py`` and
``layernorm_gated.py``, whose ``RMSNorm`` is RMSNormGated here) and Dao-AILab causal-conv1d 1.6
(``causal_conv1d_interface.py``, ``causal_conv1d_varlen.py``). What is not supported raises ValueError with its name.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .columns import split_columns
from .conv import causal_conv1d, causal_conv1d_step
from .norm import gated_rms_norm, grouped_norm
from .operators import check_ids, check_tensors
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
        initial_states: (b, h, p, n). seq_idx: (b, l). cu_seqlens: ignored beside a seq_idx, as upstream does where
            no states of sequences are asked for.

    Returns:
        out (b, l, h, p), or (out, final states (b, h, p, n) float32) with ``return_final_states``.

    Raises:
        ValueError: cu_seqlens without seq_idx, which upstream would ignore as well; return_varlen_states or
            state_dtype (not supported); shapes that do not fit.
    """
    packed = cu_seqlens if seq_idx is None else None
    _refuse(
        cu_seqlens=(packed, "name documents by seq_idx, or call polylepis.kernels.ssd.ssd, which takes cu_seqlens"),
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
    inner, state = heads * p, (conv1d_weight.shape[0] - heads * p) // 2
    _check_sizes(given, inner, conv1d_weight.shape[0], heads)
    check_groups(heads, ngroups)
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
        return_final_states=return_final_states,
    )
    out, final, _ = outputs if isinstance(outputs, tuple) else (outputs, None, None)
    if wide:
        bias = None if conv1d_bias is None else conv1d_bias[:inner]  # convolved again, as the operator returns no x
        xs = causal_conv1d(x, conv1d_weight[:inner], bias, activation=_activation(activation), seq_idx=seq_idx)
        out = (out + xs * D.flatten()).to(out.dtype)  # type: ignore[operator]
        if gated and rmsnorm_weight is not None:
            out = gated_rms_norm(out, z, rmsnorm_weight, group_size=inner // ngroups, eps=rmsnorm_eps)
    if rmsnorm_weight is None:
        out = (out * F.silu(z)).to(out.dtype)
    elif not gated:
        out = rmsnorm_fn(out, rmsnorm_weight, None, z, rmsnorm_eps, inner // ngroups)
    if outproj_weight is not None:
        out = F.linear(out.to(outproj_weight.dtype), outproj_weight, outproj_bias)
    return out if final is None else (out, final)


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


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """norm(x)·weight + bias, gated: times silu(z) after it (``norm_before_gate``), or the norm of x·silu(z).

    Args:
        x, z: (..., d). weight, bias: (d,). group_size: divides d, each group is normed by itself; None is d.

    Returns:
        Like x.

    Raises:
        ValueError: shapes or group_size that do not fit.
    """
    expect_shape("bias", bias, tuple(x.shape[-1:]))
    expect_shape("z", z, tuple(x.shape))
    check_tensors(x, {"bias": bias, "z": z})
    first = None if norm_before_gate else z
    y = grouped_norm(x, first, weight, x.shape[-1] if group_size is None else group_size, eps)
    if bias is not None:
        y = (y + bias).to(x.dtype)
    return y if z is None or not norm_before_gate else (y * F.silu(z)).to(x.dtype)


class RMSNormGated(torch.nn.Module):
    """The module around :func:`rmsnorm_fn`, with the parameters of upstream's: a weight of ones and no bias."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        torch.nn.init.ones_(self.weight)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        return rmsnorm_fn(x, self.weight, None, z, self.eps, self.group_size, self.norm_before_gate)


@torch.no_grad()
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
    """One token of decoding; ``state`` is overwritten and nothing has gradients, as upstream.

    Args:
        state: (b, h, p, n). x, z: (b, h, p). dt: (b, h, p). A: (h, p, n). B, C: (b, g, n). D, dt_bias: (h, p).
            Mamba-2's decay is one number per head: dt, A and dt_bias have to be expanded views (stride 0 there).
        state_batch_indices: (b,) rows of a larger ``state``, no row twice; a negative one is padding: its output is 0
            and no state changes.

    Returns:
        out (b, h, p).

    Raises:
        ValueError: a state without heads (Mamba-1), or dt, A, dt_bias that differ within a head.
    """
    if state.dim() != 4:
        raise ValueError(f"state has shape {tuple(state.shape)}, expected (b, h, p, n): Mamba-1 is not supported")
    _, h, p, n = state.shape
    b = state.shape[0] if state_batch_indices is None else x.shape[0]
    expect_shape("x", x, (b, h, p))
    check_ids("state_batch_indices", state_batch_indices, (b,), x.device)
    for name, tensor, shape in (("A", A, (h, p, n)), ("dt", dt, (b, h, p)), ("D", D, (h, p)), ("z", z, (b, h, p))):
        expect_shape(name, tensor, shape)
    expect_shape("dt_bias", dt_bias, (h, p))
    check_tensors(x, {"D": D, "z": z})
    A_h, dt_bh = _per_head("A", A, 2), _per_head("dt", dt, 1)
    bias = None if dt_bias is None else _per_head("dt_bias", dt_bias, 1)
    fused = D is None or D.stride(-1) == 0  # the step's skip is one number per head, and its gate comes after it
    y, _ = ssd_step(
        *(state, x, dt_bh, A_h, B, C),
        D=D[:, 0] if D is not None and fused else None,
        z=z if fused else None,
        dt_bias=bias,
        dt_softplus=dt_softplus,
        in_place=True,
        places=state_batch_indices,
    )
    if D is None or fused:
        return y
    y = (y + D * x).to(x.dtype)
    y = y if z is None else (y * F.silu(z)).to(x.dtype)
    return y if state_batch_indices is None else torch.where((state_batch_indices >= 0)[:, None, None], y, 0)


def _rows(state: Tensor, indices: Tensor | None) -> Tensor:
    """The rows at ``indices``, any row for a negative one."""
    return state if indices is None else state[indices.clamp(min=0).long()]


def _overwrite(state: Tensor, rows: Tensor, y: Tensor, indices: Tensor | None) -> Tensor:
    """Write ``rows`` where :func:`_rows` found them; y, 0 where an index is negative."""
    if indices is None:
        state.copy_(rows)
        return y
    real = indices >= 0
    state[indices[real].long()] = rows[real].to(state.dtype)
    return torch.where(real.view(-1, *(1,) * (y.dim() - 1)), y, 0)


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
    outputs = causal_conv1d(
        *(x.transpose(1, 2), weight, bias),
        activation=_activation(activation),
        seq_idx=seq_idx,
        initial_state=initial_states,
        return_final_state=return_final_states,
    )
    if isinstance(outputs, Tensor):
        return outputs.transpose(1, 2)
    out, final = outputs
    return out.transpose(1, 2), final if final_states_out is None else final_states_out.copy_(final)


@torch.no_grad()
def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """One token of the convolution; ``conv_state`` is overwritten and nothing has gradients, as upstream.

    Args:
        x: (b, c). conv_state: (b, c, k) with k >= width − 1, the last inputs. weight: (c, width). bias: (c,).
        cache_seqlens: (b,) tokens before this one; token t is at place t modulo k of ``conv_state``, a circular
            buffer. Without it the last input is at the last place.
        conv_state_indices: (b,) rows of a larger ``conv_state``, no row twice; a negative one is padding: its output
            is 0 and no state changes.

    Returns:
        out (b, c).

    Raises:
        ValueError: several tokens (not supported); shapes that do not fit.
    """
    if x.dim() != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (b, c): one token per call")
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected (c, width)")
    recent, last = weight.shape[1] - 1, conv_state.shape[-1]
    if conv_state.dim() != 3 or last < max(recent, cache_seqlens is not None):
        raise ValueError(f"conv_state has shape {tuple(conv_state.shape)}, expected (b, c, at least {recent})")
    for name, ids in (("cache_seqlens", cache_seqlens), ("conv_state_indices", conv_state_indices)):
        check_ids(name, ids, (x.shape[0],), x.device)
    held, token = _rows(conv_state, conv_state_indices), x.unsqueeze(-1).to(conv_state.dtype)
    if cache_seqlens is None:
        window = held[..., last - recent :]
    else:
        ago = torch.arange(-recent, 1, device=x.device) + cache_seqlens.long().unsqueeze(1)
        places = ago.remainder(last).unsqueeze(1).expand(-1, held.shape[1], -1)
        window = held.gather(2, places[..., :recent])
    y, _ = causal_conv1d_step(x, window, weight, bias, activation=_activation(activation))
    if cache_seqlens is not None:
        held = held.scatter(2, places[..., recent:], token)
    elif last:
        held = torch.cat([held[..., 1:], token], dim=-1)
    return _overwrite(conv_state, held, y, conv_state_indices)


@torch.no_grad()
def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """The last ``state_len`` inputs of every packed sequence, zeros before its first; no gradients.

    Args:
        x: (tokens, c). cu_seqlens: (b + 1,) integers, the cumulative lengths from 0.

    Returns:
        (b, c, state_len) in x's dtype.

    Raises:
        ValueError: shapes that do not fit.
    """
    if x.dim() != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (tokens, c)")
    check_ids("cu_seqlens", cu_seqlens, (max(1, cu_seqlens.numel()),), x.device)
    bounds = cu_seqlens.long()
    places = bounds[1:, None] + torch.arange(-state_len, 0, device=x.device)
    inside = places >= bounds[:-1, None]
    return torch.where(inside.unsqueeze(-1), x[places.clamp(min=0)], 0).transpose(1, 2)


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
