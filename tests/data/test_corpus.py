from __future__ import annotations

import builtins
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polylepis.data.corpus import (
    CAPTION_TEMPLATES,
    DIGIT_NAMES,
    KINDS,
    QuickstartConfig,
    build_quickstart,
    load_digits,
    prose_sections,
    split_text,
)
from polylepis.data.dataset import Dataset
from polylepis.data.errors import DataError


def files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def test_two_builds_are_byte_identical(small: Path, build_small: Callable[..., Dataset], tmp_path: Path) -> None:
    build_small(tmp_path / "again")
    assert files(tmp_path / "again") == files(small)
    assert [entry.name for entry in tmp_path.iterdir()] == ["again"], "nothing is left beside it"


def test_what_it_holds(dataset: Dataset) -> None:
    assert (dataset.vocabulary.used, dataset.vocabulary.size) == (928, 1024)
    assert dataset.vocabulary.modalities == ("text", "image", "voice")
    train, heldout = dataset.split("train"), dataset.split("heldout")
    assert len(train) > 10_000 and train.lengths.max() <= 240
    kinds = Counter(meta["kind"] for _, meta, _ in dataset.documents("heldout"))
    assert set(kinds) == set(KINDS) and len({kinds[k] for k in KINDS if k != "text"}) == 1
    # No digit and no section of prose is in both splits.
    source = [{"-".join(split.key(i).split("-")[:2]) for i in range(len(split))} for split in (train, heldout)]
    assert not source[0] & source[1]
    digits = [len([s for s in side if s.startswith("digit")]) for side in source]
    assert sum(digits) == 1797 and 0.09 < digits[1] / 1797 < 0.11
    # All ten classes are held out alike.
    _, labels = load_digits()
    held = Counter(int(labels[int(s.split("-")[1])]) for s in source[1] if s.startswith("digit"))
    assert len(held) == 10 and max(held.values()) - min(held.values()) <= 1


def test_documents_say_what_their_metadata_says(dataset: Dataset) -> None:
    images, labels = load_digits()
    for n, (key, meta, tokens) in enumerate(dataset.documents("heldout")):
        if n == 200:
            break
        decoded = dataset.composer.decode(tokens)
        assert [[m, _length(c, m, dataset)] for m, c in decoded] == meta["spans"]
        if meta["kind"] == "text":
            continue
        digit = int(labels[int(key.split("-")[1])])
        assert meta["digit"] == digit and DIGIT_NAMES[digit] in meta["caption"]
        assert meta["caption"] == next(content for m, content in decoded if m == "text")
        assert (decoded[0][0] == "text") == meta["kind"].startswith("caption")
        if "image" in meta["kind"]:
            picture = next(content for m, content in decoded if m == "image")
            assert isinstance(picture, np.ndarray)
            assert np.abs(picture.astype(float) - images[int(key.split("-")[1])]).mean() < 25


def _length(content: str | np.ndarray, modality: str, dataset: Dataset) -> int:
    """Tokens of a decoded span, begin and end included."""
    if isinstance(content, str):
        return len(dataset.tokenizer.encode(content))
    return (16 if modality == "image" else len(content)) + 2


def test_captions_vary_and_names_are_single_tokens(dataset: Dataset) -> None:
    assert len(CAPTION_TEMPLATES) >= 6 and CAPTION_TEMPLATES[0] == "the digit {}"
    lengths = {name: len(dataset.tokenizer.encode(CAPTION_TEMPLATES[0].format(name))) for name in DIGIT_NAMES}
    assert set(lengths.values()) == {3}, lengths
    used = Counter(
        "{}".join(meta["caption"].rsplit(DIGIT_NAMES[meta["digit"]], 1))  # "someone" holds a one, too
        for _, meta, _ in dataset.documents("train")
        if meta["kind"] == "image-caption"
    )
    assert set(used) == set(CAPTION_TEMPLATES) and min(used.values()) > 0.5 * max(used.values())


