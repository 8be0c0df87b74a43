"""The ledger of steps that are left out, by data position: step k trains on batch k or, if listed, on nothing.

So a run that rolled back is the run that left these batches out from the start, bit for bit; and a resumed run, on any
mesh, leaves out the same ones. The ledger lies in the run folder and in every checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..errors import ConfigError
from .events import FOLDER, write_aside

LEDGER_FILE = "skipped.json"
VERSION = 1


@dataclass(frozen=True)
class Entry:
    """A batch that is not trained on.

    Attributes:
        position: its number in the run, from 0: step `position + 1` would train on it.
        reason: `nan` or `spike`.
        digest: hash of its documents (`Step.doc_digest`), empty where it was listed before it was read.
        found: the step, from 1, at which it was decided.
    """

    position: int
    reason: str
    digest: str
    found: int


class Ledger:
    """What is left out, the same on all ranks; rank 0 writes it down before anything depends on it."""

    def __init__(self, run: Path) -> None:
        self.path = run / FOLDER / LEDGER_FILE
        self.entries: dict[int, Entry] = {}

    def open(self, carried: Iterable[Mapping[str, Any]] = ()) -> None:
        """Read the run folder's ledger (on rank 0, for all) and add what a checkpoint carries.

        Raises:
            ConfigError: the file is not a ledger of this version.
        """
        shared: list[Any] = [self._read() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(shared)
        if isinstance(shared[0], str):
            raise ConfigError(shared[0])
        for values in (*carried, *shared[0]):
            self._take(Entry(**values))

    def _read(self) -> list[dict[str, Any]] | str:
        if not self.path.is_file():
            return []
        try:
            values = json.loads(self.path.read_text())
            if values["version"] != VERSION:
                return f"{self.path}: version {values['version']}, but this version reads {VERSION}"
            return [asdict(Entry(**entry)) for entry in values["skipped"]]
        except (ValueError, TypeError, KeyError) as error:
            return f"{self.path}: is not a ledger of skipped steps ({error!r}); restore it or remove it"

    def add(self, entries: Iterable[Entry]) -> None:
        """List more, and write the file. All ranks call it with the same entries."""
        for entry in entries:
            self._take(entry)
        if dist.get_rank() == 0:
            values = {"version": VERSION, "skipped": self.as_list()}
            write_aside(self.path, json.dumps(values, indent=1) + "\n")

    def _take(self, entry: Entry) -> None:
        known = self.entries.get(entry.position)
        if known is None or not known.digest:
            self.entries[entry.position] = entry

    def __contains__(self, position: int) -> bool:
        return position in self.entries

    def check(self, position: int, digest: str) -> None:
        """Refuse to leave out another batch than the one that was listed.

        Raises:
            ConfigError: the data at this position have another hash than when it was listed.
        """
        entry = self.entries[position]
        if entry.digest and entry.digest != digest:
            raise ConfigError(
                f"{self.path}: position {position} was listed as batch {entry.digest}, but this run's data have "
                f"{digest} there; the ledger belongs to other data"
            )

    def as_list(self) -> list[dict[str, Any]]:
        """JSON values, for a checkpoint's manifest."""
        return [asdict(self.entries[position]) for position in sorted(self.entries)]
