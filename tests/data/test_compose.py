"""Spans of token sequences, against a reader that goes token by token."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from polylepis.data.compose import Composer
from polylepis.data.errors import DataError
from polylepis.data.tokenizer import TextTokenizer
from polylepis.data.vocabulary import Vocabulary

VOCABULARY = Vocabulary(("text", "image", "speech"), (256, 5, 3), vocab_multiple=128)


def token_by_token(tokens: list[int]) -> list[tuple[str, list[int]]]:
    """The spans of `tokens`, as one would read them aloud."""
    spans: list[tuple[str, list[int]]] = []
    before = None
    for token in tokens:
        if token == Vocabulary.EOS:
            break
        owner = next((name for name in VOCABULARY.modalities if token in VOCABULARY.range_of(name)), None)
        if owner is not None:
            if owner != before:
                spans.append((owner, []))
            spans[-1][1].append(token - VOCABULARY.range_of(owner).start)
        before = owner
    return spans


@pytest.fixture(scope="module")
def composer() -> Composer:
    return Composer(VOCABULARY, TextTokenizer.train(["a few words to train a tokenizer on"] * 9, 300), {})


# Few values, near every border: specials, ends of each range, the padded tail of the table.
TOKENS = st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7, 31, 32, 33, 287, 288, 292, 293, 295, 296, VOCABULARY.size - 1])


@given(st.lists(TOKENS, max_size=24))
@example([])
@example([Vocabulary.EOS])
@example([32, Vocabulary.EOS, 288])
def test_spans_are_those_read_token_by_token(composer: Composer, tokens: list[int]) -> None:
    spans = [(name, codes.tolist()) for name, codes in composer.spans(tokens)]
    assert spans == token_by_token(tokens)


@pytest.mark.parametrize("token", [-1, VOCABULARY.size, 2**40])
def test_a_token_outside_the_table_is_named(composer: Composer, token: int) -> None:
    with pytest.raises(DataError, match=f"token {token} is outside 0..{VOCABULARY.size - 1}"):
        composer.spans(np.array([1, 40, token, 41]))
    assert composer.spans([40, Vocabulary.EOS, token])[0][0] == "text"
