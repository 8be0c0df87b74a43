from __future__ import annotations

import numpy as np
import pytest

from polylepis.data.errors import DataError
from polylepis.data.mock import MockDataset
from polylepis.data.stream import Stream, StreamConfig


def test_mock_documents_are_what_their_lengths_say() -> None:
    dataset = MockDataset(("text", "image", "voice"), 928, 128)
    split = dataset.split("train")
    table = dataset.vocabulary.modality_table()
    assert dataset.vocabulary.used == 928 and split.lengths.max() <= 128
    for sample in range(0, len(split), 500):
        tokens = split.tokens(sample)
        assert np.array_equal(np.bincount(table[tokens], minlength=3), split.modality_lengths[sample])
        assert tokens[0] == 1 and tokens[-1] == 2 and np.array_equal(tokens, split.tokens(sample))


def test_mock_data_streams() -> None:
    dataset = MockDataset(("text", "image"), 928, 64)
    stream = Stream(dataset, StreamConfig("mock", seq_len=64, global_batch=4, micro_batch=2), dp_rank=0, dp_size=1)
    step = stream.next()
    total = sum(float(batch["loss_weight"].sum()) for batch in step.micro_batches)
    assert step.total_weight == total and sum(step.tokens.values()) <= 4 * 64


def test_refusal() -> None:
    with pytest.raises(DataError, match="mock data: 2 modalities need a vocabulary of at least 34 ids"):
        MockDataset(("text", "image"), 33, 64)
