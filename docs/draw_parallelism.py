"""Draws docs/images/parallelism.png: one Mamba layer under each axis. Run it from the repository's root."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = {"work": "#dbe9f6", "send": "#fde2c4", "sharded": "#e2f0d9"}


def panel(axes: Axes, title: str, ranks: list[list[tuple[str, str]]], links: list[int], note: str) -> None:
    """Columns of boxes, one per rank, read downwards; `links` are the rows where the ranks exchange something."""
    axes.set_title(title, fontsize=10, fontweight="bold", loc="left")
    rows = len(ranks[0])
    for column, boxes in enumerate(ranks):
        axes.text(column * 3.4 + 1.4, rows + 0.25, f"rank {column}", ha="center", fontsize=8, color="#555555")
        for row, (text, kind) in enumerate(boxes):
            y = rows - 1 - row
            axes.add_patch(
                _box(column * 3.4, y + 0.12, 2.8, 0.76, COLOURS[kind]),
            )
            axes.text(column * 3.4 + 1.4, y + 0.5, text, ha="center", va="center", fontsize=7.2)
    for row in links:
        y = rows - 1 - row + 0.5
        axes.annotate("", (3.4, y), (2.8, y), arrowprops={"arrowstyle": "<->", "color": "#c55a11", "lw": 1.6})
    axes.text(0, -0.15, note, fontsize=7.2, va="top", color="#333333")
    axes.set_xlim(-0.1, 6.3)
    axes.set_ylim(-1.15, rows + 0.6)
    axes.axis("off")


def _box(x: float, y: float, width: float, height: float, colour: str):  # type: ignore[no-untyped-def]
    from matplotlib.patches import FancyBboxPatch

    style = "round,pad=0,rounding_size=0.08"
    return FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=colour, edgecolor="#888888", linewidth=0.8)


def both(*boxes: tuple[str, str]) -> list[list[tuple[str, str]]]:
    """The same boxes on two ranks; `{}` becomes the rank's half."""
    halves = (("1st half", "heads a", "0"), ("2nd half", "heads b", "1"))
    return [[(text.format(half=h, heads=k, n=n), kind) for text, kind in boxes] for h, k, n in halves]


def main() -> None:
    figure = Figure(figsize=(11, 8.6), dpi=120, layout="constrained")
    grid = figure.subplots(2, 2)
    panel(
        grid[0][0],
        "tp: tensor + sequence parallelism",
        both(
            ("residual, norm: {half} of tokens", "sharded"),
            ("all-gather tokens", "send"),
            ("in_proj → z x B C dt: {heads}", "work"),
            ("conv, SSD, gated norm: {heads}", "work"),
            ("out_proj: partial sums", "work"),
            ("reduce-scatter tokens", "send"),
            ("residual: {half} of tokens", "sharded"),
        ),
        [1, 5],
        "Projections cut by heads (out_proj by its inputs). Norm weights are replicated over\n"
        "different tokens: their gradient is a partial sum. More ranks than groups: B and C\n"
        "replicated, and the norm's sums of squares meet in one [T, G] all-reduce.",
    )
    panel(
        grid[0][1],
        "cp, state passing",
        both(
            ("tokens: {half}", "sharded"),
            ("halo: 3 layer inputs", "send"),
            ("x B C dt, conv, scan from zero", "work"),
            ("summaries (F, Σ log-decay) leave", "send"),
            ("z projection meanwhile", "work"),
            ("state that enters: C·H·decay added", "work"),
            ("gate, norm, out_proj", "work"),
        ),
        [1, 3],
        "A segment acts on the state as H → a·H + F, with a = 0 once a document has ended.\n"
        "What travels does not grow with the sequence. Zig-zag: two segments per rank.",
    )
    panel(
        grid[1][0],
        "cp, heads ↔ sequence",
        both(
            ("tokens: {half}, all heads", "sharded"),
            ("in_proj → z x B C dt", "work"),
            ("all-to-all", "send"),
            ("all tokens, {heads}: conv, SSD", "work"),
            ("all-to-all back", "send"),
            ("gate, norm, out_proj: {half}", "work"),
        ),
        [2, 4],
        "Attention does the same with q, k, v; where its heads do not divide, keys and values\n"
        "are gathered instead and each rank keeps its own queries.",
    )
    panel(
        grid[1][1],
        "dp_shard (× cp): FSDP2",
        both(
            ("parameters, moments: shard {n}", "sharded"),
            ("all-gather this layer's parameters", "send"),
            ("forward, backward: own tokens", "work"),
            ("reduce-scatter gradients: sum", "send"),
            ("AdamW on shard {n}", "sharded"),
        ),
        [1, 3],
        "The loss is Σ w·ℓ / W with W over the global batch, so every reduction is a plain sum:\n"
        "nothing is averaged. dp_replicate adds an all-reduce of the shards' gradients.",
    )
    figure.savefig("docs/images/parallelism.png")


if __name__ == "__main__":
    main()
