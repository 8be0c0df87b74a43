"""Scripts from templates: plain text with the choices explained in it, for people to read and edit."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from ..pretrain.config import RunConfig
from .request import Request, plan_environment

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Places:
    """Where a script finds things, relative to the folder it is submitted from.

    Attributes:
        launch: the folder with the script, the resolved configuration and the code.
        runs: the run folders; several for a sweep.
        bin: a folder to put before PATH, or "" where the set-up lines or the container provide Python.
    """

    launch: str
    runs: tuple[str, ...]
    bin: str = ""


def own_bin(request: Request, elsewhere: bool) -> str:
    """The folder of this virtual environment's programs, where nothing else was said about Python."""
    in_environment = sys.prefix != sys.base_prefix
    return "" if elsewhere or request.setup or request.container or not in_environment else f"{sys.prefix}/bin"


def job_name(name: str) -> str:
    """Printable, without what SLURM expands in file names."""
    return re.sub(r"[^\w.=-]+", "-", name)


def render(kind: str, config: RunConfig, request: Request, places: Places) -> str:
    """The text of the script.

    Args:
        kind: `slurm` or `torchrun`.
    """
    least, most = request.nodes
    mesh = config.mesh.resolve(most * request.procs)
    axes = " × ".join(
        f"{name} {size}"
        for name in ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")
        if (size := getattr(mesh, name)) > 1 or name == "dp_shard"
    )
    count = f"{least} to {most} nodes" if least < most else f"{most} node" + "s" * (most > 1)
    title = f"{config.name}: {count} × {request.procs} processes, mesh {axes}"
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # shell, not HTML; values pass through `quote`
    )
    environment.filters["quote"] = shlex.quote
    template = environment.get_template("slurm.sbatch.j2" if kind == "slurm" else "torchrun.sh.j2")
    return template.render(
        config=config,
        request=request,
        title=title,
        job=job_name(config.name),
        nodes=most,
        launch=places.launch,
        launch_path=shlex.quote(places.launch)
        if places.launch.startswith("/")
        else f'"$PWD"/{shlex.quote(places.launch)}',
        runs=places.runs,
        bin=places.bin,
        plan=plan_environment(config, most * request.procs),
        srun=_srun(request),
    )


def _srun(request: Request) -> Sequence[str]:
    """Options of srun, a line each."""
    lines = [
        '--cpus-per-task="$CPUS"',
        '--open-mode=append --output="$LAUNCH/%x-%j-%n.log"',
    ]
    container = request.container
    if container is not None:
        mounts = ",".join(["$PWD:$PWD", *container.mounts])
        lines += [
            f'--container-image={shlex.quote(container.image)} --container-mounts="{mounts}"',
            '--container-workdir="$PWD" --no-container-mount-home',
            *container.flags,
        ]
    return lines
