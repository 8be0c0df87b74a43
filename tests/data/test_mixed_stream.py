"""Mixes and quarantine in the stream: shares, state, refusals, and ranks that agree about what is bad."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from polylepis.data.dataset import Dataset, Split
from polylepis.data.errors import DataError
from polylepis.data.mixing import Source, Stage
from polylepis.data.mock import MockDataset
from polylepis.data.quarantine import Entry, Ledger, QuarantineConfig
from polylepis.data.share import same_everywhere
from polylepis.data.stream import Stream, StreamConfig
from ranks import run_ranks


def rows(stream: Stream) -> torch.Tensor:
    return torch.cat([batch["tokens"] for batch in stream.next().micro_batches])


@pytest.fixture
def mixed(small: Path) -> StreamConfig:
    return StreamConfig(
        str(small),
        global_batch=24,
        micro_batch=1,
        window=64,
        sources={"b": Source(3.0, split="train"), "a": Source(1.0, split="heldout")},
        stages=(Stage(100, {"a": 1.0, "b": 1.0}),),
    )


def test_shares_and_accounting(small: Path, mixed: StreamConfig) -> None:
    dataset = Dataset.open(small)
    stream = Stream(dataset, mixed, dp_rank=0, dp_size=1)
    totals = {"a": 0, "b": 0}
    for k in range(10):
        step = stream.next()
        assert sum(step.source_tokens.values()) == sum(step.tokens.values())
        assert step.stage == (k * 24 >= 100)
        for name, count in step.source_tokens.items():
            totals[name] += count
    packs = [place[3] for place in stream.state_dict()["places"]]
    assert packs == [25 + 70, 75 + 70] == stream.planner.mix.counts(240).tolist()
    fill = sum(totals.values()) / (240 * 256)
    assert abs(totals["a"] / (95 * 256) - fill) < 0.1, "equal packs are equal tokens, but for padding"


def test_resume_at_every_step_on_any_number_of_ranks(small: Path, mixed: StreamConfig) -> None:
    dataset = Dataset.open(small)
    whole = Stream(dataset, mixed, dp_rank=0, dp_size=1)
    states, batches = [], []
    for _ in range(8):
        states.append(json.loads(json.dumps(whole.state_dict())))
        batches.append(rows(whole))
    for k, size in enumerate((1, 2, 3, 4, 6, 8, 12, 24)):
        streams = [Stream(dataset, mixed, dp_rank=r, dp_size=size, state=states[k]) for r in range(size)]
        assert torch.equal(torch.cat([rows(stream) for stream in streams]), batches[k])
        assert all(stream.state_dict() == streams[0].state_dict() for stream in streams)


def test_the_state_is_small(small: Path) -> None:
    names = [f"source{i:02d}" for i in range(30)]
    sources = {name: Source(1.0, split="heldout") for name in names}
    stages = tuple(Stage(k, {name: 0.1 * i + k for i, name in enumerate(names)}) for k in (100, 200, 300))
    config = StreamConfig(str(small), sources=sources, stages=stages, global_batch=64)
    stream = Stream(Dataset.open(small), config, dp_rank=0, dp_size=1)
    for _ in range(3):
        stream.next()
    assert len(json.dumps(stream.state_dict(), separators=(",", ":"))) <= 1024 + 64 * len(names)


def test_a_changed_mix_is_refused_field_by_field(small: Path, mixed: StreamConfig) -> None:
    dataset = Dataset.open(small)
    state = Stream(dataset, mixed, dp_rank=0, dp_size=1).state_dict()
    # The order in which a file lists the sources does not matter.
    same = replace(mixed, sources=dict(reversed(mixed.sources.items())))
    Stream(dataset, same, dp_rank=0, dp_size=1, state=state)
    with pytest.raises(DataError, match=r"weights: \[\[1\.0, 3\.0\], .* then, \[\[1\.0, 5\.0\]"):
        other = replace(mixed, sources={**mixed.sources, "b": Source(5.0)})
        Stream(dataset, other, dp_rank=0, dp_size=1, state=state)
    with pytest.raises(DataError, match=r"sources\.c: None then, \w{12} now; stages"):
        other = replace(mixed, sources={**mixed.sources, "c": Source(5.0)}, stages=())
        Stream(dataset, other, dp_rank=0, dp_size=1, state=state)


def test_refusals_name_the_source(small: Path, quickstart: Path, mixed: StreamConfig) -> None:
    def refuse(message: str, **changes: Any) -> None:
        with pytest.raises(DataError, match=message):
            Stream(Dataset.open(small), replace(mixed, **changes), dp_rank=0, dp_size=1)

    refuse("source z: .* is no data set", sources={"z": Source(1.0, path="/nowhere")}, stages=())
    refuse("has no split 'test'", sources={"z": Source(1.0, split="test")}, stages=())
    refuse(
        r"source z: .* differ in image, text, .* would mean different things \(sizes .* there, .* here\)",
        sources={"a": Source(1.0), "z": Source(1.0, path=str(quickstart))},
        stages=(),
    )
    refuse(r"source a: \d+ of \d+ documents are longer than seq_len 32", seq_len=32)
    with pytest.raises(DataError, match="1 stages, but no sources"):
        StreamConfig("x", stages=(Stage(5, {"a": 1.0}),))
    with pytest.raises(DataError, match=r"sources: the weight of a must be finite and not negative, got -1\.0"):
        StreamConfig("x", sources={"a": Source(-1.0)})


def test_mock_data_mixes_too() -> None:
    config = StreamConfig("mock", seq_len=64, global_batch=4, sources={"x": Source(1.0, path="y"), "z": Source(1.0)})
    step = Stream(MockDataset(("text",), 500, 64), config, dp_rank=0, dp_size=1).next()
    assert set(step.source_tokens) == {"x", "z"}


@settings(max_examples=40, deadline=None)
@given(
    weights=st.lists(st.floats(0.05, 20.0), min_size=1, max_size=5),
    switch=st.integers(1, 60),
    window=st.integers(1, 300),
    seed=st.integers(0, 9),
    stop=st.integers(0, 6),
    size=st.sampled_from([1, 2, 3, 4, 6, 8]),
)
def test_any_mix_resumes_anywhere_on_any_number_of_ranks(
    weights: list[float], switch: int, window: int, seed: int, stop: int, size: int
) -> None:
    """Sizes, weights, world sizes and stop points at random; the global batch is the uninterrupted run's."""
    names = [f"s{i}" for i in range(len(weights))]
    config = StreamConfig(
        "mock",
        seq_len=64,
        global_batch=24,
        micro_batch=1,
        window=window,
        seed=seed,
        sources={name: Source(weight) for name, weight in zip(names, weights, strict=True)},
        stages=(Stage(switch, {names[0]: 1.0}),),
    )
    dataset = MockDataset(("text", "image"), 100, 64)
    whole = Stream(dataset, config, dp_rank=0, dp_size=1)
    for _ in range(stop):
        whole.next()
    state = json.loads(json.dumps(whole.state_dict()))
    streams = [Stream(dataset, config, dp_rank=r, dp_size=size, state=state) for r in range(size)]
    assert all(stream.state_dict() == state for stream in streams)
    expected = rows(whole)
    assert torch.equal(torch.cat([rows(stream) for stream in streams]), expected)
    assert all(stream.state_dict() == whole.state_dict() for stream in streams)


