"""A sequence cut over ranks equals the whole: shared by the torch and the Triton tests of kernels/ssd/segments.py."""

from __future__ import annotations

import torch
from test_ssd import draw, packed
from torch import Tensor

from polylepis.kernels.ssd import ssd_core
from polylepis.kernels.ssd.segments import Segment, combine, enter, summarise

CUTS = [0, 11, 28, 40]
DOCUMENTS = {"one": None, "documents": packed((0, 6), (1, 25), (-1, 3), (2, 6))}


def results(
    ids: Tensor | None, backend: str, dtype: torch.dtype, cut: bool, *, save_states: bool = False
) -> tuple[Tensor, ...]:
    """(y, final states, gradients), by segments or in one piece."""
    t = draw(1, CUTS[-1], 2, 3, 1, 2, dtype)
    t["log_decay"] = (-t["dt"].abs()).detach().requires_grad_()
    names = ("x", "log_decay", "dt", "B", "C")
    start, D = t["initial_states"], t["D"]
    if not cut:
        options = {"D": D, "initial_states": start, "seq_idx": ids, "return_final_states": True}
        y, final = ssd_core(*(t[n] for n in names), chunk_size=16, backend=backend, **options)
    else:
        parts = []
        for a, b in zip(CUTS[:-1], CUTS[1:], strict=True):
            x, decay, scale, B, C = (t[n][:, a:b] for n in names)
            part = None if ids is None else ids[:, a:b]
            options = {"D": D, "seq_idx": part, "chunk_size": 16, "save_states": save_states}
            parts.append(summarise(x, decay, scale, B, C, **options, backend=backend))
        whole = Segment(start, torch.zeros(start.shape[:2], dtype=dtype))
        outs = []
        for index, (segment, kept) in enumerate(parts):
            opens = ids is not None and index and ids[0, CUTS[index]] not in (-1, ids[0, CUTS[index] - 1])
            entry = torch.zeros_like(whole.state) if opens else whole.state
            outs.append(enter(kept, entry))
            whole = combine(Segment(entry, whole.log_decay), segment)
        y, final = torch.cat(outs, dim=1), whole.state
    rng = torch.Generator().manual_seed(1)
    loss = sum((out * torch.randn(out.shape, generator=rng).to(dtype)).sum() for out in (y, final))
    return y.detach(), final.detach(), *torch.autograd.grad(loss, [*(t[n] for n in names), D, start])
