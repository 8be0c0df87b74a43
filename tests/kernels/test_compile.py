"""Every public function of kernels/ traces into one graph, forward and backward, with the gradients of eager."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from test_bad_input import CASES, outputs

TWINS = ("segments", "mamba_chunk_scan_combined", "causal_conv1d_fn", "rms_norm")  # what they call is traced as well


def gradients(function: Any, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    given = {k: v.clone() if isinstance(v, Tensor) and 0 not in v.stride() else v for k, v in arguments.items()}
    leaves = [v.requires_grad_() for k, v in given.items() if isinstance(v, Tensor) and k not in FIXED]
    leaves = [v for v in leaves if v.is_floating_point()]
    outs = outputs(function(**given))
    loss = sum((out.square().sum() for out in outs), torch.zeros(()))
    return (*(out.detach() for out in outs), *torch.autograd.grad(loss, leaves))


FIXED = ("seq_idx", "key_mask", "position_ids")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.full if n in TWINS else ()) for n in CASES])
def test_one_graph_forward_and_backward(name: str) -> None:
    function, draw = CASES[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    if name in ("selective_state_update", "causal_conv1d_update"):  # they overwrite a state: no gradients
        with torch.no_grad():
            for a, b in zip(outputs(compiled(**draw())), outputs(function(**draw())), strict=True):
                torch.testing.assert_close(a, b)
        return
    for a, b in zip(gradients(compiled, draw()), gradients(function, draw()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
