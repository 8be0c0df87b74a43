"""audit, simulate, preview, bench: what they claim is checked against the stream and the files themselves."""

from __future__ import annotations

import base64
import importlib.util
import json
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner

from polylepis.data.audit import audit, parse_sources, simulate
from polylepis.data.bench import planning, resident_memory
from polylepis.data.bench_peers import measure
from polylepis.data.commands import data
from polylepis.data.dataset import Dataset
from polylepis.data.errors import DataError
from polylepis.data.mixing import Source
from polylepis.data.packing import PackPlan, best_fit_decreasing
from polylepis.data.stream import Stream, StreamConfig


@pytest.fixture(scope="module")
def config(small: Path) -> StreamConfig:
    sources = {"a": Source(3.0), "b": Source(1.0, split="heldout")}
    return StreamConfig(str(small), global_batch=8, micro_batch=1, window=100, sources=sources)


def test_an_audit_foretells_the_stream(small: Path, config: StreamConfig) -> None:
    result = audit(config, epochs=3, steps=20)
    stream = Stream(Dataset.open(small), config, dp_rank=0, dp_size=1)
    tokens = {"a": 0, "b": 0}
    for _ in range(20):
        for name, count in stream.next().source_tokens.items():
            tokens[name] += count
    assert result.order_digest == stream.state_dict()["order_digest"]
    assert {name: sum(counts.values()) for name, counts in result.tokens.items()} == tokens
    assert result.deviation <= 2 and all(0.5 < fill <= 1 for fill in result.fill.values())


