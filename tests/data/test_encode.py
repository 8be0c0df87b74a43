"""A folder of files becomes the same data set, whoever does the work and however often they are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import wave
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from polylepis.data.commands import data
from polylepis.data.corpus import DIGIT_NAMES, load_digits, prose_sections
from polylepis.data.dataset import Dataset, Split
from polylepis.data.encode import EncodeConfig, encode_folder, plan_tasks
from polylepis.data.errors import DataError

CONFIG = EncodeConfig(
    max_tokens=256, heldout=0.1, shard_bytes=20_000, text_vocab=640, image_side=8, patch=2, image_codes=64, rate=8000
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    (folder / "deep" / "er").mkdir(parents=True)
    sections = prose_sections()
    for i, (_, text) in enumerate(sections[:30]):
        (folder / "deep" / f"{i:03d}.md").write_text(text)
    (folder / "deep" / "er" / "more.jsonl").write_text("\n".join(json.dumps({"text": t}) for _, t in sections[30:40]))
    images, digits = load_digits()
    for i in range(40):
        Image.fromarray(images[i]).resize((20, 30)).convert("RGB").save(folder / f"d{i}.png")
        (folder / f"d{i}.txt").write_text(f"the digit {DIGIT_NAMES[digits[i]]}")
    return folder


@pytest.fixture(scope="module")
def encoded(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("encoded") / "out"
    list(encode_folder(source, out, CONFIG))
    return out


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar*"))}


def test_what_a_folder_becomes(encoded: Path, source: Path) -> None:
    dataset = Dataset.open(encoded)
    assert list(dataset.vocabulary.modalities) == ["text", "image"] and set(dataset.splits) == {"train", "heldout"}
    assert sum(n for _, n in dataset.validate()) == sum(len(split) for split in dataset.splits.values())
    kinds: dict[str, int] = {}
    whole = ""
    for split in dataset.splits:
        for _, meta, tokens in dataset.documents(split):
            kinds[meta["kind"]] = kinds.get(meta["kind"], 0) + 1
            spans = dataset.composer.decode(tokens)
            if meta["kind"] == "text":
                whole += str(spans[0][1])
            else:
                caption = next(content for modality, content in spans if modality == "text")
                assert caption == (source / meta["file"]).with_suffix(".txt").read_text()
                assert next(c for m, c in spans if m == "image").shape == (8, 8)  # type: ignore[union-attr]
    assert kinds["image-caption"] + kinds["caption-image"] == 40 and min(kinds.values()) > 5
    for file in (source / "deep").glob("*.md"):
        assert file.read_text()[:200] in whole


def test_validation_reads_a_block_once_for_all_its_documents(encoded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    members = Split.members
    monkeypatch.setattr(Split, "members", lambda self, i: reads.append(i) or members(self, i))
    splits = (dataset := Dataset.open(encoded)).splits.values()
    list(dataset.validate())
    spans = {(s.name, *place) for s in splits for place in zip(s.shard, s.span_offset, strict=True)}
    assert sum(map(len, splits)) > len(spans) == len(reads)


def test_a_job_array_makes_the_same_bytes(encoded: Path, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for worker in (2, 0):
        list(encode_folder(source, out, CONFIG, workers=3, worker=worker))
        assert not (out / "manifest.json").exists()
    list(encode_folder(source, out, CONFIG, workers=3, worker=1))
    assert shards(out) == shards(encoded)
    assert (out / "manifest.json").read_bytes() == (encoded / "manifest.json").read_bytes()


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from polylepis.data import encode
from test_encode import CONFIG
for shard in encode.encode_folder(Path(sys.argv[1]), Path(sys.argv[2]), CONFIG):
    print(shard, flush=True)
"""


def test_a_job_array_may_start_all_at_once(encoded: Path, source: Path, tmp_path: Path) -> None:
    together = threading.Barrier(4)

    def member(worker: int) -> None:
        together.wait()
        list(encode_folder(source, tmp_path / "out", CONFIG, workers=4, worker=worker))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(member, range(4)))
    assert shards(tmp_path / "out") == shards(encoded)
    assert not (tmp_path / "out" / "encode.lock").exists()
    Dataset.open(tmp_path / "out")


def test_files_without_a_document(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / "a.png")
    with pytest.raises(DataError, match="holds no text to train a tokenizer on: use another data set's with --like"):
        list(encode_folder(folder, tmp_path / "out", CONFIG))
    assert not (tmp_path / "out").exists()
    (folder / "empty.txt").touch()
    assert [unit.file for task in plan_tasks(folder, CONFIG) for unit in task.units] == ["a.png"]


