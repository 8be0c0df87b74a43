"""Real training jobs under a real SLURM, interrupted in every way: the last bits are those of an undisturbed run."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from clusters import Slurm, wait_for
from polylepis.checkpoints.manifest import newest_checkpoint, step_of
from polylepis.checkpoints.sharded import read_tensors
from polylepis.launch.cli import main
from polylepis.parallel.mesh import MeshConfig
from polylepis.pretrain.config import RunConfig, load_config, to_yaml
from polylepis.pretrain.meter.tracker import read_metrics
from polylepis.pretrain.preempt import read_outcome
from polylepis.pretrain.shrink import shrink
from polylepis.pretrain.train import train
from ranks import run_ranks

OPTIONS = ("--nodes", "2", "--gpus-per-node", "2", "--procs-per-node", "2", "--env", "MASTER_ADDR=127.0.0.1")


def small(folder: str, steps: int, **changes: Any) -> RunConfig:
    """Four ranks: tensor parallel within a node, sharded over the two."""
    config = shrink(load_config("quickstart"), steps, MeshConfig(tp=2, dp_shard=2))
    config = replace(config, name="small", folder=folder, data=replace(config.data, global_batch=4))
    return replace(config, train=replace(config.train, keep=0, **changes))


def submit(config: RunConfig, *options: str) -> str:
    Path("small.yaml").write_text(to_yaml(config))
    assert main(["launch", "slurm", "small.yaml", *OPTIONS, *options, "--submit"]) == 0
    return (config.path / "launch" / "jobs.jsonl").read_text().split('"id": "')[1].split('"')[0]


def everything(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = newest_checkpoint(folder / "checkpoints")
    assert checkpoint is not None
    return read_tensors(checkpoint) | read_tensors(checkpoint, "optimizer.")


def assert_same_run(actual: Path, expected: Path, steps: int) -> None:
    a, b = everything(actual), everything(expected)
    assert a.keys() == b.keys()
    assert [name for name in b if not torch.equal(a[name], b[name])] == []
    losses = [[(line["step"], line["loss"], line["grad_norm"]) for line in read_metrics(f)] for f in (actual, expected)]
    assert losses[0] == losses[1] and len(losses[0]) == steps


def trained(config: RunConfig) -> int:
    lines = read_metrics(config.path)
    return lines[-1]["step"] if lines else 0


def checkpointed(config: RunConfig) -> int:
    newest = newest_checkpoint(config.checkpoints)
    return step_of(newest) if newest else 0


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_two_requeues_and_a_dead_node_end_in_the_same_bits(
    slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config = small("runs/small", 40, checkpoint_every=5)
    job = submit(config, "--time", "30", "--grace", "60")
    for enough in (3, 12):  # as the scheduler does before a time limit, at a moment that is ours
        wait_for(lambda least=enough: trained(config) >= least, 300, f"step {enough}")  # type: ignore[misc]
        slurm.ask("scancel", "--signal=USR1", "--batch", job)
        wait_for(lambda: slurm.state(job) == "PENDING", 120, "requeue")
        assert (read_outcome(config.path) or "").startswith("stopped requeue")
        assert checkpointed(config) == trained(config)  # saved where it stopped
    wait_for(lambda: trained(config) >= checkpointed(config) + 2 and trained(config) >= 20, 300, "step 20")
    slurm.kill_node("n2")
    wait_for(lambda: slurm.state(job) == "PENDING", 120, "the requeue of a job whose node has died")
    assert trained(config) < 40
    slurm.start_node("n2")
    assert slurm.wait(job, 600) == "COMPLETED"
    run_ranks(4, train, replace(config, folder=str(tmp_path / "undisturbed"), train=replace(config.train)), timeout=600)
    assert_same_run(config.path, tmp_path / "undisturbed", 40)
    text = next((config.path / "launch" / "0001").glob("*.out")).read_text()
    assert text.count("USR1: asking the run to save and stop") == 2 and text.count("] start ") >= 4
    capsys.readouterr()
    assert main(["launch", "status", "runs/small"]) == 0
    assert "done 40\n  step        40 of 40\n" in (said := capsys.readouterr().out) and f"{job}  COMPLETED" in said


def own_address() -> str:
    """An address of this machine that is not the loopback's."""
    everything = [address for found in psutil.net_if_addrs().values() for address in found]
    for address in everything:
        if address.family == socket.AF_INET and not address.address.startswith("127."):
            return address.address
    pytest.skip("no address but the loopback's here")


