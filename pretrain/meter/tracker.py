"""Where the numbers of a run go: `metrics.jsonl`, a progress bar, wandb, `loss.png`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from tqdm import tqdm

METRICS_FILE = "metrics.jsonl"


class Tracker:
    """Rank 0's record of a run. Opening it at step k drops lines of later steps, which a resumed run writes again."""

    def __init__(self, folder: Path, steps: int, first_step: int, progress: bool = True) -> None:
        self.folder = folder
        self.path = folder / METRICS_FILE
        kept = [line for line in read_metrics(folder) if line["step"] <= first_step]
        aside = self.path.with_suffix(".part")
        aside.write_text("".join(json.dumps(line) + "\n" for line in kept))
        aside.replace(self.path)
        self.file = open(self.path, "a")
        self.bar = tqdm(total=steps, initial=first_step, unit="step", disable=not progress, file=sys.stderr)
        self.wandb: Any = None

    def start_wandb(self, mode: Literal["auto", "offline", "online"], project: str, name: str, config: Any) -> None:
        """Also log to wandb; `auto` is online where a key is configured, offline in the run folder otherwise."""
        import wandb

        if mode == "auto":
            mode = "online" if wandb.api.api_key else "offline"
        settings = wandb.Settings(silent=True)
        self.wandb = wandb.init(
            dir=str(self.folder), mode=mode, project=project, name=name, config=config, settings=settings
        )

    def log(self, metrics: Mapping[str, Any]) -> None:
        """One step's metrics; `step` and the `loss/…` of each modality among them."""
        self.file.write(json.dumps(metrics) + "\n")
        self.file.flush()
        shown = {key.removeprefix("loss/"): f"{v:.2f}" for key, v in metrics.items() if key.startswith("loss/")}
        shown["tok/s"] = f"{metrics['tokens_per_second']:,.0f}"
        shown["s/step"] = f"{metrics['step_seconds']:.2f}"
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(1)
        if self.wandb is not None:
            self.wandb.log(dict(metrics), step=metrics["step"])

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()
        self.file.close()
        if self.wandb is not None:
            self.wandb.finish(exit_code=0 if kind is None else 1)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All complete lines of a run's metrics; a line cut by a crash is left out."""
    path = folder / METRICS_FILE
    lines: list[dict[str, Any]] = []
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def plot_losses(folder: Path, modalities: Sequence[str]) -> Path:
    """`loss.png`: one curve per modality, faint per step and smoothed on top.

    Raises:
        ModuleNotFoundError: matplotlib (extra `quickstart`) is not installed.
    """
    from matplotlib.figure import Figure

    lines = read_metrics(folder)
    figure = Figure(figsize=(7, 4.2), dpi=130, layout="constrained")
    axes = figure.subplots()
    for index, modality in enumerate(modalities):
        points = [(line["step"], line[f"loss/{modality}"]) for line in lines if f"loss/{modality}" in line]
        if not points:
            continue
        steps, losses = zip(*points, strict=True)
        smooth, value = [], losses[0]
        for loss in losses:
            value = 0.9 * value + 0.1 * loss
            smooth.append(value)
        axes.plot(steps, losses, color=f"C{index}", alpha=0.25, linewidth=0.8)
        axes.plot(steps, smooth, color=f"C{index}", linewidth=1.8, label=f"{modality} ({smooth[-1]:.2f})")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per predicted token")
    axes.set_title(f"{folder.name}: training loss per modality")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    path = folder / "loss.png"
    figure.savefig(path)
    return path
