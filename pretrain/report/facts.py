"""What a report says, computed from the files of a run folder alone: no model, no data, no process group."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from ..config import RunConfig, load_config
from ..errors import ConfigError
from ..health.events import FOLDER, read_events
from ..health.ledger import LEDGER_FILE
from ..meter.environment import ENVIRONMENT_FILE
from ..meter.tracker import read_metrics

Line = dict[str, Any]

MEASURED = "measured"
SAMPLED = "sampled (waiting in collectives, 50 looks a second)"
COMPARED = "measured (own work of all ranks, compared)"
PREDICTED = "predicted by the planner"


@dataclass(frozen=True)
class Lost:
    """One line of the lost-time waterfall.

    Attributes:
        name: what the time went into.
        seconds: in all, on rank 0.
        known: how it is known.
        within: the line that it is a part of; empty for a line of its own.
    """

    name: str
    seconds: float
    known: str
    within: str = ""


@dataclass(frozen=True)
class Facts:
    """Attributes:
    folder, config: of the run.
    lines: metrics, one per trained step.
    events: as recorded.
    skipped: the ledger's entries.
    environment: where it ran.
    evaluation: of its newest evaluation, if there was one.
    """

    folder: Path
    config: RunConfig
    lines: list[Line]
    events: list[Line] = field(default_factory=list)
    skipped: list[Line] = field(default_factory=list)
    environment: Line = field(default_factory=dict)
    evaluation: Line = field(default_factory=dict)

    @property
    def modalities(self) -> list[str]:
        return [m for m in self.config.model.modalities if any(f"loss/{m}" in line for line in self.lines)]

    def typical(self, key: str) -> float | None:
        """Median over the steps that have it, the first (which compiles) left out where there are more."""
        values = [line[key] for line in self.lines if key in line]
        return statistics.median(values[1:] or values) if values else None

    def total(self, key: str) -> float:
        return sum(line.get(key, 0.0) for line in self.lines)


def read_facts(folder: Path) -> Facts:
    """Everything that a run folder knows.

    Raises:
        ConfigError: not a run folder, or a run that has not finished a step.
    """
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{folder}: not a run folder: it has no config.yaml")
    lines = read_metrics(folder)
    if not lines:
        raise ConfigError(f"{folder}: nothing to report: metrics.jsonl has no step yet")
    skipped = _read(folder / FOLDER / LEDGER_FILE).get("skipped", [])
    return Facts(
        folder,
        load_config(str(folder)),
        lines,
        read_events(folder),
        skipped,
        _read(folder / ENVIRONMENT_FILE),
        _read(folder / "evaluation.json"),
    )


def _read(path: Path) -> Line:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def waterfall(facts: Facts) -> list[Lost]:
    """Where rank 0's time went, largest sums first; parts of another line follow it."""
    steps = facts.total("step_seconds")
    data, waiting = facts.total("data_wait_seconds"), facts.total("seconds/communication")
    known = any("seconds/communication" in line for line in facts.lines)
    found = [Lost("computation" + ("" if known else " and communication"), steps - data - waiting, MEASURED)]
    found.append(Lost("data wait", data, MEASURED))
    if known:
        found.append(Lost("exposed communication", waiting, SAMPLED))
        found.append(Lost("imbalance", _imbalance(facts), COMPARED, "exposed communication"))
    if bubbles := [
        line["predicted_bubble"] * line["step_seconds"] for line in facts.lines if "predicted_bubble" in line
    ]:
        found.append(Lost("pipeline bubble", sum(bubbles), PREDICTED, found[2].name if known else found[0].name))
    found.append(Lost("checkpoints", facts.total("seconds/checkpoint"), MEASURED))
    found.append(Lost("snapshots for rollback", facts.total("seconds/snapshot"), MEASURED))
    found.append(Lost("steps undone by rollbacks", _undone(facts), "steps × median step time"))
    found.append(Lost("between starts", _between(facts), "wall clock, work done again included"))
    found.append(Lost("metrics and guards", facts.total("seconds/between"), MEASURED))
    main = sorted((lost for lost in found if not lost.within), key=lambda lost: -lost.seconds)
    return [item for lost in main for item in (lost, *(part for part in found if part.within == lost.name))]


def _imbalance(facts: Facts) -> float:
    """Each comparison stands for the steps since the one before."""
    total, since = 0.0, 0
    for line in facts.lines:
        since += 1
        if "seconds/imbalance" in line:
            total += since * line["seconds/imbalance"]
            since = 0
    return total


def _undone(facts: Facts) -> float:
    rollbacks = [event for event in facts.events if event["kind"] == "rollback"]
    undone = sum(event["step"] - 1 - event["details"]["to"] for event in rollbacks)
    return undone * (facts.typical("step_seconds") or 0.0)


def _between(facts: Facts) -> float:
    """Wall-clock time between the last step that one process did and the first step of the next."""
    starts = [event for event in facts.events if event["kind"] == "start"]
    times = sorted(line["time"] for line in facts.lines if "time" in line)
    total = 0.0
    for start in starts[1:]:
        began = datetime.fromisoformat(start["time"]).timestamp()
        before, after = [t for t in times if t <= began], [t for t in times if t > began]
        if before and after:
            total += after[0] - before[-1]
    return total


def plan_against_measurement(facts: Facts) -> list[tuple[str, str, str, str]]:
    """(quantity, planned, measured, difference) for what both sides know."""
    rows: list[tuple[str, str, str, str]] = []
    pairs = (
        ("step, s", facts.typical("predicted_step_seconds"), facts.typical("step_seconds"), 1.0),
        ("peak memory of rank 0, GiB", facts.typical("predicted_memory"), facts.typical("memory_peak"), 1024.0**3),
        ("MFU", facts.typical("predicted_mfu"), facts.typical("mfu"), 1.0),
    )
    for name, planned, seen, unit in pairs:
        if planned is None and seen is None:
            continue
        difference = f"{(seen / planned - 1) * 100:+.1f} %" if planned and seen is not None else "–"
        rows.append((name, _number(planned, unit), _number(seen, unit), difference))
    return rows


def _number(value: float | None, unit: float) -> str:
    return "not predicted" if value is None else f"{value / unit:.4g}"
