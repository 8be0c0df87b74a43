"""The stream's laws: one order whatever the ranks, exact resume anywhere, sums known from the plan."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from polylepis.data.dataset import Dataset
from polylepis.data.errors import DataError
from polylepis.data.stream import Step, Stream, StreamConfig, collate

FIELDS = ("tokens", "labels", "loss_weight", "modality_ids", "doc_ids", "position_ids")


@pytest.fixture(scope="module")
def config(dataset: Dataset) -> StreamConfig:
    """About 102 packs per epoch: nine steps cross the end of an epoch."""
    return StreamConfig(str(dataset.path), split="heldout", seq_len=256, global_batch=12, micro_batch=4, window=200)


def make(dataset: Dataset, config: StreamConfig, rank: int = 0, size: int = 1, state: Any = None) -> Stream:
    return Stream(dataset, config, dp_rank=rank, dp_size=size, state=state)


def rows(step: Step) -> dict[str, torch.Tensor]:
    return {name: torch.cat([batch[name] for batch in step.micro_batches]) for name in FIELDS}


def same(a: Step, b: Step) -> bool:
    facts = ("index", "total_weight", "target_tokens", "tokens", "doc_digest", "epoch")
    return all(getattr(a, f) == getattr(b, f) for f in facts) and all(
        torch.equal(rows(a)[name], rows(b)[name]) for name in FIELDS
    )


def test_batch_contract(dataset: Dataset, config: StreamConfig) -> None:
    step = make(dataset, replace(config, modality_weights={"image": 0.5, "voice": 0.25})).next()
    table = torch.from_numpy(dataset.vocabulary.modality_table())
    weights = torch.tensor([1.0, 0.5, 0.25])
    assert len(step.micro_batches) == 3
    most = max(batch["cu_seqlens"].shape[1] for batch in step.micro_batches)
    for batch in step.micro_batches:
        for name in FIELDS:
            assert batch[name].shape == (4, 256)
            assert batch[name].dtype == (torch.float32 if name == "loss_weight" else torch.int64)
        assert batch["cu_seqlens"].dtype == torch.int32 and batch["cu_seqlens"].shape == (4, most)
        pad = batch["doc_ids"] == -1
        for name in ("tokens", "labels", "loss_weight", "modality_ids", "position_ids"):
            assert not batch[name][pad].any()
        assert torch.equal(batch["modality_ids"], table[batch["tokens"]])
        for r in range(4):
            check_row({name: value[r] for name, value in batch.items()}, table, weights)


def check_row(row: dict[str, torch.Tensor], table: torch.Tensor, weights: torch.Tensor) -> None:
    ends = row["cu_seqlens"].tolist()
    documents = int(row["doc_ids"].max()) + 1
    assert ends[0] == 0 and ends[documents:] == [int((row["doc_ids"] >= 0).sum())] * (len(ends) - documents)
    for d in range(documents):
        a, b = ends[d], ends[d + 1]
        assert (row["doc_ids"][a:b] == d).all() and b > a
        tokens = row["tokens"][a:b]
        # Whole documents only: bos … eos, every opened span closed, and labels that never leave the document.
        assert tokens[0] == 1 and tokens[-1] == 2 and not ((tokens[1:-1] == 1) | (tokens[1:-1] == 2)).any()
        for k in (1, 2):
            begins, closes = (tokens == 2 + 2 * k).sum(), (tokens == 3 + 2 * k).sum()
            assert begins == closes
        assert torch.equal(row["labels"][a : b - 1], tokens[1:]) and row["labels"][b - 1] == 0
        assert torch.equal(row["loss_weight"][a : b - 1], weights[table[tokens[1:]]])
        assert row["loss_weight"][b - 1] == 0
        assert torch.equal(row["position_ids"][a:b], torch.arange(b - a))


@pytest.mark.parametrize("weights", [{}, {"image": 0.5, "voice": 0.25}, {"text": 0.1, "image": 0.0}])
def test_sums_over_the_global_batch_come_from_the_plan(
    dataset: Dataset, config: StreamConfig, weights: dict[str, float]
) -> None:
    config = replace(config, micro_batch=2, modality_weights=weights)
    streams = [make(dataset, config, rank, 3) for rank in range(3)]
    table = dataset.vocabulary.modality_table()
    for _ in range(3):
        steps = [stream.next() for stream in streams]
        batches = [batch for step in steps for batch in step.micro_batches]
        total = sum(float(batch["loss_weight"].double().sum()) for batch in batches)
        inside = [batch["tokens"][batch["doc_ids"] >= 0].numpy() for batch in batches]
        # A target is a token that is not the first of its document.
        later = [batch["tokens"][batch["position_ids"] > 0].numpy() for batch in batches]
        for step in steps:
            assert step.total_weight == pytest.approx(total, rel=1e-12)
            for counts, found in ((step.tokens, inside), (step.target_tokens, later)):
                assert list(counts.values()) == np.bincount(table[np.concatenate(found)], minlength=3).tolist()


@pytest.mark.parametrize(
    ("size", "micro"), [(1, 1), (1, 3), (1, 12), (2, 1), (2, 3), (2, 6), (3, 1), (3, 2), (3, 4), (4, 1), (4, 3)]
)
def test_global_batches_are_the_same_on_any_number_of_ranks(
    dataset: Dataset, config: StreamConfig, size: int, micro: int
) -> None:
    alone = make(dataset, config)
    streams = [make(dataset, replace(config, micro_batch=micro), rank, size) for rank in range(size)]
    for _ in range(10):
        expected = alone.next()
        steps = [stream.next() for stream in streams]
        for name in FIELDS:
            assert torch.equal(torch.cat([rows(step)[name] for step in steps]), rows(expected)[name])
        assert {step.doc_digest for step in steps} == {expected.doc_digest}
    assert all(stream.state_dict() == alone.state_dict() for stream in streams)


def test_resume_at_every_step_is_exact_also_twice_and_across_the_epoch(dataset: Dataset, config: StreamConfig) -> None:
    """HF datasets #8308: the second resume began at zero; #8408: a shuffle buffer loses samples;
    webdataset #177, #234 and #271: no exact resume at all."""
    stream = make(dataset, config)
    states, steps = [stream.state_dict()], []
    for _ in range(20):
        steps.append(stream.next())
        states.append(stream.state_dict())
    assert {step.epoch for step in steps} == {0, 1, 2}
    assert len(json.dumps(states[-1])) < 1000
    for k in range(20):
        resumed = make(dataset, config, state=json.loads(json.dumps(states[k])))
        assert resumed.state_dict() == states[k], "saving at once after loading gives the same state"
        assert same(resumed.next(), steps[k])
        # Once more from the resumed stream, now on two ranks.
        again = [make(dataset, replace(config, micro_batch=2), r, 2, state=resumed.state_dict()) for r in range(2)]
        if k < 19:
            halves = [rows(stream.next())["tokens"] for stream in again]
            assert torch.equal(torch.cat(halves), rows(steps[k + 1])["tokens"])
            assert again[0].state_dict() == states[k + 2]


