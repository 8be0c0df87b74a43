"""From a checked request to files in the run folder, and on to the scheduler."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..pretrain.claim import check_free
from ..pretrain.config import RunConfig, load_config, to_yaml
from ..pretrain.preempt import clear_requests
from . import runs, slurm
from .errors import LaunchError
from .render import Places, own_bin, render
from .request import Request, check_sweep
from .snapshot import next_folder, take_snapshot

SCRIPTS = {"slurm": "job.sbatch", "torchrun": "torchrun.sh"}


def launch_run(
    kind: str,
    name: str,
    overrides: Sequence[str],
    sweep: Sequence[str],
    request: Request,
    submit: bool,
    elsewhere: bool,
) -> Path:
    """Check everything, write the script with its snapshot, submit it where that was asked for. The script.

    Raises:
        LaunchError, ConfigError, PlanError, DataError: before anything is written.
    """
    config = load_config(name, overrides)
    configs = sweep_configs(name, overrides, sweep) if sweep else [config]
    request = complete(request, config)
    check(kind, configs, request, submit, elsewhere)

    folder = next_folder(config.path)
    places = Places(str(folder), tuple(c.folder for c in configs), own_bin(request, elsewhere))
    text = render(kind, config, request, places)
    aside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    take_snapshot(aside)
    if sweep:
        (aside / "runs.txt").write_text("".join(f"{c.folder}\n" for c in configs))
        for index, one in enumerate(configs):
            (aside / f"config-{index}.yaml").write_text(to_yaml(one))
    else:
        (aside / "config.yaml").write_text(to_yaml(config))
    (aside / SCRIPTS[kind]).write_text(text)
    (aside / "command.json").write_text(json.dumps(sys.argv) + "\n")
    aside.rename(folder)

    script = folder / SCRIPTS[kind]
    print(script)
    if submit:
        submit_script(kind, script, configs, request)
    return script


def complete(request: Request, config: RunConfig) -> Request:
    """Processes and GPUs per node where the user left one of them to the other.

    Raises:
        LaunchError: neither was said.
    """
    gpus, procs = request.gpus, request.procs
    if not procs and gpus < 1:
        raise LaunchError("--gpus-per-node or --procs-per-node: how many processes should run on a node?")
    if gpus < 0:
        gpus = 0 if config.train.device == "cpu" else procs
    return replace(request, gpus=gpus, procs=procs)


def sweep_configs(name: str, overrides: Sequence[str], sweep: Sequence[str]) -> list[RunConfig]:
    """One configuration for each combination, in a folder of its own below the run's."""
    base = load_config(name, overrides)
    found = []
    axes = [[f"{key}={value}" for value in values] for key, values in check_sweep(sweep)]
    for combination in itertools.product(*axes):
        config = load_config(name, [*overrides, *combination])
        label = re.sub(r"[^\w.=+-]+", "_", ",".join(combination))
        found.append(replace(config, name=f"{base.name}-{label}", folder=f"{base.folder}/{label}"))
    return found


def check(kind: str, configs: Sequence[RunConfig], request: Request, submit: bool, elsewhere: bool) -> None:
    """Everything that can be known before a script is written. See `launch_run`."""
    if kind == "slurm" and request.nodes[0] != request.nodes[1]:
        raise LaunchError(f"--nodes {request.nodes[0]}:{request.nodes[1]}: a SLURM job has a fixed number of nodes")
    if submit and elsewhere:
        raise LaunchError("--submit with --elsewhere: what was not checked is not submitted from here")
    if kind == "torchrun" and submit and request.nodes[1] > 1:
        raise LaunchError(
            f"--submit with --nodes {request.nodes[1]}: bare torchrun is started on every machine; see the script"
        )
    for config in configs:
        request.check(config)
        request.check_plan(config, elsewhere)
        check_free(config.path)
        waiting = [job for job in runs.jobs_of(config.path) if job.state not in runs.ENDED]
        if submit and waiting:
            raise LaunchError(
                f"{config.folder}: job {waiting[0].id} of this run is {waiting[0].state}; `polylepis launch stop "
                f"{config.folder}` ends it, --chain N queues several"
            )
    if kind == "slurm" and not elsewhere:
        if slurm.has_slurm():
            slurm.check_request(request, slurm.partitions())
        elif submit:
            raise LaunchError("--submit: sbatch and sinfo are not on the PATH of this machine")
        else:
            print("polylepis: no SLURM on this machine: partition and sizes of nodes were not checked", file=sys.stderr)


def submit_script(kind: str, script: Path, configs: Sequence[RunConfig], request: Request) -> None:
    """To the scheduler, or into the background of this machine; remembered in the run folder(s)."""
    if kind == "slurm":
        ids = slurm.submit(script, request.chain)
        said = f"job {', then '.join(ids)}"
    else:
        clear_requests(configs[0].path)
        ids = [str(runs.start_script(script, script.parent))]
        said = f"process {ids[0]}"
    main = script.parent.parent.parent
    for folder in dict.fromkeys([main, *(config.path for config in configs)]):
        runs.record(folder, kind, ids, script.parent)
    print(f"{said}; watch it: polylepis launch status {main}", file=sys.stderr)
