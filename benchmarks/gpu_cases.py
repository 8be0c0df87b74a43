"""What benchmarks.gpu times: our kernels and layer, and the peers', each built on the same inputs.

A case is a function of the sizes that returns (forward, inputs): a closure without arguments and the tensors whose
gradients its backward computes. Peers are imported inside their cases: a process runs the cases of one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Sizes(NamedTuple):
    """b batch, l length, d model, h heads, p head_dim, g groups, n state."""

    b: int
    l: int
    d: int = 4096
    h: int = 128
    p: int = 64
    g: int = 8
    n: int = 128

    @property
    def inner(self) -> int:
        return self.h * self.p

    @property
    def conv(self) -> int:
        return self.inner + 2 * self.g * self.n


Built = tuple[Callable[[], Any], list[Tensor]]
Case = Callable[[Sizes, torch.device, torch.dtype], Built]


def fresh(*shape: int, device: torch.device, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype).mul_(scale).requires_grad_()


def scan_inputs(s: Sizes, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """x, dt, A, B, C, D, dt_bias in training's ranges: dt about 0.001 … 0.1, A −1 … −16."""
    low = {"device": device, "dtype": dtype}
    single: dict[str, Any] = {"device": device, "dtype": torch.float32}
    t = {"x": fresh(s.b, s.l, s.h, s.p, **low), "dt": fresh(s.b, s.l, s.h, **low)}
    t["A"] = (-torch.linspace(1, 16, s.h, **single)).requires_grad_()
    t["B"], t["C"] = (fresh(s.b, s.l, s.g, s.n, **low, scale=s.n**-0.5) for _ in range(2))
    t["D"] = torch.ones(s.h, **single).requires_grad_()
    t["dt_bias"] = torch.linspace(-7, -2.3, s.h, **single).requires_grad_()
    return t


def our_scan(s: Sizes, device: torch.device, dtype: torch.dtype) -> Built:
    from polylepis.kernels.ssd import ssd

    t = scan_inputs(s, device, dtype)
    return lambda: ssd(**t, dt_softplus=True, backend="triton"), list(t.values())


def our_saving_scan(s: Sizes, device: torch.device, dtype: torch.dtype) -> Built:
    from polylepis.kernels.ssd import ssd

    t = scan_inputs(s, device, dtype)
    return lambda: ssd(**t, dt_softplus=True, save_states=True, backend="triton"), list(t.values())


def mamba_ssm_scan(s: Sizes, device: torch.device, dtype: torch.dtype) -> Built:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined  # type: ignore

    t = scan_inputs(s, device, dtype)
    return lambda: mamba_chunk_scan_combined(**t, chunk_size=128, dt_softplus=True), list(t.values())


