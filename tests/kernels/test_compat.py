"""The upstream names against our oracles: signatures, values, in-place updates and refusals by name."""

from __future__ import annotations

import inspect
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from polylepis.kernels import compat
from polylepis.kernels.conv import causal_conv1d
from polylepis.kernels.ssd import ssd_reference

# state-spaces/mamba 2.3 and causal-conv1d 1.6, in order; the defaults follow the names that have one
ENDLESS = (0.0, float("inf"))
UPSTREAM: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba_chunk_scan_combined": (
        "x dt A B C chunk_size D z dt_bias initial_states seq_idx cu_seqlens dt_softplus dt_limit return_final_states "
        "return_varlen_states state_dtype",
        {
            **dict.fromkeys(("D", "z", "dt_bias", "initial_states", "seq_idx", "cu_seqlens", "state_dtype")),
            **dict.fromkeys(("dt_softplus", "return_final_states", "return_varlen_states"), False),
            "dt_limit": ENDLESS,
        },
    ),
    "mamba_split_conv1d_scan_combined": (
        "zxbcdt conv1d_weight conv1d_bias dt_bias A D chunk_size initial_states seq_idx dt_limit return_final_states "
        "activation rmsnorm_weight rmsnorm_eps outproj_weight outproj_bias headdim ngroups norm_before_gate "
        "state_dtype",
        {
            **dict.fromkeys(("initial_states", "seq_idx", "rmsnorm_weight", "outproj_weight", "outproj_bias")),
            **{"headdim": None, "state_dtype": None, "dt_limit": ENDLESS, "return_final_states": False},
            **{"activation": "silu", "rmsnorm_eps": 1e-6, "ngroups": 1, "norm_before_gate": True},
        },
    ),
    "selective_state_update": (
        "state x dt A B C D z dt_bias dt_softplus state_batch_indices",
        {"D": None, "z": None, "dt_bias": None, "dt_softplus": False, "state_batch_indices": None},
    ),
    "rmsnorm_fn": (
        "x weight bias z eps group_size norm_before_gate",
        {"z": None, "eps": 1e-6, "group_size": None, "norm_before_gate": True},
    ),
    "causal_conv1d_fn": (
        "x weight bias seq_idx initial_states return_final_states final_states_out activation",
        {
            **dict.fromkeys(("bias", "seq_idx", "initial_states", "final_states_out", "activation")),
            "return_final_states": False,
        },
    ),
    "causal_conv1d_update": (
        "x conv_state weight bias activation cache_seqlens conv_state_indices",
        dict.fromkeys(("bias", "activation", "cache_seqlens", "conv_state_indices")),
    ),
    "causal_conv1d_varlen_states": ("x cu_seqlens state_len", {}),
    "RMSNormGated": (
        "hidden_size eps group_size norm_before_gate device dtype",
        {"eps": 1e-5, "group_size": None, "norm_before_gate": True, "device": None, "dtype": None},
    ),
}


