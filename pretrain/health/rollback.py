"""States to return to: two in memory, and the run's checkpoints on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ...checkpoints.manifest import complete_checkpoints, step_of
from ...checkpoints.sharded import load_checkpoint
from ...data.stream import Stream
from ...parallel.engines.base import Engine
from .snapshot import Snapshot

Restored = tuple[int, dict[str, Any], str]


@dataclass
class Kept:
    """A state in memory, after `step` steps, with what the guards knew then."""

    snapshot: Snapshot
    step: int
    state: dict[str, Any]


class Rollback:
    """Keeps states and returns to the newest one before a step. All ranks call everything alike.

    Args:
        engine, stream: what is kept and restored.
        checkpoints: the run's checkpoint folder.
    """

    def __init__(self, engine: Engine, stream: Stream, checkpoints: Path) -> None:
        self.engine, self.stream, self.checkpoints = engine, stream, checkpoints
        self._kept: list[Kept] = []

    def keep(self, step: int, state: dict[str, Any]) -> None:
        """Take the state after `step` steps; of earlier ones the newest stays, and its memory's twin is reused."""
        self._kept = [kept for kept in self._kept if kept.step < step]
        snapshot = self._kept.pop(0).snapshot if len(self._kept) == 2 else Snapshot()
        snapshot.take(self.engine.models, self.engine.optimizer, self.stream.state_dict())
        self._kept.append(Kept(snapshot, step, state))

    def restore(self, latest: int, before_load: Callable[[], None]) -> Restored:
        """Return to the newest state after at most `latest` steps, else to the oldest one in memory.

        Args:
            before_load: called before the disk is read.

        Returns:
            Steps that the state has seen, what the guards knew then, and where it was.
        """
        memory = [kept for kept in self._kept if kept.step <= latest]
        on_disk = self._newest_on_disk(latest)
        if on_disk is not None and not (memory and memory[-1].step >= step_of(on_disk)):
            before_load()
            manifest = load_checkpoint(on_disk, self.engine.models[0], self.engine.optimizer)
            self.stream.load_state_dict(manifest["data"])
            self._kept = [kept for kept in self._kept if kept.step < manifest["step"]]
            return manifest["step"], dict(manifest.get("health", {})), f"checkpoint {on_disk.name}"
        kept = memory[-1] if memory else self._kept[0]
        self.stream.load_state_dict(kept.snapshot.restore())
        self._kept = [k for k in self._kept if k.step <= kept.step]
        return kept.step, dict(kept.state), "memory"

    def _newest_on_disk(self, latest: int) -> Path | None:
        """Rank 0 looks, so that all ranks load the same one."""
        found: list[Any] = [None]
        if dist.get_rank() == 0:
            fitting = [path for path in complete_checkpoints(self.checkpoints) if step_of(path) <= latest]
            found = [str(fitting[-1]) if fitting else None]
        dist.broadcast_object_list(found)
        return Path(found[0]) if found[0] else None

    def set_aside(self, step: int) -> list[str]:
        """Rename checkpoints of later steps, which have trained on what is now left out; nothing resumes from them."""
        renamed: list[str] = []
        if dist.get_rank() == 0:
            for path in complete_checkpoints(self.checkpoints):
                if step_of(path) > step:
                    path.rename(_free_name(path))
                    renamed.append(path.name)
        return renamed


def _free_name(path: Path) -> Path:
    names: Sequence[str] = [f".set-aside-{path.name}", *(f".set-aside-{path.name}-{n}" for n in range(1, 1000))]
    return next(path.with_name(name) for name in names if not path.with_name(name).exists())
