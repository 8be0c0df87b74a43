"""The keeper: what it saves is the moment it was asked, whatever the disk does; what it resumes is the newest whole."""

from __future__ import annotations

import random
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from keeping import differing, local_state, model_and_optimizer, step
from polylepis.checkpoints import saving
from polylepis.checkpoints.errors import CheckpointError
from polylepis.checkpoints.host import HostCopy, Snapshot, random_state, set_random_state
from polylepis.checkpoints.keeper import Keeper
from polylepis.checkpoints.manifest import complete_checkpoints, damages, discard, newest_checkpoint, read_manifest
from polylepis.checkpoints.rules import KeepRules
from polylepis.checkpoints.sharded import content_damages, read_tensors
from polylepis.parallel.mesh import MeshConfig
from ranks import run_ranks

ONE, TWO = MeshConfig(dp_shard=1), MeshConfig(dp_shard=1, tp=2)
Lines = list[tuple[str, int, str]]


def keeper(folder: Path, mesh: MeshConfig, lines: Lines, seed: int = 1, **rules: Any) -> tuple[Keeper, Any]:
    model, optimizer = model_and_optimizer(mesh, seed)
    made = Keeper(
        folder / "checkpoints",
        (model,),
        optimizer,
        KeepRules(**({"every": 1, "keep": 0} | rules)),
        facts={"config": {"a": 1}},
        report=lambda kind, at, text: lines.append((kind, at, text)),
    )
    return made, (model, optimizer)


def draws() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


def test_random_states_come_back() -> None:
    random.seed(3)
    np.random.seed(4)
    random.gauss(), np.random.randn()  # both keep the second of a pair
    state = random_state()
    first = [draws(), random.gauss(0, 1), np.random.randn()]
    set_random_state(state)
    assert [draws(), random.gauss(0, 1), np.random.randn()] == first


def test_host_copy_keeps_views_and_reuses_its_buffers() -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {"a": base[1:, 2:], "b": base.t(), "c": torch.tensor(7), "d": torch.empty(0)}
    copy = HostCopy()
    copy.take(tensors)
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    addresses = {name: tensor.data_ptr() for name, tensor in copy.tensors.items()}
    base.zero_()
    assert differing(copy.tensors, expected) == []
    copy.restore()
    assert differing(tensors, expected) == []
    copy.take(tensors)
    assert {name: tensor.data_ptr() for name, tensor in copy.tensors.items()} == addresses


def roll_back(mesh: MeshConfig) -> list[list[str]]:
    """Take, go on, come back, go on again: differences of the state after coming back, and of the repeated steps."""
    model, optimizer = state = model_and_optimizer(mesh, seed=1)
    snapshot = Snapshot()
    step(model, optimizer)
    snapshot.take((model,), optimizer, {"position": [1, 2]})
    taken = local_state(state)
    numbers = draws()
    step(model, optimizer)
    step(model, optimizer)
    after = local_state(state)
    assert differing(taken, after)
    assert snapshot.restore() == {"position": [1, 2]} and draws() == numbers
    back = differing(taken, local_state(state))
    step(model, optimizer)
    step(model, optimizer)
    again = differing(after, local_state(state))
    snapshot.restore()  # the same snapshot serves again
    return [back, again, differing(taken, local_state(state))]


@pytest.mark.parametrize("mesh", [TWO, MeshConfig(dp_shard=2)], ids=["tp2", "dp2"])
def test_a_snapshot_restores_bit_for_bit(mesh: MeshConfig) -> None:
    for differences in run_ranks(mesh.dp_shard * mesh.tp, roll_back, mesh):
        assert differences == [[], [], []]


def test_a_snapshot_of_nothing_is_refused() -> None:
    with pytest.raises(RuntimeError, match="no snapshot has been taken"):
        Snapshot().restore()


def save_while_training(folder: Path, mesh: MeshConfig) -> dict[str, Any]:
    """Two saves whose files wait until training has gone on; what was true when each was asked for."""
    lines: Lines = []
    made, state = keeper(folder, mesh, lines)
    go_on, real = threading.Event(), saving._save

    def slow(*args: Any) -> Any:
        assert go_on.wait(60)
        return real(*args)

    saving._save = slow  # type: ignore[assignment]
    truth, busy = {}, []
    with made:
        for number in (1, 2):
            step(*state)
            truth[number] = local_state(state)
            if number == 2:
                go_on.set()  # the second save must wait for the first one
            made.after_step(number, lambda number=number: {"n": number})  # type: ignore[misc]
            busy.append(made._durable.busy)
            step(*state)  # changes every weight while the files are not written yet
    assert all(made.times()[name] > 0 for name in ("blocked_seconds",)) and not lines
    loaded = {}
    for number in (1, 2):
        other, fresh = keeper(folder, mesh, lines, seed=9)
        while (newest := newest_checkpoint(folder / "checkpoints")) and newest.name > f"step-{number:08d}":
            dist.barrier()
            if dist.get_rank() == 0:
                newest.rename(folder / newest.name)
            dist.barrier()
        resumed = other.resume()
        assert resumed == {"step": number, "data": {"n": number}}
        loaded[number] = differing(truth[number], local_state(fresh))
        dist.barrier()
        if dist.get_rank() == 0:
            for moved in folder.glob("step-*"):
                moved.rename(folder / "checkpoints" / moved.name)
        dist.barrier()
    return {"loaded": loaded, "busy": busy}


