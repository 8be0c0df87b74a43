"""The doctor's command: both stages on this machine, and the findings of many."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ...pretrain.config import load_config, to_yaml
from ...pretrain.prepare import check_run, n_processes
from ...pretrain.spawn import run_workers
from ..errors import LaunchError
from .node import Subject, examine_node
from .report import TOGETHER, Check, Report, Thresholds, collect, compare_facts, read_reports, table


def examine(
    name: str | None,
    overrides: Sequence[str],
    stage: str,
    procs: int | None,
    out: Path | None,
    thresholds: Path | None,
    as_json: bool,
) -> bool:
    """Run the stages, print what was found; whether nothing failed."""
    limits = Thresholds.read(thresholds)
    config = load_config(name, overrides) if name else None
    if procs is not None and procs < 1:
        raise LaunchError(f"--procs {procs}: must be at least 1")
    count = procs or (n_processes(config) if config else 1)
    if config is not None and stage != "node":
        check_run(config, count)
    folder = out or ((config.path if config else Path()) / "launch" / "doctor")
    reports: list[Report] = []
    if stage != "ranks":
        reports.append(examine_node(Subject(config, count, config.path if config else Path(), limits)))
        reports[-1].write(folder)
    if stage != "node" and all(report.status != "fail" for report in reports):
        arguments = ["--out", str(folder.absolute()), "--quiet"]
        if config is not None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.yaml").write_text(to_yaml(config))
            arguments.insert(0, str((folder / "config.yaml").absolute()))
        if thresholds is not None:
            arguments += ["--thresholds", str(thresholds.absolute())]
        run_workers(count, arguments, "polylepis.launch.doctor.ranks")
        reports += [report for report in read_reports(folder) if report.node == "ranks"]
    print(json.dumps([asdict(report) for report in reports], indent=1) if as_json else table(reports))
    return all(report.status != "fail" for report in reports)


def collect_findings(out: Path | None, as_json: bool) -> bool:
    """Findings of many nodes in one table, and who passes."""
    if out is None:
        raise LaunchError("--collect: needs --out, the folder with the findings")
    reports = read_reports(out)
    nodes = [report for report in reports if report.node not in TOGETHER]
    same, odd = compare_facts({report.node: report.facts for report in nodes}) if nodes else (Check("", "skip"), [])
    together = Report(TOGETHER[1], [same], {}, odd)
    passing, failing = collect(out, [*reports, together] if nodes else reports)
    if as_json:
        print((out / "summary.json").read_text(), end="")
    else:
        troubled = [report for report in reports if report.status in ("warn", "fail")]
        print(table([*troubled, together] if nodes else troubled))
        print(f"{len(passing)} nodes pass, {len(failing)} fail{': ' if failing else ''}{', '.join(failing)}")
        print(f"lists: {out}/passing_nodes.txt, {out}/failing_nodes.txt")
    return not failing
