"""Blocks of documents, adopted foreign tars, Energon's index, Hugging Face's tokenizers."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from polylepis.data.adopt import adopt
from polylepis.data.commands import data
from polylepis.data.dataset import Dataset
from polylepis.data.errors import DataError
from polylepis.data.index import energon_path, index_path
from polylepis.data.maintenance import index_shards
from polylepis.data.pread import ShardFiles
from polylepis.data.scan import scan_shard
from polylepis.data.shards import ShardWriter
from polylepis.data.stream import Source, Stream, StreamConfig
from polylepis.data.tokenizer import HubTokenizer, TextTokenizer, load_tokenizer
from polylepis.data.vocabulary import Vocabulary

WORDS = "the quick brown fox jumps over a lazy dog while rain falls on small green hills of an old country".split()


def text_of(i: int, words: int) -> str:
    rng = np.random.default_rng(i)
    return " ".join(WORDS[k] for k in rng.integers(0, len(WORDS), words))


def foreign(path: Path, texts: dict[str, bytes], extension: str = "txt") -> Path:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, text in texts.items():
            for name, payload in ((f"{key}.jpg", b"\xff\xd8\0"), (f"{key}.{extension}", text)):
                info = tarfile.TarInfo(name)
                info.size = len(payload)
                tar.addfile(info, io.BytesIO(payload))
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    TextTokenizer.train([text_of(i, 40) for i in range(50)], 400).save(path)
    return path


def test_a_block_is_many_documents_in_one_member(tmp_path: Path) -> None:
    vocabulary = Vocabulary(("text", "image"), (300, 16))
    rng = np.random.default_rng(0)
    documents = [np.concatenate(([1], rng.integers(32, 332, rng.integers(1, 40)), [2])) for _ in range(500)]
    with ShardWriter(tmp_path, "a", vocabulary, {}) as writer:
        writer.write_block("first", documents[:300])
        writer.write_block("second", documents[300:], {"licence": "none"})
        with pytest.raises(DataError, match="block 'third': all tokens of a block are text"):
            writer.write_block("third", [np.array([1, 332, 2])])
        with pytest.raises(DataError, match="at least one document"):
            writer.write_block("third", [])
    tar = tmp_path / "a-00000.tar"
    index = scan_shard(tar)
    assert len(index) == 500 and index.keys[0] == b"first/0" and index.keys[-1] == b"second/199"
    files = ShardFiles([tar])
    for i in (0, 17, 299, 300, 499):
        raw = files.read_checked(
            0, int(index.token_offset[i]), int(index.token_bytes[i]), int(index.token_crc32[i]), "k"
        )
        assert np.array_equal(np.frombuffer(raw, "<u2"), documents[i])
    with ShardWriter(tmp_path, "b", vocabulary, {}) as writer:
        from polylepis.data.shards import Sample

        for i, document in enumerate(documents):
            writer.write(Sample(f"k{i}", "text", document, []))
    assert (tmp_path / "b-00000.tar").stat().st_size > 10 * tar.stat().st_size
    import webdataset

    found = list(webdataset.WebDataset(str(tar), shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in found] == ["first", "second"]
    assert np.array_equal(np.load(io.BytesIO(found[0]["tok.npy"])), np.concatenate(documents[:300]))


def test_energons_index_is_what_energon_writes(dataset: Dataset, tmp_path: Path) -> None:
    """Energon's rule: the offset of each member whose name before the first dot is new, then where the tar ends."""
    for tar in dataset.split("heldout").files.paths:
        expected, last = [], None
        with tarfile.open(tar) as archive:
            for member in archive:
                base = member.name.partition(".")[0]
                if base != last:
                    expected.append(member.offset)
                last = base
            expected.append(archive.offset)
        assert energon_path(tar).read_bytes() == np.array(expected, dtype=np.uint64).tobytes()


LONG = "folder/" + "k" * 150


def write_webdataset(path: Path, texts: dict[str, str]) -> None:
    """As its users write: the time of each member is a float, which takes an extended header."""
    import webdataset

    with webdataset.TarWriter(str(path)) as writer:
        for key, text in texts.items():
            writer.write({"__key__": key, "jpg": b"\xff\xd8\0", "txt": text.encode()})


