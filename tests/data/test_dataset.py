"""Opening and validating: everything that does not belong together is refused in one clear line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polylepis.data.codecs import PatchKMeans
from polylepis.data.dataset import Dataset
from polylepis.data.errors import DataError
from polylepis.data.maintenance import index_shards
from polylepis.data.stream import Stream, StreamConfig
from polylepis.data.tokenizer import TextTokenizer

SHARD = "heldout-00000.tar"
Damage = Callable[..., Path]


def refused(path: Path, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        Dataset.open(path)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_good_data_set_opens_and_validates(small: Path) -> None:
    dataset = Dataset.open(small)
    counts = dict(dataset.validate())
    assert sum(counts.values()) == sum(len(split) for split in dataset.splits.values())
    assert len(dataset.identity) == 64
    key, meta, tokens = next(dataset.documents("heldout"))
    assert key == dataset.split("heldout").key(0) and sum(meta["lengths"].values()) == len(tokens)
    with pytest.raises(DataError, match="no split 'test'; it has heldout, train"):
        dataset.split("test")


def test_no_data_set(tmp_path: Path) -> None:
    refused(tmp_path, r"is no data set: manifest\.json is missing; make one with: polylepis data build quickstart")


def test_unreadable_manifest(damaged: Damage) -> None:
    copy = damaged("manifest.json")
    (copy / "manifest.json").write_text("{")
    refused(copy, "is not a manifest")
    (copy / "manifest.json").write_text('{"version": 99}')
    refused(copy, "version 99")


def test_missing_shard(damaged: Damage) -> None:
    copy = damaged()
    (copy / SHARD).unlink()
    refused(copy, rf"shard .*{SHARD} is missing")


def test_truncated_shard(damaged: Damage) -> None:
    copy = damaged(SHARD)
    os.truncate(copy / SHARD, 4096)
    refused(copy, rf"shard .*{SHARD} is truncated: 4096 bytes, the manifest says \d+")


def test_shard_without_index(damaged: Damage) -> None:
    copy = damaged()
    (copy / f"{SHARD}.idx.safetensors").unlink()
    refused(copy, rf"index .*{SHARD}\.idx\.safetensors is missing; make it with: polylepis data index")


def test_index_of_another_shard(damaged: Damage) -> None:
    copy = damaged(f"{SHARD}.idx.safetensors")
    shutil.copyfile(copy / "train-00000.tar.idx.safetensors", copy / f"{SHARD}.idx.safetensors")
    refused(copy, "belongs to another tar: a foreign shard or index")


def test_foreign_shards(damaged: Damage, write_shard: Callable[..., Path]) -> None:
    copy = damaged()
    foreign = write_shard()
    shutil.copyfile(foreign, copy / "train-00009.tar")
    refused(copy, r"train-00009\.tar is not in the manifest: a foreign shard")
    with pytest.raises(DataError, match="not in the manifest beside it"):
        list(index_shards([copy / "train-00009.tar"]))
    (copy / "train-00009.tar").unlink()
    (copy / SHARD).unlink()
    shutil.copyfile(foreign, copy / SHARD)
    refused(copy, rf"shard .*{SHARD} is truncated|foreign or changed")
    with pytest.raises(DataError, match="foreign or changed shard; no index written"):
        list(index_shards([copy / SHARD]))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m.update(splits=[]), r"splits must be a table by name, got \[\]"),
        (lambda m: m["splits"]["train"][0].pop("sha256"), r"a shard of splits lacks sha256 .*train-00000\.tar"),
        (lambda m: m["splits"]["train"][0].update(bytes="many"), "a shard of splits lacks bytes"),
        (lambda m: m["files"].update({"tokenizer.model": 3}), "an entry of files lacks bytes, sha256"),
    ],
)
def test_a_malformed_manifest_is_refused(damaged: Damage, change: Callable[[Any], Any], message: str) -> None:
    copy = damaged("manifest.json")
    manifest = json.loads((copy / "manifest.json").read_text())
    change(manifest)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    refused(copy, message)


def test_validation_counts_the_tokens_that_the_manifest_states(damaged: Damage) -> None:
    copy = damaged("manifest.json")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["splits"]["heldout"][0]["tokens"]["text"] = 5
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=rf"{SHARD}: the manifest says .*'text': 5.* tokens, the shard holds"):
        list(Dataset.open(copy).validate())


def test_shard_made_with_other_vocabularies_though_manifest_and_index_agree(damaged: Damage) -> None:
    """A manifest edited by hand to take in a shard of another data set."""
    copy = damaged("manifest.json")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["splits"] = {"heldout": manifest["splits"]["train"]}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    (copy / SHARD).unlink()
    refused(copy, r"train-00000\.tar is foreign: made with other vocabularies or for another split than 'heldout'")


def test_changed_tokenizer(damaged: Damage) -> None:
    copy = damaged()
    (copy / "tokenizer.model").unlink()
    TextTokenizer.train(["some other words were used to train this"] * 9, 300).save(copy / "tokenizer.model")
    refused(copy, r"tokenizer\.model: fingerprint \w{12} differs from \w{12} in the manifest")


def test_changed_codec(damaged: Damage) -> None:
    copy = damaged()
    codec = Dataset.open(copy).codecs["image"]
    assert isinstance(codec, PatchKMeans)
    centres = codec.centres.copy()
    centres[3, 0] += 1
    PatchKMeans(centres, codec.image_shape, codec.patch).save(copy / "image.codec.npz")
    refused(copy, r"image\.codec\.npz: fingerprint \w{12} differs from \w{12} in the manifest")
    (copy / "image.codec.npz").unlink()
    refused(copy, r"cannot read the codec .*image\.codec\.npz")


def test_a_flipped_token_byte_is_found_on_reading(damaged: Damage) -> None:
    copy = damaged(SHARD)
    split = Dataset.open(copy).split("heldout")
    offset = int(split.token_offset[5]) + 2
    with open(copy / SHARD, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 4]))
    opened = Dataset.open(copy)  # sizes agree: opening cannot see it
    message = rf"{SHARD}: corrupt tokens of '{split.key(5)}' at offset {offset - 2}: crc32 \w+, the index says \w+"
    with pytest.raises(DataError, match=message):
        opened.split("heldout").tokens(5)
    with pytest.raises(DataError, match="its index differs from the tar in 'sha256': the shard was changed"):
        list(opened.validate())
    stream = Stream(
        opened, StreamConfig(str(copy), split="heldout", global_batch=40, micro_batch=1), dp_rank=0, dp_size=1
    )
    state = stream.state_dict()
    with pytest.raises(DataError, match="corrupt tokens"):
        stream.next()
    assert stream.state_dict() == state, "a failed step must not advance the state"


def test_a_flipped_picture_byte_is_found_by_validate(damaged: Damage) -> None:
    copy = damaged(SHARD)
    data = bytearray((copy / SHARD).read_bytes())
    data[data.index(b"IHDR") + 1] ^= 1
    (copy / SHARD).write_bytes(data)
    with pytest.raises(DataError, match="the shard was changed"):
        list(Dataset.open(copy).validate())


def test_a_tar_that_vanishes_while_in_use(damaged: Damage) -> None:
    copy = damaged()
    split = Dataset.open(copy).split("heldout")
    (copy / SHARD).unlink()
    with pytest.raises(DataError, match=rf"cannot read .*{SHARD} at offset \d+: No such file"):
        split.tokens(0)


def test_rebuilding_an_index_gives_the_same_bytes(damaged: Damage) -> None:
    copy = damaged()
    path = copy / f"{SHARD}.idx.safetensors"
    before = path.read_bytes()
    path.unlink()
    ((tar, index),) = index_shards([copy / SHARD])
    assert tar == copy / SHARD and len(index) == len(Dataset.open(copy).split("heldout"))
    assert path.read_bytes() == before


def test_composer_reads_what_it_writes(dataset: Dataset) -> None:
    composer = dataset.composer
    image = np.arange(16)
    tokens = composer.document([("text", "the digit two"), ("image", image), ("text", " or three"), ("voice", [5, 6])])
    assert tokens[0] == 1 and tokens[-1] == 2 and tokens.dtype == np.int64
    spans = composer.spans(tokens)
    assert [name for name, _ in spans] == ["text", "image", "text", "voice"]
    assert np.array_equal(spans[1][1], image) and spans[3][1].tolist() == [5, 6]
    decoded = composer.decode(tokens)
    assert decoded[0][1] == "the digit two" and decoded[2][1] == " or three"
    assert isinstance(decoded[1][1], np.ndarray) and decoded[1][1].shape == (8, 8)
    prompt = composer.prompt([("text", "the digit two")], open="image")
    assert prompt[0] == 1 and prompt[-1] == dataset.vocabulary.begin("image")
    assert np.array_equal(composer.prompt([("text", "a")]), composer.document([("text", "a")])[:-1])


def test_composer_refusals(dataset: Dataset) -> None:
    composer = dataset.composer
    with pytest.raises(DataError, match="image spans take codes or an array, not a string"):
        composer.document([("image", "seven")])
    with pytest.raises(DataError, match=r"image codes must lie in 0\.\.127, got 0\.\.128"):
        composer.document([("image", [0, 128])])
    with pytest.raises(DataError, match=r"takes uint8 images \(8, 8\), got uint8 \(4, 4\)"):
        composer.document([("image", np.zeros((4, 4), dtype=np.uint8))])
    with pytest.raises(DataError, match="unknown modality 'smell'"):
        composer.document([("smell", [1])])
    with pytest.raises(DataError, match=r"an image .* has 16 codes, got 3"):
        composer.decode(composer.document([("image", [1, 2, 3])]))


def test_a_start_imports_only_what_it_needs(small: Path) -> None:
    """The first batch after a resume is counted in milliseconds from the start of the process; torch takes a second."""
    script = f"""
import sys
from polylepis.data.dataset import Dataset
from polylepis.data.stream import Stream, StreamConfig
config = StreamConfig({str(small)!r}, seq_len=512, global_batch=2, micro_batch=1)
step = Stream(Dataset.open(config.path), config, dp_rank=0, dp_size=1).next()
assert step.rows["tokens"].shape == (2, 512) and step.total_weight > 0
heavy = {{"torch", "sentencepiece", "fsspec", "PIL", "webdataset", "pydantic", "polylepis.data.codecs"}}
assert not heavy & set(sys.modules)
assert step.micro_batches[1]["tokens"].shape == (1, 512) and "torch" in sys.modules
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
