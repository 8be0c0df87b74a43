"""Files of users: lines, tables, tars, packed texts and sounds, whole and in parts."""

from __future__ import annotations

import io
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import fsspec
import numpy as np
import pyarrow
import pytest
import soundfile
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from polylepis.data.errors import DataError
from polylepis.data.media import read_series, read_sound
from polylepis.data.sources import Item, Keep, Part, parts, read_items
from polylepis.data.tasks import EncodeConfig

TEXTS = ["a\u2028b", "c\u0085d\x0b", "e\r\nf", "\x1c"]
WHOLE = Part(0, 0, 0)


def read(path: Path, part: Part = WHOLE, keep: Keep = lambda _: True) -> list[Item]:
    """The documents of a file; DataError for the first that cannot be read."""
    found = list(read_items(path, path.name, EncodeConfig().modality, part, None, keep, None))
    for item in found:
        if isinstance(item, DataError):
            raise item
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["x.jsonl", "X.JSONL"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_only_a_newline_ends_a_json_line(tmp_path: Path, name: str, end: str) -> None:
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in TEXTS]
    (tmp_path / name).write_bytes((end.join(lines) + end).encode())
    assert [item.content for item in read(tmp_path / name)] == TEXTS
    (tmp_path / name).write_text('{"text": 1}\n')
    with pytest.raises(DataError, match="line 1: no JSON object with a string text"):
        read(tmp_path / name)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(max_size=30), min_size=1, max_size=20), st.integers(1, 400), st.booleans())
def test_parts_of_lines_are_all_lines_once(texts: list[str], step: int, ended: bool) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "x.jsonl"
        path.write_text("\n".join(json.dumps({"text": text}) for text in texts) + "\n" * ended)
        found = list(parts(path, step))
        assert sum(part.bytes for part in found) == path.stat().st_size
        assert all(part.bytes <= step + 250 for part in found)  # a part ends with the line at its wanted end
        assert [item.content for part in found for item in read(path, part)] == texts


def test_parts_of_texts_and_bytes(tmp_path: Path) -> None:
    lines = [f"line {i} of a long book\n" for i in range(500)]
    (tmp_path / "book.txt").write_text("".join(lines))
    found = list(parts(tmp_path / "book.txt", 1000))
    assert len(found) > 5
    pieces = [str(item.content) for part in found for item in read(tmp_path / "book.txt", part)]
    assert "".join(pieces) == "".join(lines) and all(piece.endswith("book\n") for piece in pieces)
    raw = list(parts(tmp_path / "book.txt", 1000, raw=True))
    assert [part.bytes for part in raw[:-1]] == [1000] * (len(raw) - 1)
    (tmp_path / "none.txt").touch()
    assert list(parts(tmp_path / "none.txt", 1000)) == []


def test_a_bad_line_of_a_part_is_named_by_its_number_in_the_file(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"number {i}"}) for i in range(100)]
    lines[70] = '{"text": '
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    found = list(parts(tmp_path / "x.jsonl", 500))
    items = [
        item
        for part in found
        for item in read_items(
            tmp_path / "x.jsonl", "x.jsonl", EncodeConfig().modality, part, None, lambda _: True, None
        )
    ]
    (error,) = [item for item in items if isinstance(item, DataError)]
    assert "x.jsonl, line 71: no JSON object" in str(error)
    assert len(items) == 100, "the lines after it are read"


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.bz2", "x.jsonl.xz", "x.jsonl.zst", "x.txt.gz"])
def test_packed_texts(tmp_path: Path, name: str) -> None:
    text = "\n".join(json.dumps({"text": text}) for text in TEXTS)
    with fsspec.open(str(tmp_path / name), "wb", compression="infer") as file:
        file.write(text.encode())
    assert list(parts(tmp_path / name, 1)) == [Part(0, 0, (tmp_path / name).stat().st_size)], "never cut"
    assert [item.content for item in read(tmp_path / name)] == (TEXTS if "jsonl" in name else [text])
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-20] if "zst" not in name else b"no zstd at all")
    with pytest.raises(DataError, match=rf"cannot read .*{name}"):
        read(tmp_path / name)


