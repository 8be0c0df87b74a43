"""Workers cannot change the stream, whether they are many, slow or dead."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from polylepis.data.dataset import Dataset, Split
from polylepis.data.errors import DataError
from polylepis.data.reader import Ahead
from polylepis.data.stream import Step, Stream, StreamConfig

STEPS = 6


@pytest.fixture(scope="module")
def config(dataset: Dataset) -> StreamConfig:
    return StreamConfig(str(dataset.path), split="heldout", global_batch=24, micro_batch=1, window=200)


@pytest.fixture(scope="module")
def expected(dataset: Dataset, config: StreamConfig) -> list[dict[str, torch.Tensor]]:
    stream = Stream(dataset, config, dp_rank=0, dp_size=1)
    return [rows([stream.next()]) for _ in range(STEPS)]


@pytest.fixture
def opened() -> Iterator[list[Stream]]:
    streams: list[Stream] = []
    yield streams
    for stream in streams:
        stream.close()


def rows(steps: list[Step]) -> dict[str, torch.Tensor]:
    batches = [batch for step in steps for batch in step.micro_batches]
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def processes(stream: Stream) -> list[Any]:
    return stream._ahead._loader._workers  # type: ignore[union-attr]


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 8])
def test_one_order_on_any_number_of_ranks_and_workers(
    dataset: Dataset, config: StreamConfig, expected: list[Any], opened: list[Stream], size: int, workers: int
) -> None:
    """torchtitan refuses a changed data-parallel size, Megatron-Bridge (#5637) skipped and repeated
    samples after one; the order of Energon, webdataset and StatefulDataLoader depends on the number of workers."""
    config = replace(config, workers=workers, prefetch=1)
    opened += [Stream(dataset, config, dp_rank=rank, dp_size=size) for rank in range(size)]
    for k in range(2):
        assert equal(rows([stream.next() for stream in opened]), expected[k])
    states = [stream.state_dict() for stream in opened]
    assert all(state == states[0] for state in states)
    alone = Stream(dataset, replace(config, workers=0), dp_rank=0, dp_size=1)
    for _ in range(2):
        alone.next()
    assert states[0] == alone.state_dict(), "one order digest"


@pytest.mark.parametrize(("size", "workers"), [(1, 3), (3, 1)])
def test_global_batches_are_the_same_with_any_number_of_workers(
    dataset: Dataset, config: StreamConfig, expected: list[Any], opened: list[Stream], size: int, workers: int
) -> None:
    """lhotse #417: a state that advances when data is read ahead, not when it is consumed, loses batches."""
    config = replace(config, workers=workers)
    opened += [Stream(dataset, config, dp_rank=rank, dp_size=size) for rank in range(size)]
    for k in range(3):
        assert equal(rows([stream.next() for stream in opened]), expected[k])
    # What was read ahead is not consumed: the state stands at step 3, and goes on with another number of workers.
    state = opened[0].state_dict()
    assert state["step"] == 3
    for workers in (0, 2):
        resumed = Stream(dataset, replace(config, workers=workers), dp_rank=0, dp_size=1, state=state)
        opened.append(resumed)
        assert equal(rows([resumed.next()]), expected[3])
    again = Stream(dataset, config, dp_rank=0, dp_size=1, state=state)
    opened.append(again)
    assert equal(rows([again.next()]), expected[3])
    again.load_state_dict(state)
    assert equal(rows([again.next()]), expected[3]), "loading a state drops what was read ahead of the old one"


def test_a_killed_worker_is_replaced_from_the_last_consumed_pack(
    dataset: Dataset,
    config: StreamConfig,
    expected: list[Any],
    opened: list[Stream],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Killed by signal 9; mosaicml-streaming #781 and #573 leave named shared memory behind and then hang."""
    stream = Stream(dataset, replace(config, workers=1, prefetch=1), dp_rank=0, dp_size=1)
    opened.append(stream)
    assert equal(rows([stream.next()]), expected[0])
    with caplog.at_level(logging.WARNING, "polylepis.data"):
        for k in range(1, STEPS):
            if k == 1:
                os.kill(processes(stream)[0].pid, signal.SIGKILL)
            assert equal(rows([stream.next()]), expected[k])
    assert "a data worker died; reading again from draw" in caplog.text


def test_workers_that_die_again_and_again_end_the_run(dataset: Dataset, config: StreamConfig) -> None:
    stream = Stream(dataset, replace(config, workers=1), dp_rank=0, dp_size=1)

    class Dead:
        def __iter__(self) -> Dead:
            return self

        def __next__(self) -> None:
            raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

        def _shutdown_workers(self) -> None:
            pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ahead, "_start", lambda self, position: setattr(self, "_at", position) or Dead())
        with pytest.raises(DataError, match=r"data workers died 4 times at draw 0 \(DataLoader worker .* Killed"):
            stream.next()


def test_a_stall_names_shard_and_offset(
    dataset: Dataset, config: StreamConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = Split.tokens
    slow: list[int] = []

    def read(self: Split, sample: int) -> Any:
        if not slow:
            slow.append(sample)
            time.sleep(0.4)
        return tokens(self, sample)

    monkeypatch.setattr(Split, "tokens", read)
    stream = Stream(dataset, replace(config, stall_seconds=0.1), dp_rank=0, dp_size=1)
    with caplog.at_level(logging.ERROR, "polylepis.data"):
        stream.next()
    where = dataset.split("heldout").where(slow[0])
    assert f"s so far on {where}" in caplog.text and "heldout-00000.tar: '" in where and "at offset" in where