def test_prose_is_prose_and_never_repeats() -> None:
    sections = prose_sections()
    lines = [line for _, text in sections for line in text.split("\n")]
    assert len(lines) == len(set(lines)) and sum(map(len, lines)) > 150_000
    assert not any("::=" in line or ">>>" in line for line in lines)


def test_long_text_is_cut_between_words_and_nothing_is_lost(dataset: Dataset) -> None:
    tokenizer = dataset.tokenizer
    text = "\n".join(text for _, text in prose_sections()[:5])
    pieces = split_text(tokenizer, text, 100)
    assert len(pieces) > 5 and max(map(len, pieces)) <= 100
    assert "".join(tokenizer.decode(piece) for piece in pieces) == text
    assert all(tokenizer.decode(piece)[0] in " \n" for piece in pieces[1:])
    # A "word" longer than the limit has no such place: it is cut anyway, and comes back whole.
    long = split_text(tokenizer, "x" * 1000, 20)
    assert max(map(len, long)) <= 20 and "".join(map(tokenizer.decode, long)) == "x" * 1000


def test_an_identical_data_set_is_left_alone(small: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in small.iterdir()}
    lines: list[str] = []
    build_quickstart(small, progress=lines.append)
    assert lines == [f"{small} is up to date"]
    assert {file: file.stat().st_mtime_ns for file in small.iterdir()} == before


def test_nothing_is_overwritten(small: Path, damaged: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds another data set \(seed 0 there, 1 asked\); choose another --out"):
        build_quickstart(small, seed=1)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    for force in (False, True):
        with pytest.raises(DataError, match=r"is not empty and holds no manifest\.json; it is left alone"):
            build_quickstart(mine, force=force)
    with pytest.raises(DataError, match="is a file; give a folder"):
        build_quickstart(mine / "thesis.txt", force=True)
    copy = damaged()
    (copy / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"also holds 'notes\.txt', which no build wrote; move it away first"):
        build_quickstart(copy, seed=1, force=True)
    assert (mine / "thesis.txt").read_text() == "years of work" and (copy / "notes.txt").exists()


def test_a_damaged_data_set_is_named_and_force_replaces_it(
    damaged: Callable[..., Path], small: Path, build_small: Callable[..., Dataset]
) -> None:
    copy = damaged()
    (copy / "heldout-00000.tar").unlink()
    with pytest.raises(DataError, match=r"is this data set, but damaged \(shard .* is missing\); --force builds it"):
        build_quickstart(copy)
    build_small(copy, force=True)
    assert files(copy) == files(small)
    assert [entry.name for entry in copy.parent.iterdir()] == [copy.name]


def test_a_build_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, build_small: Callable[..., Dataset]
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("polylepis.data.corpus.write_manifest", fail)
    with pytest.raises(OSError, match="disk full"):
        build_small(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("pydoc_data", "lacks pydoc_data.topics, the quickstart's text"),
        ("sklearn", r"digits come with scikit-learn: pip install polylepis\[quickstart\]"),
    ],
)
def test_missing_sources_are_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, message: str
) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == module:
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=message):
        build_quickstart(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_settings_are_checked() -> None:
    with pytest.raises(DataError, match=r"image_repeats must lie in 1\.\.8"):
        QuickstartConfig(image_repeats=9)
    with pytest.raises(DataError, match="heldout must lie between"):
        QuickstartConfig(heldout=0.0)
    with pytest.raises(DataError, match="max_document must be at least 16"):
        QuickstartConfig(max_document=3)


def test_importing_the_room_is_light() -> None:
    """The command line's --help must not wait for torch, scikit-learn or webdataset."""
    import subprocess

    code = (
        "import sys; import polylepis.data.commands; "
        "print([m for m in ('torch', 'sklearn', 'webdataset', 'numpy') if m in sys.modules])"
    )
    import os

    import polylepis

    (root,) = {str(Path(folder).parent) for folder in polylepis.__path__}
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert run.stdout.strip() == "[]", run.stderr