def corrupt(folder: Path, samples: list[int]) -> None:
    """Flips a bit in the tokens of these heldout samples."""
    split = Dataset.open(folder).split("heldout")
    with open(folder / "heldout-00000.tar", "r+b") as file:
        for sample in samples:
            file.seek(int(split.token_offset[sample]))
            byte = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte[0] ^ 8]))


@pytest.fixture
def config(small: Path) -> StreamConfig:
    return StreamConfig(
        str(small),
        split="heldout",
        global_batch=4,
        micro_batch=1,
        window=64,
        quarantine=QuarantineConfig(5, 0.5, 5, max_window_share=1.0),
    )


def test_a_bad_sample_is_masked_and_written_down(
    small: Path, damaged: Callable[..., Path], config: StreamConfig
) -> None:
    good = Stream(Dataset.open(small), config, dp_rank=0, dp_size=1)
    bad = int(good.planner.step(good.planner.start).packs[2].samples[0])
    copy = damaged("heldout-00000.tar")
    corrupt(copy, [bad])
    stream = Stream(Dataset.open(copy), config, dp_rank=0, dp_size=1)
    a, b = good.next(), stream.next()
    split = Dataset.open(small).split("heldout")
    length = int(split.lengths[bad])
    assert (b.masked, a.masked) == (length, 0)
    assert (a.total_weight, a.doc_digest, a.tokens) == (b.total_weight, b.doc_digest, b.tokens)
    for i, (x, y) in enumerate(zip(a.micro_batches, b.micro_batches, strict=True)):
        for name in x:
            if i == 2 and name in ("tokens", "labels", "loss_weight", "modality_ids"):
                assert not y[name][0, :length].any() and torch.equal(x[name][0, length:], y[name][0, length:])
            else:
                assert torch.equal(x[name], y[name])
    (entry,) = stream.ledger
    assert entry["step"] == 0 and entry["reason"] == "corrupt" and entry["where"] == split.where(bad)
    # A replay from the ledger masks the sample also where it can be read.
    state = json.loads(json.dumps(stream.state_dict()))
    replay = Stream(Dataset.open(small), config, dp_rank=0, dp_size=1, state=state)
    again = Stream(Dataset.open(copy), config, dp_rank=0, dp_size=1, state=state)
    for _ in range(40):
        x, y = replay.next(), again.next()
        assert x.masked == y.masked
        assert all(torch.equal(p[n], q[n]) for p, q in zip(x.micro_batches, y.micro_batches, strict=True) for n in p)
    assert replay.state_dict() == again.state_dict() and replay.state_dict()["tokens"] == again.state_dict()["tokens"]
    assert x.epoch > 0, "it came again"


