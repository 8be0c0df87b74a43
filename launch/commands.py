"""The commands of this room: launch {torchrun, slurm, status, logs, stop} and doctor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from .request import Container, Request, parse_env, parse_nodes, parse_sbatch, parse_setup


def common_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What torchrun and SLURM scripts share."""
    for option in reversed([
        click.argument("config"),
        click.argument("overrides", nargs=-1),
        click.option("--nodes", default="1", show_default=True, help="Machines; MIN:MAX for an elastic torchrun run."),
        click.option("--gpus-per-node", "gpus", type=int, help="GPUs of each, one process per GPU."),
        click.option("--procs-per-node", "procs", type=int, help="Processes on each, where they are not its GPUs."),
        click.option("--setup", multiple=True, help="Shell lines, or a file of them, run on every node before Python."),
        click.option("--env", multiple=True, metavar="KEY=VALUE", help="Export a variable; wins over the script's."),
        click.option("--doctor", is_flag=True, help="Check the nodes before training."),
        click.option("--submit", is_flag=True, help="Submit it (SLURM), or start it here (torchrun)."),
        click.option("--elsewhere", is_flag=True, help="Written for a cluster that this machine cannot see: data, "
                     "image and partition are not looked at."),
    ]):  # fmt: skip
        command = option(command)
    return command


@click.group()
def launch() -> None:
    """Bring a run to machines: write a script, submit it, watch it, stop it.

    The script is plain shell with its choices explained in comments. It lies in RUN/launch/0001/ with the resolved
    configuration and a copy of the code, so that what is edited afterwards does not change a job that waits.
    """


@launch.command()
@common_options
@click.option("--max-restarts", default=3, show_default=True, help="How often failed workers are started again.")
@click.option("--grace", default=60, show_default=True, help="Seconds that the workers have to save when told to end.")
def torchrun(config: str, overrides: tuple[str, ...], **options: Any) -> None:
    """Write a script that starts CONFIG under torchrun: on this machine, or one line on each of several.

    With --nodes 2:4 the run goes on while at least 2 of 4 machines are left, re-sharded; it needs mesh.dp_shard=-1.
    """
    from .write import launch_run

    launch_run("torchrun", config, overrides, (), _request(options), options["submit"], options["elsewhere"])


@launch.command()
@common_options
@click.option("--time", default="", help="Time limit, as SLURM writes it: 2-00:00:00.")
@click.option("--partition", default="", help="Where; the cluster's default otherwise.")
@click.option("--account", default="", help="Who pays.")
@click.option("--cpus-per-node", "cpus", default=0, help="Cores for the workers of a node; all of them otherwise.")
@click.option("--shared", is_flag=True, help="Do not ask for whole nodes.")
@click.option("--grace", default=300, show_default=True, help="Seconds before the limit at which the run saves.")
@click.option("--sbatch", multiple=True, help="A further #SBATCH option, for example --constraint=h100.")
@click.option("--container", "image", help="An image for SLURM's container plug-in (pyxis).")
@click.option("--container-mount", "mounts", multiple=True, metavar="SOURCE:TARGET", help="Mount into the container.")
@click.option("--container-flag", "flags", multiple=True, help="A further option of srun for the container.")
@click.option("--sweep", multiple=True, metavar="KEY=A,B", help="A job array with one run for each combination.")
@click.option(
    "--chain", default=1, show_default=True, help="Jobs that follow one another, for runs beyond a time limit."
)
def slurm(config: str, overrides: tuple[str, ...], sweep: tuple[str, ...], **options: Any) -> None:
    """Write a SLURM script for CONFIG.

    The job saves before its time limit and when it is preempted, puts itself back into the queue and resumes exactly;
    after two restarts without progress it gives up.
    """
    from .write import launch_run

    launch_run("slurm", config, overrides, sweep, _request(options), options["submit"], options["elsewhere"])


def _request(options: dict[str, Any]) -> Request:
    gpus, procs = options["gpus"], options["procs"]
    image = options.get("image")
    container = Container(image, options["mounts"], options["flags"]) if image else None
    return Request(
        nodes=parse_nodes(options["nodes"]),
        procs=procs if procs is not None else gpus if gpus is not None else 0,
        gpus=gpus if gpus is not None else -1,  # decided by the configuration's device
        cpus=options.get("cpus", 0),
        time=options.get("time", ""),
        partition=options.get("partition", ""),
        account=options.get("account", ""),
        exclusive=not options.get("shared", False),
        grace=options["grace"],
        sbatch=parse_sbatch(options.get("sbatch", ())),
        setup=parse_setup(options["setup"]),
        env=parse_env(options["env"]),
        container=container,
        max_restarts=options.get("max_restarts", 0),
        chain=options.get("chain", 1),
        doctor=options["doctor"],
    )


@launch.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def status(run: Path, as_json: bool) -> None:
    """Where RUN stands: step, loss, newest checkpoint, who holds it, what the scheduler says of its jobs."""
    from . import runs

    found = runs.status(run)
    click.echo(json.dumps(found, indent=1) if as_json else runs.as_text(found))


@launch.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--lines", "-n", default=30, show_default=True, help="The last lines of each file.")
@click.option("--follow", "-f", is_flag=True, help="Go on until no job of the run is left.")
def logs(run: Path, lines: int, follow: bool) -> None:
    """The output of RUN's newest launch, from every node."""
    from . import runs

    files = runs.log_files(run)
    for file in files:
        click.echo(f"==> {file} <==")
        click.echo("".join(runs.tail(file, lines)), nl=False)
    if follow:
        for line in runs.follow(files, run):
            click.echo(line, nl=False)


@launch.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--now", is_flag=True, help="Kill it, without saving first.")
def stop(run: Path, now: bool) -> None:
    """End RUN: it saves at its next step and stops; jobs of it that wait in the queue are cancelled."""
    from . import runs

    for line in runs.stop(run, now):
        click.echo(f"{run}: {line}")


@click.command()
@click.argument("config", required=False)
@click.argument("overrides", nargs=-1)
@click.option(
    "--stage",
    type=click.Choice(["node", "ranks", "all"]),
    default="all",
    show_default=True,
    help="Each node alone, the ranks together, or both.",
)
@click.option("--procs", type=int, help="Processes on this node; what the mesh asks for otherwise.")
@click.option("--out", type=click.Path(path_type=Path), help="Where findings go; RUN/launch/doctor otherwise.")
@click.option("--thresholds", type=click.Path(path_type=Path), help="A YAML file; see the package's thresholds.yaml.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.option("--collect", is_flag=True, help="Examine nothing: put the findings in --out together.")
def doctor(
    config: str | None,
    overrides: tuple[str, ...],
    stage: str,
    procs: int | None,
    out: Path | None,
    thresholds: Path | None,
    as_json: bool,
    collect: bool,
) -> None:
    """Are these machines fit to train CONFIG? Exit code 1 where they are not.

    Stage "node" needs no rendezvous: memory, disk, clock, limits, network, GPUs, data, kernels. Stage "ranks" starts
    processes: all-reduce right and how fast, slow links, clock skew, equal code, a shared folder. On a cluster
    `polylepis launch … --doctor` runs both before training; --collect then lists passing and failing nodes.
    """
    from .doctor.run import collect_findings, examine

    if collect:
        passed = collect_findings(out, as_json)
    else:
        passed = examine(config, overrides, stage, procs, out, thresholds, as_json)
    if not passed:
        raise SystemExit(1)