def test_resume_exactly_at_the_end_of_an_epoch(dataset: Dataset, config: StreamConfig) -> None:
    """torchdata #1437: a resume at the end drops an epoch; verl #7401: the job ends at once."""
    packs = make(dataset, config).packs_per_epoch()
    whole = replace(config, global_batch=packs, micro_batch=1)
    stream = make(dataset, whole)
    first = stream.next()
    state = stream.state_dict()
    assert state["places"] == [[1, 0, 0, packs]]
    split = dataset.split("heldout")
    assert first.tokens == dict(
        zip(dataset.vocabulary.modalities, split.modality_lengths.sum(axis=0).tolist(), strict=True)
    )
    second = stream.next()
    assert second.epoch == 1 and second.doc_digest != first.doc_digest
    assert same(make(dataset, whole, state=state).next(), second)


def test_every_document_once_per_epoch_over_three_epochs(dataset: Dataset, config: StreamConfig) -> None:
    """mosaicml-streaming repeats samples to even out ranks; webdataset's `resampled` draws with replacement."""
    stream = make(dataset, replace(config, global_batch=1, micro_batch=1))
    split = dataset.split("heldout")
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
    known = {split.tokens(i).tobytes(): [] for i in range(len(split))}  # type: dict[bytes, list[int]]
    for i in range(len(split)):
        known[split.tokens(i).tobytes()].append(i)
    while True:
        step = stream.next()
        if step.epoch == 3:
            break
        (batch,) = step.micro_batches
        ends = batch["cu_seqlens"][0].tolist()
        for a, b in itertools.pairwise(ends):
            if b > a:
                seen[step.epoch].append(known[batch["tokens"][0, a:b].numpy().tobytes()][0])
    representatives = sorted(ids[0] for ids in known.values() for _ in ids)
    for epoch in range(3):
        assert sorted(seen[epoch]) == representatives
    assert seen[0] != seen[1] != seen[2]