def test_what_is_saved_in_the_background_is_the_moment_it_was_asked_for(tmp_path: Path) -> None:
    for answer in run_ranks(2, save_while_training, tmp_path, TWO):
        assert answer == {"loaded": {1: [], 2: []}, "busy": [True, True]}
    first, second = complete_checkpoints(tmp_path / "checkpoints")
    for checkpoint in (first, second):
        assert list(damages(checkpoint)) == [] and list(content_damages(checkpoint)) == []
    manifest = read_manifest(second)
    assert manifest["config"] == {"a": 1} and manifest["polylepis"] and manifest["torch"]
    assert manifest["tensors"]["layers.1.mixer.q_proj.weight"]["placement"].split()[-1] == "tp2=S(0)"
    assert {"random.0", "random.1"} <= manifest["tensors"].keys()


def fail_on_one_rank(folder: Path, mesh: MeshConfig, rank: int) -> Lines:
    """Saves 1 and 4 succeed, 2 fails while copying, 3 while writing, 5 is the last one and fails."""
    lines: Lines = []
    made, state = keeper(folder, mesh, lines, keep=1)
    real_take, real_write = made._copy.take, saving._Writer.write_data
    fault = ""

    def take(tensors: Any) -> None:
        if fault == "copy":
            raise MemoryError("no memory for the copy")
        real_take(tensors)

    def write(self: Any, *args: Any) -> Any:
        if fault == "write":
            raise OSError(28, "No space left on device")
        return real_write(self, *args)

    made._copy.take = take  # type: ignore[method-assign]
    saving._Writer.write_data = write  # type: ignore[method-assign]
    with made:
        for number, what in ((1, ""), (2, "copy"), (3, "write"), (4, ""), (5, "write")):
            step(*state)
            made.wait()
            fault = what if dist.get_rank() == rank else ""
            try:
                made.after_step(number, lambda: {}, last=number == 5)
            except CheckpointError as error:
                lines.append(("raised", number, str(error)))
    saving._Writer.write_data = real_write  # type: ignore[method-assign]
    return lines


def fail_on_each_rank(folder: Path, mesh: MeshConfig) -> list[Lines]:
    return [fail_on_one_rank(folder / str(rank), mesh, rank) for rank in range(2)]


def test_a_failed_save_is_told_by_all_and_training_goes_on(tmp_path: Path) -> None:
    for rank, (lines, others) in enumerate(zip(*run_ranks(2, fail_on_each_rank, tmp_path, TWO), strict=True)):
        told = [("checkpoint_failed", 2), ("checkpoint_failed", 3), ("raised", 5)]
        assert [(kind, at) for kind, at, _ in lines] == told
        assert [(kind, at) for kind, at, _ in others] == [("raised", 5)]  # only rank 0 reports, all ranks raise
        assert f"step-00000002: could not be saved: rank {rank}: MemoryError: no memory for the copy (" in lines[0][2]
        full = f"could not be saved: rank {rank}: OSError: [Errno 28] No space left on device ("
        assert full in lines[1][2] and full in lines[2][2] and full in others[0][2]
        assert "bytes are free there); older checkpoints are untouched; training goes on" in lines[1][2]
        (left,) = (tmp_path / str(rank) / "checkpoints").iterdir()
        assert left.name == "step-00000004" and list(damages(left)) == []


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a disk of so many bytes."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def attach(size: int) -> Path:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
        if done.returncode:
            pytest.skip(f"cannot mount a small disk: {done.stderr.decode().strip()}")
        return folder

    yield attach
    subprocess.run(["umount", folder], capture_output=True)


