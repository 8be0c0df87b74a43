"""The pictures of a report, as SVG."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

from .facts import Facts, Lost

WIDTH, HEIGHT = 7.2, 3.2
Draw = Callable[[Any], None]


def svg(draw: Draw, height: float = HEIGHT) -> str:
    """What `draw` draws on one pair of axes.

    Raises:
        ModuleNotFoundError: matplotlib (extra `quickstart`) is not installed.
    """
    import matplotlib
    from matplotlib.figure import Figure

    # Text stays text (small, searchable); a fixed salt, so that the same run gives the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "polylepis", "font.size": 9}):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _curve(axes: Any, facts: Facts, key: str, label: str, color: str, smooth: bool = True) -> None:
    points = [(line["step"], line[key]) for line in facts.lines if key in line]
    if not points:
        return
    steps, values = zip(*points, strict=True)
    if not smooth or len(points) < 20:
        axes.plot(steps, values, color=color, linewidth=1.4, label=label, marker="." if len(points) < 20 else None)
        return
    running, smoothed = values[0], []
    for value in values:
        running = 0.9 * running + 0.1 * value
        smoothed.append(running)
    axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.7)
    axes.plot(steps, smoothed, color=color, linewidth=1.6, label=label)


def _finish(axes: Any, ylabel: str) -> None:
    axes.set_xlabel("step")
    axes.set_ylabel(ylabel)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, ncols=3)


def losses(facts: Facts) -> Draw:
    def draw(axes: Any) -> None:
        for index, modality in enumerate(facts.modalities):
            _curve(axes, facts, f"loss/{modality}", modality, f"C{index}")
        marks = {"spike": ("C3", "spike"), "not finite": ("k", "not finite")}
        for kind, (color, label) in marks.items():
            steps = [event["step"] for event in facts.events if event["kind"] == kind]
            for number, step in enumerate(steps):
                axes.axvline(step, color=color, linewidth=0.8, linestyle=":", label=None if number else label)
        _finish(axes, "nats per predicted token")

    return draw


def norms(facts: Facts) -> Draw:
    def draw(axes: Any) -> None:
        _curve(axes, facts, "grad_norm", "whole model", "0.3")
        for index, modality in enumerate(facts.modalities):
            _curve(axes, facts, f"grad_norm/{modality}", f"{modality}'s own", f"C{index}")
        axes.set_yscale("log")
        _finish(axes, "2-norm, before clipping")

    return draw


def speed(facts: Facts) -> Draw:
    def draw(axes: Any) -> None:
        _curve(axes, facts, "tokens_per_second", "tokens per second", "C0")
        axes.set_ylim(bottom=0)
        _finish(axes, "tokens per second")

    return draw


def step_time(facts: Facts) -> Draw:
    def draw(axes: Any) -> None:
        _curve(axes, facts, "step_seconds", "measured", "C0")
        _curve(axes, facts, "predicted_step_seconds", "planned", "C1", smooth=False)
        axes.set_ylim(bottom=0)
        _finish(axes, "seconds per step")

    return draw


def utilisation(facts: Facts) -> Draw:
    def draw(axes: Any) -> None:
        _curve(axes, facts, "mfu", "MFU", "C0")
        _curve(axes, facts, "hfu", "HFU", "C1")
        axes.set_ylim(bottom=0)
        _finish(axes, "share of the peak")

    return draw


def experts(facts: Facts) -> Draw:
    """The busiest expert over a fair share, in the worst layer."""

    def draw(axes: Any) -> None:
        for index, modality in enumerate(["", *facts.modalities]):
            key = f"expert_load_max/{modality}" if modality else "expert_load_max"
            points = [(line["step"], max(line[key])) for line in facts.lines if line.get(key)]
            if points:
                color = f"C{index - 1}" if modality else "0.3"
                axes.plot(*zip(*points, strict=True), color=color, linewidth=1.2, label=modality or "all tokens")
        axes.axhline(1.0, color="0.7", linewidth=0.8)
        _finish(axes, "busiest expert ÷ fair share")

    return draw


def lost_time(found: Sequence[Lost]) -> Draw:
    """The waterfall: each line starts where the one before ended, parts lie inside theirs."""

    def draw(axes: Any) -> None:
        names, start, within = [], 0.0, 0.0
        for row, lost in enumerate(found):
            left = within if lost.within else start
            color = "C7" if lost.within else ("C0" if row == 0 else "C3")
            axes.barh(row, lost.seconds, left=left, color=color, alpha=0.9)
            axes.text(left + lost.seconds, row, f" {lost.seconds:,.1f} s", va="center", fontsize=8)
            names.append(f"of which {lost.name}" if lost.within else lost.name)
            if not lost.within:
                within, start = start, start + lost.seconds
        axes.set_yticks(range(len(found)), names)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlabel("seconds of rank 0, added up")

    return draw
