"""`polylepis rehearse`: the whole plan before anything is paid for: full size on paper, shrunken in real processes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

MAX_PROCESSES = 8


@click.command()
@click.argument("config")
@click.argument("overrides", nargs=-1)
@click.option("--gpus", type=int, help="GPUs in all: takes the plan that CONFIG carries for them, where it has one.")
@click.option("--gpu", default="h100", show_default=True, help="a100, h100, h200 or b200: whose memory must suffice.")
@click.option("--memory", type=float, help="GiB of one GPU that may be used, instead of all it has.")
@click.option("--processes", default=MAX_PROCESSES, show_default=True, help="Processes of the shrunken run, at most.")
def rehearse(
    config: str, overrides: tuple[str, ...], gpus: int | None, gpu: str, memory: float | None, processes: int
) -> None:
    """Rehearse CONFIG's plan without a GPU.

    At full size, on fake tensors: shapes, bytes of every rank against a GPU's memory, every collective. Then shrunken
    in width, pattern and axes intact as far as 8 processes allow: two steps, a checkpoint, two more steps from it.
    """
    from ..pretrain.config import load_config, plan_sizes
    from ..pretrain.prepare import n_processes

    carried = gpus in plan_sizes(config) and not any(text.startswith("gpus=") for text in overrides)
    resolved = load_config(config, (*([f"gpus={gpus}"] if carried else []), *overrides))
    world = gpus or n_processes(resolved)
    full_size(resolved, world, gpu, memory)
    small_run(resolved, world, processes)
    click.echo(f"rehearsed: {resolved.name} on {world} GPUs")


def full_size(config: Any, world: int, gpu: str, memory: float | None) -> None:
    """Check, price and walk through the plan at its real size.

    Raises:
        PlanError, ConfigError: it cannot be built, does not fit, or a layer sends something unexpected.
    """
    from ..parallel.errors import PlanError
    from ..parallel.pipeline.cost import Roofline
    from ..parallel.pipeline.devices import GIB, find_device
    from ..pretrain.config import to_yaml
    from ..pretrain.plan.estimate import estimate
    from ..pretrain.plan.report import table
    from ..pretrain.plan.search import why_not
    from ..pretrain.prepare import check_run

    check_run(config, world)
    config = replace(config, mesh=config.mesh.resolve(world))
    device = find_device(gpu)
    found = estimate(config, Roofline(device), None if memory is None else memory * GIB)
    click.echo(table(found, device.name, f"a roofline of {device.name} (assumptions: docs/planning.md)"))
    if not found.fits:
        raise PlanError("rehearse: " + "; ".join(why_not(found)))
    with tempfile.TemporaryDirectory() as scratch:
        asked, answer = Path(scratch, "plan.yaml"), Path(scratch, "walk.json")
        asked.write_text(to_yaml(config))
        module = "polylepis.pretrain.plan.full_size"
        done = subprocess.run([sys.executable, "-m", module, str(asked), str(answer)], capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise PlanError(last.removeprefix("polylepis: "))
        walked = json.loads(answer.read_text())
    click.echo("\n" + volumes(walked, found))


def volumes(walked: dict[str, Any], found: Any) -> str:
    """What every rank of each pipeline coordinate sends and receives per micro-batch, forward and backward."""
    config, mesh = found.config, found.config.mesh
    schedule = found.timeline.schedule
    lines = ["per micro-batch, forward and backward, on each rank over tp, cp and ep:"]
    for rank in range(mesh.pp):
        calls: Counter[str] = Counter()
        sizes: Counter[str] = Counter()
        mine = [i for i in range(schedule.n_stages) if schedule.rank_of(i, 0) == rank]
        entries = [walked["layers"][layer] for i in mine for layer in found.stages[i].layers]
        entries += [walked["ends"]] if mesh.pp == 1 else []
        for entry in entries:
            calls.update(entry["both"]["calls"])
            sizes.update(entry["both"]["bytes"])
        told = ", ".join(f"{calls[n]} {n} ({sizes[n] / 2**20:,.1f} MiB)" for n in sorted(calls)) or "nothing"
        lines.append(f"pipeline {rank}: {told}")
    if mesh.pp > 1:
        size = config.data.micro_batch * config.data.seq_len // mesh.cp // mesh.tp * config.model.d_model
        size *= config.train.compute_dtype.itemsize
        lines.append(f"between stages: {size / 2**20:,.1f} MiB each way; embedding and loss: {walked['ends']['both']}")
    if not all(entry["counted"] for entry in walked["layers"]):
        lines.append("expert layers: by formula, rows spread evenly (fake tensors choose no experts)")
    shard = sum(memory.parameters for memory in found.memory) / len(found.memory) / 4
    lines.append(
        f"per step over dp_shard × cp = {mesh.dp_shard * mesh.cp}: about {shard:,.0f} parameters of each rank gathered "
        f"and their gradients scattered"
    )
    return "\n".join(lines)


def small_mesh(mesh: Any, limit: int) -> Any:
    """The same axes with at most `limit` processes: those that are used stay at two as long as they fit.

    tp, cp and pp are kept before data-parallel axes, which repeat what is there already.
    """
    from ..parallel.mesh import MeshConfig
    from ..pretrain.verify import cap_data_axes

    capped = cap_data_axes(mesh)
    sizes = {axis: getattr(capped, axis) for axis in ("tp", "cp", "pp", "dp_shard", "dp_replicate")}
    for axis in ("tp", "cp", "pp"):
        sizes[axis] = next(n for n in range(min(2, sizes[axis]), sizes[axis] + 1) if sizes[axis] % n == 0)
    for axis in ("dp_replicate", "dp_shard", "cp", "pp", "tp"):
        if math.prod(sizes.values()) <= limit:
            break
        sizes[axis] = 1
    ep = math.gcd(capped.ep, sizes["dp_shard"] * sizes["cp"])
    return MeshConfig(**sizes, ep=ep, ep_spare=capped.ep_spare if ep > 1 else 0)


def small_run(config: Any, world: int, limit: int) -> None:
    """Two steps, save, load, two more, in real processes on the CPU."""
    from ..pretrain.config import to_yaml
    from ..pretrain.errors import ConfigError
    from ..pretrain.meter.tracker import read_metrics
    from ..pretrain.prepare import check_run
    from ..pretrain.shrink import shrink
    from ..pretrain.spawn import run_workers

    if not 1 <= limit <= 64:
        raise ConfigError(f"--processes: between 1 and 64, not {limit}")
    mesh = small_mesh(config.mesh.resolve(world), limit)
    small = shrink(config, steps=2, mesh=mesh)
    length = 8 * mesh.cp * mesh.tp * -(-64 // (8 * mesh.cp * mesh.tp))
    rows = 2 * mesh.pp * mesh.dp_replicate * mesh.dp_shard
    pipeline, pattern = small.pipeline, small.model.pattern
    if mesh.pp != config.mesh.pp:  # other stages: let them be cut anew
        pipeline, pattern = replace(pipeline, cuts=()), pattern.replace("|", "")
    with tempfile.TemporaryDirectory() as scratch:
        small = replace(
            small,
            folder=str(Path(scratch, "run")),
            model=replace(small.model, pattern=pattern),
            pipeline=pipeline,
            data=replace(small.data, seq_len=length, global_batch=rows, micro_batch=1),
            train=replace(small.train, overlap_dispatch=config.train.overlap_dispatch and mesh.ep > 1),
        )
        check_run(small, mesh.n_processes)
        axes = " × ".join(f"{axis} {size}" for axis, size in vars(mesh).items() if size > 1) or "one process"
        click.echo(f"\nshrunken, {mesh.n_processes} processes ({axes}): 2 steps, save, load, 2 steps", err=True)
        os.environ["OMP_NUM_THREADS"] = "1"
        for steps in (2, 4):
            small = replace(small, train=replace(small.train, steps=steps))
            asked = Path(scratch, "run.yaml")
            asked.write_text(to_yaml(small))
            run_workers(mesh.n_processes, [str(asked)])
        lines = read_metrics(small.path)
        wrong = [
            line["step"] for line in lines if not math.isfinite(line["loss"]) or not math.isfinite(line["grad_norm"])
        ]
        if [line["step"] for line in lines] != [1, 2, 3, 4] or wrong:
            raise ConfigError(
                f"rehearse: expected finite losses of steps 1 to 4, got steps {lines} (not finite: {wrong})"
            )
    told = ", ".join(f"{line['loss']:.3f}" for line in lines)
    click.echo(f"shrunken run ({axes}): losses {told}; the last two continued from the checkpoint")