def test_thresholds() -> None:
    ledger = Ledger(QuarantineConfig(2, 0.1, 2), ["wiki", "books"])
    one = ledger.with_new([Entry(0, 7, 3, 2), Entry(1, 7, 3, 2)])
    assert one.streak == 1 and (0, 7) in one and (0, 8) not in one
    assert one.with_new([Entry(0, 7, 9, 2)]).streak == 0, "known ones are no news"
    with pytest.raises(
        DataError, match=r"step 4: 3 bad samples in source wiki, .* is 2 \(the newest: sample 8, corrup"
    ):
        one.with_new([Entry(0, 8, 4, 2), Entry(0, 9, 4, 0)])
    two = one.with_new([Entry(0, 8, 4, 0)])
    with pytest.raises(DataError, match=r"step 5: new bad samples in 3 steps in a row, quarantine\.max_streak is 2"):
        two.with_new([Entry(1, 8, 5, 0)])
    one.check_share(3, 10, 100)
    with pytest.raises(DataError, match=r"step 3: 11 of 100 tokens are in quarantine, more than .* 0\.1"):
        one.check_share(3, 11, 100)
    with pytest.raises(DataError, match="max_per_source >= 0"):
        QuarantineConfig(-1)
    with pytest.raises(DataError, match=r"window >= 1, .* got 0, None and 0\.02"):
        QuarantineConfig(window=0)


def test_thresholds_over_a_window_of_steps() -> None:
    """Energon's rule of N consecutive failures misses a source that is half broken: a window sees it."""
    config = QuarantineConfig(99, 1.0, 99, window=4, max_per_window=2, max_window_share=0.1)
    ledger = Ledger(config, ["wiki", "books"])
    for step in (0, 3, 6, 9):  # never more than two within four steps
        ledger = ledger.with_new([Entry(0, step, step, 2), Entry(1, step, step, 1)]).with_new([])
    with pytest.raises(
        DataError, match=r"step 10: 3 new bad samples in source wiki within 4 steps, .*max_per_window is 2 \(the newest"
    ):
        ledger.with_new([Entry(0, 50, 10, 2), Entry(0, 51, 10, 2)])
    # 100 positions a step, 400 a window, of which 40 may be masked.
    for step, masked in ((10, 20), (11, 0), (12, 20), (14, 20), (16, 20)):
        ledger = ledger.with_masked(step, masked, 100)
    assert ledger.masked == [(14, 20), (16, 20)], "what lies behind the window is forgotten"
    with pytest.raises(DataError, match=r"step 17: 41 of 400 positions of 4 steps .*max_window_share 0\.1"):
        ledger.with_masked(17, 1, 100)
    again = Ledger(config, ["wiki", "books"], masked=json.loads(json.dumps(ledger.masked)))
    assert again.masked == ledger.masked


@pytest.mark.parametrize("limits", [{"max_per_window": 2}, {"max_window_share": 0.01}])
def test_windows_end_every_rank_at_the_same_step(
    damaged: Callable[..., Path], config: StreamConfig, limits: dict[str, Any]
) -> None:
    copy = damaged("heldout-00000.tar")
    corrupt(copy, list(range(0, 40, 7)))
    config = replace(config, quarantine=replace(QuarantineConfig(40, 1.0, 40, window=30), **limits))
    told = run_ranks(4, _rank, str(copy), config)
    assert len({json.dumps([lines[-1], state]) for lines, state in told}) == 1, "one message, one state"
    assert next(iter(limits)) in told[0][0][-1] and 1 < len(told[0][0]) < 30
    # A run that was interrupted just before stops where the other did.
    before = len(told[0][0]) - 2
    stream = Stream(Dataset.open(copy), config, dp_rank=0, dp_size=1)
    for _ in range(before):
        stream.next()
    state = json.loads(json.dumps(stream.state_dict()))
    resumed = Stream(Dataset.open(copy), config, dp_rank=0, dp_size=1, state=state)
    resumed.next()
    with pytest.raises(DataError) as refusal:
        resumed.next()
    assert str(refusal.value) == told[0][0][-1]


