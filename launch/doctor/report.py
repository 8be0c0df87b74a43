"""Findings: what a check says, its thresholds, tables, JSON, and the lists of nodes that pass and fail."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml

from ..errors import LaunchError

TOGETHER = ("ranks", "all nodes")  # reports that are not of one node
SUMMARY = "summary.json"
DEFAULTS = Path(__file__).parent / "thresholds.yaml"
Status = Literal["ok", "warn", "fail", "skip"]
ORDER: tuple[Status, ...] = ("skip", "ok", "warn", "fail")


@dataclass(frozen=True)
class Thresholds:
    """See `thresholds.yaml`, which holds the values and says what each decides."""

    free_memory_gib: float
    shm_gib: float
    open_files: int
    write_mb_per_second: float
    gpu_stray_mib: int
    host_to_device_gb_per_second: float
    clock_skew_seconds: float
    gemm_spread: float
    slow_pair: float
    all_reduce_mb: tuple[int, ...]
    all_reduce_gb_per_second: float
    pair_mb: int

    __pydantic_config__ = {"extra": "forbid"}

    @classmethod
    def read(cls, file: Path | None = None) -> Thresholds:
        """The defaults, with what `file` says instead.

        Raises:
            LaunchError: no such file, an unknown name or a value of another type.
        """
        values = yaml.safe_load(DEFAULTS.read_text())
        if file is not None:
            try:
                given = yaml.safe_load(file.read_text())
            except (OSError, yaml.YAMLError) as error:
                raise LaunchError(f"--thresholds {file}: {' '.join(str(error).split())}") from None
            unknown = sorted(set(given or {}) - set(values)) if isinstance(given, dict) else [str(given)]
            if unknown:
                raise LaunchError(f"--thresholds {file}: unknown {unknown[0]}; accepted: {', '.join(values)}")
            values |= given
        try:
            return pydantic.TypeAdapter(cls).validate_json(json.dumps(values), strict=True)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            raise LaunchError(f"--thresholds {file}: {name}: {first['msg']}, not {first['input']!r}") from None


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: what was looked at.
        status: `fail` must be mended before training, `warn` should be, `skip` could not be looked at here.
        value: what was found, with its unit.
        detail: what would be right, or why it was skipped.
    """

    name: str
    status: Status
    value: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Report:
    """Findings on one node, or (`node` is "ranks") on all ranks together.

    Attributes:
        facts: versions and hashes, which must be equal on all nodes.
        bad_nodes: nodes that the findings name (stage 2 alone can name others than itself).
    """

    node: str
    checks: list[Check]
    facts: dict[str, str] = field(default_factory=dict)
    bad_nodes: list[str] = field(default_factory=list)

    @property
    def status(self) -> Status:
        return max((check.status for check in self.checks), key=ORDER.index, default="skip")

    def write(self, folder: Path) -> Path:
        """`folder/NODE.json`, whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{self.node}.json"
        aside = folder / f".{self.node}.part"
        aside.write_text(json.dumps(asdict(self) | {"status": self.status}, indent=1) + "\n")
        aside.replace(file)
        return file


def guarded(name: str, check: Callable[[], Check]) -> Check:
    """A check that breaks is a finding of its own, and the rest still run."""
    try:
        return check()
    except Exception as error:
        return Check(name, "fail", type(error).__name__, " ".join(str(error).split())[:200])


def table(reports: Sequence[Report]) -> str:
    """One line for each finding; nodes on which everything is well take one line together."""
    lines = []
    for report in reports:
        lines.append(f"{report.node}: {report.status}")
        width = max((len(check.name) for check in report.checks), default=0)
        for check in report.checks:
            detail = f"  ({check.detail})" if check.detail else ""
            lines.append(f"  {check.status:4}  {check.name:{width}}  {check.value}{detail}")
    return "\n".join(lines)


def read_reports(folder: Path) -> list[Report]:
    """What the nodes, and the ranks together, have written.

    Raises:
        LaunchError: nothing there.
    """
    reports = []
    for file in sorted(folder.glob("*.json")):
        if file.name == SUMMARY:
            continue
        values: dict[str, Any] = json.loads(file.read_text())
        values.pop("status")
        reports.append(Report(**(values | {"checks": [Check(**check) for check in values["checks"]]})))
    if not reports:
        raise LaunchError(f"{folder}: no findings of `polylepis doctor` in it")
    return reports


def compare_facts(facts: dict[str, dict[str, str]]) -> tuple[Check, list[str]]:
    """Versions and hashes must be equal on all nodes (or ranks); names those that are not with the majority."""
    odd: dict[str, list[str]] = {}
    for name in sorted({name for one in facts.values() for name in one}):
        usual, _ = Counter(one.get(name, "none") for one in facts.values()).most_common(1)[0]
        for node, one in facts.items():
            if one.get(name, "none") != usual:
                odd.setdefault(node, []).append(f"{name} {one.get(name, 'none')}, not {usual}")
    if not odd:
        return Check("same everywhere", "ok", f"{len(facts)} × the same versions, code and configuration"), []
    told = "; ".join(f"{node}: {', '.join(what)}" for node, what in list(odd.items())[:4])
    return Check("same everywhere", "fail", f"{len(odd)} differ", told), sorted(odd)


def collect(folder: Path, reports: Iterable[Report]) -> tuple[list[str], list[str]]:
    """Nodes that pass and that fail, also as `passing_nodes.txt` and `failing_nodes.txt` (one per line), and
    `summary.json`."""
    reports = list(reports)
    nodes = {report.node: report.status for report in reports if report.node not in TOGETHER}
    failing = {node for node, status in nodes.items() if status == "fail"}
    for report in reports:
        failing |= set(report.bad_nodes)
    passing = sorted(nodes.keys() - failing)
    for name, found in (("passing_nodes.txt", passing), ("failing_nodes.txt", sorted(failing))):
        (folder / name).write_text("".join(f"{node}\n" for node in found))
    summary = {"passing": passing, "failing": sorted(failing), "reports": [dataclasses.asdict(r) for r in reports]}
    (folder / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")
    return passing, sorted(failing)
