"""`polylepis plan`, `polylepis bench layers` and `polylepis bench tune`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import click

from ..config import load_config, plan_sizes


@click.command()
@click.argument("config")
@click.argument("overrides", nargs=-1)
@click.option("--gpus", type=int, help="GPUs in all; without it, what the configuration's mesh asks for.")
@click.option("--gpu", default="h100", show_default=True, help="a100, h100, h200 or b200.")
@click.option("--memory", type=float, help="GiB of one GPU that may be used, instead of all it has.")
@click.option("--as-written", is_flag=True, help="Price the configuration as it is, or its plan for --gpus.")
@click.option("--top", default=5, show_default=True, help="How many plans to list.")
@click.option("--document", type=int, help="Mean tokens of a document; without it, one document per row.")
@click.option("--layers", type=click.Path(path_type=Path), help="Measured seconds, from `polylepis bench layers`.")
@click.option("--loads", type=click.Path(path_type=Path), help="Expert loads that this run (or checkpoint) measured.")
@click.option("--timeline", type=click.Path(path_type=Path), help="Draw the step: FILE.png or FILE.html.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the prediction as JSON.")
def plan(
    config: str,
    overrides: tuple[str, ...],
    gpus: int | None,
    gpu: str,
    memory: float | None,
    as_written: bool,
    top: int,
    document: int | None,
    layers: Path | None,
    loads: Path | None,
    timeline: Path | None,
    json_path: Path | None,
) -> None:
    """Predict memory and step time of CONFIG on GPUs, and look for the fastest plan that fits.

    Meshes, schedules, micro-batches and recompute per kind are searched; the overrides printed at the end run the best
    one. Exit code 2, with the reasons and what would help, where nothing fits.
    """
    from ...parallel.errors import PlanError
    from ...parallel.pipeline.cost import Roofline, Timing
    from ...parallel.pipeline.devices import GIB, find_device
    from ..prepare import n_processes
    from .estimate import Assumptions, estimate
    from .loads import read_loads
    from .measure import Measured, read_layers
    from .picture import save_timeline
    from .report import as_json, search_table, table, title
    from .search import overrides as to_paste
    from .search import search, why_not

    device = find_device(gpu)
    if gpus is not None and gpus < 1:
        raise PlanError(f"--gpus: must be at least 1, not {gpus}")
    carried = as_written and gpus in plan_sizes(config) and not any(text.startswith("gpus=") for text in overrides)
    resolved = load_config(config, (*([f"gpus={gpus}"] if carried else []), *overrides))
    world = gpus or n_processes(resolved)
    limit = device.memory if memory is None else memory * GIB
    timing: Timing = Roofline(device) if layers is None else Measured(device, read_layers(layers))
    source = f"a roofline of {device.name} (assumptions: docs/planning.md)" if layers is None else f"{layers}"
    measured = loads or (Path(resolved.train.loads) if resolved.train.loads else None)
    assumed = Assumptions(document, {} if measured is None else read_loads(measured, resolved.model))
    if as_written:
        best = estimate(replace(resolved, mesh=resolved.mesh.resolve(world)), timing, limit, assumed)
    else:
        found = search(resolved, world, timing, limit, assumed, top)
        click.echo(search_table(found, limit) + "\n")
        if not found.best:
            reasons = "; ".join(why_not(found.nearest)) if found.nearest else found.example
            nearest = f"; the nearest is {title(found.nearest)}" if found.nearest else ""
            raise PlanError(f"plan: no plan for {world} × {device.name} fits{nearest}: {reasons}")
        best = found.best[0]
    click.echo(table(best, device.name, source))
    click.echo("\nto run it: polylepis train " + " ".join([config, *to_paste(best)]))
    if timeline is not None:
        save_timeline(best.timeline, timeline, f"{best.config.name}, {title(best)}")
        click.echo(f"timeline: {timeline}")
    if json_path is not None:
        json_path.write_text(json.dumps(as_json(best, device.name, source), indent=1) + "\n")
    if not best.fits:
        raise PlanError("plan: " + "; ".join(why_not(best)))


@click.group()
def bench() -> None:
    """Measure this machine."""


@bench.command("layers")
@click.argument("config")
@click.argument("overrides", nargs=-1)
@click.option("--out", type=click.Path(path_type=Path), help="Where to; without it, layers.json in the run folder.")
@click.option("--repeats", default=7, show_default=True, help="Runs of each layer; the median counts.")
def bench_layers(config: str, overrides: tuple[str, ...], out: Path | None, repeats: int) -> None:
    """Time forward and backward of each layer of CONFIG here, on a micro-batch of its data (data.path=mock: none).

    A run whose folder holds the table logs predicted_step_seconds and predicted_bubble beside every measured step;
    `polylepis plan --layers FILE` plans with it.
    """
    import os

    import torch

    from .crowd import measure
    from .measure import LAYERS_FILE, write_layers

    resolved = load_config(config, overrides)
    if repeats < 1:
        raise click.BadParameter(f"must be at least 1, not {repeats}", param_hint="--repeats")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))  # as a worker of a run
    times = measure(resolved, repeats)
    path = out or resolved.path / LAYERS_FILE
    write_layers(times, path)
    beside = f", {times.processes} processes at once" if times.processes > 1 else ""
    click.echo(f"{times.machine}; {times.tokens} tokens{beside}")
    for key, (forward, backward) in times.seconds.items():
        values = json.loads(key)
        click.echo(f"{values['kind']:<10} forward {forward * 1e3:>9.3f} ms  backward {backward * 1e3:>9.3f} ms")
    if times.send is not None:
        handed = f"pipeline    operation {times.operation * 1e3:>8.3f} ms  send     {times.send * 1e3:>9.3f} ms"
        click.echo(handed)
    click.echo(f"table: {path}")


@bench.command("tune")
def bench_tune() -> None:
    """Time the launch candidates of the scan's kernels on this GPU and rewrite their table in the package.

    The table is keyed by architecture, shape and Triton version; a run looks it up and never tunes by itself.
    """
    from ...kernels.ssd.tune import tune

    tune(say=click.echo)
