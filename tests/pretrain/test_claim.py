"""One run, one job: a living claim is refused with its numbers, a dead one is taken over."""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import signal
import time
from dataclasses import asdict, replace
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from polylepis.pretrain.claim import LOCK_FILE, STALE_SECONDS, Claim, check_free, claim_folder, living_claim
from polylepis.pretrain.errors import ConfigError


def leave(folder: Path, claim: Claim, age: float = 0.0) -> None:
    """As if `claim` had been made in `folder`, its last heartbeat `age` seconds ago."""
    file = folder / LOCK_FILE
    file.write_text(json.dumps(asdict(claim)))
    os.utime(file, (time.time() - age, time.time() - age))


def test_a_claim_ends_with_its_body(tmp_path: Path) -> None:
    with claim_folder(tmp_path):
        found = living_claim(tmp_path)
        assert found is not None and found[0] == Claim.mine() and found[1] < 60
        check_free(tmp_path)  # one's own
    assert living_claim(tmp_path) is None and not (tmp_path / LOCK_FILE).exists()


def test_a_living_process_is_refused_by_name(tmp_path: Path) -> None:
    import psutil

    parent = psutil.Process(os.getppid())
    leave(tmp_path, replace(Claim.mine(), pid=parent.pid, started=parent.create_time(), owner="SLURM job 7"))
    with pytest.raises(ConfigError, match=rf"live job, process {parent.pid} on .* of SLURM job 7, heartbeat \d+ s ago"):
        check_free(tmp_path)
    with pytest.raises(ConfigError, match="belongs to a live job"), claim_folder(tmp_path):
        raise AssertionError("was let in")
    assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == parent.pid


def test_a_zombie_holds_nothing(tmp_path: Path) -> None:
    """In a container without an init, what is killed stays in the process table."""
    import psutil

    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    process = psutil.Process(child)
    leave(tmp_path, replace(Claim.mine(), pid=child, started=process.create_time()))
    assert living_claim(tmp_path) is not None
    os.kill(child, signal.SIGKILL)
    while process.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    try:
        assert living_claim(tmp_path) is None
        check_free(tmp_path)
    finally:
        os.waitpid(child, 0)


OTHER = Claim("elsewhere", 1, 0.0, "pid:[1]", "SLURM job 7")
CASES = {
    "this host, process gone": (replace(Claim.mine(), pid=2**22 + 1), 0.0, "", True),
    "this host, process id reused": (replace(Claim.mine(), started=1.0), 0.0, "", True),
    "other host, fresh heartbeat": (OTHER, 1.0, "", False),
    "other host, old heartbeat": (OTHER, STALE_SECONDS + 5, "", True),
    "other host, the same job started again": (OTHER, 1.0, "7", True),
    "other host, another job": (OTHER, 1.0, "8", False),
}


@pytest.mark.parametrize(("claim", "age", "job", "free"), CASES.values(), ids=CASES)
def test_who_may_take_over(
    claim: Claim, age: float, job: str, free: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", job)
    leave(tmp_path, claim, age)
    if not free:
        with pytest.raises(ConfigError, match="belongs to a live job"):
            check_free(tmp_path)
        return
    with claim_folder(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text()) == asdict(Claim.mine())


def test_a_foreign_lock_is_told(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).write_text("[]")
    with pytest.raises(ConfigError, match="is no lock of this version"):
        check_free(tmp_path)


def race(folder: Path, barrier: Barrier, won: str) -> None:
    barrier.wait()
    try:
        with claim_folder(folder):
            (folder / f"{won}.{os.getpid()}").touch()
            time.sleep(0.5)
    except ConfigError:
        pass


def test_of_several_claimants_one_wins(tmp_path: Path) -> None:
    context = mp.get_context("fork")
    leave(tmp_path, replace(Claim.mine(), pid=2**22 + 1))  # dead: all want to take it over
    barrier = context.Barrier(6)
    processes = [context.Process(target=race, args=(tmp_path, barrier, "won")) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert len(list(tmp_path.glob("won.*"))) == 1