def test_parquet_by_row_groups(tmp_path: Path) -> None:
    texts: list[str | None] = [f"row {i} " * 20 for i in range(100)]
    texts[7] = None
    table = pyarrow.table({"text": texts, "url": ["u"] * 100})
    parquet.write_table(table, tmp_path / "x.parquet", row_group_size=10)
    found = list(parts(tmp_path / "x.parquet", 1000))
    assert len(found) > 2 and found[-1].end == 10
    assert [i.content for part in found for i in read(tmp_path / "x.parquet", part)] == [t for t in texts if t]
    parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "y.parquet")
    with pytest.raises(
        DataError, match=r"y\.parquet has no column text of strings; its columns are {'body': 'string'}"
    ):
        read(tmp_path / "y.parquet")
    (tmp_path / "z.parquet").write_bytes(b"no table")
    with pytest.raises(DataError, match=r"z\.parquet is no Parquet file"):
        read(tmp_path / "z.parquet")


def test_samples_of_tars(tmp_path: Path) -> None:
    picture = io.BytesIO()
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(picture, format="PNG")
    with webdataset.TarWriter(str(tmp_path / "x.tar")) as tar:
        tar.write({"__key__": "a", "jpg": picture.getvalue(), "txt": b"a caption ", "json": b"{}"})
        tar.write({"__key__": "b", "txt": b"a text"})
        tar.write({"__key__": "c", "json": b"{}"})
        tar.write({"__key__": "d", "jpg": picture.getvalue(), "flac": b"x"})
        tar.write({"__key__": "e", "txt": b"\xff"})
        tar.write({"__key__": "f", "png": picture.getvalue()})
    found = list(read_items(tmp_path / "x.tar", "x.tar", EncodeConfig().modality, WHOLE, None, lambda _: True, None))
    good = [item for item in found if not isinstance(item, DataError)]
    assert good == [
        Item("x.tar/a.jpg", "image", picture.getvalue(), "a caption"),
        Item("x.tar/b", "text", "a text"),
        Item("x.tar/f.png", "image", picture.getvalue()),
    ]
    messages = [str(item) for item in found if isinstance(item, DataError)]
    assert ["key 'c' has json" in messages[0], "key 'd' has flac, jpg" in messages[1]] == [True, True]
    assert "x.tar/e.txt is not UTF-8 at byte 0" in messages[2]
    kept = read(tmp_path / "x.tar", keep=lambda name: name == b"x.tar/b")
    assert [item.name for item in kept] == ["x.tar/b"]


@pytest.mark.parametrize(
    ("rate", "channels", "subtype"), [(8000, 1, "PCM_16"), (44100, 2, "PCM_24"), (48000, 1, "FLOAT")]
)
def test_sounds_are_resampled(tmp_path: Path, rate: int, channels: int, subtype: str) -> None:
    seconds, pitch = 0.5, 440.0
    wave = 0.5 * np.sin(2 * np.pi * pitch * np.arange(int(rate * seconds)) / rate)
    path = tmp_path / ("x.wav" if subtype == "FLOAT" else "x.flac")
    soundfile.write(path, np.stack([wave] * channels, axis=1), rate, subtype=subtype)
    found = read_sound(path.read_bytes(), "x", 16000)
    assert found.dtype == np.int16 and abs(len(found) - 8000) <= 1
    expected = 0.5 * np.sin(2 * np.pi * pitch * np.arange(len(found)) / 16000) * 32768
    middle = slice(400, -400)  # the filter rings at the ends
    assert np.abs(found[middle] - expected[middle]).max() < 0.01 * 16384
    with pytest.raises(DataError, match="x is no sound that libsndfile reads"):
        read_sound(b"no sound", "x", 16000)


def test_a_column_may_begin_with_empty_fields(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("day,a,b,none\nmon,1,,\ntue,2,5,\nwed,3,6,\n")
    columns = read_series((tmp_path / "x.csv").read_bytes(), "x.csv")
    assert list(columns) == ["a", "b"]
    np.testing.assert_array_equal(columns["b"], [np.nan, 5.0, 6.0])
    (tmp_path / "x.csv").write_text("day,a\nmon,1\ntue\n")
    with pytest.raises(DataError, match="row 3: 1 fields, 2 expected"):
        read_series((tmp_path / "x.csv").read_bytes(), "x.csv")