def fla_scan(s: Sizes, device: torch.device, dtype: torch.dtype) -> Built:
    """simple_gla on the scan's terms: q = C, k = B, v = x·dt, g = A·dt; without D, B and C repeated per head."""
    from fla.ops.simple_gla import chunk_simple_gla  # type: ignore

    t = scan_inputs(s, device, dtype)
    with torch.no_grad():
        dt = F.softplus(t["dt"].float() + t["dt_bias"])
        v, g = (t["x"] * dt[..., None]).to(dtype), dt * t["A"]
        q, k = (t[name].repeat_interleave(s.h // s.g, dim=2) for name in ("C", "B"))
    inputs = [part.detach().requires_grad_() for part in (q, k, v, g)]
    return lambda: chunk_simple_gla(*inputs[:3], g=inputs[3], scale=1.0)[0], inputs


def conv_inputs(s: Sizes, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    shapes = ((s.b, s.l, s.conv), (s.conv, 4), (s.conv,))
    return [fresh(*shape, device=device, dtype=dtype) for shape in shapes]


def our_conv(s: Sizes, device: torch.device, dtype: torch.dtype) -> Built:
    from polylepis.kernels.conv import causal_conv1d

    x, weight, bias = conv_inputs(s, device, dtype)
    return lambda: causal_conv1d(x, weight, bias, backend="triton"), [x, weight, bias]


def peer_conv(s: Sizes, device: torch.device, dtype: torch.dtype) -> Built:
    from causal_conv1d import causal_conv1d_fn  # type: ignore

    x, weight, bias = conv_inputs(s, device, dtype)
    return lambda: causal_conv1d_fn(x.transpose(1, 2), weight, bias, activation="silu"), [x, weight, bias]


def norm_inputs(s: Sizes, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    shapes = ((s.b, s.l, s.inner), (s.b, s.l, s.inner), (s.inner,))
    return [fresh(*shape, device=device, dtype=dtype) for shape in shapes]


def our_norm(s: Sizes, device: torch.device, dtype: torch.dtype) -> Built:
    from polylepis.kernels.norm import gated_rms_norm

    x, z, weight = norm_inputs(s, device, dtype)
    return lambda: gated_rms_norm(x, z, weight, group_size=s.inner // s.g, backend="triton"), [x, z, weight]


def mamba_ssm_norm(s: Sizes, device: torch.device, dtype: torch.dtype) -> Built:
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn  # type: ignore

    x, z, weight = norm_inputs(s, device, dtype)
    group = s.inner // s.g
    return lambda: rmsnorm_fn(x, weight, None, z=z, group_size=group, norm_before_gate=False), [x, z, weight]


def layer_inputs(s: Sizes, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """u, the projections, the convolution's weights, the norm's and the scan's parameters of one Mamba-2 layer."""
    low: dict[str, Any] = {"device": device, "dtype": dtype}
    t = {k: v for k, v in scan_inputs(s._replace(b=1, l=1), device, dtype).items() if k in ("A", "D", "dt_bias")}
    t["u"] = fresh(s.b, s.l, s.d, **low)
    t["in_proj"] = fresh(s.inner + s.conv + s.h, s.d, **low, scale=s.d**-0.5)
    t["out_proj"] = fresh(s.d, s.inner, **low, scale=s.inner**-0.5)
    t["conv_weight"], t["conv_bias"], t["norm"] = (fresh(*k, **low) for k in ((s.conv, 4), (s.conv,), (s.inner,)))
    return t


def our_mixer(s: Sizes, device: torch.device, dtype: torch.dtype) -> Built:
    """What lies between the projections: one operator, from views of the projection's output."""
    t = layer_inputs(s, device, dtype)
    zxBCdt = fresh(s.b, s.l, s.inner + s.conv + s.h, device=device, dtype=dtype)
    del t["u"], t["in_proj"], t["out_proj"]
    return lambda: _mix(zxBCdt, t, s), [zxBCdt, *t.values()]


def _mix(zxBCdt: Tensor, t: dict[str, Tensor], s: Sizes) -> Tensor:
    from polylepis.kernels.columns import split_columns
    from polylepis.kernels.ssd import ssd_mixer

    z, x, B, C, dt = split_columns(zxBCdt, (s.inner, s.inner, s.g * s.n, s.g * s.n, s.h))
    y = ssd_mixer(
        *(x, dt, t["A"], B, C, t["conv_weight"], t["conv_bias"]),
        n_groups=s.g,
        z=z,
        norm_weight=t["norm"],
        norm_group_size=s.inner // s.g,
        D=t["D"],
        dt_bias=t["dt_bias"],
        backend="triton",
    )
    assert isinstance(y, Tensor)
    return y


def our_layer(s: Sizes, device: torch.device, dtype: torch.dtype) -> Built:
    t = layer_inputs(s, device, dtype)
    inner = {name: value for name, value in t.items() if name not in ("u", "in_proj", "out_proj")}
    return lambda: F.linear(_mix(F.linear(t["u"], t["in_proj"]), inner, s), t["out_proj"]), list(t.values())


def our_separate_layer(s: Sizes, device: torch.device, dtype: torch.dtype) -> Built:
    """The same layer from the separate operators: what the one operator has to beat."""
    from polylepis.kernels.conv import causal_conv1d
    from polylepis.kernels.norm import gated_rms_norm
    from polylepis.kernels.ssd import ssd

    t = layer_inputs(s, device, dtype)

    def forward() -> Tensor:
        z, xBC, dt = F.linear(t["u"], t["in_proj"]).split((s.inner, s.conv, s.h), dim=-1)
        xBC = causal_conv1d(xBC, t["conv_weight"], t["conv_bias"], backend="triton")
        x, B, C = xBC.split((s.inner, s.g * s.n, s.g * s.n), dim=-1)
        parts = (x.unflatten(-1, (s.h, s.p)), dt, t["A"], B.unflatten(-1, (s.g, s.n)), C.unflatten(-1, (s.g, s.n)))
        y = ssd(*parts, D=t["D"], dt_bias=t["dt_bias"], dt_softplus=True, backend="triton").flatten(-2)
        y = gated_rms_norm(y, z, t["norm"], group_size=s.inner // s.g, backend="triton")
        return F.linear(y, t["out_proj"])

    return forward, list(t.values())


def mamba_ssm_layer(s: Sizes, device: torch.device, dtype: torch.dtype) -> Built:
    import causal_conv1d  # type: ignore  # noqa: F401
    from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined  # type: ignore

    t = layer_inputs(s, device, dtype)

    def forward() -> Tensor:
        return mamba_split_conv1d_scan_combined(
            *(F.linear(t["u"], t["in_proj"]), t["conv_weight"], t["conv_bias"], t["dt_bias"], t["A"], t["D"]),
            chunk_size=128,
            activation="silu",
            rmsnorm_weight=t["norm"],
            outproj_weight=t["out_proj"],
            headdim=s.p,
            ngroups=s.g,
            norm_before_gate=False,
        )

    return forward, list(t.values())


# Which library (a process each) has which cases; a case of ours stands beside the peers' of the same name.
LIBRARIES: dict[str, dict[str, Case]] = {
    "polylepis": {
        "scan": our_scan,
        "scan, states saved": our_saving_scan,
        "conv": our_conv,
        "gated norm": our_norm,
        "layer": our_layer,
        "mixer": our_mixer,
        "layer, separate operators": our_separate_layer,
    },
    "mamba_ssm": {"scan": mamba_ssm_scan, "gated norm": mamba_ssm_norm, "layer": mamba_ssm_layer},
    "fla simple_gla": {"scan": fla_scan},
    "causal_conv1d": {"conv": peer_conv},
}
MODULES = {"mamba_ssm": "mamba_ssm", "fla simple_gla": "fla", "causal_conv1d": "causal_conv1d"}


def least_bytes(case: str, s: Sizes) -> tuple[int, int]:
    """Bytes that forward and backward must move at least, two per element: every input read and output written once."""
    tokens = s.b * s.l
    x, bc, conv, inner = (2 * tokens * k for k in (s.inner, 2 * s.g * s.n, s.conv, s.inner))
    dt = 2 * tokens * s.h
    if case.startswith("scan"):
        return 2 * x + bc + dt, 3 * x + 2 * bc + 2 * dt
    if case == "conv":
        return 2 * conv, 3 * conv
    if case == "gated norm":
        return 3 * inner, 5 * inner
    return 0, 0  # the layer is bound by its projections
