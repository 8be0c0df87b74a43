"""Two micro-batches in one pass through the stack: rows of one travel to their experts while the other computes.

The order is a pure function of where the expert layers are. The runtime (`HybridModel.forward_pair`) and the planner
(`pipeline/lanes.py`) both follow it. Only layers without experts are put into a journey's time, so no layer is entered
twice at once, which FSDP does not allow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Layers = tuple[int, ...]


@dataclass(frozen=True)
class Turn:
    """What one of the two micro-batches does next.

    Attributes:
        batch: 0 or 1.
        layers: it passes, one after another; of them only the last may have experts.
        out, back: layers that the other micro-batch passes while the rows of that last one are on their way to the
            experts, and on their way back.
    """

    batch: int
    layers: Layers
    out: Layers = ()
    back: Layers = ()


def interleave(experts: Sequence[bool]) -> tuple[Turn, ...]:
    """The turns of two micro-batches through a stack.

    The layers between two expert layers are what the other micro-batch passes meanwhile: the larger half while rows go
    out, the rest while they come back.

    Args:
        experts: of every layer, whether it has experts.
    """
    at = [layer for layer, has in enumerate(experts) if has]
    if not at:
        everything = tuple(range(len(experts)))
        return (Turn(0, everything), Turn(1, everything))
    starts, ends = (0, *(layer + 1 for layer in at)), (*at, len(experts))
    between = [tuple(range(start, end)) for start, end in zip(starts, ends, strict=True)]
    turns, first = [], between[0]
    for layer, before, after in zip(at, between, between[1:], strict=False):
        turns.append(Turn(0, (*first, layer), *_halves(before)))
        turns.append(Turn(1, (layer,), *_halves(after)))
        first = ()
    return (*turns, Turn(1, between[-1])) if between[-1] else tuple(turns)


def _halves(layers: Layers) -> tuple[Layers, Layers]:
    half = (len(layers) + 1) // 2
    return layers[:half], layers[half:]
