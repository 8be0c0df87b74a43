"""Bare torchrun survives killed workers, a host that goes and returns, and one that does not; real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from clusters import Hosts, descendants, wait_for, why_no_hosts
from polylepis.checkpoints.manifest import newest_checkpoint, step_of
from polylepis.checkpoints.sharded import read_tensors
from polylepis.launch.cli import main
from polylepis.launch.runs import launched
from polylepis.parallel.mesh import MeshConfig
from polylepis.pretrain.config import RunConfig, load_config, to_yaml
from polylepis.pretrain.meter.tracker import read_metrics
from polylepis.pretrain.preempt import read_outcome
from polylepis.pretrain.shrink import shrink
from polylepis.pretrain.train import train
from ranks import run_ranks

EXACT = ("step", "loss", "grad_norm", "tokens/text", "tokens/image", "tokens/voice")


def small(folder: str, steps: int, every: int, pattern: str = "M*ME") -> RunConfig:
    config = shrink(load_config("quickstart"), steps, MeshConfig(dp_shard=-1))
    config = replace(config, name="small", folder=folder, model=replace(config.model, pattern=pattern))
    return replace(config, train=replace(config.train, checkpoint_every=every, keep=0))


def write_script(config: RunConfig, *options: str) -> Path:
    Path("small.yaml").write_text(to_yaml(config))
    assert main(["launch", "torchrun", "small.yaml", *options]) == 0
    return config.path / "launch" / "0001" / "torchrun.sh"


def trained(config: RunConfig) -> int:
    lines = read_metrics(config.path)
    return lines[-1]["step"] if lines else 0


def checkpointed(config: RunConfig) -> int:
    newest = newest_checkpoint(config.checkpoints)
    return step_of(newest) if newest else 0


def lines_of(folder: Path) -> list[dict[str, float]]:
    return [{key: line[key] for key in EXACT if key in line} for line in read_metrics(folder)]


def assert_same_bits(actual: RunConfig, expected: Path) -> None:
    newest = [newest_checkpoint(folder / "checkpoints") for folder in (actual.path, expected)]
    a, b = (read_tensors(c) | read_tensors(c, "optimizer.") for c in newest if c is not None)
    assert a.keys() == b.keys()
    assert [name for name in b if not torch.equal(a[name], b[name])] == []
    assert lines_of(actual.path) == lines_of(expected)


def resumed_after(config: RunConfig, before: float, timeout: float = 300) -> float:
    """Seconds from `before` to the next line of metrics."""
    file = config.path / "metrics.jsonl"
    stamp = file.stat().st_mtime_ns
    saved = checkpointed(config)

    def goes_on() -> bool:
        # Reopening also writes the file; a step beyond the checkpoint is what counts.
        return file.stat().st_mtime_ns != stamp and trained(config) > saved

    # First the tracker cuts the file back to the checkpoint, then it grows.
    wait_for(lambda: trained(config) <= saved or goes_on(), timeout, "resumption")
    wait_for(goes_on, timeout, "a step after resumption")
    return time.monotonic() - before


@pytest.mark.timeout(1200)
def test_killed_workers_and_told_agents_come_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker killed -9 is started again; SIGTERM to torchrun itself saves and ends; another start finishes."""
    monkeypatch.chdir(tmp_path)
    config = small("run", 120, 10, "M-")
    script = write_script(config, "--procs-per-node", "1")
    with open("log", "wb") as log:
        process = subprocess.Popen(["bash", str(script)], stdout=log, stderr=log)
    try:
        wait_for(lambda: checkpointed(config) >= 10 or process.poll() is not None, 300, "step 10")
        workers = [
            pid for pid in descendants(process.pid) if "polylepis.pretrain.train" in psutil.Process(pid).cmdline()
        ]
        os.kill(workers[-1], signal.SIGKILL)
        resumed_after(config, time.monotonic())
        process.terminate()
        process.wait(300)
        assert read_outcome(config.path) == f"stopped requeue {checkpointed(config)}", Path("log").read_text()
        assert checkpointed(config) == trained(config) < 120
    finally:
        process.kill()
    assert "exitcode: -9" in Path("log").read_text()
    run_ranks(1, train, config, timeout=500)
    assert read_outcome(config.path) == "done 120"
    run_ranks(1, train, replace(config, folder=str(tmp_path / "undisturbed")), timeout=500)
    assert_same_bits(config, tmp_path / "undisturbed")