def test_a_full_and_a_read_only_disk(mount: Callable[[int], Path], tmp_path: Path) -> None:
    lines: Lines = []
    made, state = keeper(tmp_path, ONE, lines)
    made.after_step(1, lambda: {}, last=True)
    size = sum(file.stat().st_size for file in (made.folder / "step-00000001").iterdir())
    small_disk = mount(int(2.6 * size))  # two of them, not three
    made, state = keeper(small_disk, ONE, lines)
    with made:
        for number in range(1, 5):
            step(*state)
            made.after_step(number, lambda: {})
            made.wait()
        assert [path.name for path in complete_checkpoints(made.folder)] == ["step-00000001", "step-00000002"]
        assert [(kind, at) for kind, at, _ in lines] == [("checkpoint_failed", 3), ("checkpoint_failed", 4)]
        assert "No space left on device" in lines[0][2] and "bytes are free there" in lines[0][2]
        assert len(list(made.folder.iterdir())) == 2  # nothing half-written stays
        discard(made.folder / "step-00000001")
        made.after_step(5, lambda: {}, last=True)  # space again: it saves again
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
        made.after_step(6, lambda: {})
        made.wait()
        assert lines[2][:2] == ("checkpoint_failed", 6) and "Read-only file system" in lines[2][2]
        with pytest.raises(CheckpointError, match=r"step-00000007: could not be saved: rank 0: OSError: .*Read-only"):
            made.after_step(7, lambda: {}, last=True)
    for checkpoint in complete_checkpoints(made.folder):
        assert list(damages(checkpoint)) == []
    assert len(lines) == 3


def on_local_parts(folder: Path, mesh: MeshConfig, story: str) -> Any:
    """Durable at 2 and 4, local at every step to 5; then something happens to the parts, and a new life resumes."""
    lines: Lines = []
    rules = {"every": 2, "local_folder": str(folder / "fast"), "local_every": 1}
    made, state = keeper(folder, mesh, lines, **rules)
    assert made.resume() is None
    truth = {}
    for number in range(1, 6):
        step(*state)
        truth[number] = local_state(state)
        made.after_step(number, lambda number=number: {"n": number})  # type: ignore[misc]
    made.wait()
    dist.barrier()
    mine = made._tier.folder  # type: ignore[union-attr]
    assert len(list(mine.glob("step-*.json"))) == 2 and not list(mine.glob("*.part"))
    if dist.get_rank() == 1:
        newest = mine / "step-00000005.safetensors"
        if story == "one is missing":
            newest.unlink()
        if story == "one is damaged":
            data = bytearray(newest.read_bytes())
            data[-1] ^= 1
            newest.write_bytes(data)
    if dist.get_rank() == 0 and story == "another run":
        (folder / "checkpoints" / "run_id").write_text("another")
    dist.barrier()
    other = MeshConfig(dp_shard=2) if story == "another mesh" else mesh
    made, state = keeper(folder, other, lines, seed=9, **rules)
    resumed = made.resume()
    assert resumed is not None and resumed["data"] == {"n": resumed["step"]}
    same = story != "another mesh" and differing(truth[resumed["step"]], local_state(state))
    with made:
        pass
    return resumed["step"], same, [kind for kind, _, _ in lines], mine.exists()


STORIES = {
    "all are whole": (5, ["local_resumed"]),
    "one is missing": (4, ["local_incomplete"]),
    "one is damaged": (4, ["local_damaged"]),
    "another run": (4, []),
    "another mesh": (4, []),
}


def all_stories(folder: Path, mesh: MeshConfig) -> dict[str, Any]:
    return {story: on_local_parts(folder / story, mesh, story) for story in STORIES}


def test_resumes_from_the_newest_whole_tier(tmp_path: Path) -> None:
    answers = run_ranks(2, all_stories, tmp_path, TWO)
    for story, (found, said) in STORIES.items():
        kept = story == "another run"  # of a run that is not ours, whatever it is
        same = False if story == "another mesh" else []
        assert answers[0][story] == (found, same, said, kept), story
        assert answers[1][story] == (found, same, [], kept), story


def test_rules_that_cannot_be() -> None:
    with pytest.raises(CheckpointError, match="keep must not be negative, got -1"):
        KeepRules(keep=-1)
    for wrong in ({"local_every": 5}, {"local_folder": "/fast"}):
        with pytest.raises(CheckpointError, match="the local tier needs both local_folder and local_every"):
            replace(KeepRules(), **wrong)  # type: ignore[arg-type]


def test_a_checkpoint_that_was_being_replaced_comes_back(tmp_path: Path) -> None:
    lines: Lines = []
    made, state = keeper(tmp_path, ONE, lines)
    made.after_step(1, lambda: {"n": 1}, last=True)
    expected = local_state(state)
    (made.folder / "step-00000001").rename(made.folder / ".step-00000001.old")  # a crash between two renames
    (made.folder / ".step-00000002.part").mkdir()
    (made.folder / ".step-00000000.old").mkdir()  # and one in the middle of a removal
    again, fresh = keeper(tmp_path, ONE, lines, seed=9)
    assert again.resume() == {"step": 1, "data": {"n": 1}} and differing(expected, local_state(fresh)) == []
    assert (made.folder / ".step-00000002.part").exists()  # it may be another run's, until this one has the folder
    with again:
        assert [path.name for path in made.folder.iterdir()] == ["step-00000001"]
    made.after_step(1, lambda: {"n": "replaced"}, last=True)
    assert read_manifest(made.folder / "step-00000001")["data"] == {"n": "replaced"}
    assert read_tensors(made.folder / "step-00000001", "random.").keys() == {"random.0"}
