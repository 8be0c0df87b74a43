"""How the packs of a step are dealt out to ranks: what a stream asks for when it is not to be in their order."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from .errors import DataError


class PackFacts(NamedTuple):
    """What is known of a pack before it is read.

    Attributes:
        lengths: int64 [documents], their tokens.
        modalities: int64 [M], tokens by modality, in bank order.
    """

    lengths: np.ndarray
    modalities: np.ndarray


class Dealt(NamedTuple):
    """A new order of a step's packs, and facts about it for the metrics.

    Attributes:
        order: every pack's number once; rank r takes the r-th of `dp_size` equal runs.
        facts: name -> number.
    """

    order: list[int]
    facts: dict[str, float]


Deal = Callable[[Sequence[PackFacts]], Dealt]


def check_divides(batch: int, micro: int, dp_size: int) -> None:
    """DataError, with the nearest numbers that work, unless global_batch is a multiple of ranks x micro_batch."""
    unit = dp_size * micro
    if batch % unit == 0:
        return
    below = batch // unit * unit
    accepted = [f"global_batch {' or '.join(str(n) for n in (below, below + unit) if n)}"]
    smaller = [m for m in range(1, micro) if batch % (dp_size * m) == 0]
    accepted += [f"micro_batch {smaller[-1]}"] if smaller else []
    ranks = [r for r in range(1, batch // micro + 1) if batch % (r * micro) == 0]
    near = sorted(sorted(ranks, key=lambda r: abs(r - dp_size))[:2])
    accepted += [f"{' or '.join(map(str, near))} ranks"] if near else []
    raise DataError(
        f"global_batch {batch} is no multiple of data-parallel ranks {dp_size} x micro_batch {micro} = {unit}; "
        f"accepted nearest to it: {', '.join(accepted)}"
    )


def check_dealt(dealt: Dealt, n_packs: int) -> None:
    """DataError unless every pack is dealt out exactly once."""
    if sorted(dealt.order) != list(range(n_packs)):
        raise DataError(f"the packs of a step are dealt out as {dealt.order[:8]}…; each of {n_packs} must come once")


def dealt_digest(batch: str, order: Sequence[int]) -> str:
    """16 hexadecimal digits over a global batch's digest and the order it is dealt out in."""
    values = np.array(order, dtype="<i8").tobytes()
    return hashlib.blake2b(values, digest_size=8, key=batch.encode()).hexdigest()