def test_seed_names_the_order(dataset: Dataset, config: StreamConfig) -> None:
    digests = {make(dataset, replace(config, seed=seed)).next().doc_digest for seed in range(4)}
    assert len(digests) == 4


def test_a_state_of_another_plan_is_refused_field_by_field(dataset: Dataset, config: StreamConfig) -> None:
    """Megatron-Bridge #5637: another layout was accepted, and samples were skipped in silence."""
    state = make(dataset, config).state_dict()
    other = replace(config, seq_len=512, seed=3)
    with pytest.raises(DataError, match=r"seed: 0 then, 3 now; seq_len: 256 then, 512 now\)"):
        make(dataset, other, state=state)
    with pytest.raises(DataError, match=r"modality_weights\.image: 1\.0 then, 2\.0 now"):
        make(dataset, replace(config, modality_weights={"image": 2.0}), state=state)
    state["plan"]["sources"]["data"] = "0" * 12
    state["plan_hash"] = "?"
    with pytest.raises(DataError, match=r"\(sources\.data: 000000000000 then, \w{12} now\)"):
        make(dataset, config, state=state)
    # Where the data lies and how a rank cuts its share do not matter.
    good = make(dataset, config).state_dict()
    make(dataset, replace(config, path="/elsewhere", micro_batch=1, workers=3, prefetch=9), state=good)
    with pytest.raises(DataError, match="lacks order_digest, tokens"):
        make(dataset, config, state={k: v for k, v in good.items() if k not in ("tokens", "order_digest")})
    with pytest.raises(DataError, match="version 9"):
        make(dataset, config, state={**good, "version": 9})
    with pytest.raises(DataError, match="points outside its plan: source data, epoch 0, window 99, pack 0"):
        make(dataset, config, state={**good, "places": [[0, 99, 0, 0]]})
    with pytest.raises(DataError, match=r"outside its plan: 12 draws make \[12\] packs per source, it holds \[0\]"):
        make(dataset, config, state={**good, "draws": 12})
    with pytest.raises(DataError, match="contradicts itself: step 3, but 0 draws"):
        make(dataset, config, state={**good, "step": 3})
    with pytest.raises(DataError, match="malformed"):
        make(dataset, config, state={**good, "places": [[0, "x"]]})


