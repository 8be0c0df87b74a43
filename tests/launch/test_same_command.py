"""The README's promise: the quickstart, on the same mesh, from a laptop's command line and from a cluster's scripts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clusters import Slurm, why_no_slurm
from polylepis.checkpoints.manifest import newest_checkpoint, step_of
from polylepis.checkpoints.sharded import read_tensors
from polylepis.launch.cli import main
from polylepis.launch.runs import launched

STEPS = 3


def run(*words: str) -> None:
    command = [sys.executable, "-m", "polylepis.launch", *words]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr


def last(folder: str) -> dict[str, torch.Tensor]:
    checkpoint = newest_checkpoint(Path(folder) / "checkpoints")
    assert checkpoint is not None and step_of(checkpoint) == STEPS
    return read_tensors(checkpoint) | read_tensors(checkpoint, "optimizer.")


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_quickstart_by_command_by_torchrun_and_by_slurm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.chdir(tmp_path)
    run("data", "build", "quickstart")
    words = ["quickstart", f"train.steps={STEPS}", "tracking.wandb=disabled"]
    run("train", *words, "folder=runs/laptop")
    assert main(["launch", "torchrun", *words, "folder=runs/torchrun", "--procs-per-node", "2"]) == 0
    subprocess.run(["bash", "runs/torchrun/launch/0001/torchrun.sh"], check=True, capture_output=True)
    folders = ["runs/torchrun"]
    if not why_no_slurm():  # the two tensor-parallel ranks on a node each
        slurm: Slurm = request.getfixturevalue("slurm")
        options = ["--nodes", "2", "--procs-per-node", "1", "--env", "MASTER_ADDR=127.0.0.1", "--submit"]
        assert main(["launch", "slurm", *words, "folder=runs/slurm", *options]) == 0
        (job,) = (entry.id for entry in launched(Path("runs/slurm")))
        assert slurm.wait(job, 600) == "COMPLETED"
        folders.append("runs/slurm")
    expected = last("runs/laptop")
    for folder in folders:
        actual = last(folder)
        assert actual.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []
