"""Shards and indices: what webdataset reads, what is refused, and what a killed writer leaves behind."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from polylepis.data.dataset import Dataset
from polylepis.data.errors import DataError
from polylepis.data.index import ShardIndex, index_path
from polylepis.data.pread import ShardFiles
from polylepis.data.scan import scan_shard
from polylepis.data.shards import Sample, ShardWriter
from polylepis.data.vocabulary import Vocabulary


def make_tar(path: Path, names: list[str], *, format: int = tarfile.USTAR_FORMAT) -> Path:
    """A tar of well-formed members in the given order."""
    meta = {"modalities": ["text"], "lengths": {"text": 3}, "fingerprints": {}, "split": "train"}
    array = io.BytesIO()
    np.save(array, np.array([1, 40, 2], dtype=np.uint16))
    with tarfile.open(path, "w", format=format) as tar:
        for name in names:
            payload = json.dumps(meta).encode() if name.endswith("json") else array.getvalue()
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    return path


def test_webdataset_reads_our_shards(dataset: Dataset) -> None:
    """Interoperability, with the next tests and Energon's index in test_adopt.py."""
    import webdataset

    split = dataset.split("heldout")
    shard = split.files.paths[0]
    reader = webdataset.WebDataset(str(shard), shardshuffle=False, empty_check=False).decode("rgb8")
    found = {sample["__key__"]: sample for sample in reader}
    assert list(found) == [split.key(i) for i in range(len(split))]
    for i in range(0, len(split), 17):
        sample = found[split.key(i)]
        assert np.array_equal(sample["tokens.npy"], split.tokens(i))
        assert sample["json"]["lengths"] == dict(
            zip(dataset.vocabulary.modalities, split.modality_lengths[i].tolist(), strict=True)
        )
        assert ("png" in sample) == ("image" in sample["json"]["kind"])
        assert ("wav" in sample) == ("voice" in sample["json"]["kind"])
        if "png" in sample:
            assert sample["png"].shape == (8, 8, 3)


def test_python_tarfile_reads_our_shards_and_members_are_anonymous(write_shard: Callable[..., Path]) -> None:
    with tarfile.open(write_shard()) as tar:
        infos = tar.getmembers()
    assert {info.mtime for info in infos} == {0}
    assert {(info.uname, info.gname, info.uid) for info in infos} == {("polylepis", "polylepis", 0)}
    assert [i.name for i in infos[:3]] == ["doc-000.json", "doc-000.tokens.npy", "doc-000.txt"]


def test_the_index_is_rebuilt_from_the_tar_alone(write_shard: Callable[..., Path]) -> None:
    tar = write_shard()
    before = index_path(tar).read_bytes()
    index_path(tar).unlink()
    found = scan_shard(tar)
    found.save(index_path(tar))
    assert index_path(tar).read_bytes() == before
    assert found.header["bytes"] == tar.stat().st_size
    assert np.array_equal(found.modality_lengths.sum(axis=1), found.lengths)
    # The offsets point at the bare token ids.
    files = ShardFiles([tar])
    data = files.read(0, int(found.token_offset[3]), int(found.token_bytes[3]))
    assert np.frombuffer(data, "<u2")[0] == 1 and len(data) == 2 * found.lengths[3]
    # Spans tile the archive.
    ends = found.span_offset + found.span_bytes
    assert found.span_offset[0] == 0 and np.array_equal(found.span_offset[1:], ends[:-1])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.json", "b.json", "a.tokens.npy", "b.tokens.npy"], r"needs members json and tokens\.npy, has json"),
        (["a.json", "a.tokens.npy", "b.json", "b.tokens.npy", "a.txt"], "'a' comes again at offset 4096 .*interleaved"),
        (["a.json", "a.tokens.npy", "b.json", "b.tokens.npy", "a.json", "a.tokens.npy"], "duplicate key"),
        (["a.json", "a.tokens.npy", "a.json"], r"duplicate member a\.json at offset 2048"),
        (["a.json", "a.tokens.npy", "noextension"], r"'noextension' at offset 2048 is not named KEY\.EXTENSION"),
        ([], "holds no sample"),
    ],
)
def test_keys_that_a_streaming_reader_would_mix_up(tmp_path: Path, names: list[str], message: str) -> None:
    """Ray #63374: a tar that is not ordered by key silently yields half samples."""
    with pytest.raises(DataError, match=message):
        scan_shard(make_tar(tmp_path / "x.tar", names))


def test_pax_and_gnu_extensions_are_refused(tmp_path: Path) -> None:
    long = "k" * 120
    with pytest.raises(DataError, match="has type b'x'; only plain files"):
        scan_shard(make_tar(tmp_path / "x.tar", [f"{long}.json"], format=tarfile.PAX_FORMAT))
    with pytest.raises(DataError, match="has type b'L'; only plain files"):
        scan_shard(make_tar(tmp_path / "x.tar", [f"{long}.json"], format=tarfile.GNU_FORMAT))


def test_truncation_anywhere_is_refused_with_shard_and_offset(write_shard: Callable[..., Path]) -> None:
    """webdataset #142 and #432: a tar that ends early silently ends the shard."""
    tar = write_shard()
    whole = tar.read_bytes()
    end = int((scan_shard(tar).span_offset + scan_shard(tar).span_bytes)[-1])
    for size in (0, 100, 512, 700, 2048, end - 512, end, end + 512):
        tar.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"train-00000\.tar: (truncated|no proper end).* at offset \d+"):
            scan_shard(tar)
    tar.write_bytes(whole + b"x")
    with pytest.raises(DataError, match="no proper end of archive"):
        scan_shard(tar)


