"""What a Mamba-2 layer on the Triton path keeps for its backward, by autograd's hooks, against the planner's figure.

Run by test_interpreter.py. On a GPU "auto" is Triton; here it has to be told.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))
sys.path.insert(0, str(Path(__file__).parent))
from bfloat16_shim import bfloat16  # noqa: F401
from test_cost import NONE, PACKED, PARTLY, ROUTED, SELECTIVE, measured, model_of, predicted

from polylepis.kernels import conv, norm, operators
from polylepis.kernels.ssd import api, mixer, segments
from polylepis.parallel.recompute import RecomputeConfig


@pytest.fixture(autouse=True)
def triton(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every operator takes Triton, as it does for CUDA tensors; yields the names of those that were asked."""
    asked: list[str] = []
    for module in (api, conv, mixer, norm, segments):

        def chosen(backend: str, *rest: Any, _name: str = module.__name__) -> bool:
            asked.append(_name.rpartition(".")[2])
            return operators.use_triton("triton" if backend == "auto" else backend, *rest)

        monkeypatch.setattr(module, "use_triton", chosen)
    return asked


SHORT = [21, 1, 10]
CASES = [
    ({}, SHORT, NONE, torch.bfloat16),
    ({"mamba": ROUTED}, SHORT, SELECTIVE, torch.float32),
    *(
        pytest.param(*case, marks=pytest.mark.full)
        for case in (
            ({}, PACKED, NONE, torch.float32),
            ({}, PACKED, NONE, torch.bfloat16),
            ({"mamba": ROUTED}, PACKED, NONE, torch.float32),
            ({"mamba": PARTLY}, PACKED, NONE, torch.float32),
            ({}, PACKED, SELECTIVE, torch.float32),
            ({"mamba": ROUTED}, PACKED, SELECTIVE, torch.bfloat16),
        )
    ),
]


@pytest.mark.usefixtures("bfloat16")
@pytest.mark.parametrize(("changes", "lengths", "choices", "dtype"), CASES)
def test_saved_bytes(
    changes: dict[str, Any], lengths: list[int], choices: RecomputeConfig, dtype: torch.dtype, triton: list[str]
) -> None:
    config = model_of("M", **changes)
    real = measured(config, lengths, 1, dtype, choices)
    assert "mixer" in triton and "norm" in triton
    assert predicted(config, lengths, 1, dtype, choices, kernels="triton") == pytest.approx(real, rel=0.05)
