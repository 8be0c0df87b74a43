"""The plan of a run: which packs every step holds, from lengths, weights and a position alone.

A position is a handful of integers. `Planner.step` maps a position to the packs of a step and the position after it,
without reading a shard, in the same way on every rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .errors import DataError
from .mixing import Mix
from .packing import PackPlan


class Place(NamedTuple):
    """Where a source stands: its epoch, window, next pack of the window, and packs drawn so far."""

    epoch: int = 0
    window: int = 0
    pack: int = 0
    packs: int = 0


class Position(NamedTuple):
    """Where a run stands: draws (packs of all sources) so far, and a `Place` per source."""

    draws: int
    places: tuple[Place, ...]


class Pack(NamedTuple):
    """One row: the source's number and its samples int64 [k]."""

    source: int
    samples: np.ndarray


class StepPlan(NamedTuple):
    """The packs of one step's global batch, and the positions before and after it."""

    packs: list[Pack]
    before: Position
    after: Position

    @property
    def most(self) -> int:
        """The most documents of a pack."""
        return max(len(pack.samples) for pack in self.packs)

    @property
    def epoch(self) -> int:
        """The epoch, in its source, of the first pack."""
        return self.before.places[self.packs[0].source].epoch


class Planner:
    """Plans steps over several sources.

    Args:
        lengths: source name -> int64 [n] tokens per document.
        mix: the schedule over the same names, in the same order.
        seq_len, window, seed, block, spread: see `PackPlan`; each source has its own order.
        global_batch: packs per step.

    Raises:
        DataError: names the source that cannot be packed, with the numbers.
    """

    def __init__(
        self,
        lengths: Mapping[str, np.ndarray],
        mix: Mix,
        *,
        seq_len: int,
        window: int,
        seed: int,
        global_batch: int,
        block: int = 1,
        spread: int = 32,
    ) -> None:
        self.mix, self.global_batch = mix, global_batch
        self.plans: list[PackPlan] = []
        for number, (name, array) in enumerate(lengths.items()):
            try:
                # The first source's order is that of a run without a mix.
                order = seed if number == 0 else seed + (number << 40)
                plan = PackPlan(array, seq_len=seq_len, window=window, seed=order, block=block, spread=spread)
                self.plans.append(plan)
            except DataError as error:
                raise DataError(f"source {name}: {error}" if len(lengths) > 1 else str(error)) from error

    @property
    def start(self) -> Position:
        """Before the first draw."""
        return Position(0, tuple(Place() for _ in self.plans))

    def step(self, position: Position) -> StepPlan:
        """The next `global_batch` packs from `position` on; windows and epochs run on into the next."""
        places = list(position.places)
        packs: list[Pack] = []
        for source in self.mix.sources(position.draws, self.global_batch).tolist():
            epoch, window, pack, drawn = places[source]
            plan = self.plans[source]
            here = plan.packs(epoch, window)
            packs.append(Pack(source, here[pack]))
            pack += 1
            if pack == len(here):
                pack, window = 0, window + 1
                if window == plan.n_windows:
                    window, epoch = 0, epoch + 1
            places[source] = Place(epoch, window, pack, drawn + 1)
        return StepPlan(packs, position, Position(position.draws + self.global_batch, tuple(places)))

    def check(self, position: Position) -> None:
        """DataError unless `position` is one that `step` can have led to."""
        counts = self.mix.counts(position.draws).tolist() if position.draws >= 0 else None
        if counts is None or [place.packs for place in position.places] != counts:
            raise DataError(
                f"the data state points outside its plan: {position.draws} draws make {counts} packs per source, "
                f"it holds {[place.packs for place in position.places]}"
            )
        for name, plan, (epoch, window, pack, _) in zip(self.mix.names, self.plans, position.places, strict=True):
            inside = epoch >= 0 and 0 <= window < plan.n_windows
            if not inside or not 0 <= pack < len(plan.packs(epoch, window)):
                raise DataError(
                    f"the data state points outside its plan: source {name}, epoch {epoch}, window {window}, "
                    f"pack {pack}"
                )


def digest(before: str, packs: Sequence[Pack]) -> str:
    """16 hexadecimal digits over `before`, and source and samples of every pack, pack boundaries included."""
    state = hashlib.blake2b(before.encode(), digest_size=8)
    for source, samples in packs:
        state.update(np.array([source, len(samples), *samples], dtype="<i8").tobytes())
    return state.hexdigest()


def flat(fields: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Nested mappings as dotted names."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        found |= flat(value, f"{path}{name}.") if isinstance(value, Mapping) else {path + name: value}
    return found


def short(value: Any) -> str:
    """A value in at most 48 characters."""
    text = str(value)
    return text if len(text) <= 48 else text[:45] + "…"