def test_a_flipped_header_bit_is_refused(write_shard: Callable[..., Path]) -> None:
    tar = write_shard()
    data = bytearray(tar.read_bytes())
    offset = int(scan_shard(tar).span_offset[2])
    data[offset + 3] ^= 1
    tar.write_bytes(data)
    with pytest.raises(DataError, match=rf"train-00000\.tar: bad tar header at offset {offset} \(bad checksum\)"):
        scan_shard(tar)


def test_a_sample_of_another_vocabulary_in_the_shard_is_refused(
    tmp_path: Path, write_shard: Callable[..., Path]
) -> None:
    tar = write_shard(2)
    data = tar.read_bytes()
    first = data.index(b'"vocabulary":"') + 14
    second = data.index(b'"vocabulary":"', first) + 14
    tar.write_bytes(data[:second] + b"0" * 32 + data[second + 32 :])
    with pytest.raises(DataError, match=r"'doc-001' at offset .* was made with other vocabularies"):
        scan_shard(tar)


def test_a_damaged_or_foreign_index_is_refused(tmp_path: Path, write_shard: Callable[..., Path]) -> None:
    tar = write_shard()
    path = index_path(tar)
    whole = path.read_bytes()
    for at in range(len(whole) - 64, len(whole)):  # the last tensors' bytes: any value there is a well-formed file
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(DataError, match=r"is damaged .*crc32 differs"):
            ShardIndex.load(path)
    path.write_bytes(whole[:-100])
    with pytest.raises(DataError, match=r"is damaged .*; make it with: polylepis data index .*train-00000\.tar$"):
        ShardIndex.load(path)
    with pytest.raises(DataError, match="is missing; make it with"):
        ShardIndex.load(tmp_path / "y.tar.idx.safetensors")


def test_the_writer_refuses_before_it_writes(tmp_path: Path, write_shard: Callable[..., Path]) -> None:
    vocabulary = Vocabulary(("text",), (300,))
    good = np.array([1, 40, 2])
    with ShardWriter(tmp_path, "a", vocabulary, {}) as writer:
        writer.write(Sample("k", "test", good, [("text", 1)]))
        with pytest.raises(DataError, match="duplicate sample key 'k'"):
            writer.write(Sample("k", "test", good, []))
        with pytest.raises(DataError, match="without dots and slashes"):
            writer.write(Sample("a.b", "test", good, []))
        with pytest.raises(DataError, match=r"ids in 0\.\.331"):
            writer.write(Sample("l", "test", np.array([1, 332]), []))
        with pytest.raises(DataError, match="begins with bos"):
            writer.write(Sample("l", "test", np.array([40, 2]), []))
    assert len(scan_shard(tmp_path / "a-00000.tar")) == 1
    before = (tmp_path / "a-00000.tar").read_bytes()
    with pytest.raises(DataError, match="never overwritten"), ShardWriter(tmp_path, "a", vocabulary, {}) as writer:
        writer.write(Sample("k", "test", good, []))
    assert (tmp_path / "a-00000.tar").read_bytes() == before


def test_an_exception_leaves_no_final_name(tmp_path: Path) -> None:
    vocabulary = Vocabulary(("text",), (300,))
    with pytest.raises(RuntimeError, match="boom"), ShardWriter(tmp_path, "a", vocabulary, {}) as writer:
        writer.write(Sample("k", "test", np.array([1, 40, 2]), []))
        raise RuntimeError("boom")
    assert list(tmp_path.iterdir()) == []


KILLED = """
import numpy as np, sys
from pathlib import Path
from polylepis.data.shards import Sample, ShardWriter
from polylepis.data.vocabulary import Vocabulary
with ShardWriter(Path(sys.argv[1]), "a", Vocabulary(("text",), (300,)), {}, samples_per_shard=200) as writer:
    for i in range(10**6):
        writer.write(Sample(f"k{i}", "test", np.array([1, 40, 2]), []))
        if i == 500:
            print("ready", flush=True)
"""


def test_a_killed_writer_leaves_only_whole_shards(tmp_path: Path) -> None:
    """webdataset's ShardWriter leaves a truncated tar under its final name."""
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, env=_environment()
    )
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    names = sorted(path.name for path in tmp_path.iterdir())
    tars = [name for name in names if name.endswith(".tar")]
    assert tars and all(len(scan_shard(tmp_path / name)) == 200 for name in tars)
    assert any(name.endswith(".tar.part") for name in names)


def test_open_files_stay_few_and_reads_stay_right(tmp_path: Path, write_shard: Callable[..., Path]) -> None:
    tars = [write_shard(3, folder=tmp_path / str(i), seed=i) for i in range(6)]
    files = ShardFiles(tars, max_open=2)
    rng = np.random.default_rng(0)
    for shard in rng.integers(0, 6, 200).tolist():
        assert files.read(shard, 0, 1000) == tars[shard].read_bytes()[:1000]
        assert len(files._open) <= 2
    files.close()
    with pytest.raises(DataError, match=r"truncated: \d+ of 1000 bytes at offset"):
        files.read(0, tars[0].stat().st_size - 10, 1000)


def _environment() -> dict[str, str]:
    """The package root of this very test run, also where the package is not installed."""
    import polylepis

    (root,) = {str(Path(folder).parent) for folder in polylepis.__path__}
    # The clone's folder may have any name; only a parent that holds it as "polylepis" may go on the path.
    path = [root] if Path(root, "polylepis").exists() else []
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*path, *filter(None, [os.environ.get("PYTHONPATH")])])}
