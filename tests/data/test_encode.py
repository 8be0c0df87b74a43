"""A folder of files becomes the same data set, whoever does the work and however often they are killed."""

from __future__ import annotations

import dataclasses
import io
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
import psutil
import pytest
from click.testing import CliRunner
from PIL import Image

from polylepis.data.commands import data
from polylepis.data.corpus import DIGIT_NAMES, load_digits, prose_sections
from polylepis.data.dataset import Dataset, Split
from polylepis.data.encode import encode_folder
from polylepis.data.errors import DataError
from polylepis.data.tasks import EncodeConfig, plan_tasks

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
    whole = dataclasses.replace(CONFIG, heldout=0.0)
    with pytest.raises(DataError, match="holds no text to train a tokenizer on: use another data set's with --like"):
        list(encode_folder(folder, tmp_path / "out", whole))
    assert not (tmp_path / "out").exists()
    (folder / "empty.txt").touch()
    assert [unit.file for task in plan_tasks(folder, whole).tasks for unit in task.units] == ["a.png"]
    (folder / "a.png").unlink()
    for i in range(3):  # a shard of blank texts alone is no shard
        (folder / f"{i}.txt").write_text(" \n" * 20)
    one = dataclasses.replace(whole, shard_bytes=40)
    with pytest.raises(DataError, match="holds no text to train a tokenizer on"):
        list(encode_folder(folder, tmp_path / "out", one))
    (folder / "words.txt").write_text("words to read " * 30)
    done = list(encode_folder(folder, tmp_path / "out", one))
    assert [count > 0 for _, count, _ in done] == [False] * 3 + [True]
    dataset = Dataset.open(tmp_path / "out")
    assert [shard["name"] for shard in dataset.manifest["splits"]["train"]] == ["train-00003.tar"]
    assert list(encode_folder(folder, tmp_path / "out", one)) == done
    assert not list((tmp_path / "out").glob("*.nothing"))
    (folder / "words.txt").write_text(" ")
    with pytest.raises(DataError, match="holds no document for split train"):
        list(encode_folder(folder, tmp_path / "other", one, like=tmp_path / "out"))
    (folder / "words.txt").write_text("words")
    list(encode_folder(folder, tmp_path / "other", one, like=tmp_path / "out"))


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
    (few / "b.csv").write_text("a,b\n1,2\n")
    run = CliRunner().invoke(data, ["encode", str(few), str(tmp_path / "next"), "--like", str(encoded)])
    assert "b.csv" in str(run.exception) and "no codec for series, only for text, image" in str(run.exception)
    assert not (tmp_path / "next").exists()


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
    codes = [int(dataset.split("train").modality_lengths[i][1]) for i in range(6)]
    assert codes == [8000 // 320 + 2] * 6
    list(encode_folder(source, tmp_path / "other", dataclasses.replace(config, rate=16000)))
    resampled = Dataset.open(tmp_path / "other").split("train")
    assert [int(resampled.modality_lengths[i][1]) for i in range(6)] == [2 * (8000 // 320) + 2] * 6
    with pytest.raises(
        DataError, match=r"s\d\.wav: 25 codes of voice and a caption of \d+ tokens need \d+ tokens, --max-t"
    ):
        list(encode_folder(source, tmp_path / "third", dataclasses.replace(config, max_tokens=30)))


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
    refuse("lies in .* and would be read itself", out=source / "deep" / "out")
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "x").touch()
    refuse("is not empty and belongs to no encode job", out=stranger)
    before = shards(encoded)
    with pytest.raises(DataError, match="belongs to another encode job"):
        list(encode_folder(source, encoded, EncodeConfig()))
    assert shards(encoded) == before
    (empty / "x.png").write_bytes(b"no picture")
    refuse("split heldout would be empty: files are held out whole, 1 of them with a share of 0.1", empty)
    (empty / "w.jsonl").write_text('{"text": "fine"}\n' * 9)
    (empty / "y.md").write_text("words " * 100)
    refuse(r"x\.png is no picture", empty)
    assert not (tmp_path / "out").exists()
    (empty / "x.png").unlink()
    (empty / "z.jsonl").write_text('{"text": "fine"}\n{"txt": 1}\n{"txt": 2}\n')
    refuse(r"z\.jsonl, line 2: no JSON object with a string text", empty)
    with pytest.raises(DataError, match="max_tokens >= 16"):
        EncodeConfig(max_tokens=4)
    assert len(plan_tasks(source, CONFIG).tasks) > 3


def test_one_file_of_many_documents_becomes_many_shards(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    texts = [f"document {i} says {' '.join(str(i * k) for k in range(30))}" for i in range(400)]
    (source / "all.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (source / "notes.xyz").touch()
    config = EncodeConfig(max_tokens=2048, heldout=0.1, shard_bytes=8_000, text_vocab=400)
    plan = plan_tasks(source, config)
    assert len(plan.tasks) > 5 and plan.passed_over == {".xyz": 1}
    list(encode_folder(source, tmp_path / "one", config))
    list(encode_folder(source, tmp_path / "two", config, workers=2))
    assert shards(tmp_path / "one") == shards(tmp_path / "two")
    dataset = Dataset.open(tmp_path / "one")
    found = {
        split: [dataset.composer.decode(tokens)[0][1] for _, _, tokens in dataset.documents(split)]
        for split in dataset.splits
    }
    assert sorted([*found["train"], *found["heldout"]]) == sorted(texts) and 15 < len(found["heldout"]) < 80
    # What is held out does not depend on where the parts of the file begin.
    list(encode_folder(source, tmp_path / "big", dataclasses.replace(config, shard_bytes=10**6)))
    big = Dataset.open(tmp_path / "big")
    assert sorted(found["heldout"]) == sorted(big.composer.decode(t)[0][1] for _, _, t in big.documents("heldout"))


def test_webdataset_tars_of_pictures(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    source = tmp_path / "source"
    source.mkdir()
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
    for number in range(2):
        with webdataset.TarWriter(str(source / f"{number}.tar")) as tar:
            for i in range(number * 30, number * 30 + 30):
                buffer = io.BytesIO()
                Image.fromarray(pictures[i]).save(buffer, format="PNG")
                png = buffer.getvalue() if i != 17 else b"broken"
                tar.write({"__key__": f"k{i}", "png": png, "txt": f"caption {i}", "json": {"i": i}})
    config = EncodeConfig(
        max_tokens=64, heldout=0.2, text_vocab=300, image_side=8, patch=2, image_codes=32, skip_bad=True
    )
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"0\.tar/k17\.png is no picture"):
        list(encode_folder(source, out, dataclasses.replace(config, skip_bad=False)))
    list(encode_folder(source, out, config))
    dataset = Dataset.open(out)
    assert dataset.vocabulary.modalities == ("text", "image") and set(dataset.splits) == {"train", "heldout"}
    names = []
    for split in dataset.splits:
        for _, meta, tokens in dataset.documents(split):
            i = int(meta["file"].split("/k")[1].split(".")[0])
            names.append(i)
            spans = dict(dataset.composer.decode(tokens))
            assert spans["text"] == f"caption {i}"
            assert np.abs(spans["image"].astype(int) - pictures[i]).mean() < 60  # in colour: of noise, by 32 codes
    assert sorted(names) == [i for i in range(60) if i != 17]
    (entry,) = [json.loads(line) for path in out.glob("*.skipped.jsonl") for line in path.read_text().splitlines()]
    assert entry["file"] == "0.tar" and "0.tar/k17.png is no picture" in entry["reason"]
    run = CliRunner().invoke(
        data, ["encode", str(source), str(tmp_path / "cli"), "--like", str(out), "--skip-bad", "--heldout", "0.2"]
    )
    assert run.exit_code == 0 and "1 documents were left out" in run.output
    assert "image: patch-kmeans, 32 codes, 8x8 pixels in colour" in run.output and "heldout: " in run.output


ORPHANS = """
import os, sys, time
from pathlib import Path
from polylepis.data import encode
config = encode.EncodeConfig(text_vocab=300, shard_bytes=1)
for _ in encode.encode_folder(Path(sys.argv[1]), Path(sys.argv[2]), config, workers=2):
    print("one", flush=True)
    time.sleep(60)
"""


def test_workers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for i in range(4):
        (source / f"{i}.txt").write_text("words to read " * 50)
    process = subprocess.Popen(
        [sys.executable, "-c", ORPHANS, str(source), str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"one\n"
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 3, "two workers and what starts them"
    process.kill()
    process.wait()
    process.stdout.close()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert alive == []
