"""Each launch between a Mamba-2 layer's projections by itself, beside the bytes that it must move: where the time goes.

A launch is timed on buffers that the launches before it have filled; what adds partial sums up belongs to it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .gpu_cases import Sizes, fresh, layer_inputs

Launch = tuple[Callable[[], Any], int]


def launches(s: Sizes, device: torch.device, dtype: torch.dtype) -> dict[str, Launch]:
    """(closure, least bytes) of every launch of the forward and the backward, in their order."""
    from polylepis.kernels import triton_norm
    from polylepis.kernels.ssd import triton_mixer, triton_scan

    t = {k: v.detach() for k, v in layer_inputs(s._replace(b=1, l=1), device, dtype).items()}
    zxBCdt = fresh(s.b, s.l, s.inner + s.conv + s.h, device=device, dtype=dtype).detach()
    state = s.g * s.n
    z, x, B, C, dt = zxBCdt.split((s.inner, s.inner, state, state, s.h), dim=-1)
    how = triton_scan.Discretisation(True, True, 0.0, float("inf"))
    conv = triton_mixer.Convolution.of((x, B, C), t["conv_weight"], t["conv_bias"], None, None, True)
    decays = triton_mixer.Decays(dt, t["A"], t["dt_bias"], t["D"], None, how, s.g)
    chunk = 0 if device.type == "cuda" else 32
    convolved, scan, cs, scale = triton_mixer.prepare(conv, decays, chunk)
    states, _ = triton_scan.pass_states(scan, cs, scale, None)
    y = triton_scan.outputs(scan, cs, scale, states)
    flat, group = y.view(s.b, s.l, s.inner), s.inner // s.g
    _, _, rstd = triton_norm.norm_forward(flat, z, None, t["norm"], group, 1e-5)
    dy = torch.randn_like(y)
    buffer = torch.empty_like(zxBCdt)
    dz, dxBC, ddt = buffer.split((s.inner, s.conv, s.h), dim=-1)
    dleft, _ = triton_scan.pass_states(scan, cs, scale, None, dy=dy)
    dx, dsim, tiles = triton_scan._token_gradients(scan, cs, scale, dleft, dy)
    dB, dC, links = triton_scan._group_gradients(scan, cs, scale, states, dleft, dsim, dy)

    def size(*tensors: Tensor) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    per_head, final = size(cs, scale), s.b * s.h * s.p * s.n * 4
    parts = [tensor for tensor in tiles if tensor is not None]
    # one of a chunk's two halves has row sums from the other; three of its four blocks of dsim exist
    partial = size(*parts) - size(cs) // 2 if scan.chunk > scan.rows(scan.config.dx) else size(*parts) - size(cs)
    needed = size(dsim) * 3 // 4
    return {
        "prep and convolution": (
            lambda: triton_mixer.prepare(conv, decays, chunk),
            2 * size(convolved) + size(dt) + per_head,
        ),
        "state pass": (
            lambda: triton_scan.pass_states(scan, cs, scale, None),
            size(x, B, states) + per_head + final,
        ),
        "output": (lambda: triton_scan.outputs(scan, cs, scale, states), size(convolved, states, y) + per_head),
        "gated norm": (
            lambda: triton_norm.norm_forward(flat, z, None, t["norm"], group, 1e-5),
            size(flat, z, flat, rstd),
        ),
        "norm backward": (
            lambda: triton_norm.norm_backward(dy.view_as(flat), None, flat, z, t["norm"], rstd, group, dz),
            size(flat, z, dy, flat, dz, rstd),
        ),
        "state pass, reversed": (
            lambda: triton_scan.pass_states(scan, cs, scale, None, dy=dy),
            size(dy, C, dleft, cs) + final,
        ),
        "dx": (
            lambda: triton_scan._token_gradients(scan, cs, scale, dleft, dy),
            size(convolved, dy, dleft, dx) + needed + partial + per_head,
        ),
        "dB and dC": (
            lambda: triton_scan._group_gradients(scan, cs, scale, states, dleft, dsim, dy),
            size(convolved, dy, states, dleft, dB, dC) + needed + 2 * per_head,
        ),
        "decay": (
            lambda: triton_scan._decay_gradients(scan, scale, tiles, links, ddt),
            partial + 2 * per_head + 2 * size(dt),
        ),
        "convolution backward": (
            lambda: triton_mixer.conv_gradients(conv, dx.view_as(flat), dB.flatten(-2), dC.flatten(-2), dxBC),
            3 * size(convolved),
        ),
    }


def time_launches(
    sizes: list[Sizes],
    device: torch.device,
    until: float,
    keep: Callable[[list[dict[str, Any]]], None],
) -> None:
    """A row per launch and sizes, kept after each; the time runs out for the last ones."""
    from polylepis.kernels.timing import median_us

    rows: list[dict[str, Any]] = []
    for s in sizes:
        built = launches(s, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
        for name, (function, least) in built.items():
            row: dict[str, Any] = {"launch": name, "length": s.l, "batch": s.b, "bytes": least}
            if time.time() > until:
                row["error"] = "no time left"
            else:
                row["us"] = round(median_us(function, device), 1)
            rows.append(row)
            keep(rows)


def render(rows: list[dict[str, Any]], bandwidth: float) -> list[str]:
    """The rows as Markdown; ``bandwidth`` in TB/s."""
    lines = [
        "",
        "## Launches of one layer, microseconds; least: the bytes that must move, copied",
        "",
    ]
    lines += ["| launch | length | batch | µs | MB | least | reached |", "|---" * 7 + "|"]
    for row in rows:
        least = row["bytes"] / bandwidth / 1e6 if bandwidth else 0.0
        reached = f"{least / row['us']:.0%}" if least and "us" in row else "–"
        cells = (
            row["launch"],
            row["length"],
            row["batch"],
            row.get("us", row.get("error")),
            round(row["bytes"] / 1e6, 1),
        )
        lines.append("| " + " | ".join(map(str, cells)) + f" | {f'{least:.0f}' if least else '–'} | {reached} |")
    return lines
