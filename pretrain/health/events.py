"""`health/events.jsonl` of a run folder: one line per thing that happened, whoever noticed it."""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

FOLDER = "health"
EVENTS_FILE = "events.jsonl"


class Events:
    """Appends events; a disk that takes no more costs the event's line, never the step.

    Args:
        run: the run folder.
        rank: of this process, recorded with each event.
    """

    def __init__(self, run: Path, rank: int) -> None:
        self.folder, self.rank = run / FOLDER, rank
        self.lost = 0
        self._began = time.monotonic()

    def tell(self, guard: str, kind: str, step: int, message: str, **details: Any) -> None:
        """Record an event and, unless it is the run's own start or end, say it on standard error.

        Args:
            guard: the part of `HealthConfig` it belongs to, or `run`.
            kind: what happened, one word or two.
            step: the step, from 1.
            message: one line for people.
            details: JSON values for programs.
        """
        event = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),  # of the wall clock: it may jump
            "seconds": round(time.monotonic() - self._began, 3),  # since this process began: it never jumps
            "guard": guard,
            "kind": kind,
            "step": step,
            "rank": self.rank,
            "message": message,
            **({"details": details} if details else {}),
        }
        if guard != "run":  # starts and ends are said by those who start and end
            print(f"polylepis: step {step}: {message}", file=sys.stderr, flush=True)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # One write of one line to a file opened for appending: lines of several ranks do not mix.
            descriptor = os.open(self.folder / EVENTS_FILE, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                size = os.fstat(descriptor).st_size
                cut = size and os.pread(descriptor, 1, size - 1) != b"\n"  # a disk was full in the middle of a line
                line = (("\n" if cut else "") + json.dumps(event) + "\n").encode()
                if os.write(descriptor, line) < len(line):
                    raise OSError("no space for a whole line")
            finally:
                os.close(descriptor)
        except OSError as error:
            self.lost += 1
            print(f"polylepis: an event could not be written ({self.lost} so far): {error}", file=sys.stderr)


def read_events(run: Path) -> list[dict[str, Any]]:
    """All whole lines of a run's events, oldest first."""
    path = run / FOLDER / EVENTS_FILE
    events = []
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            events.append(json.loads(text))
        except json.JSONDecodeError:  # cut by a full disk or a crash
            continue
    return events


def write_aside(path: Path, text: str) -> None:
    """Replace a small file as a whole, flushed: after a crash it is the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    with open(aside, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
