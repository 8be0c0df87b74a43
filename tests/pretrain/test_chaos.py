"""Injected faults on real processes: the expected reaction, and after recovery the trajectory of a run without fault.

The short versions run in `make test`; `make chaos` runs all of them.
"""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from faults import Fault, small, train_with, train_with_jumping_clock
from polylepis.checkpoints.manifest import newest_checkpoint
from polylepis.checkpoints.sharded import read_tensors
from polylepis.parallel.mesh import MeshConfig
from polylepis.pretrain.config import RunConfig
from polylepis.pretrain.errors import HANG_EXIT
from polylepis.pretrain.health.config import HealthConfig
from polylepis.pretrain.health.events import read_events
from polylepis.pretrain.meter.tracker import read_metrics
from ranks import run_ranks

STEPS, EVERY = 8, 3
PROMISED = ("loss", "grad_norm", "lr", "loss/text", "loss/image", "loss/voice")
chaos = pytest.mark.chaos


def run_of(folder: Path, health: HealthConfig | None = None, *, pp: int = 1) -> RunConfig:
    """Two ranks, tensor parallel or as pipeline stages; every layer kind."""
    config = small(folder, STEPS, health, tp=2 // pp, checkpoint_every=EVERY, timeout=60.0)
    model = replace(config.model, pattern="M*|-E", d_model=32, vocab_size=256)
    data = replace(config.data, seq_len=32)
    return replace(config, model=model, data=data, mesh=MeshConfig(dp_shard=1, tp=2 // pp, pp=pp))


def trajectory(folder: Path) -> list[tuple[float, ...]]:
    return [(line["step"], *(line[key] for key in PROMISED)) for line in read_metrics(folder)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = newest_checkpoint(folder / "checkpoints")
    assert checkpoint is not None and checkpoint.name == f"step-{STEPS:08d}"
    return read_tensors(checkpoint) | read_tensors(checkpoint, "optimizer.")


@pytest.fixture(scope="module")
def faultless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happened to."""
    folder = tmp_path_factory.mktemp("faultless")
    assert run_ranks(2, train_with, run_of(folder)) == ["", ""]
    return folder


def assert_same(folder: Path, faultless: Path) -> None:
    """Losses, norms and learning rates of every step, weights and moments at the end: to the bit."""
    assert trajectory(folder) == trajectory(faultless)
    ours, theirs = weights(folder), weights(faultless)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def killed(folder: Path, rank: int, position: int) -> None:
    with pytest.raises(AssertionError, match=r"died without an answer|failed"):
        run_ranks(2, train_with, run_of(folder), Fault("kill", rank, (position,)))


def test_a_killed_rank_costs_nothing_but_time(tmp_path: Path, faultless: Path) -> None:
    killed(tmp_path, 1, 4)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert run_ranks(2, train_with, run_of(tmp_path)) == ["", ""]
    assert_same(tmp_path, faultless)
    assert [event["kind"] for event in read_events(tmp_path) if event["guard"] == "run"][-2:] == ["start", "end"]


@chaos
@pytest.mark.parametrize("seed", range(5))
def test_any_rank_killed_at_any_step_again_and_again(seed: int, tmp_path: Path, faultless: Path) -> None:
    dice = random.Random(seed)
    for _ in range(dice.randint(1, 3)):
        first = max(0, len(read_metrics(tmp_path)) // EVERY * EVERY)
        killed(tmp_path, dice.randint(0, 1), dice.randint(first, STEPS - 1))
    assert run_ranks(2, train_with, run_of(tmp_path)) == ["", ""]
    assert_same(tmp_path, faultless)


@pytest.mark.parametrize("pp", [1, pytest.param(2, marks=chaos)])
def test_a_stopped_rank_is_a_hang_with_a_name(pp: int, tmp_path: Path, faultless: Path) -> None:
    """SIGSTOP on rank 1: rank 0 dumps stacks and collectives, names rank 1 and ends; a restart resumes."""
    health = HealthConfig(hang_seconds=4.0, slow_seconds=120.0, straggler="off")
    with pytest.raises(AssertionError, match="rank 0 died without an answer"):
        run_ranks(2, train_with, run_of(tmp_path, health, pp=pp), Fault("stop", 1, (4,)), timeout=200)
    (event,) = [event for event in read_events(tmp_path) if event["guard"] == "hang"]
    assert event["rank"] == 0 and event["step"] == 5 and event["details"]["behind"] == [1]
    assert "its process is stopped, dead or unreachable" in event["message"]
    assert event["details"]["last_collective"]["name"].startswith("gloo:")
    assert not event["details"]["last_collective"]["ended"]
    stacks = (tmp_path / "health" / "hangs" / "step-00000005-rank-00000.txt").read_text()
    assert "hang watchdog" in stacks or "watchdog.py" in stacks
    assert "accumulate" in stacks and "distributed_c10d.py" in stacks
    recorded = json.loads((tmp_path / "health" / "hangs" / "step-00000005-rank-00000.json").read_text())
    assert recorded["entries"][-1]["caller"].startswith("/")
    assert HANG_EXIT == 75
    if pp == 1:
        assert run_ranks(2, train_with, run_of(tmp_path)) == ["", ""]
        assert_same(tmp_path, faultless)


@chaos
def test_a_nan_on_one_rank_is_left_out_and_a_restart_leaves_the_same_out(tmp_path: Path) -> None:
    """The promise here: equal to a run that never had this batch."""
    a, b = tmp_path / "a", tmp_path / "b"
    assert run_ranks(2, train_with, run_of(a), Fault("nan in a gradient", 1, (4,))) == ["", ""]
    (b / "health").mkdir(parents=True)
    (b / "health" / "skipped.json").write_text((a / "health" / "skipped.json").read_text())
    killed(b, 0, 6)
    assert run_ranks(2, train_with, run_of(b)) == ["", ""]
    assert_same(b, a)
    assert [line["step"] for line in read_metrics(a)] == [1, 2, 3, 4, 6, 7, 8]


@chaos
def test_a_corrupted_batch_is_left_out_and_a_kill_does_not_bring_it_back(tmp_path: Path) -> None:
    """Of two data-parallel ranks one reads weights that are no numbers: equal to a run that never had this batch."""
    mesh = MeshConfig(dp_shard=2)
    a, b = (replace(run_of(tmp_path / name), mesh=mesh) for name in "ab")
    assert run_ranks(2, train_with, a, Fault("corrupted batch", 1, (4,))) == ["", ""]
    (event,) = [event for event in read_events(a.path) if event["guard"] == "nan"]
    assert event["step"] == 5 and "began on rank 1 in layers.3; " in event["message"]
    assert "it came back when the step was repeated; step left out" in event["message"]
    (b.path / "health").mkdir(parents=True)
    (b.path / "health" / "skipped.json").write_text((a.path / "health" / "skipped.json").read_text())
    with pytest.raises(AssertionError, match=r"died without an answer|failed"):
        run_ranks(2, train_with, b, Fault("kill", 1, (6,)))
    assert run_ranks(2, train_with, b) == ["", ""]
    assert_same(b.path, a.path)
    assert [line["step"] for line in read_metrics(a.path)] == [1, 2, 3, 4, 6, 7, 8]


@chaos
def test_a_killed_stage_of_a_pipeline_costs_nothing_but_time(tmp_path: Path) -> None:
    faultless, run = (run_of(tmp_path / name, pp=2) for name in ("faultless", "run"))
    assert run_ranks(2, train_with, faultless) == ["", ""]
    for rank, position in ((0, 4), (1, 5)):
        with pytest.raises(AssertionError, match=r"died without an answer|failed"):
            run_ranks(2, train_with, run, Fault("kill", rank, (position,)))
    assert run_ranks(2, train_with, run) == ["", ""]
    assert_same(run.path, faultless.path)


@chaos
def test_a_slow_rank_is_named_and_changes_nothing(tmp_path: Path, faultless: Path) -> None:
    health = HealthConfig(straggler_every=4)
    fault = Fault("slow", 1, tuple(range(STEPS)))
    assert run_ranks(2, train_with, run_of(tmp_path, health), fault) == ["", ""]
    told = [event for event in read_events(tmp_path) if event["guard"] == "straggler"]
    assert told and all(event["details"]["slow"] == [1] for event in told)
    assert_same(tmp_path, faultless)


@chaos
def test_a_straggler_that_stays_one_stops_the_run(tmp_path: Path) -> None:
    health = HealthConfig(straggler="act", straggler_every=3, straggler_limit=2)
    fault = Fault("slow", 0, tuple(range(STEPS)))
    for said in run_ranks(2, train_with, run_of(tmp_path, health), fault):
        assert said.startswith("HealthError: rank 0 slow in 2 comparisons in a row")


@chaos
def test_clocks_that_jump_change_nothing(tmp_path: Path, faultless: Path) -> None:
    """The wall clock leaps by up to an hour at every look: no hang is seen, no time is negative."""
    health = HealthConfig(hang_seconds=50.0, slow_seconds=120.0)
    assert run_ranks(2, train_with_jumping_clock, run_of(tmp_path, health)) == ["", ""]
    assert_same(tmp_path, faultless)
    assert [event["guard"] for event in read_events(tmp_path) if event["guard"] != "run"] == []
    for line in read_metrics(tmp_path):
        times = [value for key, value in line.items() if "seconds" in key]
        assert all(0 <= value < 600 for value in times), line


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that holds one checkpoint of the toy model and little more."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs root to mount a small file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@chaos
def test_a_disk_that_fills_up_costs_checkpoints_and_lines_but_not_the_run(small_disk: Path, faultless: Path) -> None:
    """Full from the first save on: training goes on to the end, says so, and ends by failing its last save cleanly."""
    run = small_disk / "run"
    run.mkdir()
    with open(small_disk / "filler", "wb", buffering=0) as filler:
        filler.write(b"x" * (63 * 1024 * 1024))
    said = run_ranks(2, train_with, run_of(run))
    assert all("No space left" in line or "could not be written" in line or "Error" in line for line in said), said
    assert newest_checkpoint(run / "checkpoints") is None
    (small_disk / "filler").unlink()
    assert run_ranks(2, train_with, run_of(run)) == ["", ""]
    assert_same(run, faultless)


@chaos
def test_a_spike_and_a_kill_end_where_the_spike_alone_ends(tmp_path: Path) -> None:
    """Rolled back, then killed, then resumed by a process that only has the ledger and a checkpoint."""
    health = HealthConfig(spike="act", spike_history=4, spike_window=8, snapshot_every=2, straggler="off")
    spike, both = tmp_path / "spike", tmp_path / "both"
    assert run_ranks(2, train_with, run_of(spike, health), Fault("spike", -1, (5,))) == ["", ""]
    config = run_of(both, health)
    with pytest.raises(AssertionError):
        run_ranks(2, train_with, config, Fault("spike then kill", -1, (5, 6)))
    assert run_ranks(2, train_with, config) == ["", ""]
    assert_same(both, spike)
    assert replace(config, folder="") == replace(run_of(spike, health), folder="")
