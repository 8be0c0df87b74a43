"""The commands of this room: train, evaluate, generate, verify, report, profile, recipes."""

from __future__ import annotations

from pathlib import Path

import click

from .config import find_config, load_config, recipe_names, to_yaml


@click.command(context_settings={"ignore_unknown_options": False})
@click.argument("config")
@click.argument("overrides", nargs=-1)
@click.option("--shrink", is_flag=True, help="Same structure, tiny sizes, two steps on the CPU: does the recipe run?")
@click.option("--dry-run", is_flag=True, help="Check everything, print the resolved configuration, start nothing.")
def train(config: str, overrides: tuple[str, ...], shrink: bool, dry_run: bool) -> None:
    """Train CONFIG: a recipe's name, a YAML file, or a run folder (which resumes it).

    OVERRIDES are written section.key=value, for example train.steps=100 mesh.tp=1. The run folder receives
    config.yaml, metrics.jsonl, loss.png, checkpoints/ and wandb/. Called again, it resumes from the newest
    checkpoint. On several machines start the worker itself: torchrun … -m polylepis.pretrain.train CONFIG.
    """
    from .claim import check_free
    from .errors import StoppedError
    from .preempt import clear_requests, read_outcome
    from .prepare import check_all, n_processes
    from .shrink import shrink as shrunk
    from .spawn import run_workers

    resolved = load_config(config, overrides)
    if shrink:
        resolved = shrunk(resolved)
    world_size = n_processes(resolved)
    check_all(resolved, world_size)
    if dry_run:
        click.echo(to_yaml(resolved), nl=False)
        return
    check_free(resolved.path)
    click.echo(f"{resolved.name}: {world_size} processes, run folder {resolved.folder}", err=True)
    resolved.path.mkdir(parents=True, exist_ok=True)
    clear_requests(resolved.path)
    requested = resolved.path / ".requested.yaml"
    requested.write_text(to_yaml(resolved))
    code = 1
    try:
        run_workers(world_size, [str(requested)])
    except StoppedError as stopped:
        code = stopped.exit_code
    outcome = read_outcome(resolved.path)
    if outcome is None or not outcome.startswith("done"):
        click.echo(f"{resolved.name}: {outcome or 'ended before it could save'}; the same command resumes it", err=True)
        raise SystemExit(code)
    click.echo(f"{resolved.name}: trained to step {resolved.train.steps}; see {resolved.folder}", err=True)


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--digits", default=0, show_default=True, help="Held-out digits to classify; 0 takes all.")
def evaluate(run: Path, digits: int) -> None:
    """Evaluate the newest checkpoint of RUN on the held-out split.

    Prints loss per modality, the gap between matched and shuffled captions, and the accuracy of naming a digit
    from its image by likelihood; writes evaluation.json into the run folder.
    """
    from .evaluate import evaluate_run

    evaluate_run(run, digits or None)


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--prompt", default="The ", show_default=True, help="Text to continue.")
@click.option("--tokens", default=60, show_default=True, help="How many tokens to continue it by.")
@click.option("--per-digit", default=6, show_default=True, help="Images drawn for each of the ten digit captions.")
@click.option("--temperature", default=0.5, show_default=True, help="0 is greedy.")
@click.option("--seed", default=0, show_default=True)
def generate(run: Path, prompt: str, tokens: int, per_digit: int, temperature: float, seed: int) -> None:
    """Draw digits from captions (generated.png) and continue a text prompt, with RUN's newest checkpoint.

    Decoding keeps a recurrent state and a key/value cache; nothing is computed twice.
    """
    from .generate import generate_run

    generate_run(run, prompt=prompt, n_tokens=tokens, per_digit=per_digit, temperature=temperature, seed=seed)


@click.command()
@click.argument("config")
@click.argument("overrides", nargs=-1)
def verify(config: str, overrides: tuple[str, ...]) -> None:
    """Prove that CONFIG's parallel plan equals one process, before paying for GPUs.

    Runs the plan on this machine's CPU, shrunk in width but with its pattern, routing and axes intact (data-parallel
    axes at most 2), and compares loss, gradient norm, every gradient and one optimizer step with one process: in fp64,
    where parallelism is proven, and in fp32. Exit code 1 where anything exceeds its tolerance.
    """
    from .prepare import n_processes
    from .verify import certificate, verify_config

    resolved = load_config(config, overrides)
    plan, lines = verify_config(resolved, n_processes(resolved))
    click.echo(certificate(plan, lines))
    if not all(line.passed for line in lines):
        raise SystemExit(1)


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
def report(run: Path) -> None:
    """Write report.html into RUN: plots, lost time, plan against measurement, events, environment, in one file."""
    from .report.page import write_report

    click.echo(write_report(run))


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--steps", default=3, show_default=True, help="How many of the next steps to profile.")
@click.option("--all-ranks", is_flag=True, help="Every rank writes a trace, not only rank 0.")
def profile(run: Path, steps: int, all_ranks: bool) -> None:
    """Open a torch-profiler window on the job that is training RUN; traces go to RUN/profile/.

    The job sees the request within a step and need not be restarted. Open the traces in ui.perfetto.dev.
    """
    from .meter.window import ask

    click.echo(f"{ask(run, steps, all_ranks)}: waiting for the job's next step", err=True)


@click.group()
def recipes() -> None:
    """The recipes that ship with the package."""


@recipes.command("list")
def list_recipes() -> None:
    """Name, pattern and parameters of each recipe."""
    from ..parallel.model import count_parameters

    for name in recipe_names():
        config = load_config(name)
        click.echo(f"{name:28} {count_parameters(config.model):>15,}  {config.model.pattern}")


@recipes.command()
@click.argument("name")
def show(name: str) -> None:
    """The recipe's file, with its comments."""
    click.echo(find_config(name).read_text(), nl=False)
