"""`kill -9` while saving: always a whole checkpoint to resume from, and the same bits in the end.

Two kinds. *Points*: a save is killed before its n-th file operation, for every n, so no state that a crash can leave
between two operations is missed. *Moments*: real training processes are killed again and again at random times, in the
middle of writing too, until the run is done, and the result is compared with a run that nobody disturbed.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from keeping import differing, local_state, model_and_optimizer, step
from polylepis.checkpoints.keeper import Keeper
from polylepis.checkpoints.manifest import complete_checkpoints, damages, newest_checkpoint, read_manifest
from polylepis.checkpoints.rules import KeepRules
from polylepis.checkpoints.sharded import read_tensors
from polylepis.parallel.mesh import MeshConfig
from polylepis.pretrain.config import RunConfig, load_config
from polylepis.pretrain.meter.tracker import read_metrics
from polylepis.pretrain.shrink import shrink
from polylepis.pretrain.train import train
from ranks import Ranks, run_ranks

OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "os.truncate")


def save_twice(folder: Path, asynchronous: bool, die_before: int) -> tuple[int, dict[int, Any]]:
    """Save steps 1 and 2, keeping one. Before file operation `die_before` of the second save this process dies.

    Returns:
        File operations of the second save, and all values by step.
    """
    model, optimizer = state = model_and_optimizer(MeshConfig(dp_shard=1), seed=1)
    keeper = Keeper(folder, (model,), optimizer, KeepRules(every=1, keep=1, asynchronous=asynchronous))
    truth, count, watching = {}, 0, False

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if watching and event in OPERATIONS and str(folder) in str(arguments[0]):
            count += 1
            if count == die_before:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    with keeper:
        for number in (1, 2):
            step(*state)
            truth[number] = local_state(state)
            watching = number == 2
            keeper.after_step(number, lambda number=number: {"n": number})  # type: ignore[misc]
            keeper.wait()
    return count, truth


def resume(folders: list[Path]) -> list[tuple[Any, dict[str, Any]]]:
    found = []
    for folder in folders:
        model, optimizer = state = model_and_optimizer(MeshConfig(dp_shard=1), seed=2)
        keeper = Keeper(folder, (model,), optimizer, KeepRules())
        resumed = keeper.resume()
        with keeper:
            found.append((resumed, local_state(state)))
    return found


def check_points(folder: Path, asynchronous: bool, every: int) -> None:
    """Kill before every so-manieth file operation, and look at what is left."""
    ((operations, truth),) = run_ranks(1, save_twice, folder / "whole", asynchronous, 0)
    assert operations > 10
    points = {point: folder / f"at-{point}" for point in range(1, operations + 1, every)}
    for point, died in points.items():
        with Ranks(1, save_twice, died, asynchronous, point) as ranks:
            ranks.processes[0].join(60)
            assert ranks.processes[0].exitcode == -signal.SIGKILL, f"point {point}"
        left = complete_checkpoints(died)
        assert [line for checkpoint in left for line in damages(checkpoint)] == [], f"point {point}"
    (answers,) = run_ranks(1, resume, list(points.values()))
    for (point, died), (resumed, values) in zip(points.items(), answers, strict=True):
        assert resumed["data"] == {"n": resumed["step"]}
        assert differing(values, truth[resumed["step"]]) == [], f"point {point}"
        assert not [path for path in died.iterdir() if path.name.startswith(".")], f"point {point}"  # cleared
    assert {resumed["step"] for resumed, _ in answers} == {1, 2}


def test_killed_at_some_file_operations(tmp_path: Path) -> None:
    check_points(tmp_path, True, 11)


@pytest.mark.chaos
@pytest.mark.timeout(900)
@pytest.mark.parametrize("asynchronous", [True, False], ids=["async", "sync"])
def test_killed_at_every_file_operation(asynchronous: bool, tmp_path: Path) -> None:
    check_points(tmp_path, asynchronous, 1)


def small(folder: Path, steps: int, kind: str, every: int = 1) -> RunConfig:
    """A run of two ranks that saves at every step: `async`, `sync`, or `local`, where most saves are local ones."""
    config = shrink(load_config("quickstart"), steps)
    model = replace(config.model, pattern="M*E", d_model=32, vocab_size=256)
    model = replace(model, attention=replace(model.attention, n_heads=4, n_kv_heads=2, head_dim=8))
    rules = replace(config.train, checkpoint_every=every, keep=2, async_checkpoint=kind != "sync", timeout=20.0)
    if kind == "local":
        rules = replace(rules, checkpoint_every=10 * every, local_folder=f"{folder}-fast", local_every=1)
    data = replace(config.data, seq_len=32)
    return replace(config, folder=str(folder), model=model, train=rules, data=data)


def everything(folder: Path) -> dict[str, Any]:
    checkpoint = newest_checkpoint(folder / "checkpoints")
    assert checkpoint is not None
    return read_tensors(checkpoint) | read_tensors(checkpoint, "optimizer.")


def progress(folder: Path, kind: str) -> list[Path]:
    """What is finished so far, on the tier that saves most."""
    if kind == "local":
        return sorted(Path(f"{folder}-fast").glob("*/rank-00001/step-*.json"))
    return complete_checkpoints(folder / "checkpoints")


def kill_until_done(folder: Path, steps: int, kills: int, kind: str, seed: int) -> int:
    """Train; kill all ranks (or one, which the others must notice) at random moments, `kills` times, then finish.

    Returns:
        The number of kills that met running ranks.
    """
    chance, killed = random.Random(seed), 0
    config = small(folder, steps, kind)
    while killed < kills:
        before = progress(folder, kind)
        with Ranks(2, train, config) as ranks:
            alive, until = True, time.monotonic() + 60
            while alive and progress(folder, kind) == before and time.monotonic() < until:
                time.sleep(0.005)  # so every life gets a step further
                alive = all(process.is_alive() for process in ranks.processes)
            time.sleep(chance.uniform(0, 0.1))
            if all(process.is_alive() for process in ranks.processes):
                killed += 1
                victim = chance.choice([None, 0, 1])
                if victim is not None:
                    ranks.processes[victim].kill()
                    ranks.processes[1 - victim].join(chance.uniform(0, 0.3))
            elif newest_checkpoint(folder / "checkpoints") == folder / "checkpoints" / f"step-{steps:08d}":
                break
            ranks.kill()
        for checkpoint in complete_checkpoints(folder / "checkpoints"):
            assert list(damages(checkpoint)) == []
    run_ranks(2, train, config, timeout=600)
    return killed


def check_moments(folder: Path, steps: int, kills: int, kind: str, seed: int) -> None:
    """As many runs as it takes to be killed `kills` times; each must end as the one that nobody disturbed."""
    run_ranks(2, train, small(folder / "whole", steps, "async", every=0), timeout=600)
    expected, killed, number = everything(folder / "whole"), 0, 0
    state = read_manifest(folder / "whole" / "checkpoints" / f"step-{steps:08d}")["data"]
    losses = [(line["step"], line["loss"]) for line in read_metrics(folder / "whole")]
    assert len(losses) == steps
    while killed < kills:
        assert number < 2 * kills, "runs that are over before anybody can be killed"
        run, number = folder / f"killed-{number}", number + 1
        killed += kill_until_done(run, steps, kills - killed, kind, seed + number)
        assert differing(expected, everything(run)) == []
        assert read_manifest(run / "checkpoints" / f"step-{steps:08d}")["data"] == state
        assert [(line["step"], line["loss"]) for line in read_metrics(run)] == losses


def test_killed_at_random_moments_ends_with_the_same_bits(tmp_path: Path) -> None:
    check_moments(tmp_path, 8, 2, "async", seed=1)


@pytest.mark.chaos
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("kind", "kills"), [("async", 40), ("sync", 35), ("local", 30)])
def test_killed_a_hundred_times(kind: str, kills: int, tmp_path: Path) -> None:
    """105 kills in all."""
    check_moments(tmp_path, 30, kills, kind, 100 * kills)
