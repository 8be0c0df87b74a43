"""The timeline of a step, as PNG and as one HTML file without dependencies."""

from __future__ import annotations

import html
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from ...parallel.pipeline.simulate import Timeline
from ..errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = MappingProxyType({"F": "#9ecae1", "B": "#74c476", "I": "#74c476", "W": "#fdae6b"})
NAMES = MappingProxyType({"F": "forward", "B": "backward", "I": "backward of inputs", "W": "backward of weights"})


def save_timeline(timeline: Timeline, path: Path, title: str) -> None:
    """Draw a timeline; the suffix, `.png` or `.html`, decides how.

    Raises:
        ConfigError: another suffix.
        ModuleNotFoundError: PNG without matplotlib (extra `quickstart`).
    """
    if path.suffix == ".png":
        draw(timeline, title).savefig(path)
    elif path.suffix == ".html":
        path.write_text(page(timeline, title))
    else:
        raise ConfigError(f"{path}: a timeline is drawn as .png or .html, not {path.suffix or 'without a suffix'}")


def shade(kind: str, chunk: int) -> str:
    """Later chunks of a rank are darker."""
    red, green, blue = (int(COLOURS[kind][i : i + 2], 16) for i in (1, 3, 5))
    factor = 1 - 0.28 * chunk
    return "#" + "".join(f"{max(0, round(c * factor)):02x}" for c in (red, green, blue))


def _chunk(timeline: Timeline, stage: int) -> int:
    return min(2, stage // timeline.schedule.n_ranks)


def draw(timeline: Timeline, title: str) -> Figure:
    """A matplotlib figure of one step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 1.3 + 0.42 * timeline.schedule.n_ranks), dpi=120, layout="constrained")
    paint(figure.subplots(), timeline, title)
    return figure


def paint(axes: Axes, timeline: Timeline, title: str, legend: bool = True) -> None:
    """One row per pipeline rank, time to the right, numbers of micro-batches where they fit."""
    from matplotlib.patches import Patch

    ranks = timeline.schedule.n_ranks
    line = 0.4 if len(timeline.spans) < 150 * ranks else 0.0
    for span in timeline.spans:
        length = span.end - span.start
        colour = shade(span.op.kind, _chunk(timeline, span.op.stage))
        bar = (span.rank - 0.42, 0.84)
        axes.broken_barh([(span.start, length)], bar, facecolors=colour, edgecolors="white", lw=line)
        if length / timeline.seconds > 0.012:
            middle = span.start + length / 2
            axes.text(middle, span.rank, str(span.op.micro_batch), ha="center", va="center", fontsize=6.5)
    axes.set_ylim(ranks - 0.4, -0.6)
    axes.set_xlim(0, timeline.seconds)
    axes.set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)], fontsize=8)
    axes.set_xlabel("seconds")
    axes.set_title(f"{title}: {timeline.seconds:.3f} s, idle {timeline.bubble:.1%}", fontsize=10, loc="left")
    if legend:
        used = sorted({span.op.kind for span in timeline.spans}, key="FBIW".index)
        patches = [Patch(color=COLOURS[kind], label=NAMES[kind]) for kind in used]
        axes.legend(
            handles=patches, ncols=len(used), fontsize=7, frameon=False, loc="lower right", bbox_to_anchor=(1, 1)
        )


def page(timeline: Timeline, title: str) -> str:
    """One self-contained HTML page; the mouse tells operation and times."""
    ranks, scale = timeline.schedule.n_ranks, 1400 / timeline.seconds
    boxes = []
    for span in timeline.spans:
        x, length, y = 70 + span.start * scale, (span.end - span.start) * scale, 10 + span.rank * 30
        told = (
            f"{NAMES[span.op.kind]}, micro-batch {span.op.micro_batch}, stage {span.op.stage}: "
            f"{span.start:.4f} to {span.end:.4f} s"
        )
        colour = shade(span.op.kind, _chunk(timeline, span.op.stage))
        label = f'<text x="{x + length / 2:.1f}" y="{y + 17}">{span.op.micro_batch}</text>' if length > 14 else ""
        boxes.append(
            f'<g><title>{told}</title><rect x="{x:.2f}" y="{y}" width="{length:.2f}" height="26" fill="{colour}"/>'
            f"{label}</g>"
        )
    rows = "".join(f'<text class="r" x="60" y="{27 + rank * 30}">rank {rank}</text>' for rank in range(ranks))
    head = html.escape(f"{title}: {timeline.seconds:.3f} s, idle {timeline.bubble:.1%}")
    key = " ".join(f'<span style="background:{COLOURS[k]}">&nbsp;{NAMES[k]}&nbsp;</span>' for k in "FBW")
    style = "body{font:14px sans-serif;margin:20px}text{font-size:10px;text-anchor:middle}text.r{text-anchor:end}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{head}</title><style>{style}</style>'
        f"<h1 style='font-size:16px'>{head}</h1><p>{key}</p>"
        f'<svg width="1490" height="{20 + ranks * 30}">{rows}{"".join(boxes)}</svg></html>\n'
    )