def write_tar(format: int) -> Callable[[Path, dict[str, str]], None]:
    def write(path: Path, texts: dict[str, str]) -> None:
        with tarfile.open(path, "w", format=format) as tar:
            for folder in (".", "./folder"):
                info = tarfile.TarInfo(folder)
                info.type = tarfile.DIRTYPE
                tar.addfile(info)
            for key, text in texts.items():
                for name, payload in ((f"./{key}.jpg", b"\xff\xd8\0"), (f"./{key}.txt", text.encode())):
                    info = tarfile.TarInfo(name)
                    info.size, info.mtime = len(payload), 1.5
                    tar.addfile(info, io.BytesIO(payload))

    return write


@pytest.mark.parametrize(
    "write",
    [write_webdataset, write_tar(tarfile.PAX_FORMAT), write_tar(tarfile.GNU_FORMAT)],
    ids=["webdataset", "pax", "gnu"],
)
def test_tars_with_extended_headers_are_adopted(
    tmp_path: Path, tokenizer: Path, write: Callable[[Path, dict[str, str]], None]
) -> None:
    texts = {f"{LONG if i % 3 else 'folder/short'}{i:03d}": text_of(i, 5 + i) for i in range(20)}
    write(tmp_path / "x.tar", texts)
    with tarfile.open(tmp_path / "x.tar") as tar:  # Python's reader is the oracle of names, and of where groups begin
        members = [m for m in tar if m.isfile()]
    assert [m.name.removeprefix("./") for m in members] == [f"{k}.{e}" for k in texts for e in ("jpg", "txt")]
    assert members[0].offset_data - members[0].offset > 512 or members[2].offset_data - members[2].offset > 512
    list(adopt([tmp_path / "x.tar"], tokenizer=tokenizer, max_tokens=512))
    dataset = Dataset.open(tmp_path)
    assert [n for _, n in dataset.validate()] == [20]
    split = dataset.split("train")
    assert [split.key(i).removeprefix("./").removesuffix("/0") for i in range(20)] == list(texts)
    assert split.span_offset.tolist() == [m.offset for m in members[::2]]
    for i, text in enumerate(texts.values()):
        assert dataset.composer.decode(split.tokens(i))[0][1] == text
        assert split.members(i) == {"jpg": b"\xff\xd8\0", "txt": text.encode()}
    starts = np.fromfile(energon_path(tmp_path / "x.tar"), np.uint64).tolist()
    assert starts[:-1] == [m.offset for m in members[::2]]


@pytest.mark.parametrize(
    "payload, message",
    [
        (b"0 path=x\n", "a record of 0 bytes"),
        (b"99 path=x\n", "a record of 99 bytes where 10 are left"),
        (b"9 pathx\n\n", "a malformed record"),
        (b"22 GNU.sparse.major=1\n", "a sparse file"),
        (b"x path=y\n", "invalid literal"),
    ],
)
def test_damaged_extended_headers_are_refused(tmp_path: Path, tokenizer: Path, payload: bytes, message: str) -> None:
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, kind, content in (("e", tarfile.XHDTYPE, payload), ("a.txt", tarfile.REGTYPE, b"text")):
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, len(content)
            tar.addfile(info, io.BytesIO(content))
    with pytest.raises(DataError, match=rf"x\.tar: bad tar header at offset 0 \(.*{message}"):
        list(adopt([tmp_path / "x.tar"], tokenizer=tokenizer))


