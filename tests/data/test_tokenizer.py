from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from polylepis.data.dataset import Dataset
from polylepis.data.errors import DataError
from polylepis.data.tokenizer import TextTokenizer

SENTENCES = ["the quick brown fox jumps over the lazy dog", "a handwritten seven", "Grüße aus Köln"] * 20


@pytest.fixture(scope="module")
def small() -> TextTokenizer:
    return TextTokenizer.train(SENTENCES, 320)


@settings(max_examples=300, deadline=None)
@given(text=st.text())
@example(text="")
@example(text=" leading, trailing  and   many ")
@example(text="line\nline\n\n\ttab\r\n")
@example(text="\u2581 is sentencepiece's own space \u2581\u2581")
@example(text="<s></s><unk><0x0A><pad>")
@example(text="null \0 byte, 漢字, 🐍🏽, e\u0301, \ufeff")
def test_round_trip_is_exact(small: TextTokenizer, text: str) -> None:
    ids = small.encode(text)
    assert all(0 < i < small.vocab_size for i in ids)
    assert small.decode(ids) == text


def test_the_corpus_tokenizer_round_trips_and_compresses(dataset: Dataset) -> None:
    tokenizer = dataset.tokenizer
    text = "The statement executes the suite once, if the condition is true.\nOtherwise the else clause runs."
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(text) / len(ids) > 2.0
    assert tokenizer.vocab_size == 640


def test_training_is_deterministic_and_the_fingerprint_says_what_matters(tmp_path: Path, small: TextTokenizer) -> None:
    again = TextTokenizer.train(SENTENCES, 320)
    assert again.fingerprint == small.fingerprint
    assert TextTokenizer.train(SENTENCES, 321).fingerprint != small.fingerprint
    small.save(tmp_path / "a.model")
    again.save(tmp_path / "b.model")
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()
    loaded = TextTokenizer.load(tmp_path / "a.model")
    assert loaded.fingerprint == small.fingerprint and loaded.encode("fox") == small.encode("fox")


def test_bytes_that_are_no_text_do_not_break_decoding(small: TextTokenizer) -> None:
    (first, *_rest) = small.encode("\u2581")
    assert small.decode([first]) == "\ufffd"
    assert small.decode([0]) == "\ufffd"


def test_refusals(small: TextTokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"text id 320 is outside 0\.\.319"):
        small.decode([320])
    with pytest.raises(DataError, match="lone surrogate at character 1"):
        small.encode("a\ud800")
    with pytest.raises(DataError, match="at least 300"):
        TextTokenizer.train(SENTENCES, 256)
    with pytest.raises(DataError, match="cannot train a tokenizer of 500 pieces"):
        TextTokenizer.train([], 500)
    # A small corpus has fewer pieces than were asked for; the tokenizer says how many.
    assert 320 < TextTokenizer.train(SENTENCES, 5000).vocab_size < 5000
    (tmp_path / "bad.model").write_bytes(b"no model at all")
    with pytest.raises(DataError, match=r"bad\.model"):
        TextTokenizer.load(tmp_path / "bad.model")
    with pytest.raises(DataError, match="cannot read the tokenizer"):
        TextTokenizer.load(tmp_path / "absent.model")
