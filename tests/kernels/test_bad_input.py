"""Every public function of kernels/: a tensor that does not fit is refused by name, a view works like its copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polylepis.kernels import compat
from polylepis.kernels.attention import apply_rope, decode_attention, packed_attention
from polylepis.kernels.conv import causal_conv1d, causal_conv1d_step
from polylepis.kernels.norm import gated_rms_norm, rms_norm, rms_norm_residual
from polylepis.kernels.routed_gemm import routed_linear
from polylepis.kernels.ssd import enter, ssd, ssd_core, ssd_mixer, ssd_step, summarise

Arguments = dict[str, Any]
B, L, H, P, G, N, K = 2, 6, 4, 3, 2, 5, 4
INNER, STATE = H * P, G * N
CHANNELS = INNER + 2 * STATE


def new(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def ids() -> Tensor:
    return torch.tensor([[0, 0, 1, 1, 1, -1], [0, 1, 1, 2, 2, 2]])


def scan() -> Arguments:
    names = {"x": new(B, L, H, P), "B": new(B, L, G, N), "C": new(B, L, G, N), "D": new(H), "seq_idx": ids()}
    return {**names, "initial_states": new(B, H, P, N), "chunk_size": 4}


def core() -> Arguments:
    return {**scan(), "log_decay": -new(B, L, H).abs(), "scale": new(B, L, H)}


def whole() -> Arguments:
    return {**scan(), "dt": new(B, L, H), "A": -new(H).abs(), "dt_bias": new(H), "z": new(B, L, H, P)}


def step() -> Arguments:
    per_token = {"x": new(B, H, P), "dt": new(B, H), "B": new(B, G, N), "C": new(B, G, N), "z": new(B, H, P)}
    return {**per_token, "state": new(B, H, P, N), "A": -new(H).abs(), "D": new(H), "dt_bias": new(H)}


def layer() -> Arguments:
    inputs = {"x": new(B, L, INNER), "dt": new(B, L, H), "B": new(B, L, STATE), "C": new(B, L, STATE)}
    weights = {
        "conv_weight": new(CHANNELS, K),
        "conv_bias": new(CHANNELS),
        "norm_weight": new(INNER),
        "A": -new(H).abs(),
    }
    states = {"conv_state": new(B, CHANNELS, K - 1), "initial_states": new(B, H, P, N), "seq_idx": ids()}
    return {**inputs, **weights, **states, "z": new(B, L, INNER), "D": new(H), "dt_bias": new(H), "n_groups": G}


def conv() -> Arguments:
    return {"x": new(B, L, 7), "weight": new(7, K), "bias": new(7), "seq_idx": ids(), "initial_state": new(B, 7, K - 1)}


def segments(entry: Tensor, **given: Any) -> Any:
    segment, kept = summarise(**given)
    return segment.state, segment.log_decay, enter(kept, entry)


def segment() -> Arguments:
    return {k: v for k, v in core().items() if k != "initial_states"} | {"entry": new(B, H, P, N)}


def split_scan() -> Arguments:
    weights = {"conv1d_weight": new(CHANNELS, K), "conv1d_bias": new(CHANNELS), "rmsnorm_weight": new(INNER)}
    rest = {"dt_bias": new(H), "A": -new(H).abs(), "D": new(H), "initial_states": new(B, H, P, N), "seq_idx": ids()}
    last = {"outproj_weight": new(8, INNER), "headdim": P, "ngroups": G, "chunk_size": 4}
    return {"zxbcdt": new(B, L, INNER + CHANNELS + H), **weights, **rest, **last}


CASES: dict[str, tuple[Callable[..., Any], Callable[[], Arguments]]] = {
    "ssd": (ssd, whole),
    "ssd_core": (ssd_core, core),
    "ssd_step": (ssd_step, step),
    "ssd_mixer": (ssd_mixer, layer),
    "segments": (segments, segment),
    "causal_conv1d": (causal_conv1d, conv),
    "causal_conv1d_step": (
        causal_conv1d_step,
        lambda: {"x": new(B, 7), "state": new(B, 7, K - 1), "weight": new(7, K), "bias": new(7)},
    ),
    "rms_norm": (rms_norm, lambda: {"x": new(B, L, 8), "weight": new(8)}),
    "rms_norm_residual": (
        rms_norm_residual,
        lambda: {"x": new(B, L, 8), "residual": new(B, L, 8), "weight": new(8)},
    ),
    "gated_rms_norm": (
        gated_rms_norm,
        lambda: {"x": new(B, L, 8), "z": new(B, L, 8), "weight": new(8), "group_size": 4},
    ),
    "packed_attention": (
        packed_attention,
        lambda: {"q": new(L, H, 8), "k": new(L, 2, 8), "v": new(L, 2, 8), "boundaries": [0, 4, L]},
    ),
    "decode_attention": (
        decode_attention,
        lambda: {
            **{"q": new(B, 2, H, 8), "k_cache": new(B, L, 2, 8), "v_cache": new(B, L, 2, 8)},
            "key_mask": torch.ones(B, L, dtype=torch.bool),
        },
    ),
    "apply_rope": (apply_rope, lambda: {"x": new(L, H, 8), "position_ids": torch.arange(L)}),
    "routed_linear": (routed_linear, lambda: {"x": new(L, 5), "weight": new(2, 7, 5), "counts": [4, 2]}),
    "mamba_chunk_scan_combined": (compat.mamba_chunk_scan_combined, whole),
    "mamba_split_conv1d_scan_combined": (compat.mamba_split_conv1d_scan_combined, split_scan),
    "causal_conv1d_fn": (
        compat.causal_conv1d_fn,
        lambda: {
            "x": new(B, 7, L),
            "weight": new(7, K),
            "bias": new(7),
            "seq_idx": ids(),
            "initial_states": new(B, 7, 3),
        },
    ),
    "causal_conv1d_update": (
        compat.causal_conv1d_update,
        lambda: {"x": new(B, 7), "conv_state": new(B, 7, K), "weight": new(7, K), "bias": new(7)},
    ),
    "selective_state_update": (
        compat.selective_state_update,
        lambda: {
            **{"state": new(B, H, P, N), "x": new(B, H, P), "dt": new(B, H, 1).expand(B, H, P), "z": new(B, H, P)},
            **{"A": (-new(H, 1, 1).abs()).expand(H, P, N), "B": new(B, G, N), "C": new(B, G, N), "D": new(H, P)},
        },
    ),
}
# how other arguments speak of a tensor that alone does not fit
OTHER_NAMES = {
    **{"v": "v", "k_cache": "k", "v_cache": "v", "conv_weight": "weight", "conv_bias": "bias"},
    **{"conv1d_weight": "weight", "conv1d_bias": "bias", "initial_states": "initial_state", "conv_state": "state"},
}


def shorter(t: Tensor, dim: int) -> Tensor:
    return t.narrow(dim % t.dim(), 0, t.shape[dim % t.dim()] - 1)


WRONG: dict[str, Callable[[Tensor, int], Tensor]] = {
    "one dimension more": lambda t, dim: t.unsqueeze(dim % (t.dim() + 1)),
    "another device": lambda t, dim: t.to("meta"),
    "another kind of number": lambda t, dim: t.long() if t.is_floating_point() else t.double(),
    "shorter": shorter,
}


def transposed(t: Tensor, dim: int) -> Tensor:
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def strided(t: Tensor, dim: int) -> Tensor:
    dim %= t.dim()
    return torch.stack([t, ~t if t.dtype == torch.bool else t + 1], dim=dim + 1).flatten(dim, dim + 1)[
        (slice(None),) * dim + (slice(None, None, 2),)
    ]


def sliced(t: Tensor, dim: int) -> Tensor:
    dim %= t.dim()
    return torch.cat([t[(slice(None),) * dim + (slice(0, 1),)], t], dim=dim).narrow(dim, 1, t.shape[dim])


VIEWS = {"transposed": transposed, "every other element": strided, "behind an offset": sliced}


def outputs(value: Any) -> tuple[Tensor, ...]:
    return tuple(value) if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_what_does_not_fit_is_refused_by_name(name: str, data: st.DataObject) -> None:
    function, draw = CASES[name]
    arguments = draw()
    tensors = [key for key, value in arguments.items() if isinstance(value, Tensor)]
    key, change = data.draw(st.sampled_from(tensors)), data.draw(st.sampled_from(sorted(WRONG)))
    arguments[key] = WRONG[change](arguments[key], data.draw(st.integers(0, 3)))
    if change == "another kind of number" and key == "key_mask":
        arguments[key] = arguments[key].long()
    try:
        outputs(function(**arguments))
    except ValueError as error:
        message = str(error)
        named = [k for k in (*tensors, *OTHER_NAMES.values()) if k in message]
        assert (named and "expected" in message) or "do not" in message or "does not" in message, message
        return
    # what is shorter may fit, a narrower weight for one; norms take any number of leading dimensions
    assert change == "shorter" or (name == "rms_norm" and change == "one dimension more"), (key, change)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", CASES)
def test_views_work_like_their_copies(name: str, view: str) -> None:
    """All arguments are views at once, in every dimension in turn; expanded dt and A have to stay so."""
    function, draw = CASES[name]
    want = outputs(function(**draw()))
    for dim in range(4):
        arguments = draw()
        for key, value in arguments.items():
            if isinstance(value, Tensor) and 0 not in value.stride():
                arguments[key] = VIEWS[view](value, dim)
                assert torch.equal(arguments[key], value)
        for a, b in zip(outputs(function(**arguments)), want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
