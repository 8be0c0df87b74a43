"""Long texts are cut between words, lose nothing, and fill their rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from polylepis.data.corpus import prose_sections
from polylepis.data.cut import cut_text
from polylepis.data.packing import best_fit_decreasing
from polylepis.data.tokenizer import TextTokenizer


def by_bytes(text: str) -> list[int]:
    return list(text.encode())


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=400), st.integers(1, 30))
@example("a" * 100 + " " + "漢" * 100, 7)
def test_nothing_is_lost(text: str, limit: int) -> None:
    pieces = list(cut_text(text, limit, by_bytes))
    assert "".join(piece for piece, _ in pieces) == text
    assert all(ids == by_bytes(piece) for piece, ids in pieces)
    assert all(len(ids) <= limit or len(piece) == 1 for piece, ids in pieces)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=300), st.integers(40, 100))
def test_words_stay_whole_where_they_fit(lengths: list[int], limit: int) -> None:
    text = " ".join("w" * n for n in lengths)
    pieces = [piece for piece, _ in cut_text(text, limit, by_bytes)]
    assert [word for piece in pieces for word in piece.split()] == text.split()
    # Another word would not have fitted, or the piece is as good as full.
    for piece, after in zip(pieces, pieces[1:], strict=False):
        assert len(piece) + len(after.split()[0]) + 1 > limit or len(piece) >= 0.985 * limit


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    text = [line for _, section in prose_sections()[:40] for line in section.split("\n")]
    return TextTokenizer.train(text, 600)


@pytest.mark.parametrize("limit", [254, 2046])
def test_pieces_fill_the_limit_with_few_encodings(tokenizer: TextTokenizer, limit: int) -> None:
    text = "".join(section for _, section in prose_sections())
    asked = 0

    def encode(piece: str) -> list[int]:
        nonlocal asked
        asked += len(piece)
        return tokenizer.encode(piece)

    pieces = list(cut_text(text, limit, encode))
    assert "".join(piece for piece, _ in pieces) == text
    fill = np.array([len(ids) for _, ids in pieces[:-1]]) / limit
    assert fill.mean() > 0.98 and fill.max() <= 1 and asked < 3 * len(text)


def test_long_texts_waste_no_rows(tokenizer: TextTokenizer) -> None:
    texts = [section * 8 for _, section in prose_sections()[:60]]
    lengths = [len(ids) + 2 for text in texts for _, ids in cut_text(text, 510, tokenizer.encode)]
    packs = best_fit_decreasing(np.array(lengths), 512)
    assert sum(lengths) / (len(packs) * 512) > 0.97
