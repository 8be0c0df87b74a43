"""The page: everything inside one file, so that it can be mailed, archived, and opened without a network."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..config import to_yaml
from ..health.events import write_aside
from . import plots
from .facts import Facts, plan_against_measurement, read_facts, waterfall

REPORT_FILE = "report.html"
STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2430; background: #f6f7f9; margin: 0; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 24px 60px; }
h1 { margin: 0 0 2px; font-size: 26px; } h2 { font-size: 17px; margin: 0 0 10px; }
.sub { color: #5c6672; margin: 0 0 20px; }
.tiles, .pictures { display: grid; gap: 14px; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); margin-bottom: 14px; }
.pictures { grid-template-columns: repeat(auto-fit, minmax(520px, 1fr)); }
.card { background: #fff; border: 1px solid #e3e6ea; border-radius: 8px; padding: 14px 16px; overflow-x: auto; }
.tile b { display: block; font-size: 22px; font-weight: 600; } .tile span { color: #5c6672; font-size: 13px; }
section { margin-top: 14px; }
img { width: 100%; height: auto; display: block; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th, td { text-align: left; padding: 4px 14px 4px 0; border-bottom: 1px solid #eceef1; vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.drawing { max-width: 760px; }
.none { color: #5c6672; } pre { font-size: 12.5px; overflow-x: auto; } summary { cursor: pointer; font-weight: 600; }
.part td:first-child { padding-left: 18px; color: #5c6672; }
"""


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run folder.

    Raises:
        ConfigError: not a run folder, or nothing in it to report yet.
    """
    facts = read_facts(folder)
    path = folder / REPORT_FILE
    write_aside(path, page(facts))
    return path


def page(facts: Facts) -> str:
    """The whole page."""
    title = escape(f"{facts.config.name}: a report")
    found, resolved = waterfall(facts), escape(to_yaml(facts.config))
    sections = [
        _tiles(facts),
        _pictures(facts),
        _section("Where the time went", _waterfall(found)),
        _section("Plan against measurement", _plan(facts)),
        _section("Events", _events(facts)),
        _section("Batches left out", _skipped(facts)),
        _section("Held-out evaluation", _evaluation(facts)),
        _section("Environment", _environment(facts)),
        _section("Configuration", f"<details><summary>resolved</summary><pre>{resolved}</pre></details>"),
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body><main>'
        f"<h1>{escape(facts.config.name)}</h1><p class=sub>{escape(_subtitle(facts))}</p>\n"
        + "\n".join(sections)
        + "\n</main></body></html>\n"
    )


def _subtitle(facts: Facts) -> str:
    last, of = facts.lines[-1]["step"], facts.config.train.steps
    model = facts.config.model
    ended = [event for event in facts.events if event["guard"] == "run"]
    state = {"end": "ended", "stop": "stopped", "start": "running, or killed"}
    said = state.get(ended[-1]["kind"], "") if ended else ""
    return f"step {last:,} of {of:,}{f', {said}' if said else ''} · {model.pattern} · d_model {model.d_model:,}"


def _tiles(facts: Facts) -> str:
    line, seen = facts.lines[-1], len(facts.lines)
    tokens = sum(facts.total(f"tokens/{m}") for m in facts.config.model.modalities)
    tiles = [
        (f"{line['loss']:.3f}", "loss, nats per token, last step"),
        (f"{tokens:,.0f}", f"tokens in {seen:,} steps"),
        (f"{facts.typical('tokens_per_second') or 0:,.0f}", "tokens per second, median"),
        (f"{facts.typical('step_seconds') or 0:,.3f} s", "per step, median"),
    ]
    if (mfu := facts.typical("mfu")) is not None:
        tiles.append((f"{100 * mfu:.1f} %", f"MFU (HFU {100 * (facts.typical('hfu') or 0):.1f} %)"))
    elif (rate := facts.typical("model_tflops_per_device")) is not None:
        tiles.append((f"{rate:.4g}", "model TFLOP/s per device (no peak known)"))
    starts = sum(event["kind"] == "start" for event in facts.events)
    tiles.append((f"{starts}", "starts" if starts != 1 else "start"))
    tiles.append((f"{sum(event['guard'] != 'run' for event in facts.events)}", "events of guards"))
    cards = (f'<div class="card tile"><b>{escape(a)}</b><span>{escape(b)}</span></div>' for a, b in tiles)
    return f'<div class="tiles">{"".join(cards)}</div>'


def _pictures(facts: Facts) -> str:
    pictures = [
        ("Loss per modality", plots.losses(facts)),
        ("Gradient norm", plots.norms(facts)),
        ("Throughput", plots.speed(facts)),
        ("Step time", plots.step_time(facts)),
    ]
    if facts.typical("mfu") is not None:
        pictures.append(("Utilisation", plots.utilisation(facts)))
    if any(line.get("expert_load_max") for line in facts.lines):
        pictures.append(("Load of experts, worst layer", plots.experts(facts)))
    cards = (
        f'<div class="card"><h2>{escape(name)}</h2>{picture(plots.svg(draw), name)}</div>' for name, draw in pictures
    )
    return f'<div class="pictures">{"".join(cards)}</div>'


def picture(svg: str, name: str) -> str:
    """An SVG as an image of its own: identifiers of one cannot meet those of another."""
    data = base64.b64encode(svg.encode()).decode()
    return f'<img alt="{escape(name)}" src="data:image/svg+xml;base64,{data}">'


def _section(title: str, body: str) -> str:
    return f'<section class="card"><h2>{escape(title)}</h2>{body}</section>'


def _none(text: str) -> str:
    return f'<p class="none">{escape(text)}</p>'


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]], numbers: Sequence[int] = ()) -> str:
    top = "".join(f"<th{' class=n' if i in numbers else ''}>{escape(name)}</th>" for i, name in enumerate(head))
    body = []
    for row in rows:
        cells = (
            f"<td{' class=n' if index in numbers else ''}>{escape(str(value))}</td>" for index, value in enumerate(row)
        )
        body.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table><thead><tr>{top}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _waterfall(found: Sequence[Any]) -> str:
    total = sum(lost.seconds for lost in found if not lost.within) or 1.0
    drawing = picture(plots.svg(plots.lost_time(found), 0.5 + 0.3 * len(found)), "lost time")
    rows = [
        (
            f"of which {lost.name}" if lost.within else lost.name,
            f"{lost.seconds:,.1f}",
            f"{100 * lost.seconds / total:.1f} %",
            lost.known,
        )
        for lost in found
    ]
    return f'<div class="drawing">{drawing}</div>' + _table(("", "seconds", "share", "how it is known"), rows, (1, 2))


def _plan(facts: Facts) -> str:
    mesh, rows = facts.config.mesh, plan_against_measurement(facts)
    axes = " × ".join(f"{name} {value}" for name, value in vars(mesh).items())
    text = f"<p>{escape(axes)}, {facts.environment.get('devices', '?')} processes</p>"
    if not any("predicted_step_seconds" in line for line in facts.lines):
        text += _none("No step time was predicted for this device: `polylepis bench layers` measures what that takes.")
    return text + _table(("", "planned", "measured", "difference"), rows, (1, 2, 3))


def _events(facts: Facts) -> str:
    rows = [(e["time"][:19].replace("T", " "), e["step"], e["guard"], e["kind"], e["message"]) for e in facts.events]
    if not rows:
        return _none("None recorded.")
    more = f"<p class=none>the last 200 of {len(rows)}</p>" if len(rows) > 200 else ""
    return more + _table(("time (UTC)", "step", "guard", "kind", ""), rows[-200:], (1,))


def _skipped(facts: Facts) -> str:
    if not facts.skipped:
        return _none("None: every batch was trained on.")
    rows = [(e["position"], e["position"] + 1, e["reason"], e["found"], e["digest"]) for e in facts.skipped]
    return _table(("data position", "its step", "reason", "found at step", "batch"), rows, (0, 1, 3))


def _evaluation(facts: Facts) -> str:
    if not facts.evaluation:
        return _none("Not evaluated yet: `polylepis evaluate` writes evaluation.json.")
    values = facts.evaluation
    rows = [(f"loss, {name}", f"{loss:.4f}") for name, loss in values.get("loss", {}).items()]
    rows += [
        (name.replace("_", " "), f"{value:.4g}") for name, value in values.items() if isinstance(value, int | float)
    ]
    return _table(("", "value"), rows, (1,))


def _environment(facts: Facts) -> str:
    if not facts.environment:
        return _none("environment.json is absent: the run is older than this version.")
    rows: list[tuple[str, str]] = []
    for name, value in facts.environment.items():
        if isinstance(value, dict):
            rows += [(f"{name}: {key}", str(item)) for key, item in value.items()]
        elif isinstance(value, list):
            rows.append(
                (name, ", ".join(map(str, value[:32])) + (f" and {len(value) - 32} more" if len(value) > 32 else ""))
            )
        else:
            rows.append((name, str(value)))
    return _table(("", ""), rows)
