"""Triton's kernels on the CPU: each `interpreted_*.py` runs in a process of its own, because TRITON_INTERPRET has to be
set before anything imports Triton. They are started in conftest.py."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path

import pytest

pytest.importorskip("triton")
SUITES = sorted(Path(__file__).parent.glob("interpreted_*.py"))


@pytest.mark.parametrize("suite", SUITES, ids=lambda path: path.stem)
@pytest.mark.parametrize("cases", ["not full", pytest.param("full", marks=pytest.mark.full)])
def test_in_the_interpreter(
    running: dict[tuple[Path, str], Future[subprocess.CompletedProcess[str]]], suite: Path, cases: str
) -> None:
    done = running[suite, cases].result()
    print(done.stdout[-6000:])
    nothing = 5  # no case of this kind in the suite
    assert done.returncode in ((0,) if cases == "not full" else (0, nothing)), done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.full
def test_the_gpu_benchmark_rehearses() -> None:
    """The whole of benchmarks.gpu on the CPU at toy sizes: every check passes and every case of ours runs."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    for option in ([], ["--tune"]):
        command = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", *option]
        done = subprocess.run(
            command, cwd=SUITES[0].parents[2], env=environment, capture_output=True, text=True, timeout=280
        )
        assert done.returncode == 0 and "False" not in done.stdout and "Error" not in done.stdout, done.stdout