def test_refusals_before_anything_is_read(dataset: Dataset, config: StreamConfig) -> None:
    with pytest.raises(DataError, match="global_batch 12 is no multiple of data-parallel ranks 5 x micro_batch 4 = 20"):
        make(dataset, config, 0, 5)
    with pytest.raises(DataError, match=r"dp_rank must lie in 0\.\.1, got 2"):
        make(dataset, config, 2, 2)
    with pytest.raises(
        DataError, match=r"\d+ of 768 documents are longer than seq_len 64 \(the longest has \d+ tokens"
    ):
        make(dataset, replace(config, seq_len=64))
    with pytest.raises(DataError, match="names smell; the data set has text, image, voice"):
        make(dataset, replace(config, modality_weights={"smell": 1.0}))
    with pytest.raises(DataError, match="all zero"):
        make(dataset, replace(config, modality_weights={"text": 0.0, "image": 0.0, "voice": 0.0}))
    with pytest.raises(DataError, match="no split 'test'"):
        make(dataset, replace(config, split="test"))
    for field, value in (("seq_len", 1), ("global_batch", 0), ("micro_batch", 0), ("window", 0), ("seed", -1)):
        with pytest.raises(DataError, match=f"{field} must be at least"):
            StreamConfig("x", **{field: value})
    with pytest.raises(DataError, match=r"modality_weights\.text must be finite and not negative, got nan"):
        StreamConfig("x", modality_weights={"text": float("nan")})


def test_collate_serves_prompts_too(dataset: Dataset) -> None:
    table, weights = dataset.vocabulary.modality_table(), np.ones(3, dtype=np.float32)
    document = dataset.composer.document([("text", "the digit two")])
    batch = collate([[document], [document, document]], 32, table, weights)
    assert batch["cu_seqlens"].tolist() == [[0, len(document), len(document)], [0, len(document), 2 * len(document)]]
    with pytest.raises(DataError, match=r"row 0: \d+ tokens in 1 documents do not fit 4"):
        collate([[document]], 4, table, weights)


def test_resume_at_every_pack_also_at_the_ends_of_windows_and_epochs(dataset: Dataset, config: StreamConfig) -> None:
    """accelerate #4233, litdata #316 and mosaicml-streaming #869 fail at or beyond an epoch's end."""
    config = replace(config, seq_len=512, global_batch=1, micro_batch=1, window=150)
    stream = make(dataset, config)
    packs = stream.packs_per_epoch()
    states, digests = [stream.state_dict()], []
    for _ in range(packs + 12):
        digests.append(stream.next().doc_digest)
        states.append(stream.state_dict())
    places = [state["places"][0] for state in states]
    assert sum(pack == 0 for _, _, pack, _ in places) == 8, "starts of 6 windows of epoch 0 and 2 of epoch 1"
    resumed = make(dataset, config)
    for k in range(len(digests)):
        resumed.load_state_dict(states[k])
        resumed.load_state_dict(json.loads(json.dumps(resumed.state_dict())))  # twice, at once
        assert resumed.next().doc_digest == digests[k] and resumed.state_dict() == states[k + 1]


@pytest.mark.parametrize(
    ("size", "micro", "accepted"),
    [
        (5, 4, "global_batch 20, 1 or 3 ranks"),
        (5, 1, "global_batch 10 or 15, 4 or 6 ranks"),
        (6, 4, "global_batch 24, micro_batch 2, 1 or 3 ranks"),
        (4, 7, "global_batch 28, micro_batch 3"),
        (24, 1, "global_batch 24, 6 or 12 ranks"),
    ],
)
def test_sizes_that_do_not_divide_are_refused_with_the_nearest_that_do(
    dataset: Dataset, config: StreamConfig, size: int, micro: int, accepted: str
) -> None:
    """webdataset #225 and torchtitan (finite data over several ranks): what does not divide must not hang later."""
    with pytest.raises(
        DataError, match=rf"x micro_batch {micro} = {size * micro}; accepted nearest to it: {accepted}$"
    ):
        make(dataset, replace(config, micro_batch=micro), 0, size)
    for ranks in (1, 2, 3, 4, 6, 8):
        batch = 24 * micro
        make(dataset, replace(config, global_batch=batch, micro_batch=micro), ranks - 1, ranks)
