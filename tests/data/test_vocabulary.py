from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polylepis.data.errors import DataError
from polylepis.data.vocabulary import N_SPECIALS, Vocabulary


def test_table_of_the_quickstart() -> None:
    v = Vocabulary(("text", "image", "voice"), (640, 128, 128))
    assert (v.used, v.size) == (928, 1024)
    assert v.range_of("text") == range(32, 672)
    assert v.range_of("image") == range(672, 800)
    assert v.range_of("voice") == range(800, 928)
    assert (v.begin("image"), v.end("image"), v.begin("voice"), v.end("voice")) == (4, 5, 6, 7)
    table = v.modality_table()
    assert table.dtype == np.int64 and table.shape == (1024,)
    assert table[[0, 1, 2, 3, 8, 31]].tolist() == [0] * 6
    assert table[[4, 5, 6, 7]].tolist() == [1, 1, 2, 2]
    assert table[[671, 672, 799, 800, 927, 928, 1023]].tolist() == [0, 1, 1, 2, 2, 0, 0]


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=15), st.sampled_from([1, 64, 1024]))
def test_ranges_are_contiguous_and_the_description_is_complete(sizes: list[int], multiple: int) -> None:
    names = ("text", *(f"m{i}" for i in range(len(sizes) - 1)))
    v = Vocabulary(names, tuple(sizes), multiple)
    edge = N_SPECIALS
    for name, size in zip(names, sizes, strict=True):
        assert v.range_of(name).start == edge
        edge += size
    assert v.used == edge <= v.size < edge + multiple and v.size % multiple == 0
    again = Vocabulary.from_json(json.loads(json.dumps(v.to_json())))
    assert again == v and again.fingerprint == v.fingerprint
    assert Vocabulary(names, (*sizes[:-1], sizes[-1] + 1), multiple).fingerprint != v.fingerprint


@pytest.mark.parametrize(
    ("modalities", "sizes", "message"),
    [
        (("image", "text"), (1, 1), "modality 0 must be 'text'"),
        (("text", "a", "a"), (1, 1, 1), "must differ"),
        (("text",), (0,), "one size >= 1"),
        (("text", *(f"m{i}" for i in range(15))), (1,) * 16, "16 modalities"),
    ],
)
def test_refusals(modalities: tuple[str, ...], sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Vocabulary(modalities, sizes)


def test_codes_outside_their_range_are_refused() -> None:
    v = Vocabulary(("text", "image"), (10, 4))
    assert v.to_unified("image", [0, 3]).tolist() == [42, 45]
    with pytest.raises(DataError, match=r"image codes must lie in 0\.\.3, got 0\.\.4"):
        v.to_unified("image", [0, 4])
    with pytest.raises(DataError, match="unknown modality 'voice'"):
        v.range_of("voice")
    with pytest.raises(DataError, match="text spans have no begin"):
        v.begin("text")
