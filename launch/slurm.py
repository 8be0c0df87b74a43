"""SLURM's own commands, and what they say: partitions before a script is written, jobs afterwards."""

from __future__ import annotations

import difflib
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import LaunchError
from .request import Request, parse_time


@dataclass(frozen=True)
class Partition:
    """Attributes: time limit in seconds (None: unlimited), and per node the most cores and GPUs that any node has."""

    name: str
    is_default: bool
    limit: int | None
    nodes: int
    cpus: int
    gpus: int


@dataclass(frozen=True)
class Job:
    """One line of squeue or sacct."""

    id: str
    state: str
    elapsed: str
    limit: str
    nodes: str
    reason: str


def has_slurm() -> bool:
    return shutil.which("sbatch") is not None and shutil.which("sinfo") is not None


def _ask(*command: str) -> str:
    """What a command of SLURM's prints.

    Raises:
        LaunchError: it failed; its own first line.
    """
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise LaunchError(f"{command[0]}: not found; SLURM's commands are not on the PATH of this machine") from None
    if result.returncode != 0:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        raise LaunchError(f"{command[0]}: {lines[0] if lines else f'ended with {result.returncode}'}")
    return result.stdout


def partitions() -> list[Partition]:
    """What this cluster has; lines of one partition with different nodes are put together."""
    found: dict[str, Partition] = {}
    for line in _ask("sinfo", "-h", "-o", "%P|%l|%D|%c|%G").splitlines():
        name, limit, nodes, cpus, gres = line.strip().split("|")
        part = Partition(
            name.rstrip("*"),
            name.endswith("*"),
            None if limit in ("infinite", "n/a") else parse_time(limit),
            int(nodes),
            int(re.match(r"\d+", cpus)[0]),  # type: ignore[index]
            sum(int(n) for n in re.findall(r"gpu(?::[^:,()]+)?:(\d+)", gres)),
        )
        if other := found.get(part.name):
            part = Partition(
                part.name,
                part.is_default,
                part.limit,
                part.nodes + other.nodes,
                max(part.cpus, other.cpus),
                max(part.gpus, other.gpus),
            )
        found[part.name] = part
    return list(found.values())


def check_request(request: Request, known: Sequence[Partition]) -> None:
    """Refuse a request that no node of the partition could ever serve.

    Raises:
        LaunchError: with the partition's own numbers.
    """
    names = {part.name: part for part in known}
    if not request.partition:
        part = next((part for part in known if part.is_default), None)
        if part is None:
            raise LaunchError(f"--partition: this cluster has no default; accepted: {', '.join(names)}")
    else:
        # SLURM takes several names, and starts where it can first.
        chosen = request.partition.split(",")
        for name in chosen:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f"did you mean {near[0]}? " if near else ""
                raise LaunchError(f"--partition {name}: no such partition; {hint}accepted: {', '.join(names)}")
        part = max((names[name] for name in chosen), key=lambda p: (p.gpus, p.nodes))
    nodes = request.nodes[1]
    for what, asked, there in (
        (f"--nodes {nodes}", nodes, part.nodes),
        (f"--gpus-per-node {request.gpus}", request.gpus, part.gpus),
        (f"--cpus-per-node {request.cpus}", request.cpus, part.cpus),
    ):
        if asked > there:
            raise LaunchError(f"{what}: partition {part.name} has {there}{'' if 'nodes' in what else ' at most'}")
    if request.time and part.limit is not None and (asked := parse_time(request.time)) > part.limit:
        raise LaunchError(f"--time {request.time}: {asked} s, but partition {part.name} allows {part.limit} s")


def submit(script: Path, chain: int = 1) -> list[str]:
    """Try the script against the scheduler, then submit it; the job numbers, in the order in which they run.

    Raises:
        LaunchError: the scheduler refuses; its own words.
    """
    _ask("sbatch", "--test-only", str(script))
    jobs: list[str] = []
    for _ in range(chain):
        # afterany: the next link also goes on where this one ran out of time.
        after = [f"--dependency=afterany:{jobs[-1]}"] if jobs else []
        jobs.append(_ask("sbatch", "--parsable", *after, str(script)).strip().split(";")[0])
    return jobs


def find_jobs(ids: Sequence[str]) -> list[Job]:
    """What the scheduler still knows of these jobs: squeue, then for the rest sacct where there is accounting."""
    jobs: list[Job] = []
    for number in ids:
        try:
            lines = _ask("squeue", "-h", "-t", "all", "-j", number, "-o", "%i|%T|%M|%l|%N|%r").splitlines()
        except LaunchError:  # the queue has forgotten it
            lines = []
        jobs += [Job(*line.strip().split("|")) for line in lines]
    missing = [n for n in ids if not any(job.id.split("_")[0] == n for job in jobs)]
    if missing and shutil.which("sacct"):
        try:
            told = _ask("sacct", "-n", "-P", "-X", "-j", ",".join(missing),
                        "-o", "JobID,State,Elapsed,Timelimit,NodeList,Reason")  # fmt: skip
        except LaunchError:  # a cluster without accounting
            told = ""
        jobs += [Job(*line.strip().split("|")) for line in told.splitlines()]
    return jobs


def cancel(ids: Sequence[str]) -> None:
    if ids:
        _ask("scancel", *ids)


def hold_back(job: Job) -> bool:
    """Whether a job waits to run."""
    return job.state in ("PENDING", "REQUEUED", "SUSPENDED", "REQUEUE_HOLD", "SPECIAL_EXIT")