def _rank(folder: str, config: StreamConfig) -> Any:
    rank = dist.get_rank()
    stream = Stream(Dataset.open(folder), config, dp_rank=rank, dp_size=4, group=dist.group.WORLD)
    lines: list[Any] = []
    try:
        for _ in range(30):
            step = stream.next()
            batch = step.micro_batches[0]
            lines.append([step.doc_digest, step.masked, step.total_weight, float(batch["loss_weight"].sum())])
    except DataError as error:
        lines.append(str(error))
    return [lines, stream.state_dict()]


@pytest.mark.parametrize("limit", [40, 3])
def test_four_processes_agree_about_bad_samples(damaged: Callable[..., Path], config: StreamConfig, limit: int) -> None:
    """webdataset #188, #225, #250 and lhotse #1098: ranks whose shards run out hang the others.

    Here four ranks take 30 steps, many epochs, over an uneven number of samples, and also agree on the bad ones."""
    copy = damaged("heldout-00000.tar")
    corrupt(copy, list(range(0, 40, 7)))
    config = replace(config, quarantine=QuarantineConfig(limit, 1.0, 40, max_window_share=1.0))
    told = run_ranks(4, _rank, str(copy), config)
    lines = [rank[0] for rank in told]
    assert len({len(rank) for rank in lines}) == 1, "every rank stops at the same step"
    assert all(rank[1] == told[0][1] for rank in told), "and in the same state"
    if limit == 3:
        assert len({rank[-1] for rank in lines}) == 1 and "4 bad samples in source data" in lines[0][-1]
        lines = [rank[:-1] for rank in lines]
    else:
        assert len(told[0][1]["ledger"]) == 6 and len(lines[0]) == 30
    for step in zip(*lines, strict=True):
        assert len({json.dumps(rank[:3]) for rank in step}) == 1


def _pair(folder: str, config: StreamConfig) -> Any:
    rank = dist.get_rank()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    pair = pairs[rank // 2]
    opened = Dataset.open(folder)
    stream = Stream(opened, config, dp_rank=rank // 2, dp_size=2, group=dist.group.WORLD, model_group=pair)
    alone = Stream(opened, config, dp_rank=rank // 2, dp_size=2, group=dist.group.WORLD)
    reads = [0]
    original = Split.tokens

    def count(self: Split, sample: int) -> Any:
        reads[0] += 1
        return original(self, sample)

    Split.tokens = count  # type: ignore[method-assign]
    equal, touched = True, 0
    for _ in range(6):
        before = reads[0]
        a = stream.next()
        touched += reads[0] - before
        b = alone.next()
        for x, y in zip(a.micro_batches, b.micro_batches, strict=True):
            equal &= x.keys() == y.keys() and all(torch.equal(x[n], y[n]) and x[n].dtype == y[n].dtype for n in x)
            equal &= same_everywhere(x, pair)
        equal &= stream.state_dict() == alone.state_dict()
    Split.tokens = original  # type: ignore[method-assign]
    return [equal, touched, len(stream.state_dict()["ledger"])]


def test_one_rank_of_a_model_parallel_group_reads_for_all(damaged: Callable[..., Path], config: StreamConfig) -> None:
    copy = damaged("heldout-00000.tar")
    corrupt(copy, list(range(0, 60, 9)))
    config = replace(config, quarantine=QuarantineConfig(40, 1.0, 40, max_window_share=1.0))
    told = run_ranks(4, _pair, str(copy), config)
    assert all(rank[0] for rank in told)
    assert told[0][1] > 0 and told[2][1] > 0 and told[1][1] == told[3][1] == 0, "only the first of each pair reads"
    assert len({rank[2] for rank in told}) == 1 and told[0][2] > 0


def test_several_ranks_without_a_group_stop_at_the_first_bad_sample(
    damaged: Callable[..., Path], config: StreamConfig
) -> None:
    copy = damaged("heldout-00000.tar")
    corrupt(copy, list(range(Dataset.open(copy).split("heldout").lengths.size)))
    stream = Stream(Dataset.open(copy), config, dp_rank=1, dp_size=2)
    with pytest.raises(DataError, match="corrupt tokens of"):
        stream.next()
    assert stream.state_dict()["ledger"] == []
