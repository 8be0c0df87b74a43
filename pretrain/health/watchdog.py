"""The hang watchdog: a thread per rank that shows its sign of life, dumps stacks, and finds who is behind.

It uses no collective and no store, which may be what hangs: ranks see each other through small files in the run
folder. Whether a rank is alive is judged by whether *its file changes while we look*, never by comparing clocks.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import HANG_EXIT
from ..meter.pulse import Pulse
from .config import HealthConfig
from .events import FOLDER, Events, write_aside
from .recorder import collectives

SLOW_PHASES = ("start", "checkpoint", "snapshot")
PATIENCE = 3  # times what a phase took the last time is no hang yet: a step may be longer than `hang_seconds`


class Watchdog(threading.Thread):
    """Watches the loop of this process through its pulse.

    Args:
        config: `hang`, `hang_seconds`, `slow_seconds`.
        run: the run folder, shared by all ranks.
        rank, world: of this process.
        pulse: what the loop is doing.
        events: where the verdict goes.
        end: what `act` calls with the exit code.
    """

    def __init__(
        self,
        config: HealthConfig,
        run: Path,
        rank: int,
        world: int,
        pulse: Pulse,
        events: Events,
        end: Callable[[int], Any] = os._exit,
    ) -> None:
        super().__init__(name="hang watchdog", daemon=True)
        self.config, self.folder, self.rank, self.world = config, run / FOLDER, rank, world
        self.pulse, self.events, self.end = pulse, events, end
        self.tick = min(10.0, config.hang_seconds / 10)
        self._ticks, self._told = 0, -1
        self._stopped = threading.Event()

    def close(self) -> None:
        """The loop is over: no more signs of life are expected of it."""
        self._stopped.set()
        if self.is_alive():
            self.join(timeout=5)

    def run(self) -> None:
        self.show()
        while not self._stopped.wait(self.tick):
            self.show()
            beat = self.pulse.beat
            slow = beat.phase in SLOW_PHASES or beat.step in (0, self.pulse.first)
            limit = max(self.config.slow_seconds, self.config.hang_seconds) if slow else self.config.hang_seconds
            limit = max(limit, PATIENCE * self.pulse.last.get(beat.phase, 0.0))
            if time.monotonic() - beat.since > limit and beat.count != self._told:
                self._told = beat.count
                self.report()

    def show(self, **more: Any) -> None:
        """Write this rank's sign of life."""
        beat, self._ticks = self.pulse.beat, self._ticks + 1
        values = {
            "rank": self.rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "tick": self._ticks,
            "step": beat.step,
            "phase": beat.phase,
            "phase_seconds": round(time.monotonic() - beat.since, 3),
            **more,
        }
        try:
            path = self._heartbeat(self.rank)
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_suffix(".part")  # not flushed to disk: it is of no use after a crash of the machine
            aside.write_text(json.dumps(values))
            aside.replace(path)
        except OSError:
            pass  # a full disk is reported by what needs the disk; the watchdog goes on watching

    def report(self) -> None:
        """Dump where this rank is, look who is behind, say so, and (`act`) end the process."""
        beat = self.pulse.beat
        recorded = collectives()
        self._dump(beat.step, recorded)
        entry = recorded["entries"][-1] if recorded["entries"] else None
        waits = entry is not None and not entry["ended"]
        self.show(in_collective=waits, collectives=recorded["groups"])
        time.sleep(max(2 * self.tick, 1.0))  # until the others have noticed too, and shown it
        before = self._others()
        self.show(in_collective=waits, collectives=recorded["groups"])
        time.sleep(max(3 * self.tick, 1.0))  # a machine that is merely busy must have had its turn
        behind, why = judge(before, self._others(), self.world)
        where = _collective(entry) if entry and waits else "in no collective"
        names = ", ".join(f"rank {rank}{_place(before.get(rank))}" for rank in behind[:8])
        message = f"hang: no progress for {time.monotonic() - beat.since:.0f} s in phase {beat.phase}; "
        message += f"behind: {names} ({why})" if behind else f"no rank is behind the others ({why})"
        speakers = [rank for rank in sorted(before) if rank not in behind] or [self.rank]
        if self.rank == speakers[0]:
            details = {"behind": behind, "why": why, "last_collective": entry, "heartbeats": before}
            self.events.tell("hang", "hang", beat.step, f"{message}; this rank is {where}", **details)
        if self.config.hang == "act" and self.pulse.beat.count == beat.count:
            print(f"polylepis: rank {self.rank} ends (exit code {HANG_EXIT}): {message}", file=sys.stderr, flush=True)
            self.end(HANG_EXIT)

    def _dump(self, step: int, recorded: Mapping[str, Any]) -> None:
        """Stacks of every thread, and the last collectives, into files of this rank."""
        folder = self.folder / "hangs"
        stem = f"step-{step:08d}-rank-{self.rank:05d}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / f"{stem}.txt", "w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            write_aside(folder / f"{stem}.json", json.dumps(recorded, indent=1, default=str) + "\n")
        except OSError as error:
            print(f"polylepis: rank {self.rank}: the stacks could not be written: {error}", file=sys.stderr)
            faulthandler.dump_traceback(sys.stderr, all_threads=True)

    def _heartbeat(self, rank: int) -> Path:
        return self.folder / "heartbeats" / f"rank-{rank:05d}.json"

    def _others(self) -> dict[int, dict[str, Any]]:
        """What every rank of this run shows now."""
        shown = {}
        for rank in range(self.world):
            try:
                shown[rank] = json.loads(self._heartbeat(rank).read_text())
            except (OSError, ValueError):
                continue
        return shown


def judge(
    before: Mapping[int, Mapping[str, Any]], after: Mapping[int, Mapping[str, Any]], world: int
) -> tuple[list[int], str]:
    """Who holds the others up, and why we think so, from two looks at all heartbeats.

    Most telling first: no sign of life at all, a process that is frozen or gone, an earlier step, not being in a
    collective while others wait in one, fewer collectives called.

    Returns:
        Ranks (none where all are alike) and the reason.
    """
    silent = [rank for rank in range(world) if rank not in after]
    if silent:
        return silent, "has shown no sign of life"
    frozen = [r for r in range(world) if r in before and before[r]["tick"] == after[r]["tick"]]
    if frozen:
        return frozen, "its process is stopped, dead or unreachable"
    newest = max(shown["step"] for shown in after.values())
    late = [rank for rank, shown in sorted(after.items()) if shown["step"] < newest]
    if late:
        return late, f"at an earlier step than {newest}"
    free = [rank for rank, shown in sorted(after.items()) if not shown.get("in_collective", False)]
    if free and len(free) < len(after):
        return free, "is in no collective, the others wait in one"
    counts = {rank: shown.get("collectives", {}) for rank, shown in sorted(after.items())}
    most = {name: max(c.get(name, 0) for c in counts.values()) for c in counts.values() for name in c}
    fewer = [rank for rank, c in counts.items() if any(c.get(name, most[name]) < most[name] for name in most)]
    if fewer and len(fewer) < len(after):
        return fewer, "has called fewer collectives of its group"
    return [], "all ranks are at the same collective or in none: the network or the device may hang"


def _collective(entry: Mapping[str, Any]) -> str:
    return f"in {entry['name']} {entry['number']} of {entry['group']}, called from {entry['caller']}"


def _place(shown: Mapping[str, Any] | None) -> str:
    return f" (host {shown['host']}, step {shown['step']}, phase {shown['phase']})" if shown else ""
