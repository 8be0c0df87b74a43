"""The page about a run: whole in one file, nothing missing in a real browser, sums that add up."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from polylepis.launch.cli import main
from polylepis.pretrain.config import load_config, to_yaml
from polylepis.pretrain.errors import ConfigError
from polylepis.pretrain.report.facts import plan_against_measurement, read_facts, waterfall
from polylepis.pretrain.report.page import write_report

START = 1_700_000_000.0


def stamp(seconds: float) -> str:
    return datetime.fromtimestamp(START + seconds, UTC).isoformat(timespec="milliseconds")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder of 30 steps of 2 s each, restarted once after step 20, with a spike rolled back from 12 to 10."""
    folder = tmp_path / "run <b>"
    (folder / "health").mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(load_config("quickstart", ["name=a & b"])))
    lines = []
    for step in range(1, 31):
        lines.append(
            {
                "step": step,
                "loss": 3.0 - step / 50,
                "grad_norm": 1.0 + step % 3,
                "tokens_per_second": 100.0,
                "step_seconds": 2.0,
                "data_wait_seconds": 0.5,
                "seconds/communication": 0.25,
                "seconds/checkpoint": 1.0 if step % 10 == 1 and step > 1 else 0.0,
                "seconds/snapshot": 0.0,
                "seconds/between": 0.01,
                "time": START + 2.1 * step + (100.0 if step > 20 else 0.0),
                "mfu": 0.3,
                "hfu": 0.4,
                "memory_peak": 3 * 1024**3,
                "predicted_step_seconds": 1.6,
                "predicted_bubble": 0.125,
                "expert_load_max": [1.2, 1.5],
                **{f"loss/{m}": 3.0 - step / 50 for m in ("text", "image")},
                **{f"tokens/{m}": 50 for m in ("text", "image")},
                **({"seconds/imbalance": 0.1} if step % 10 == 0 else {}),
            }
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    common: dict[str, Any] = {"guard": "run", "kind": "start", "step": 0, "rank": 0, "seconds": 0.0}
    events = [
        common | {"time": stamp(0), "message": "started"},
        common | {"time": stamp(25), "guard": "spike", "kind": "spike", "step": 12, "message": "spike: <script>"},
        common
        | {"time": stamp(26), "guard": "spike", "kind": "rollback", "step": 12, "message": "m", "details": {"to": 10}},
        common | {"time": stamp(140), "step": 20, "message": "started"},
    ]
    (folder / "health" / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    skipped = [{"position": 11, "reason": "spike", "digest": "ab", "found": 12}]
    (folder / "health" / "skipped.json").write_text(json.dumps({"version": 1, "skipped": skipped}))
    (folder / "environment.json").write_text(json.dumps({"python": "3.11", "packages": {"torch": "2.13"}}))
    return folder


def test_lost_time_adds_up(run: Path) -> None:
    facts = read_facts(run)
    found = {lost.name: lost for lost in waterfall(facts)}
    assert found["computation"].seconds == pytest.approx(30 * (2.0 - 0.5 - 0.25))
    assert found["data wait"].seconds == pytest.approx(15.0)
    assert found["exposed communication"].seconds == pytest.approx(7.5)
    assert found["imbalance"].seconds == pytest.approx(3.0) and found["imbalance"].within == "exposed communication"
    assert found["pipeline bubble"].seconds == pytest.approx(7.5) and "predicted" in found["pipeline bubble"].known
    assert found["checkpoints"].seconds == pytest.approx(2.0)
    assert found["steps undone by rollbacks"].seconds == pytest.approx(2.0)  # step 11, done and undone
    # From the end of step 20 (42 s) to the end of step 21 (144.1 s) at the wall's clock.
    assert found["between starts"].seconds == pytest.approx(102.1)
    assert next(iter(found)) == "between starts", "largest first"
    rows = {row[0]: row[1:] for row in plan_against_measurement(facts)}
    assert rows["step, s"] == ("1.6", "2", "+25.0 %")
    assert rows["peak memory of rank 0, GiB"] == ("not predicted", "3", "–")


class Collected(HTMLParser):
    """Every reference to something outside, and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        for name in ("src", "href"):
            if (value := values.get(name)) and not value.startswith("data:"):
                self.outside.append(value)
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)
        assert tag != "script", "what a run recorded must not become code"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_one_file_and_says_it_all(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run)]) == 0
    path = run / "report.html"
    assert capsys.readouterr().out.strip() == str(path)
    parser = Collected()
    parser.feed(path.read_text())
    assert parser.outside == [] and parser.open == []
    for words in ("a & b", "spike: <script>", "step 30 of 500", "MFU (HFU 40.0 %)", "Batches left out", "torch"):
        assert words in parser.text, words
    assert path.read_text() == write_report(run).read_text(), "the same run gives the same page"


def test_nothing_to_report_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"not a run folder: it has no config\.yaml"):
        read_facts(tmp_path)
    (tmp_path / "config.yaml").write_text(to_yaml(load_config("quickstart")))
    with pytest.raises(ConfigError, match=r"nothing to report: metrics.jsonl has no step yet"):
        read_facts(tmp_path)


def test_a_page_of_the_barest_run(run: Path) -> None:
    """No events, no environment, one step, hardly a metric: sections say so instead of vanishing."""
    shutil.rmtree(run / "health")
    (run / "environment.json").unlink()
    bare = {"step": 1, "loss": 3.0, "grad_norm": 1.0, "tokens_per_second": 1.0, "step_seconds": 1.0}
    (run / "metrics.jsonl").write_text(json.dumps(bare | {"data_wait_seconds": 0.1}) + "\n")
    text = write_report(run).read_text()
    for words in (
        "None recorded.",
        "every batch was trained on",
        "environment.json is absent",
        "No step time was pred",
    ):
        assert words in text


def test_a_real_browser_misses_nothing(run: Path, tmp_path: Path) -> None:
    """Headless Chromium lays the page out; every picture has a size, nothing is fetched, no error is logged."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no chromium here (Debian: apt-get install chromium)")
    pictures = len(re.findall("<img ", write_report(run).read_text()))
    probe = """<script>addEventListener("load", () => {
      const images = [...document.images], body = document.body;
      const seen = images.filter(i => i.complete && i.naturalWidth > 100 && i.getBoundingClientRect().height > 50);
      body.dataset.pictures = seen.length;
      body.dataset.sections = document.querySelectorAll("section > h2").length;
      body.dataset.wide = document.documentElement.scrollWidth > innerWidth;
      body.dataset.fetched = performance.getEntriesByType("resource").filter(r => !r.name.startsWith("data:")).length;
    })</script>"""
    page = tmp_path / "probed.html"
    page.write_text((run / "report.html").read_text().replace("</body>", probe + "</body>"))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--dump-dom"]
    command += [
        "--enable-logging=stderr",
        "--v=0",
        "--virtual-time-budget=20000",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    result = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=200)
    found = dict(re.findall(r'data-(\w+)="(\w+)"', result.stdout[result.stdout.index("<body") :][:400]))
    assert found == {"pictures": str(pictures), "sections": "7", "wide": "false", "fetched": "0"}
    assert "CONSOLE" not in result.stderr
    assert pictures == 7
