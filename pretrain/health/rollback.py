"""States to return to: two in memory, and the run's checkpoints on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ...checkpoints.host import Snapshot
from ...checkpoints.keeper import Keeper
from ...checkpoints.manifest import complete_checkpoints, step_of
from ...checkpoints.sharded import load_checkpoint
from ...data.stream import Stream
from ...parallel.engines.base import Engine

Restored = tuple[int, dict[str, Any], str]


@dataclass
class Kept:
    """A state in memory, after `step` steps."""

    snapshot: Snapshot
    step: int


class Rollback:
    """Keeps states and returns to the newest one before a step. All ranks call everything alike.

    Args:
        engine, stream: what is kept and restored.
        keeper: of the run's checkpoints.
    """

    def __init__(self, engine: Engine, stream: Stream, keeper: Keeper) -> None:
        self.engine, self.stream, self.keeper = engine, stream, keeper
        self._kept: list[Kept] = []

    def keep(self, step: int, state: dict[str, Any]) -> None:
        """Take the state after `step` steps; of earlier ones the newest stays, the other's memory is used again.

        Args:
            state: the position in the data and what the guards know.
        """
        self._kept = [kept for kept in self._kept if kept.step < step]
        snapshot = self._kept.pop(0).snapshot if len(self._kept) == 2 else Snapshot()
        snapshot.take(self.engine.models, self.engine.optimizer, state)
        self._kept.append(Kept(snapshot, step))

    def restore(self, latest: int, before_load: Callable[[], None]) -> Restored:
        """Return to the newest state after at most `latest` steps, else to the oldest one in memory.

        Args:
            before_load: called before the disk is read.

        Returns:
            Steps that the state has seen, the position and what the guards knew then, and where it was.
        """
        self.keeper.wait()  # a save in flight holds what is about to be undone
        memory = [kept for kept in self._kept if kept.step <= latest]
        on_disk = self._newest_on_disk(latest)
        if on_disk is not None and not (memory and memory[-1].step >= step_of(on_disk)):
            before_load()
            manifest = load_checkpoint(on_disk, self.engine.models, self.engine.optimizer)
            self._kept = [kept for kept in self._kept if kept.step < manifest["step"]]
            step, state, where = manifest["step"], dict(manifest["data"]), f"checkpoint {on_disk.name}"
        else:
            kept = memory[-1] if memory else self._kept[0]
            self._kept = [k for k in self._kept if k.step <= kept.step]
            step, state, where = kept.step, kept.snapshot.restore(), "memory"
        self.stream.load_state_dict(state)
        return step, state, where

    def _newest_on_disk(self, latest: int) -> Path | None:
        """Rank 0 looks, so that all ranks load the same one."""
        found: list[Any] = [None]
        if dist.get_rank() == 0:
            fitting = [path for path in complete_checkpoints(self.keeper.folder) if step_of(path) <= latest]
            found = [str(fitting[-1]) if fitting else None]
        dist.broadcast_object_list(found)
        return Path(found[0]) if found[0] else None