def test_foreign_tars_become_a_data_set_that_streams_and_mixes(tmp_path: Path, tokenizer: Path) -> None:
    for number, name in enumerate(("one", "two")):
        folder = tmp_path / name
        folder.mkdir()
        texts = {f"dir/{i:03d}": text_of(1000 * number + i, 5 + 9 * (i % 30)).encode() for i in range(60)}
        texts["dir/nothing"] = b""
        texts["dir/umlaut"] = "Grüße, 世界! ".encode() * 60
        foreign(folder / "x.tar", texts)
    before = (tmp_path / "one" / "x.tar").read_bytes()
    run = CliRunner().invoke(
        data,
        ["index", str(tmp_path / "one" / "x.tar"), "--tokenizer", str(tokenizer), "--max-tokens", "64"],
    )
    assert run.exit_code == 0, run.output
    list(adopt([tmp_path / "two" / "x.tar"], like=tmp_path / "one", max_tokens=64))
    assert (tmp_path / "one" / "x.tar").read_bytes() == before
    opened = Dataset.open(tmp_path / "one")
    split = opened.split("train")
    assert split.lengths.max() <= 64 and len(split) > 60
    tokens = [split.tokens(i) for i in range(len(split))]
    assert all(t[0] == 1 and t[-1] == 2 and len(t) == n for t, n in zip(tokens, split.lengths.tolist(), strict=True))
    whole: dict[str, str] = {}
    for i, t in enumerate(tokens):
        (_, text), *_ = opened.composer.decode(t)
        key = split.key(i).rpartition("/")[0]
        whole[key] = whole.get(key, "") + str(text)
    assert whole["dir/007"] == text_of(7, 5 + 9 * 7) and whole["dir/umlaut"] == "Grüße, 世界! " * 60
    assert "dir/nothing" not in whole
    assert sum(n for _, n in opened.validate()) == len(split)
    rebuilt = index_path(tmp_path / "one" / "x.tar").read_bytes()
    list(index_shards([tmp_path / "one" / "x.tar"]))
    assert index_path(tmp_path / "one" / "x.tar").read_bytes() == rebuilt
    sources = {name: Source(1.0, str(tmp_path / name)) for name in ("one", "two")}
    config = StreamConfig(str(tmp_path / "one"), seq_len=64, global_batch=8, sources=sources)
    step = Stream(opened, config, dp_rank=0, dp_size=1).next()
    assert abs(step.source_tokens["one"] - step.source_tokens["two"]) < 64


def test_adoption_refuses(tmp_path: Path, tokenizer: Path, small: Path) -> None:
    def refuse(message: str, *tars: Path, **options: object) -> None:
        given: dict[str, object] = {"tokenizer": tokenizer, **options}
        with pytest.raises(DataError, match=message):
            list(adopt(tars, **given))  # type: ignore[arg-type]

    tar = foreign(tmp_path / "x.tar", {"a": b"some text", "b": b"\xff\xfe"})
    refuse(r"x\.tar: key 'b' at offset 2048: txt is not UTF-8 at byte 0", tar)
    refuse(
        r"key 'a' at offset 0 has no member 'text', only jpg, txt; name the text's with --text", tar, extension="text"
    )
    refuse("max_tokens must be at least 16", tar, max_tokens=3)
    refuse("no such shard", tmp_path / "y.tar")
    refuse("give either a tokenizer .* or a data set", tar, tokenizer=None)
    refuse("is a data set already", small / "heldout-00000.tar")
    foreign(tmp_path / "z.tar", {"a": b"more"})
    refuse(r"also holds z\.tar; adopt all tars of a folder together", tar)
    with pytest.raises(DataError, match="needs members json and tokens"):
        list(index_shards([tmp_path / "z.tar"]))
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".tar", ".tar"]


def test_another_tokenizer_is_a_bad_sample(tmp_path: Path, tokenizer: Path) -> None:
    tar = foreign(tmp_path / "x.tar", {"a": text_of(0, 30).encode()})
    list(adopt([tar], tokenizer=tokenizer))
    split = Dataset.open(tmp_path).split("train")
    split.encode = lambda text: np.array([1, 2])
    with pytest.raises(DataError, match=r"x\.tar: 'a/0' at offset \d+ gives 2 tokens, the index says \d+"):
        split.tokens(0)


def test_hugging_face_tokenizers(tmp_path: Path) -> None:
    library = pytest.importorskip("tokenizers")
    model = library.Tokenizer(library.models.BPE())
    model.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    model.train_from_iterator([text_of(i, 40) for i in range(20)], trainer)
    path = tmp_path / "their.json"
    model.save(str(path))
    found = load_tokenizer(path)
    assert isinstance(found, HubTokenizer) and found.decode(found.encode("Grüße, fox!")) == "Grüße, fox!"
    folder = tmp_path / "tars"
    folder.mkdir()
    foreign(folder / "x.tar", {f"{i}": text_of(i, 30).encode() for i in range(9)})
    list(adopt([folder / "x.tar"], tokenizer=path))
    opened = Dataset.open(folder)
    assert opened.composer.decode(opened.split("train").tokens(3)) == [("text", text_of(3, 30))]
    (folder / "tokenizer.json").write_text(json.dumps({"not": "one"}))
    with pytest.raises(DataError, match=r"tokenizer\.json: not a tokenizer\.json"):
        Dataset.open(folder)
    shutil.rmtree(folder)
    with pytest.raises(DataError, match="cannot read the tokenizer"):
        load_tokenizer(folder / "tokenizer.json")
