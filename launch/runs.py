"""Runs that were launched: what became of them, their output, and how to stop them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from ..checkpoints.manifest import newest_checkpoint, step_of
from ..pretrain.claim import living_claim
from ..pretrain.config import CONFIG_FILE, load_config
from ..pretrain.meter.tracker import read_metrics
from ..pretrain.preempt import Stop, read_outcome, request_stop
from . import slurm
from .errors import LaunchError

JOBS_FILE = "jobs.jsonl"
ENDED = ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "ENDED", "BOOT_FAIL", "DEADLINE")


@dataclass(frozen=True)
class Launched:
    """One submission of a run.

    Attributes:
        kind: `slurm` or `torchrun`.
        id: the job's number; for torchrun the process id of the script.
        folder: with the script and its logs.
        host: where it was submitted.
        time: seconds since the epoch.
    """

    kind: str
    id: str
    folder: str
    host: str
    time: float


def record(run: Path, kind: str, ids: list[str], folder: Path) -> None:
    """Remember submissions of a run."""
    file = run / "launch" / JOBS_FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a") as out:
        for number in ids:
            entry = Launched(kind, number, str(folder), socket.gethostname(), time.time())
            out.write(json.dumps(asdict(entry)) + "\n")


def launched(run: Path) -> list[Launched]:
    """Submissions of a run, oldest first."""
    file = run / "launch" / JOBS_FILE
    if not file.is_file():
        return []
    return [Launched(**json.loads(line)) for line in file.read_text().splitlines()]


def open_run(run: Path) -> None:
    """Refuse what is no run folder.

    Raises:
        LaunchError: names the folder.
    """
    if not (run / CONFIG_FILE).is_file() and not (run / "launch").is_dir():
        raise LaunchError(f"{run}: neither {CONFIG_FILE} nor launch/ in it, so this is no run folder")


def jobs_of(run: Path) -> list[slurm.Job]:
    """What the scheduler, or this machine, knows of a run's submissions."""
    entries = launched(run)
    ids = [entry.id for entry in entries if entry.kind == "slurm"]
    jobs = slurm.find_jobs(ids) if ids and slurm.has_slurm() else []
    for entry in entries:
        if entry.kind == "torchrun":
            state = "RUNNING" if script_process(entry) else "ENDED"
            where = entry.host if entry.host == socket.gethostname() else f"{entry.host} (not this machine)"
            jobs.append(slurm.Job(entry.id, state, "", "", where, ""))
    return jobs


def script_process(entry: Launched) -> psutil.Process | None:
    """The process of a script that was started on this machine, if it still runs."""
    if entry.host != socket.gethostname():
        return None
    try:
        process = psutil.Process(int(entry.id))
        alive = process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - entry.time) < 60
    except psutil.NoSuchProcess:
        return None
    return process if alive else None


def status(run: Path) -> dict[str, Any]:
    """Where a run stands: JSON values."""
    open_run(run)
    config = load_config(str(run)) if (run / CONFIG_FILE).is_file() else None
    newest = newest_checkpoint(run / "checkpoints")
    metrics = read_metrics(run)
    last = metrics[-1] if metrics else {}
    claim = living_claim(run)
    return {
        "run": str(run),
        "state": "training" if claim else (read_outcome(run) or "not running"),
        "held_by": claim[0].describe() if claim else None,
        "heartbeat_seconds": round(claim[1], 1) if claim else None,
        "step": last.get("step", 0),
        "steps": config.train.steps if config else None,
        "loss": last.get("loss"),
        "step_seconds": last.get("step_seconds"),
        "newest_checkpoint": step_of(newest) if newest else None,
        "jobs": [asdict(job) for job in jobs_of(run)],
    }


def as_text(found: dict[str, Any]) -> str:
    """`status`, for people."""
    lines = [f"{found['run']}: {found['state']}"]
    if found["held_by"]:
        lines.append(f"  held by     {found['held_by']}, heartbeat {found['heartbeat_seconds']:.0f} s ago")
    lines.append(
        f"  step        {found['step']:,} of {found['steps']:,}" if found["steps"] else "  step        none yet"
    )
    if found["loss"] is not None:
        lines.append(f"  loss        {found['loss']:.4f}, {found['step_seconds']:.3f} s a step")
    newest = found["newest_checkpoint"]
    lines.append("  checkpoint  " + (f"step {newest:,}" if newest is not None else "none yet"))
    for job in found["jobs"]:
        words = [job["id"], job["state"], job["elapsed"], job["limit"] and f"of {job['limit']}", job["nodes"]]
        reason = job["reason"] if job["reason"] not in ("", "None") else ""
        lines.append("  job         " + "  ".join(word for word in (*words, reason) if word))
    return "\n".join(lines)


def log_files(run: Path) -> list[Path]:
    """Output of the newest launch that has any, the most recently written file last."""
    open_run(run)
    folders = {entry.folder: None for entry in reversed(launched(run))}
    for folder in map(Path, folders):
        files = [path for path in folder.glob("*") if path.suffix in (".log", ".out")]
        if files:
            return sorted(files, key=lambda path: path.stat().st_mtime)
    raise LaunchError(f"{run}: no job has written anything yet")


def tail(file: Path, lines: int) -> list[str]:
    with open(file, errors="replace") as text:
        return list(deque(text, maxlen=lines))


def follow(files: list[Path], run: Path) -> Iterator[str]:
    """What is written to `files` from now on, until no job of the run is left."""
    with contextlib.ExitStack() as stack:
        handles = [stack.enter_context(open(file, errors="replace")) for file in files]
        for handle in handles:
            handle.seek(0, os.SEEK_END)
        while True:
            said = [line for handle in handles for line in handle]
            yield from said
            if not said and all(job.state in ENDED for job in jobs_of(run)):
                return
            time.sleep(1.0)


def stop(run: Path, now: bool) -> list[str]:
    """End a run: waiting jobs are cancelled, a running one saves first, unless `now`. What was done, a line each.

    Raises:
        LaunchError: nothing of this run is running or waiting.
    """
    open_run(run)
    done: list[str] = []
    jobs = [job for job in jobs_of(run) if job.state not in ENDED]
    numbers = {entry.id for entry in launched(run) if entry.kind == "slurm"}
    waiting = [job.id for job in jobs if slurm.hold_back(job)]
    running = [job.id for job in jobs if job.id.split("_")[0] in numbers and job.id not in waiting]
    slurm.cancel(waiting)
    done += [f"job {number}: cancelled before it started" for number in waiting]
    if now:
        slurm.cancel(running)
        done += [f"job {number}: cancelled; it resumes from the newest checkpoint" for number in running]
        for entry in launched(run):
            process = script_process(entry) if entry.kind == "torchrun" else None
            if process is not None:
                os.killpg(process.pid, signal.SIGKILL)
                done.append(f"process {process.pid}: killed with its workers")
    elif living_claim(run) or running:
        request_stop(run, Stop.END)
        done.append("asked to save at the next step and stop; `polylepis launch status` shows when it has")
    if not done:
        raise LaunchError(f"{run}: nothing to stop; no job of it is running or waiting")
    return done


def start_script(script: Path, folder: Path) -> int:
    """Run a script in the background, with a session of its own; its process id."""
    with open(folder / "torchrun.log", "ab") as log:
        process = subprocess.Popen(
            ["bash", str(script)], stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
        )
    return process.pid
