"""Rank 0's record of a run: what is measured goes to every sink; `loss.png`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from .sinks import METRICS_FILE, Bar, JsonLines, Sink, TensorBoard, Wandb, read_metrics

__all__ = ["METRICS_FILE", "Tracker", "plot_losses", "read_metrics"]


class Tracker:
    """Rank 0's record of a run. Opening it at step k drops lines of later steps, which a resumed run writes again."""

    def __init__(self, folder: Path, steps: int, first_step: int, progress: bool = True) -> None:
        self.folder, self._first = folder, first_step
        self.sinks: list[Sink] = [JsonLines(folder, first_step)]
        if progress:
            self.sinks.append(Bar(steps, first_step))

    def start_wandb(self, mode: Literal["auto", "offline", "online"], project: str, name: str, config: Any) -> None:
        """Also log to wandb; see `Wandb`."""
        self.sinks.append(Wandb(self.folder, mode, project, name, config))

    def start_tensorboard(self) -> None:
        """Also log to TensorBoard; see `TensorBoard`."""
        self.sinks.append(TensorBoard(self.folder, self._first))

    def log(self, metrics: Mapping[str, Any]) -> None:
        """One step's metrics; `step` and the `loss/…` of each modality among them."""
        for sink in self.sinks:
            sink.log(metrics)

    def rewind(self, step: int) -> None:
        """The run has rolled back to `step`."""
        for sink in self.sinks:
            sink.rewind(step)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sink in self.sinks:
            sink.close(0 if kind is None else 1)


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
