"""Bad samples: masked, written down, counted by all ranks alike, and too many of them end the run on every rank.

A bad sample's slot keeps its planned length, is filled with padding and weighs nothing, so no other rank and no later
step notices. The sum of loss weights stays the planned one: it is known before the step and the same when the step is
repeated. Who is in the ledger is masked for good, also when it can be read again; that makes a replay bitwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .errors import BadSampleError, DataError

if TYPE_CHECKING:
    import torch.distributed as dist

# New bad samples of one rank in one step that are told to the others by name; more than these end the run.
_TOLD = 16


@dataclass(frozen=True)
class QuarantineConfig:
    """When bad samples end a run. The defaults stop at the first one.

    Attributes:
        max_per_source: bad samples of one source that are borne; 0 stops at the first.
        max_share: share of a global batch's tokens that may be masked.
        max_streak: steps in a row that may find new ones.
        window: steps over which the next two count, the current one included.
        max_per_window: new bad samples of one source within a window; None sets no limit beside `max_per_source`.
        max_window_share: share of the positions of a window's global batches (rows x seq_len) that may be masked.

    Raises:
        DataError: a limit below zero.
    """

    max_per_source: int = 0
    max_share: float = 0.05
    max_streak: int = 8
    window: int = 100
    max_per_window: int | None = None
    max_window_share: float = 0.02

    __pydantic_config__ = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if self.max_per_source < 0 or not 0.0 <= self.max_share <= 1.0 or self.max_streak < 1:
            raise DataError(
                f"quarantine: max_per_source >= 0, max_share in 0..1 and max_streak >= 1 are needed, got "
                f"{self.max_per_source}, {self.max_share} and {self.max_streak}"
            )
        per_window = 0 if self.max_per_window is None else self.max_per_window
        if self.window < 1 or per_window < 0 or not 0.0 <= self.max_window_share <= 1.0:
            raise DataError(
                "quarantine: window >= 1, max_per_window >= 0 (or none) and max_window_share in 0..1 are needed, got "
                f"{self.window}, {self.max_per_window} and {self.max_window_share}"
            )


class Entry(NamedTuple):
    """A bad sample: number of its source, its number there, the step that met it, and why (in `REASONS`)."""

    source: int
    sample: int
    step: int
    reason: int

    @property
    def why(self) -> str:
        return BadSampleError.REASONS[self.reason]


class Ledger:
    """All bad samples of a run so far, the same on every rank.

    Args:
        config: the limits.
        names: of the sources.
        entries: what a checkpoint holds.
        streak: steps in a row, up to now, that found new ones.
        masked: (step, tokens masked) of the steps of the last window that had any.
    """

    def __init__(
        self,
        config: QuarantineConfig,
        names: Sequence[str],
        entries: Iterable[Sequence[int]] = (),
        streak: int = 0,
        masked: Iterable[Sequence[int]] = (),
    ) -> None:
        self.config, self.names = config, names
        self.entries = {(entry[0], entry[1]): Entry(*map(int, entry)) for entry in entries}
        self.streak = streak
        self.masked = [(int(step), int(tokens)) for step, tokens in masked]

    def __contains__(self, at: tuple[int, int]) -> bool:
        """Whether (source, sample) is listed."""
        return at in self.entries

    def with_new(self, found: Sequence[Entry]) -> Ledger:
        """A ledger with what a step found (the same list on every rank).

        Raises:
            DataError: past `max_per_source`, `max_per_window` or `max_streak`.
        """
        news = {entry[:2]: entry for entry in sorted(found) if entry[:2] not in self.entries}
        grown = Ledger(self.config, self.names, streak=self.streak + 1 if news else 0, masked=self.masked)
        grown.entries = {**self.entries, **news}
        if not news:
            return grown
        first = min(news.values())
        for number, name in enumerate(self.names):
            count = sum(entry.source == number for entry in grown.entries.values())
            if count > self.config.max_per_source:
                raise DataError(
                    f"step {first.step}: {count} bad samples in source {name}, quarantine.max_per_source is "
                    f"{self.config.max_per_source} (the newest: sample {first.sample}, {first.why})"
                )
            limit, since = self.config.max_per_window, first.step - self.config.window
            recent = sum(entry.source == number and entry.step > since for entry in grown.entries.values())
            if limit is not None and recent > limit:
                raise DataError(
                    f"step {first.step}: {recent} new bad samples in source {name} within {self.config.window} steps, "
                    f"quarantine.max_per_window is {limit} (the newest: sample {first.sample}, {first.why})"
                )
        if grown.streak > self.config.max_streak:
            raise DataError(
                f"step {first.step}: new bad samples in {grown.streak} steps in a row, quarantine.max_streak is "
                f"{self.config.max_streak} (the newest: sample {first.sample} of {self.names[first.source]}, "
                f"{first.why})"
            )
        return grown

    def check_share(self, step: int, masked: int, tokens: int) -> None:
        """DataError when more than `max_share` of a step's tokens are masked."""
        if masked > self.config.max_share * tokens:
            raise DataError(
                f"step {step}: {masked} of {tokens} tokens are in quarantine, more than quarantine.max_share "
                f"{self.config.max_share}"
            )

    def with_masked(self, step: int, masked: int, positions: int) -> Ledger:
        """A ledger that knows what a step masked of its `positions`; DataError past the window's share.

        The window always counts as full: at the start of a run one bad sample is a small share of it, as later.
        """
        recent = [(s, tokens) for s, tokens in self.masked if step - self.config.window < s < step]
        recent += [(step, masked)] if masked else []
        total, whole = sum(tokens for _, tokens in recent), positions * self.config.window
        if total > self.config.max_window_share * whole:
            raise DataError(
                f"step {step}: {total} of {whole} positions of {self.config.window} steps are in quarantine, more than "
                f"quarantine.max_window_share {self.config.max_window_share}"
            )
        grown = Ledger(self.config, self.names, streak=self.streak, masked=recent)
        grown.entries = self.entries
        return grown


def tell(found: Sequence[Entry], group: dist.ProcessGroup | None) -> list[Entry]:
    """The new entries of all ranks of `group` (None: this rank alone), sorted: the same list on every rank.

    Raises:
        DataError: on every rank, when one rank has met more than 16 in one step.
    """
    if group is None:
        return sorted(found)
    import torch
    import torch.distributed as dist

    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    mine = np.zeros((1 + _TOLD, 4), dtype=np.int64)
    mine[0, 0] = len(found)
    for i, entry in enumerate(found[:_TOLD]):
        mine[1 + i] = entry
    local = torch.from_numpy(mine).to(device)
    everyone = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, local, group=group)
    told: set[Entry] = set()
    for table in (tensor.cpu().tolist() for tensor in everyone):
        count = table[0][0]
        if count > _TOLD:
            first = Entry(*table[1])
            raise DataError(
                f"step {first.step}: one rank met {count} bad samples at once, more than {_TOLD} (one of them: sample "
                f"{first.sample} of source {first.source}, {first.why})"
            )
        told |= {Entry(*row) for row in table[1 : 1 + count]}
    return sorted(told)
