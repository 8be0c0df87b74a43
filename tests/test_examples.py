"""Every example runs, and does what it says."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest


def test_ssd_in_your_model(capsys: pytest.CaptureFixture[str]) -> None:
    file = Path(__file__).parent.parent / "examples" / "ssd_in_your_model.py"
    assert runpy.run_path(str(file))["main"]() < 0.1
    assert "after 3 it says [4, 5, 6, 7, 8]" in capsys.readouterr().out