@pytest.mark.full
@pytest.mark.timeout(900)
def test_submitted_to_this_machine_it_is_watched_and_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`launch torchrun --submit`, then status, logs, stop; submitted again it goes on; `stop --now` leaves nobody."""
    monkeypatch.chdir(tmp_path)
    config = small("run", 100_000, 10, "M-")
    Path("small.yaml").write_text(to_yaml(config))
    words = ["launch", "torchrun", "small.yaml", "--procs-per-node", "1"]

    def said(*command: str) -> str:
        capsys.readouterr()
        assert main(["launch", *command]) == 0
        return capsys.readouterr().out

    assert main([*words, "--submit"]) == 0
    wait_for(lambda: trained(config) >= 12, 300, "step 12")
    (entry,) = launched(config.path)
    found = said("status", "run")
    assert found.startswith("run: training\n") and f"job         {entry.id}  RUNNING" in found
    assert main([*words, "--submit"]) == 2
    assert "run: belongs to a live job, process" in capsys.readouterr().err
    assert "==> run/launch/0001/torchrun.log <==" in said("logs", "run") and "100000" in said("logs", "run")
    assert "asked to save at the next step and stop" in said("stop", "run")
    wait_for(lambda: "ENDED" in said("status", "run"), 120, "the end")
    reached = trained(config)
    assert read_outcome(config.path) == f"stopped end {reached}" and checkpointed(config) == reached

    assert main([*words, "--submit"]) == 0
    wait_for(lambda: trained(config) > reached + 2, 300, "a step further")
    again = launched(config.path)[-1]
    family = [psutil.Process(pid) for pid in descendants(int(again.id))]
    assert any("polylepis.pretrain.train" in process.cmdline() for process in family)
    assert f"process {again.id}: killed with its workers" in said("stop", "run", "--now")
    wait_for(lambda: not any(alive(process) for process in family), 60, "the end of every process")
    assert said("status", "run").startswith("run: not running\n")
    assert main(["launch", "stop", "run", "--now"]) == 2


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if reason := why_no_hosts():
        pytest.skip(f"no hosts here: {reason}")
    found = Hosts()
    try:
        found.start()
        yield found
    finally:
        found.stop()


QUICK = {"PORT": "29511", "LAST_CALL": "5", "KEEP_ALIVE": "1"}


def start(hosts: Hosts, host: str, script: Path) -> subprocess.Popen[bytes]:
    words = ["bash", str(script), hosts.addresses["a"], *(["head"] if host == "a" else [])]
    return hosts.run(host, words, Path(f"{host}.log"), LOCAL_ADDR=hosts.addresses[host], **QUICK)


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_a_host_that_dies_and_returns(hosts: Hosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same mesh again: the last bits are those of an undisturbed run. So is a killed worker of the other host."""
    monkeypatch.chdir(tmp_path)
    config = small("run", 120, 10)
    script = write_script(config, "--procs-per-node", "1", "--nodes", "2")
    first = start(hosts, "a", script)
    start(hosts, "b", script)
    wait_for(lambda: checkpointed(config) >= 10, 300, "step 10")
    (worker,) = [
        p for p in descendants(first.pid) if psutil.Process(p).cmdline()[-2:-1] == ["polylepis.pretrain.train"]
    ]
    os.kill(worker, signal.SIGKILL)
    seconds = resumed_after(config, time.monotonic())
    print(f"killed worker: resumed after {seconds:.1f} s")
    wait_for(lambda: checkpointed(config) >= 40, 300, "step 40")
    hosts.kill("b")
    died = time.monotonic()
    time.sleep(5)  # until it has been started again
    second = start(hosts, "b", script)
    seconds = resumed_after(config, died)
    print(f"host lost for 5 s: resumed after {seconds:.1f} s")
    logs = [Path(f"{host}.log") for host in "ab"]
    assert [first.wait(300), second.wait(300)] == [0, 0], "\n".join(log.read_text() for log in logs)
    assert read_outcome(config.path) == "done 120"
    run_ranks(2, train, replace(config, folder=str(tmp_path / "undisturbed")), timeout=600)
    assert_same_bits(config, tmp_path / "undisturbed")


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_a_host_that_does_not_return(hosts: Hosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks, then one: the same documents in the same steps, the loaded state exact, losses within rounding."""
    monkeypatch.chdir(tmp_path)
    config = small("run", 80, 10)
    script = write_script(config, "--procs-per-node", "1", "--nodes", "1:2")
    first = start(hosts, "a", script)
    start(hosts, "b", script)
    wait_for(lambda: checkpointed(config) >= 20, 300, "step 20")
    hosts.kill("b")
    seconds = resumed_after(config, time.monotonic())
    print(f"host lost for good: resumed after {seconds:.1f} s")
    assert first.wait(600) == 0, Path("a.log").read_text()
    run_ranks(2, train, replace(config, folder=str(tmp_path / "undisturbed")), timeout=600)
    actual, expected = lines_of(config.path), lines_of(tmp_path / "undisturbed")
    assert [line["step"] for line in actual] == list(range(1, 81))
    for a, b in zip(actual, expected, strict=True):
        assert {k: v for k, v in a.items() if k.startswith("tokens")} == {
            k: v for k, v in b.items() if k.startswith("tokens")
        }
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4), a["step"]
    before = [(a["loss"], b["loss"]) for a, b in zip(actual, expected, strict=True) if a["step"] <= 20]
    assert all(a == b for a, b in before)
