"""The upstream names against our oracles: signatures, values, in-place updates and refusals by name."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from polylepis.kernels import compat
from polylepis.kernels.conv import causal_conv1d
from polylepis.kernels.ssd import ssd_reference

# state-spaces/mamba 2.3 and causal-conv1d 1.6, in order
UPSTREAM = {
    "mamba_chunk_scan_combined": "x dt A B C chunk_size D z dt_bias initial_states seq_idx cu_seqlens dt_softplus "
    "dt_limit return_final_states return_varlen_states state_dtype",
    "mamba_split_conv1d_scan_combined": "zxbcdt conv1d_weight conv1d_bias dt_bias A D chunk_size initial_states "
    "seq_idx dt_limit return_final_states activation rmsnorm_weight rmsnorm_eps outproj_weight outproj_bias headdim "
    "ngroups norm_before_gate state_dtype",
    "selective_state_update": "state x dt A B C D z dt_bias dt_softplus state_batch_indices",
    "causal_conv1d_fn": "x weight bias seq_idx initial_states return_final_states final_states_out activation",
    "causal_conv1d_update": "x conv_state weight bias activation cache_seqlens conv_state_indices",
}


def new(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("name", UPSTREAM)
def test_signatures(name: str) -> None:
    assert list(inspect.signature(getattr(compat, name)).parameters) == UPSTREAM[name].split()


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
    with pytest.raises(ValueError, match="cache_seqlens is not supported"):
        compat.causal_conv1d_update(new(1, 2), new(1, 2, 3), new(2, 4), cache_seqlens=torch.zeros(1))
    with pytest.raises(ValueError, match="activation='gelu' is unknown"):
        compat.causal_conv1d_fn(new(1, 2, 5), new(2, 4), activation="gelu")
