"""Draws docs/images/kernels.png: the chunk decomposition of the SSD matrix. Run: python docs/draw_kernels.py"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Polygon, Rectangle

CHUNKS, Q = 4, 6
INSIDE, BETWEEN, CARRIED, STATE, RESET = "#4c78a8", "#9ecae9", "#f2cf5b", "#54a24b", "#d1495b"


def matrix(axes: Axes) -> None:
    """The lower-triangular matrix: two tiles and what passes between them on the diagonal, rank-n blocks below."""
    size = CHUNKS * Q
    for row in range(CHUNKS):
        for column in range(row + 1):
            x, y = column * Q, size - (row + 1) * Q
            if row == column:
                half = Q / 2
                for a, b in ((x, y + half), (x + half, y)):
                    corners = [(a, b), (a, b + half), (a + half, b)]
                    axes.add_patch(Polygon(corners, closed=True, facecolor=INSIDE, edgecolor="white", lw=1.5))
                axes.add_patch(Rectangle((x, y), half, half, facecolor=BETWEEN, edgecolor="white", lw=1.5))
            else:
                axes.add_patch(Rectangle((x, y), Q, Q, facecolor=CARRIED, edgecolor="white", lw=2))
                axes.text(x + Q / 2, y + Q / 2, "C·S", ha="center", va="center", fontsize=9)
    axes.text(1.5, size - 4.8, "W", ha="center", fontsize=11)
    axes.text(size * 0.52, size * 0.86, "dark: an exp for every pair", fontsize=9)
    axes.text(size * 0.52, size * 0.8, "light: a factor for every", fontsize=9)
    axes.text(size * 0.52, size * 0.74, "row and every column", fontsize=9)
    axes.add_patch(Rectangle((0, 0), size, size, facecolor="none", edgecolor="#888888"))
    axes.text(size / 2, size + 0.6, "input tokens j, chunks of Q in two tiles", ha="center", fontsize=10)
    axes.text(-0.7, size / 2, "output tokens i", rotation=90, ha="center", va="center", fontsize=10)
    axes.set(xlim=(-1.6, size + 0.4), ylim=(-0.4, size + 2), aspect="equal")
    axes.set_title("y = M x: what is near, what is far", fontsize=12)
    axes.axis("off")


def box(axes: Axes, x: float, y: float, text: str, colour: str, width: float = 3.6) -> None:
    axes.add_patch(Rectangle((x, y), width, 1.5, facecolor=colour, edgecolor="none", alpha=0.9))
    axes.text(x + width / 2, y + 0.75, text, ha="center", va="center", fontsize=9)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = "#444444") -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color=colour, lw=1.3))


def chain(axes: Axes) -> None:
    """The states between chunks, and a document boundary that cuts the chain."""
    for k in range(CHUNKS):
        x = k * 5.2
        box(axes, x, 7.2, f"y of chunk {k}", "#dddddd")
        box(axes, x + 0.9, 4.4, f"state {k}", STATE, 2.7)
        box(axes, x, 1.0, f"x, B, C, dt of {k}", "#dddddd")
        arrow(axes, (x + 2.2, 5.9), (x + 2.2, 7.2), CARRIED)
        arrow(axes, (x + 0.4, 2.5), (x + 0.4, 7.2), INSIDE)
        reset = k == 1
        end = 6.1 if k < CHUNKS - 1 else 5.8
        arrow(axes, (x + 3.6, 5.15), (x + end, 5.15), RESET if reset else STATE)
        arrow(axes, (x + 2.9, 2.5), (x + 4.5, 5.0), STATE)
        label = "× 0" if reset else "× λ"
        axes.text(x + 4.5, 5.45, label, ha="center", fontsize=9, color=RESET if reset else "black")
    box(axes, -4.4, 4.4, "initial state", "#b7d7b0")
    arrow(axes, (-0.8, 5.15), (0.9, 5.15), STATE)
    box(axes, CHUNKS * 5.2 + 0.6, 4.4, "final state", "#b7d7b0", 2.8)
    state_pass = "state pass (green): once over the chunks in order, the state in registers; × 0: a new document"
    output = "output: W·u (blue) and C·S (yellow) of one tile and one group, its heads in one program"
    axes.text(-4.4, 9.5, state_pass, fontsize=9)
    axes.text(-4.4, -0.5, output, fontsize=9)
    axes.set(xlim=(-4.8, CHUNKS * 5.2 + 3.8), ylim=(-1.2, 10.4))
    axes.set_title("the same, as the kernels compute it (λ = exp Σ log decay)", fontsize=12)
    axes.axis("off")


def main() -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.6), width_ratios=(1, 2.1))
    matrix(left)
    chain(right)
    figure.tight_layout()
    figure.savefig(Path(__file__).parent / "images" / "kernels.png", dpi=110)


if __name__ == "__main__":
    main()
