"""What is opened and refused before the first step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from polylepis.data.adopt import save_meaning
from polylepis.data.codecs import GivenLatents
from polylepis.data.compose import Composer
from polylepis.data.latents import LatentFormat
from polylepis.data.manifest import fingerprints, write_manifest
from polylepis.data.mock import MockSplit
from polylepis.data.shards import Sample, ShardWriter
from polylepis.data.stream import Stream
from polylepis.data.tokenizer import TextTokenizer
from polylepis.data.vocabulary import Vocabulary
from polylepis.pretrain.config import load_config
from polylepis.pretrain.errors import ConfigError
from polylepis.pretrain.prepare import open_data, open_stream
from ranks import run_ranks

MOCK = ["data.path=mock", "data.seq_len=64", "data.global_batch=8", "data.micro_batch=2"]


def _streams() -> Any:
    """Ranks 0, 1 and 3 are one data-parallel coordinate, rank 2 is another."""
    rank = dist.get_rank()
    config = load_config("quickstart", MOCK)
    dataset = open_data(config)
    coordinate = int(rank == 2)
    stream = open_stream(config, dataset, coordinate, 2)
    alone = Stream(dataset, config.data, dp_rank=coordinate, dp_size=2)
    reads = [0]
    original = MockSplit.tokens

    def count(self: MockSplit, sample: int) -> np.ndarray:
        reads[0] += 1
        return original(self, sample)

    MockSplit.tokens = count  # type: ignore[method-assign]
    batches = [batch for _ in range(2) for batch in stream.next().micro_batches]
    MockSplit.tokens = original  # type: ignore[method-assign]
    expected = [batch for _ in range(2) for batch in alone.next().micro_batches]
    equal = all(torch.equal(a[name], b[name]) for a, b in zip(batches, expected, strict=True) for name in b)
    return reads[0] > 0, equal, stream.state_dict() == alone.state_dict()


def test_one_rank_of_each_data_parallel_coordinate_reads() -> None:
    told = run_ranks(4, _streams)
    assert [rank[0] for rank in told] == [True, False, True, False]
    assert all(rank[1] and rank[2] for rank in told)


def test_latents_without_a_head_for_them_are_refused(tmp_path: Path) -> None:
    tokenizer = TextTokenizer.train(["some words here and there"] * 20, 300)
    codec = GivenLatents(width=3)
    composer = Composer(Vocabulary(("text", "image"), (tokenizer.vocab_size, 1)), tokenizer, {"image": codec})
    save_meaning(tmp_path, composer)
    marks = fingerprints(composer.vocabulary, tokenizer, composer.codecs)
    form = LatentFormat.of(composer.codecs)
    with ShardWriter(tmp_path, "train", composer.vocabulary, marks, latents=form) as writer:
        vectors = np.zeros((2, 3))
        writer.write(Sample("a", "x", composer.document([("image", vectors)]), [("image", 4)], latents=vectors))
    write_manifest(tmp_path, name="x", generator={}, provenance={}, composer=composer, splits={"train": writer.indices})
    config = load_config("quickstart", [])
    config = replace(config, data=replace(config.data, path=str(tmp_path)))
    with pytest.raises(
        ConfigError, match=r"holds continuous latents \(image, 3 x bfloat16\), .* have no head for them"
    ):
        open_data(config)