def test_a_job_that_never_began_leaves_nothing(source: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        list(encode_folder(source, tmp_path / "out", CONFIG, tokenizer=tmp_path / "none.model"))
    assert not (tmp_path / "out").exists()


def test_killed_and_started_again(encoded: Path, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(source), str(out), str(Path(__file__).parent)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    finished = {path.name: os.stat(path).st_mtime_ns for path in out.glob("*.tar")}
    list(encode_folder(source, out, CONFIG))
    assert shards(out) == shards(encoded)
    assert all(os.stat(out / name).st_mtime_ns == when for name, when in finished.items()), "nothing was done twice"


def test_like_another_data_set(encoded: Path, source: Path, tmp_path: Path) -> None:
    few = tmp_path / "few"
    few.mkdir()
    (few / "a.txt").write_text("Some words to read.")
    run = CliRunner().invoke(data, ["encode", str(few), str(tmp_path / "out"), "--like", str(encoded)])
    assert run.exit_code == 0 and "tokens/s" in run.output and "identity" in run.output
    ours, theirs = Dataset.open(tmp_path / "out"), Dataset.open(encoded)
    assert ours.manifest["fingerprints"] == theirs.manifest["fingerprints"]


def test_sounds(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        with wave.open(str(source / f"s{i}.wav"), "wb") as file:
            file.setnchannels(2)
            file.setsampwidth(2)
            file.setframerate(8000)
            file.writeframes((rng.standard_normal(16000) * 3000).astype("<i2").tobytes())
        (source / f"s{i}.txt").write_text("a sound like rain on the roof " * 3)
    config = EncodeConfig(text_vocab=300, rate=8000, voice_codes=16)
    list(encode_folder(source, tmp_path / "out", config))
    dataset = Dataset.open(tmp_path / "out")
    assert dataset.vocabulary.modalities == ("text", "voice") and len(dataset.split("train")) == 6
    with pytest.raises(DataError, match=r"s0\.wav: 16-bit samples at 16000 Hz are needed, got 16-bit at 8000 Hz"):
        list(encode_folder(source, tmp_path / "other", EncodeConfig(text_vocab=300)))


def test_megatron_data_sets(encoded: Path, tmp_path: Path) -> None:
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    import torch

    source = tmp_path / "source"
    source.mkdir()
    documents = [np.random.default_rng(i).integers(0, 400, 50 * i + 1) for i in range(9)]
    builder = indexed.IndexedDatasetBuilder(str(source / "x.bin"), dtype=np.uint16)
    for document in documents:
        for part in np.array_split(document, 2) if len(document) > 1 else [document]:
            builder.add_item(torch.from_numpy(part))
        builder.end_document()
    builder.finalize(str(source / "x.idx"))
    config = EncodeConfig(max_tokens=202)
    list(encode_folder(source, tmp_path / "out", config, like=encoded))
    split = Dataset.open(tmp_path / "out").split("train")
    found = [split.tokens(i)[1:-1] - 32 for i in range(len(split))]
    assert np.array_equal(np.concatenate(found), np.concatenate(documents)) and max(map(len, found)) == 200
    assert len(found) == sum(-(-len(document) // 200) for document in documents)
    with pytest.raises(DataError, match=r"x\.bin holds ids of some tokenizer: name it with --tokenizer or --like"):
        list(encode_folder(source, tmp_path / "other", config))
    (source / "x.idx").write_bytes(b"no index")
    with pytest.raises(DataError, match=r"x\.idx is no Megatron index"):
        list(encode_folder(source, tmp_path / "third", config, like=encoded))


def test_refusals(source: Path, encoded: Path, tmp_path: Path) -> None:
    def refuse(message: str, where: Path = source, out: Path = tmp_path / "out", **options: object) -> None:
        with pytest.raises(DataError, match=message):
            list(encode_folder(where, out, CONFIG, **options))  # type: ignore[arg-type]

    empty = tmp_path / "empty"
    empty.mkdir()
    refuse("holds no file of a known kind", empty)
    refuse("is no folder", tmp_path / "absent")
    refuse("workers >= 1 and worker in 0..workers-1", workers=2, worker=2)
    refuse("is not empty and belongs to no encode job", out=source)
    before = shards(encoded)
    with pytest.raises(DataError, match="belongs to another encode job"):
        list(encode_folder(source, encoded, EncodeConfig()))
    assert shards(encoded) == before
    (empty / "x.png").write_bytes(b"no picture")
    (empty / "y.md").write_text("words " * 100)
    refuse(r"x\.png is no picture", empty)
    (empty / "x.png").unlink()
    (empty / "z.jsonl").write_text('{"text": "fine"}\n{"txt": 1}\n')
    refuse(r"z\.jsonl, line 2: no JSON object with a field text", empty, out=tmp_path / "out2")
    with pytest.raises(DataError, match="max_tokens >= 16"):
        EncodeConfig(max_tokens=4)
    assert len(plan_tasks(source, CONFIG)) > 3
