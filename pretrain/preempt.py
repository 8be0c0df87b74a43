"""Requests to save and stop: signals to any rank, a marker file in the run folder, and what became of the run.

Nothing here speaks to other ranks: `wanted()` is what this rank knows, and the loop's own all-gather makes one decision
of it (`train.check_agreement`). Exit codes do not carry it either, because torchrun turns every one but 0 into 1 (and
with restarts left would start the run again): a run that was asked to stop ends with 0 and says so in a file.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
from enum import IntEnum
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch.distributed as dist

FOLDER = "launch"
STOP_FILE = "stop"
OUTCOME_FILE = "outcome"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


class Stop(IntEnum):
    """Why a run should save and stop; the largest over the ranks counts.

    Attributes:
        NO: it should not.
        REQUEUE: its time or its machine is about to go; it wants to be started again.
        END: a person has asked; it should stay stopped.
    """

    NO = 0
    REQUEUE = 1
    END = 2


def request_stop(folder: Path, reason: Stop) -> None:
    """Ask the run in `folder` to save at its next step and stop."""
    marker = folder / FOLDER / STOP_FILE
    marker.parent.mkdir(parents=True, exist_ok=True)
    aside = marker.with_name(f".{STOP_FILE}.{os.getpid()}")
    aside.write_text(f"{reason.name.lower()}\n")
    aside.replace(marker)


def clear_requests(folder: Path) -> None:
    """Forget requests to an earlier process, and what became of it."""
    for name in (STOP_FILE, OUTCOME_FILE):
        (folder / FOLDER / name).unlink(missing_ok=True)


def write_outcome(folder: Path, outcome: str, step: int) -> None:
    """Tell whoever started the run what became of it: `done`, `stopped requeue`, `stopped end`, `refused`."""
    file = folder / FOLDER / OUTCOME_FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{OUTCOME_FILE}.{os.getpid()}")
    aside.write_text(f"{outcome} {step}\n")
    aside.replace(file)


def read_outcome(folder: Path) -> str | None:
    """The words of `write_outcome` and the step, or None where the run has not ended in order."""
    try:
        return (folder / FOLDER / OUTCOME_FILE).read_text().strip()
    except FileNotFoundError:
        return None


class Preemption:
    """Collects requests to stop while its body runs, and records at its end what became of the run.

    Enter it after the process group exists: a rank that waits in the rendezvous must still die of SIGTERM, or torchrun
    waits 30 seconds for it at every restart.
    """

    def __init__(self, folder: Path, steps: int) -> None:
        """`steps`: of the whole run. On rank 0 the marker file is looked for, so that the others need not."""
        first = not dist.is_initialized() or dist.get_rank() == 0
        self._marker = folder / FOLDER / STOP_FILE if first else None
        self._folder, self._steps = folder, steps
        self._signalled = self._agreed = Stop.NO
        self._stopped_at: int | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():  # Python runs handlers there only
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if kind is None and self._marker is not None:
            stopped = self._stopped_at is not None
            outcome = f"stopped {self._agreed.name.lower()}" if stopped else "done"
            write_outcome(self._folder, outcome, self._stopped_at if self._stopped_at is not None else self._steps)
            self._marker.unlink(missing_ok=True)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signalled:  # the second Ctrl-C means it
            raise KeyboardInterrupt
        self._signalled = Stop.REQUEUE

    def wanted(self) -> Stop:
        """What this rank has been asked so far."""
        if self._marker is None:
            return self._signalled
        try:
            words = self._marker.read_text().split()
        except OSError:
            return self._signalled
        return Stop.END if words[:1] == ["end"] else max(Stop.REQUEUE, self._signalled)

    def agree(self, stop: int) -> None:
        """What the ranks have been asked, the strongest of it, the same on all of them."""
        self._agreed = Stop(stop)

    def ends_after(self, step: int) -> bool:
        """Whether `step` (counted from 1) is the last for now: the run's own last, or one that ranks agreed on."""
        if step < self._steps and self._agreed != Stop.NO:
            self._stopped_at = step
        return step >= self._steps or self._stopped_at is not None


def die_with_parent() -> None:
    """On Linux: end this process when torchrun's agent dies, however it dies.

    Workers have a session of their own, and would otherwise go on training on a machine that was given up, beside
    those that replace them.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