def test_an_audit_finds_what_is_wrong(small: Path, config: StreamConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    packs = PackPlan.packs

    def twice(self: PackPlan, epoch: int, window: int) -> list[np.ndarray]:
        found = packs(self, epoch, window)
        return [found[0], *found] if (epoch, window) == (1, 0) else found

    monkeypatch.setattr(PackPlan, "packs", twice)
    with pytest.raises(DataError, match=r"source a: epoch 1 holds document \d+ 2 times"):
        audit(config, epochs=2, steps=1)


def test_a_forecast_counts_what_nodes_read(small: Path, config: StreamConfig) -> None:
    found = simulate(config, dp_size=4, ranks_per_node=2, steps=10, cache_bytes=10**9)
    stream = Stream(Dataset.open(small), config, dp_rank=0, dp_size=1)
    tokens = sum(sum(stream.next().tokens.values()) for _ in range(10))
    assert found.tokens_per_step == tokens / 10 and found.read_per_step == tokens * 2 / 10 / 2
    assert found.fetched == sum(path.stat().st_size for path in small.glob("*.tar")) and found.hit_rate > 0.8
    tight = simulate(config, dp_size=4, ranks_per_node=2, steps=10, cache_bytes=1)
    assert tight.fetched > 5 * found.fetched and tight.hit_rate < found.hit_rate
    with pytest.raises(DataError, match="must be a multiple of 3 ranks"):
        simulate(config, dp_size=3, ranks_per_node=1, steps=1, cache_bytes=1)


def test_commands(small: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> str:
        result = CliRunner().invoke(data, list(arguments))
        assert result.exit_code == 0, result.output + repr(result.exception)
        return result.output

    out = run("audit", f"{small}=3", f"{small}#heldout=1", "--steps", "10")
    assert "each exactly once in each of 2 epochs" in out and "order digest" in out
    assert json.loads(run("audit", str(small), "--steps", "2", "--json"))["epochs"] == 2
    assert "cache hits" in run("simulate", str(small), "--steps", "3")
    tree = run("inspect", str(small), "--samples", "0", "--seq-len", "512")
    assert tree.count("└─ voice") == 2 and "shuffle quality" in tree
    assert (
        json.loads(run("bench", str(small), "--samples", "300", "--position", "200", "--resident", "500", "--json"))[
            "ratio"
        ]["raw"]
        > 1
    )
    with pytest.raises(DataError, match=r"a=x: a source is written PATH.*'x' is no number"):
        parse_sources(["a=x"])
    assert list(parse_sources(["x/a", "y/a#t=2"]).items()) == [
        ("a", Source(1.0, "x/a")),
        ("a'", Source(2.0, "y/a", "t")),
    ]
    assert parse_sources(["day=1/s", "s3://b/day=2/t=2.5"]) == {
        "s": Source(1.0, "day=1/s"),
        "t": Source(2.5, "s3://b/day=2/t"),
    }
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "encode.json").touch()
    with pytest.raises(DataError, match=r"begun is no data set: manifest\.json is missing; go on with: polylepis data"):
        Dataset.open(begun)


def test_epochs_of_a_forecast_are_documents_read(small: Path) -> None:
    config = StreamConfig(str(small), global_batch=4, micro_batch=1, window=64, seq_len=512)
    cluster = {"dp_size": 1, "ranks_per_node": 1, "cache_bytes": 10**9}
    split = Dataset.open(small).split("train")
    plan = PackPlan(split.lengths, seq_len=512, window=64, seed=config.seed)
    order = [pack for epoch in range(2) for window in range(plan.n_windows) for pack in plan.packs(epoch, window)]
    for steps in (1, 5, 17, 40):
        (epochs,) = simulate(config, steps=steps, **cluster).epochs.values()
        assert epochs == pytest.approx(sum(map(len, order[: steps * 4])) / len(split.lengths))


def test_a_preview_shows_pictures_and_sounds(small: Path, tmp_path: Path) -> None:
    page = tmp_path / "new" / "p.html"
    result = CliRunner().invoke(data, ["preview", str(small), "--out", str(page), "--samples", "30", "--packs", "5"])
    assert result.exit_code == 0, result.output
    svg = tmp_path / "p.svg"
    again = CliRunner().invoke(
        data, ["preview", str(small), "--out", str(page), "--samples", "30", "--packs", "5", "--picture", str(svg)]
    )
    assert again.exit_code == 0 and svg.read_text().count("<rect") > 20
    ElementTree.fromstring(svg.read_text())
    text = page.read_text()
    pictures = re.findall(r"data:image/png;base64,([\w+/=]+)", text)
    sounds = re.findall(r"data:audio/wav;base64,([\w+/=]+)", text)
    assert pictures and all(base64.b64decode(p).startswith(b"\x89PNG") for p in pictures)
    assert sounds and all(base64.b64decode(s).startswith(b"RIFF") for s in sounds)
    assert text.count("<div class=pack>") == 5 and text.count("<div class=sample>") == 30
    assert "<script" not in text and "http" not in text, "self-contained, and nothing of the data is executed"
    widths = [float(w) for w in re.findall(r'style="width:([\d.]+)%"><i', text)]
    assert 400 < sum(widths) <= 500.1, "five packs, filled with documents"


@pytest.mark.parametrize("seed", range(5))
def test_packs_are_within_two_percent_of_the_least_possible(seed: int) -> None:
    lengths = np.clip(np.random.default_rng(seed).lognormal(5.0, 1.0, 1000).astype(np.int64), 1, 1024)
    assert len(best_fit_decreasing(lengths, 1024)) <= 1.02 * -(-int(lengths.sum()) // 1024)


def test_planning_is_timed_per_document() -> None:
    """The bench prints microseconds; how many is for docs/data.md, not for a test."""
    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, 1.0, 2_000).astype(np.int64), 8, 4096)
    assert 0 < planning(lengths, documents=2_000) < float("inf")


@pytest.mark.full
def test_memory_stays_flat_over_a_hundred_thousand_samples(quickstart: Path) -> None:
    """pytorch #13246: workers whose data set is Python objects grow with every sample that they touch."""
    config = StreamConfig(str(quickstart), seq_len=1024, global_batch=8, micro_batch=8)
    found = resident_memory(config, 100_000, workers=4)
    assert found["samples"] >= 100_000 and found["early"] > 0
    assert found["late"] - found["early"] < 16 << 20, found


def test_memory_is_that_of_the_reader_and_its_workers(small: Path) -> None:
    config = StreamConfig(str(small), seq_len=512, global_batch=8, micro_batch=8)
    alone, with_two = (resident_memory(config, 900, workers=workers) for workers in (0, 2))
    assert alone["samples"] >= 900 and alone["late"] > 1 << 20
    assert with_two["late"] > alone["late"] + (1 << 20)


@pytest.mark.skipif(importlib.util.find_spec("litdata") is not None, reason="litdata is installed here")
def test_a_peer_that_is_not_there_is_named(small: Path) -> None:
    assert measure("litdata", sys.executable, small, "train", 10) == {"error": "litdata is not installed"}
