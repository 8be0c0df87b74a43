"""Files of users: JSON lines with other line separators inside, empty fields of tables."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from polylepis.data.errors import DataError
from polylepis.data.sources import read_series, read_texts

TEXTS = ["a\u2028b", "c\u0085d\x0b", "e\r\nf", "\x1c"]


@pytest.mark.parametrize("name", ["x.jsonl", "X.JSONL"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_only_a_newline_ends_a_json_line(tmp_path: Path, name: str, end: str) -> None:
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in TEXTS]
    (tmp_path / name).write_bytes((end.join(lines) + end).encode())
    assert [text for text in read_texts(tmp_path / name) if text] == TEXTS
    (tmp_path / name).write_text('{"text": 1}\n')
    with pytest.raises(DataError, match="line 1: text is int"):
        list(read_texts(tmp_path / name))


def test_a_column_may_begin_with_empty_fields(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("day,a,b,none\nmon,1,,\ntue,2,5,\nwed,3,6,\n")
    columns = read_series(tmp_path / "x.csv")
    assert list(columns) == ["a", "b"]
    np.testing.assert_array_equal(columns["b"], [np.nan, 5.0, 6.0])
    (tmp_path / "x.csv").write_text("day,a\nmon,1\ntue\n")
    with pytest.raises(DataError, match="row 3: 1 fields, 2 expected"):
        read_series(tmp_path / "x.csv")
