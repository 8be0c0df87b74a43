"""Who trains in a run folder: a lock with a heartbeat, so that two jobs never write into one run."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from .errors import ConfigError

LOCK_FILE = "lock.json"
BEAT_SECONDS = 10.0
STALE_SECONDS = 120.0  # NFS may show a file's time up to a minute late


@dataclass(frozen=True)
class Claim:
    """The process that trains in a folder.

    Attributes:
        host, pid, started: of rank 0; `started` (seconds since the epoch) tells a reused process id from the first.
        namespace: the process namespace, in which alone `pid` means something.
        owner: the SLURM job or torchrun run that restarts this process under the same name, or "".
    """

    host: str
    pid: int
    started: float
    namespace: str
    owner: str

    @classmethod
    def mine(cls) -> Claim:
        process = psutil.Process()
        return cls(socket.gethostname(), process.pid, process.create_time(), _namespace(), _owner())

    def is_alive(self, heartbeat_age: float) -> bool:
        """By the process itself where it can be seen from here, by the heartbeat's age in seconds elsewhere."""
        here = Claim.mine()
        if (self.host, self.namespace) != (here.host, here.namespace):
            # What a scheduler started again under the same name has ended before.
            return heartbeat_age < STALE_SECONDS and not (self.owner and self.owner == here.owner)
        try:
            process = psutil.Process(self.pid)
            # In a container whose first process collects no orphans, killed workers stay in the table as zombies.
            return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - self.started) < 1
        except psutil.NoSuchProcess:
            return False

    def describe(self) -> str:
        owner = f" of {self.owner}" if self.owner else ""
        return f"process {self.pid} on {self.host}{owner}"


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _owner() -> str:
    if job := os.environ.get("SLURM_JOB_ID"):
        return f"SLURM job {job}"
    run = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return "" if run == "none" else f"torchrun run {run}"


def read_claim(folder: Path) -> tuple[Claim, float] | None:
    """Who holds the folder, and the heartbeat's age in seconds by the file system's own clock; None if nobody does."""
    lock = folder / LOCK_FILE
    try:
        claim = Claim(**json.loads(lock.read_text()))
        beat = lock.stat().st_mtime
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        raise ConfigError(f"{lock}: is no lock of this version; remove it if no job trains in {folder}") from None
    probe = folder / f".{LOCK_FILE}.{socket.gethostname()}.{os.getpid()}"
    try:
        probe.touch()
        return claim, max(0.0, probe.stat().st_mtime - beat)
    except OSError:  # a folder that only its owner may write
        return claim, max(0.0, time.time() - beat)
    finally:
        probe.unlink(missing_ok=True)


def living_claim(folder: Path) -> tuple[Claim, float] | None:
    """The claim of a process that still trains in the folder, and its heartbeat's age in seconds."""
    found = read_claim(folder)
    return found if found and found[0].is_alive(found[1]) else None


def check_free(folder: Path) -> None:
    """Refuse a folder in which a live process trains.

    Raises:
        ConfigError: names the process, its host, its job and the age of its heartbeat.
    """
    found = living_claim(folder)
    if found and found[0] != Claim.mine():
        claim, age = found
        raise ConfigError(
            f"{folder}: belongs to a live job, {claim.describe()}, heartbeat {age:.0f} s ago; stop it with "
            f"`polylepis launch stop {folder}` or choose another folder=…"
        )


@contextlib.contextmanager
def claim_folder(folder: Path) -> Iterator[None]:
    """Hold the folder while the body runs; a claim whose process is gone is taken over.

    Raises:
        ConfigError: see `check_free`.
    """
    lock, mine = folder / LOCK_FILE, Claim.mine()
    aside = folder / f".{LOCK_FILE}.{mine.host}.{mine.pid}.new"
    with _one_at_a_time(folder):
        check_free(folder)
        lock.unlink(missing_ok=True)
        aside.write_text(json.dumps(asdict(mine)))
        try:
            os.link(aside, lock)  # atomic, also where the file system has no locks
        except FileExistsError:
            raise ConfigError(f"{lock}: several jobs claim this run at the same time; start one of them") from None
        finally:
            aside.unlink()
    done = threading.Event()
    thread = threading.Thread(target=_beat, args=(lock, done), name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        with contextlib.suppress(FileNotFoundError):
            if json.loads(lock.read_text()) == asdict(mine):
                lock.unlink()


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Between the look at a dead claim and its removal no living one may take its place."""
    with open(folder / f".{LOCK_FILE}", "w") as file:
        with contextlib.suppress(OSError):  # a file system without locks: a window of milliseconds stays
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _beat(lock: Path, done: threading.Event) -> None:
    while not done.wait(BEAT_SECONDS):
        with contextlib.suppress(OSError):  # a full or absent disk: the heartbeat ages, which is what it is for
            os.utime(lock)
