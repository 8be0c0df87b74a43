"""What the tests of ssd_mixer share: inputs, the layer, and the same layer by a loop over tokens in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from test_ssd import packed
from torch import Tensor

from polylepis.kernels.conv import causal_conv1d
from polylepis.kernels.ssd import ssd_mixer, ssd_reference

Tensors = dict[str, Tensor]
LAYOUTS = {
    "boundaries inside chunks": packed((0, 9), (1, 14), (2, 1), (3, 1), (4, 8)),
    "padding everywhere": packed((-1, 3), (3, 10), (-1, 5), (1, 10), (-1, 1), (7, 4), (-1, 4)),
    "one token each": torch.arange(21)[None],
    "only padding": packed((-1, 20)),
    "mixed rows": torch.cat([packed((0, 15), (1, 18)), packed((-1, 2), (5, 1), (6, 30))]),
}


def draw(
    b: int, l: int, h: int, p: int, g: int, n: int, dtype: torch.dtype = torch.float32, *, width: int = 4
) -> Tensors:
    """Every tensor argument of ssd_mixer, with gradients; norm groups are those of B and C."""
    rng = torch.Generator().manual_seed(l)
    inner, channels = h * p, h * p + 2 * g * n
    shapes = {
        **{"x": (b, l, inner), "dt": (b, l, h), "A": (h,), "B": (b, l, g * n), "C": (b, l, g * n)},
        **{"conv_weight": (channels, width), "conv_bias": (channels,), "z": (b, l, inner), "norm_weight": (inner,)},
        **{"D": (h,), "dt_bias": (h,), "conv_state": (b, channels, width - 1), "initial_states": (b, h, p, n)},
    }
    tensors = {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}
    tensors["A"] = -tensors["A"].abs() - 0.1
    return {name: tensor.to(dtype).requires_grad_() for name, tensor in tensors.items()}


def mixer(t: Tensors, groups: int, **options: Any) -> tuple[Tensor, ...]:
    norm = {"norm_group_size": t["x"].shape[2] // groups} if "z" in t else {}
    out = ssd_mixer(**t, n_groups=groups, chunk_size=16, return_final_states=True, **norm, **options)
    assert isinstance(out, tuple)
    return out


def oracle(
    t: Tensors,
    groups: int,
    *,
    seq_idx: Tensor | None = None,
    activation: str | None = "silu",
    dt_limit: tuple[float, float] = (0.0, float("inf")),
) -> tuple[Tensor, Tensor, Tensor]:
    """The sequential recurrence behind the convolution that test_conv checks by a loop; the norm by its formula."""
    xBC, window = causal_conv1d(
        torch.cat((t["x"], t["B"], t["C"]), dim=-1),
        t["conv_weight"],
        t.get("conv_bias"),
        activation=activation,
        seq_idx=seq_idx,
        initial_state=t.get("conv_state"),
        return_final_state=True,
        backend="torch",
    )
    x, B, C = xBC.split((t["x"].shape[2], t["B"].shape[2], t["C"].shape[2]), dim=-1)
    y, final = ssd_reference(
        x.unflatten(-1, (t["dt"].shape[2], -1)),
        *(t["dt"], t["A"], B.unflatten(-1, (groups, -1)), C.unflatten(-1, (groups, -1))),
        D=t.get("D"),
        dt_bias=t.get("dt_bias"),
        dt_softplus=True,
        dt_limit=dt_limit,
        initial_states=t.get("initial_states"),
        seq_idx=seq_idx,
        return_final_states=True,
    )
    out = y.flatten(-2)
    if "z" in t:
        gated = (out * F.silu(t["z"])).unflatten(-1, (groups, -1))
        out = (gated / (gated.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(-2) * t["norm_weight"]
    return out, final, window


def results(function: Callable[..., tuple[Tensor, ...]], t: Tensors, groups: int, **options: Any) -> tuple[Tensor, ...]:
    """(out, final states, final window, the gradient of every tensor) of a random projection of the three."""
    outs = function(t, groups, **options)
    rng = torch.Generator().manual_seed(1)
    loss = sum((out * torch.randn(out.shape, generator=rng).to(out.dtype)).sum() for out in outs)
    return (*(out.detach() for out in outs), *torch.autograd.grad(loss, list(t.values())))
