"""The two steps of a segment on the torch path, and the algebra of their summaries."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from segment_cases import DOCUMENTS, results
from test_ssd import assert_close

from polylepis.kernels.ssd.segments import Segment, combine, enter, summarise


@pytest.mark.parametrize("layout", DOCUMENTS)
def test_segments_equal_the_whole(layout: str) -> None:
    ids = DOCUMENTS[layout]
    assert_close(results(ids, "torch", torch.float64, True), results(ids, "torch", torch.float64, False), 1e-11)


def test_combination_is_associative() -> None:
    a, b, c = (Segment(torch.randn(1, 2, 3, 4).double(), -torch.rand(1, 2).double()) for _ in range(3))
    b = b._replace(log_decay=torch.tensor([[-torch.inf, -0.5]], dtype=torch.float64))
    for left, right in zip(combine(combine(a, b), c), combine(a, combine(b, c)), strict=True):
        torch.testing.assert_close(left, right)


def test_refusals() -> None:
    x, decay, B = torch.randn(1, 5, 2, 3), -torch.rand(1, 5, 2), torch.randn(1, 5, 1, 4)
    with pytest.raises(ValueError, match="scale has shape"):
        summarise(x, decay, decay[:, :4], B, B)
    _, kept = summarise(x, decay, decay, B, B)
    with pytest.raises(ValueError, match="entry has shape"):
        enter(kept, torch.zeros(1, 2, 3, 3))