@pytest.mark.full
@pytest.mark.timeout(900)
def test_the_doctor_looks_before_the_job_trains(
    slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two nodes that pass train; where the head is every node's own loopback they fail by name, and nothing trains."""
    monkeypatch.chdir(tmp_path)
    good, bad = small("runs/good", 2), small("runs/bad", 2)
    job = submit(good, "--doctor", "--env", f"MASTER_ADDR={own_address()}")
    assert slurm.wait(job, 400) == "COMPLETED", log_of(good)
    assert trained(good) == checkpointed(good) == 2
    findings = good.path / "launch" / "0001" / "doctor"
    assert sorted(file.name for file in findings.glob("*.json")) == ["n1.json", "n2.json", "ranks.json"]
    assert "all-reduce       Σ of 4 ranks" in log_of(good) and "4 ranks on " in log_of(good)
    capsys.readouterr()
    assert main(["doctor", "--collect", "--out", str(findings)]) == 0
    assert "2 nodes pass, 0 fail" in capsys.readouterr().out
    assert (findings / "passing_nodes.txt").read_text().split() == ["n1", "n2"]

    job = submit(bad, "--doctor")
    out = bad.path / "launch" / "0001" / f"small-{job}.out"
    wait_for(lambda: out.is_file() and "srun ended with" in out.read_text(), 300, "the doctor's verdict")
    slurm.ask("scancel", job)
    assert "not every node is fit, so nothing trains: polylepis doctor --collect" in out.read_text()
    assert main(["doctor", "--collect", "--out", str(bad.path / "launch" / "0001" / "doctor")]) == 1
    assert "0 nodes pass, 2 fail: n1, n2" in (said := capsys.readouterr().out) and "leads to 127.0.0.1" in said
    assert trained(bad) == checkpointed(bad) == 0


def log_of(config: RunConfig) -> str:
    """All that a job and its nodes have said."""
    files = sorted((config.path / "launch" / "0001").glob("*.*"))
    return "".join(file.read_text() for file in files if file.suffix in (".out", ".log"))


@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_real_time_limits(slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM itself tells the job that its minutes are over, again and again; nothing is lost."""
    monkeypatch.chdir(tmp_path)
    config = small("runs/small", 1500, checkpoint_every=0)
    job = submit(config, "--time", "2", "--grace", "60")
    out = config.path / "launch" / "0001" / f"small-{job}.out"
    wait_for(lambda: out.is_file() and out.read_text().count("] requeue") >= 2, 1200, "two requeues")
    before = checkpointed(config)
    assert 2 <= before < 1500
    # What is left is cut short: the comparison needs an end, not 1,500 steps.
    assert main(["launch", "stop", "runs/small"]) == 0
    wait_for(lambda: slurm.state(job) in ("COMPLETED", "CANCELLED"), 300, "the end")
    steps = checkpointed(config)
    resumed = [line["step"] for line in read_metrics(config.path)]
    assert resumed == list(range(1, len(resumed) + 1))
    undisturbed = replace(config, folder=str(tmp_path / "undisturbed"))
    run_ranks(4, train_to, undisturbed, steps, timeout=2400)
    assert_same_run(config.path, tmp_path / "undisturbed", steps)


def train_to(config: RunConfig, steps: int) -> None:
    """The first `steps` steps of the run, stopped as a person would."""
    from polylepis.pretrain import prepare as module
    from polylepis.pretrain.preempt import Stop, request_stop

    class Asking(module.Stream):
        def next(self) -> Any:
            found = super().next()
            if found.index + 1 >= steps:
                request_stop(config.path, Stop.END)
            return found

    module.Stream = Asking  # type: ignore[misc]
    train(config)
