"""`polylepis`: the console entry. It mounts what each room exports, and turns a user's mistake into one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

import click

# Mounted lazily: importing torch costs seconds, and `polylepis --help` needs none of it.
ROOMS = {
    "train": ("polylepis.pretrain.commands", "train", "Train a recipe, a YAML file, or a run folder (resumes it)."),
    "evaluate": ("polylepis.pretrain.commands", "evaluate", "Evaluate a run on its held-out data."),
    "generate": ("polylepis.pretrain.commands", "generate", "Draw digits from captions and continue a prompt."),
    "data": ("polylepis.data.commands", "data", "Build, index, validate and inspect data sets."),
    "convert": ("polylepis.checkpoints.commands", "convert", "Export a run to Hugging Face, verified, or import one."),
    "eval": ("polylepis.checkpoints.commands", "evaluate_export", "Run lm-evaluation-harness on an export."),
    "plan": ("polylepis.pretrain.plan.commands", "plan", "Predict memory and step time, and find the plan that fits."),
    "rehearse": (
        "polylepis.launch.rehearse",
        "rehearse",
        "Run a plan without GPUs: full size on paper, small for real.",
    ),
    "verify": ("polylepis.pretrain.commands", "verify", "Prove that a parallel plan equals one process, on the CPU."),
    "report": ("polylepis.pretrain.commands", "report", "Write one self-contained HTML page about a run."),
    "profile": ("polylepis.pretrain.commands", "profile", "Open a profiler window on a running job."),
    "checkpoint": ("polylepis.checkpoints.commands", "checkpoint", "Inspect, verify, compare and prune checkpoints."),
    "bench": ("polylepis.pretrain.plan.commands", "bench", "Measure this machine: layers; tune its kernels."),
    "launch": ("polylepis.launch.commands", "launch", "Write job scripts (torchrun, SLURM), submit, watch, stop."),
    "doctor": ("polylepis.launch.commands", "doctor", "Are these machines fit to train? Each alone, then together."),
    "recipes": ("polylepis.pretrain.commands", "recipes", "List and show the recipes of the package."),
}


class LazyGroup(click.Group):
    """Loads a command's module when the command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(ROOMS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in ROOMS:
            return None
        module, attribute, _ = ROOMS[cmd_name]
        return getattr(import_module(module), attribute)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in ROOMS.items()])


@click.group(cls=LazyGroup)
@click.version_option(package_name="polylepis")
def cli() -> None:
    """Pretrain hybrid, multimodal Mamba models, from two laptop processes to thousands of GPUs.

    The quickstart, step by step: data build quickstart · train quickstart · evaluate runs/quickstart ·
    generate runs/quickstart · convert runs/quickstart --to hf
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; a user's mistake is one line on standard error and exit code 2, without traceback.

    POLYLEPIS_TRACEBACK=1 shows the traceback of such a mistake as well.
    """
    try:
        cli.main(args=list(sys.argv[1:] if arguments is None else arguments), prog_name="polylepis")
    except SystemExit as stop:  # click always leaves through here
        return stop.code if isinstance(stop.code, int) else 1
    except Exception as error:
        code = getattr(error, "exit_code", None)
        if code is None or os.environ.get("POLYLEPIS_TRACEBACK") == "1":
            raise
        click.echo(f"polylepis: {error}", err=True)
        return code
    return 0
