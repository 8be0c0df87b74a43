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
    """Collects requests to stop while its body runs.

    Enter it after the process group exists: a rank that waits in the rendezvous must still die of SIGTERM, or torchrun
    waits 30 seconds for it at every restart.
    """

    def __init__(self, folder: Path, reads_marker: bool) -> None:
        """`reads_marker`: on rank 0, which looks for the marker file so that the others need not."""
        self._marker = folder / FOLDER / STOP_FILE if reads_marker else None
        self._folder, self._signalled = folder, Stop.NO
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

    def conclude(self, stop: Stop, step: int) -> None:
        """On the rank that reads the marker: record what became of the run, and forget the request."""
        if self._marker is not None:
            write_outcome(self._folder, "done" if stop == Stop.NO else f"stopped {stop.name.lower()}", step)
            self._marker.unlink(missing_ok=True)


def die_with_parent() -> None:
    """On Linux: end this process when torchrun's agent dies, however it dies.

    Workers have a session of their own, and would otherwise go on training on a machine that was given up, beside
    those that replace them.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
