"""A run that is asked to stop saves, tells why, and resumes to the same bits, whichever rank was asked and how."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from polylepis.checkpoints.manifest import newest_checkpoint, step_of
from polylepis.checkpoints.sharded import read_tensors
from polylepis.pretrain import prepare as module
from polylepis.pretrain.config import RunConfig, load_config
from polylepis.pretrain.preempt import Preemption, Stop, clear_requests, read_outcome, request_stop
from polylepis.pretrain.shrink import shrink
from polylepis.pretrain.train import check_agreement, train
from ranks import run_ranks


def tiny(folder: Path, steps: int) -> RunConfig:
    config = replace(shrink(load_config("quickstart"), steps), folder=str(folder))
    return replace(config, model=replace(config.model, pattern="M-"))


def everything(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = newest_checkpoint(folder / "checkpoints")
    assert checkpoint is not None
    return read_tensors(checkpoint) | read_tensors(checkpoint, "optimizer.")


def train_and_ask(config: RunConfig, rank: int, step: int, how: str) -> int:
    """Train; before step `step` (from 1), `rank` is asked to stop. The last step trained."""

    class Asking(module.Stream):
        def next(self) -> Any:
            if self.position_step == step - 1 and dist.get_rank() == rank:
                if how == "marker":
                    request_stop(config.path, Stop.END)
                else:
                    os.kill(os.getpid(), getattr(signal, how))
            found = super().next()
            self.position_step = found.index + 1
            return found

        position_step = 0

    module.Stream = Asking  # type: ignore[misc]
    train(config)
    newest = newest_checkpoint(config.checkpoints)
    assert newest is not None
    return step_of(newest)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody asked to stop."""
    folder = tmp_path_factory.mktemp("whole")
    run_ranks(2, train, tiny(folder, 4))
    assert read_outcome(folder) == "done 4"
    return folder


@pytest.mark.parametrize(
    ("how", "rank", "reason"), [("SIGTERM", 1, "requeue"), ("SIGUSR1", 0, "requeue"), ("marker", 0, "end")]
)
def test_asked_to_stop_saves_and_resumes_to_the_same_bits(
    how: str, rank: int, reason: str, whole: Path, tmp_path: Path
) -> None:
    parts = tmp_path / "parts"
    assert run_ranks(2, train_and_ask, tiny(parts, 4), rank, 2, how) == [2, 2]
    assert read_outcome(parts) == f"stopped {reason} 2"
    assert not (parts / "lock.json").exists() and not (parts / "launch" / "stop").exists()
    run_ranks(2, train, tiny(parts, 4))
    assert read_outcome(parts) == "done 4"
    expected, actual = everything(whole), everything(parts)
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


def test_a_request_at_the_last_step_is_a_finished_run(tmp_path: Path) -> None:
    assert run_ranks(1, train_and_ask, replace(tiny(tmp_path, 2), mesh=replace(tiny(tmp_path, 2).mesh, tp=1)), 0, 2,
                     "SIGTERM") == [2]  # fmt: skip
    assert read_outcome(tmp_path) == "done 2"


def agree(folder: Path, digests: list[str], stops: list[int]) -> bool:
    preemption = Preemption(folder, 10)
    preemption.wanted = lambda: Stop(stops[dist.get_rank()])  # type: ignore[method-assign]
    check_agreement(3, digests[dist.get_rank()], preemption)
    return preemption.ends_after(3)


def test_a_request_to_any_rank_counts_for_all(tmp_path: Path) -> None:
    same = ["0123456789abcdef"] * 3
    assert run_ranks(3, agree, tmp_path, same, [0, 0, 0]) == [False] * 3
    assert run_ranks(3, agree, tmp_path, same, [0, 1, 0]) == [True] * 3
    assert run_ranks(3, agree, tmp_path, same, [1, 0, 2]) == [True] * 3


def test_handlers_are_only_there_while_training(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Preemption(tmp_path, 5) as preemption:
        assert preemption.wanted() == Stop.NO
        os.kill(os.getpid(), signal.SIGINT)
        assert preemption.wanted() == Stop.REQUEUE
        with pytest.raises(KeyboardInterrupt):  # the second Ctrl-C means it
            os.kill(os.getpid(), signal.SIGINT)
        request_stop(tmp_path, Stop.END)
        assert preemption.wanted() == Stop.END
    assert signal.getsignal(signal.SIGTERM) is before
    clear_requests(tmp_path)
    assert Preemption(tmp_path, 5).wanted() == Stop.NO


def test_workers_die_with_their_agent(tmp_path: Path) -> None:
    """torchrun gives workers a session of their own; killed -9, it would leave them training."""
    worker = "import time; from polylepis.pretrain.preempt import die_with_parent; die_with_parent(); "
    worker += "print('ready', flush=True); time.sleep(600)"
    agent = (
        "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', sys.argv[1]], "
        "start_new_session=True, stdout=subprocess.PIPE, text=True); print(p.pid, p.stdout.readline(), flush=True); "
        "time.sleep(600)"
    )
    environment = os.environ | {"TORCHELASTIC_RUN_ID": "x"}
    with subprocess.Popen(
        [sys.executable, "-c", agent, worker], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline().split()[0])
        process.kill()
        for _ in range(200):
            status = Path(f"/proc/{pid}/stat")
            if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
                return
            time.sleep(0.05)
    raise AssertionError(f"worker {pid} outlived its agent")