def new(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("name", UPSTREAM)
def test_signatures(name: str) -> None:
    parameters = inspect.signature(getattr(compat, name)).parameters
    names, defaults = UPSTREAM[name]
    assert list(parameters) == names.split()
    assert {k: p.default for k, p in parameters.items() if p.default is not p.empty} == defaults


@pytest.mark.parametrize("wide", [False, True])
def test_chunk_scan(wide: bool) -> None:
    b, l, h, p, g, n = 2, 21, 4, 3, 2, 5
    x, z, dt, B, C = new(b, l, h, p), new(b, l, h, p), new(b, l, h), new(b, l, g, n), new(b, l, g, n)
    A, D, start = -torch.rand(h, dtype=torch.float64), new(h, p) if wide else new(h), new(b, h, p, n)
    ids = torch.tensor([0] * 9 + [1] * 10 + [-1] * 2).expand(b, l)
    options: dict[str, Any] = {
        "dt_softplus": True,
        "initial_states": start,
        "seq_idx": ids,
        "return_final_states": True,
    }
    got, final = compat.mamba_chunk_scan_combined(x, dt, A, B, C, 8, D=D, z=z, dt_bias=new(h) * 0, **options)
    want, want_final = ssd_reference(x, dt, A, B, C, **options)
    skip = D if wide else D[:, None]
    want = (want + skip * x * (ids >= 0)[..., None, None]) * F.silu(z)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(final, want_final)


@pytest.mark.parametrize("norm", [None, "before", "after"])
def test_split_conv_scan(norm: str | None) -> None:
    b, l, h, p, g, n = 2, 13, 4, 4, 2, 3
    inner, channels = h * p, h * p + 2 * g * n
    zxbcdt, weight, bias = new(b, l, inner + channels + h), new(channels, 4), new(channels)
    dt_bias, A, D, scale, out_weight = new(h), -torch.rand(h, dtype=torch.float64), new(h), new(inner), new(7, inner)
    got = compat.mamba_split_conv1d_scan_combined(
        *(zxbcdt, weight, bias, dt_bias, A, D, 8),
        rmsnorm_weight=None if norm is None else scale,
        outproj_weight=out_weight,
        headdim=p,
        ngroups=g,
        norm_before_gate=norm == "before",
    )
    z, xBC, dt = zxbcdt.split((inner, channels, h), dim=-1)
    x, B, C = causal_conv1d(xBC, weight, bias).split((inner, g * n, g * n), dim=-1)
    x, B, C = x.unflatten(-1, (h, p)), B.unflatten(-1, (g, n)), C.unflatten(-1, (g, n))
    y = ssd_reference(x, dt, A, B, C, D=D, dt_bias=dt_bias, dt_softplus=True).flatten(-2)

    def grouped(v: Tensor) -> Tensor:
        parts = v.unflatten(-1, (g, -1))
        return (parts / (parts.square().mean(-1, keepdim=True) + 1e-6).sqrt()).flatten(-2) * scale

    gate = F.silu(z)
    y = y * gate if norm is None else grouped(y) * gate if norm == "before" else grouped(y * gate)
    torch.testing.assert_close(got, y @ out_weight.T)


@pytest.mark.parametrize("norm", [None, False, True])
def test_split_conv_scan_with_a_skip_per_channel(norm: bool | None) -> None:
    """Like the skip per head where its channels agree; the final states come second, and only if asked for."""
    b, l, h, p, g, n = 1, 9, 4, 4, 2, 3
    inner, channels = h * p, h * p + 2 * g * n
    common = (new(b, l, inner + channels + h), new(channels, 4), new(channels), new(h), -new(h).abs())
    options: dict[str, Any] = {"ngroups": g, "initial_states": new(b, h, p, n)}
    if norm is not None:
        options |= {"rmsnorm_weight": new(inner), "norm_before_gate": norm}
    D = new(h)
    want, final = compat.mamba_split_conv1d_scan_combined(
        *(*common, D, 4), headdim=p, return_final_states=True, **options
    )
    wide = D[:, None].expand(h, p).contiguous()
    got, again = compat.mamba_split_conv1d_scan_combined(*common, wide, 4, return_final_states=True, **options)
    torch.testing.assert_close(got, want)
    assert torch.equal(again, final) and final.shape == (b, h, p, n)
    alone = compat.mamba_split_conv1d_scan_combined(*common, wide, 4, **options)
    assert isinstance(alone, Tensor) and torch.equal(alone, got)


def test_decoding_overwrites_the_states() -> None:
    b, h, p, g, n = 2, 4, 3, 2, 5
    state, x, z, B, C = new(b, h, p, n), new(b, h, p), new(b, h, p), new(b, g, n), new(b, g, n)
    A, dt, bias, D = -torch.rand(h, dtype=torch.float64), new(b, h), new(h), new(h, p)
    want, final = ssd_reference(
        *(t[:, None] for t in (x, dt)),
        A,
        *(t[:, None] for t in (B, C)),
        dt_bias=bias,
        dt_softplus=True,
        initial_states=state,
        return_final_states=True,
    )
    got = compat.selective_state_update(
        state,
        x,
        dt[..., None].expand(b, h, p),
        A[:, None, None].expand(h, p, n),
        *(B, C, D, z),
        dt_bias=bias[:, None].expand(h, p),
        dt_softplus=True,
    )
    torch.testing.assert_close(got, (want[:, 0] + D * x) * F.silu(z))
    torch.testing.assert_close(state, final)
    inputs, weight = new(b, 6, 9), new(6, 4)
    want = compat.causal_conv1d_fn(inputs, weight, activation="swish")
    held = torch.zeros(b, 6, 5, dtype=torch.float64)
    for t in range(9):
        got = compat.causal_conv1d_update(inputs[..., t], held, weight, activation="silu")
        torch.testing.assert_close(got, want[..., t])
    torch.testing.assert_close(held, inputs[..., 4:])


def decode_arguments(b: int, h: int, p: int, g: int, n: int) -> dict[str, Tensor]:
    """As Mamba2.step of mamba_ssm expands them."""
    A, dt, bias, D = -torch.rand(h, dtype=torch.float64), new(b, h), new(h), new(h)
    return {
        **{"x": new(b, h, p), "dt": dt[..., None].expand(b, h, p), "A": A[:, None, None].expand(h, p, n)},
        **{"B": new(b, g, n), "C": new(b, g, n), "D": D[:, None].expand(h, p), "z": new(b, h, p)},
        "dt_bias": bias[:, None].expand(h, p),
    }


@pytest.mark.parametrize("skip", ["per head", "per channel", "none"])
def test_states_by_index_and_padding_that_touches_none(skip: str) -> None:
    b, h, p, n = 3, 4, 3, 5
    given, state = decode_arguments(b, h, p, 2, n), new(6, h, p, n)
    given["D"] = new(h, p) if skip == "per channel" else given["D"]
    if skip == "none":
        del given["D"], given["z"]
    places = torch.tensor([4, -1, 0], dtype=torch.int32)
    given["x"][1] = float("nan")  # padding may hold anything
    dt = F.softplus(given["dt"] + given["dt_bias"])
    B, C = (given[k].repeat_interleave(2, dim=1) for k in "BC")
    moved = state[[4, 5, 0]] * (dt[..., None] * given["A"]).exp() + (dt * given["x"])[..., None] * B[:, :, None]
    want = (moved * C[:, :, None]).sum(-1)
    if skip != "none":
        want = (want + given["D"] * given["x"]) * F.silu(given["z"])
    want[1] = 0
    after = state.clone()
    after[4], after[0] = moved[0], moved[2]
    got = compat.selective_state_update(state, **given, dt_softplus=True, state_batch_indices=places)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(state, after)


def test_decoding_keeps_no_graph() -> None:
    """As upstream: a state that remembered its past would grow with every token."""
    given, state = decode_arguments(2, 4, 3, 2, 5), new(2, 4, 3, 5)
    given["x"].requires_grad_()
    assert not compat.selective_state_update(state, **given).requires_grad and not state.requires_grad
    weight, held = new(6, 4).requires_grad_(), new(2, 6, 4)
    assert not compat.causal_conv1d_update(new(2, 6), held, weight).requires_grad and not held.requires_grad


@pytest.mark.parametrize("length", [3, 4, 7])
def test_circular_convolution_states(length: int) -> None:
    """By place in a larger cache, each row at its own point of the circle; padding gives 0 and touches nothing."""
    inputs, weight, bias = new(3, 6, 12), new(6, 4), new(6)
    want = compat.causal_conv1d_fn(inputs, weight, bias, activation="silu")
    assert isinstance(want, Tensor)
    cache = torch.zeros(5, 6, length, dtype=torch.float64)
    cache[2] = 7
    places = torch.tensor([3, -1, 0], dtype=torch.int32)
    behind = torch.tensor([0, 0, 2])  # the third row starts two tokens later
    cache[0, :, :2] = inputs[2, :, :2]
    for t in range(10):
        seen = (behind + t).to(torch.int32)
        x = torch.stack([inputs[row, :, behind[row] + t] for row in range(3)])
        got = compat.causal_conv1d_update(x, cache, weight, bias, "silu", seen, places)
        torch.testing.assert_close(got[0], want[0, :, t])
        torch.testing.assert_close(got[2], want[2, :, t + 2])
        assert (got[1] == 0).all()
    assert (cache[[1, 4]] == 0).all() and (cache[2] == 7).all()
    for row, place, end in ((0, 3, 10), (2, 0, 12)):
        for position in range(end - length, end):
            torch.testing.assert_close(cache[place, :, position % length], inputs[row, :, position])


@pytest.mark.parametrize("state_len", [1, 3, 6])
def test_states_of_packed_sequences(state_len: int) -> None:
    x, ends = new(11, 4), [0, 2, 2, 7, 11]
    got = compat.causal_conv1d_varlen_states(x, torch.tensor(ends, dtype=torch.int32), state_len)
    want = torch.zeros(4, 4, state_len, dtype=torch.float64)
    for row, (start, end) in enumerate(pairwise(ends)):
        for back in range(1, min(state_len, end - start) + 1):
            want[row, :, -back] = x[end - back]
    assert torch.equal(got, want)


@pytest.mark.parametrize("group", [None, 4])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("gated, biased", [(True, False), (False, True), (True, True)])
def test_gated_norm(group: int | None, before: bool, gated: bool, biased: bool) -> None:
    x, z, weight, bias = (t.requires_grad_() for t in (new(2, 3, 12), new(2, 3, 12), new(12), new(12)))
    used = [x, weight, *([z] if gated else []), *([bias] if biased else [])]
    got = compat.rmsnorm_fn(x, weight, bias if biased else None, z if gated else None, 1e-3, group, before)
    v = x * F.silu(z) if gated and not before else x
    parts = [part / (part.square().mean(-1, keepdim=True) + 1e-3).sqrt() for part in v.split(group or 12, dim=-1)]
    want = torch.cat(parts, dim=-1) * weight + (bias if biased else 0)
    want = want * F.silu(z) if gated and before else want
    pull = new(2, 3, 12)
    for a, b in zip(
        (got, *torch.autograd.grad((got * pull).sum(), used)),
        (want, *torch.autograd.grad((want * pull).sum(), used)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_norm_module() -> None:
    norm = compat.RMSNormGated(12, group_size=4, norm_before_gate=False, dtype=torch.float64)
    assert list(norm.state_dict()) == ["weight"] and (norm.weight == 1).all()
    x, z = new(2, 12), new(2, 12)
    torch.testing.assert_close(norm(x, z), compat.rmsnorm_fn(x, norm.weight, None, z, 1e-5, 4, False))
    torch.testing.assert_close(norm(x), compat.rmsnorm_fn(x, norm.weight, None, None, 1e-5, 4))


def test_dtypes_of_results() -> None:
    """Outputs as x, final states of the scan in float32 whatever the initial ones are, of the convolution as x."""
    x, dt, B = new(1, 6, 2, 4).bfloat16(), new(1, 6, 2).bfloat16(), new(1, 6, 1, 8).bfloat16()
    A, start = -torch.rand(2), new(1, 2, 4, 8).bfloat16()
    out, final = compat.mamba_chunk_scan_combined(x, dt, A, B, B, 4, initial_states=start, return_final_states=True)
    assert (out.dtype, final.dtype) == (torch.bfloat16, torch.float32)
    inputs = new(1, 3, 6).bfloat16()
    out, final = compat.causal_conv1d_fn(inputs, new(3, 4).float(), return_final_states=True)
    assert (out.dtype, final.dtype) == (torch.bfloat16, torch.bfloat16)
    assert compat.causal_conv1d_update(inputs[..., 0], final, new(3, 4).float()).dtype == torch.bfloat16
    assert compat.rmsnorm_fn(x, torch.ones(4), None, x).dtype == torch.bfloat16


def test_convolution() -> None:
    x, weight, bias, start = new(2, 6, 9), new(6, 3), new(6), new(2, 6, 2)
    kept = torch.empty(2, 6, 2, dtype=torch.float64)
    out, final = compat.causal_conv1d_fn(
        x, weight, bias, initial_states=start, return_final_states=True, final_states_out=kept
    )
    want = F.conv1d(torch.cat([start, x], -1), weight[:, None], bias, groups=6)
    torch.testing.assert_close(out, want)
    assert final is kept and torch.equal(kept, x[..., -2:])


def test_refusals_by_name() -> None:
    x, dt, A, B = new(1, 4, 2, 3), new(1, 4, 2), -torch.rand(2, dtype=torch.float64), new(1, 4, 1, 5)
    for change in (
        {"cu_seqlens": torch.tensor([0, 4])},
        {"return_varlen_states": True},
        {"state_dtype": torch.float32},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(change))} is not supported"):
            compat.mamba_chunk_scan_combined(x, dt, A, B, B, 8, **change)
    ids = torch.tensor([[0, 0, 1, 1]])  # name the documents; cu_seqlens beside them only asks for states
    beside = compat.mamba_chunk_scan_combined(x, dt, A, B, B, 8, seq_idx=ids, cu_seqlens=torch.tensor([0, 2, 4]))
    assert torch.equal(beside, compat.mamba_chunk_scan_combined(x, dt, A, B, B, 8, seq_idx=ids))
    with pytest.raises(ValueError, match="outproj_bias was given without outproj_weight"):
        compat.mamba_split_conv1d_scan_combined(
            new(1, 4, 99), new(16, 4), None, new(2), A, new(2, 3), 8, outproj_bias=new(3)
        )
    with pytest.raises(ValueError, match="D has shape"):
        compat.mamba_chunk_scan_combined(x, dt, A, B, B, 8, D=new(2, 4))
    with pytest.raises(ValueError, match="d_nonssm"):
        compat.mamba_split_conv1d_scan_combined(new(1, 4, 99), new(16, 4), None, new(2), A, new(2, 3), 8)
    state = new(1, 2, 3, 5)
    with pytest.raises(ValueError, match=r"A has shape .*Mamba-1"):
        compat.selective_state_update(state, x[:, 0], x[:, 0], new(2, 3, 5), B[:, 0], B[:, 0])
    with pytest.raises(ValueError, match="Mamba-1 is not supported"):
        compat.selective_state_update(state[0], x[:, 0], x[:, 0], new(2, 3, 5), B[:, 0], B[:, 0])
    for name in ("cache_seqlens", "conv_state_indices"):
        with pytest.raises(ValueError, match=f"{name} has"):
            compat.causal_conv1d_update(new(1, 2), new(1, 2, 3), new(2, 4), **{name: torch.zeros(1)})
    with pytest.raises(ValueError, match="one token per call"):
        compat.causal_conv1d_update(new(1, 2, 3), new(1, 2, 3), new(2, 4))
    with pytest.raises(ValueError, match="bias has shape"):
        compat.rmsnorm_fn(new(2, 4), new(4), new(3))
    with pytest.raises(ValueError, match="cu_seqlens has"):
        compat.causal_conv1d_varlen_states(new(5, 2), torch.tensor([0.0, 5.0]), 3)
    with pytest.raises(ValueError, match="activation='gelu' is unknown"):
        compat.causal_conv1d_fn(new(1, 2, 5), new(2, 4), activation="gelu")
