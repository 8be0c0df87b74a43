"""What of an expert layer's all-to-alls is not hidden, for two micro-batches in one pass (`overlap.py`), simulated.

Two lanes: one computes (and sends what is not dispatch), the other dispatches. A turn's expert layer starts an
all-to-all, the other micro-batch's layers run meanwhile, and it goes on when both are over. The backward is the mirror
image. The shared expert, which hides some of it as well, is left out of account, as it is everywhere in the planner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..overlap import interleave
from .cost import Cost


@dataclass(frozen=True)
class Piece:
    """A stretch of a lane.

    Attributes:
        lane: `compute` or `dispatch`.
        batch, layer: whose.
        start, end: seconds from the start of the pass.
    """

    lane: Literal["compute", "dispatch"]
    batch: int
    layer: int
    start: float
    end: float


@dataclass(frozen=True)
class Lanes:
    """One pass of two micro-batches.

    Attributes:
        pieces: of both lanes, by start.
        seconds: of the pass.
        exposed: by layer, seconds in which nothing computes because its rows are on their way, both micro-batches.
    """

    pieces: tuple[Piece, ...]
    seconds: float
    exposed: tuple[float, ...]

    @property
    def dispatched(self) -> float:
        """Seconds of all-to-alls."""
        return sum(piece.end - piece.start for piece in self.pieces if piece.lane == "dispatch")


def simulate_lanes(experts: Sequence[bool], compute: Sequence[float], dispatch: Sequence[float]) -> Lanes:
    """A forward pass.

    Args:
        experts: of every layer, whether it has experts.
        compute: seconds of each layer without its dispatch.
        dispatch: seconds of its all-to-alls in both directions together.
    """
    pieces: list[Piece] = []
    exposed, now = [0.0] * len(experts), 0.0

    def run(batch: int, layers: Sequence[int]) -> None:
        nonlocal now
        for layer in layers:
            pieces.append(Piece("compute", batch, layer, now, now + compute[layer]))
            now += compute[layer]

    def travel(batch: int, layer: int, meanwhile: Sequence[int]) -> None:
        nonlocal now
        arrival = now + dispatch[layer] / 2
        pieces.append(Piece("dispatch", batch, layer, now, arrival))
        run(1 - batch, meanwhile)
        exposed[layer] += max(0.0, arrival - now)
        now = max(now, arrival)

    for turn in interleave(experts):
        *plain, last = turn.layers
        run(turn.batch, plain)
        if experts[last]:
            travel(turn.batch, last, turn.out)
        run(turn.batch, (last,))
        if experts[last]:
            travel(turn.batch, last, turn.back)
    pieces.sort(key=lambda piece: (piece.start, piece.lane))
    return Lanes(tuple(pieces), now, tuple(exposed))


def pair_lanes(experts: Sequence[bool], costs: Sequence[Cost]) -> tuple[Lanes, Lanes]:
    """Forward and backward (mirrored: as a forward pass of the backward's seconds) of two micro-batches."""
    forward = simulate_lanes(experts, [c.forward + c.tensor + c.context for c in costs], [c.experts for c in costs])
    backward = simulate_lanes(
        experts,
        [c.inputs + c.weights + c.tensor_back + c.context_back for c in costs],
        [c.experts_back for c in costs],
    )
    return forward, backward


def overlapped(experts: Sequence[bool], costs: Sequence[Cost]) -> list[Cost]:
    """The costs of one micro-batch where two pass at once: of each layer's dispatch only what is not hidden."""
    forward, backward = pair_lanes(experts, costs)
    return [
        replace(cost, experts=out / 2, experts_back=back / 2)
        for cost, out, back in zip(costs, forward.exposed, backward.exposed, strict=True)
    ]
