"""Continuous latents: what is written comes back bit for bit, at its slot, on any rank, after any interruption."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save_file

from polylepis.data.adopt import save_meaning
from polylepis.data.codecs import ByteCodec, Codec, GivenLatents
from polylepis.data.commands import data
from polylepis.data.compose import Composer
from polylepis.data.dataset import Dataset
from polylepis.data.encode import encode_folder
from polylepis.data.errors import BadSampleError, DataError
from polylepis.data.index import ShardIndex, index_path
from polylepis.data.latents import LatentFormat, most_in_a_row, parse_member, to_bits, to_float, to_member
from polylepis.data.manifest import fingerprints, write_manifest
from polylepis.data.preview import write_preview
from polylepis.data.quarantine import QuarantineConfig
from polylepis.data.scan import scan_shard
from polylepis.data.shards import Sample, ShardWriter
from polylepis.data.share import same_everywhere
from polylepis.data.stream import Step, Stream, StreamConfig
from polylepis.data.tasks import EncodeConfig
from polylepis.data.tokenizer import TextTokenizer
from polylepis.data.vocabulary import Vocabulary
from ranks import run_ranks

WIDTH = 3
FORM = LatentFormat(WIDTH, "bfloat16", ("image", "sound"))


def composer_of(tokenizer: TextTokenizer, dtype: str = "bfloat16") -> Composer:
    """text, two continuous modalities of one width, and bytes between them."""
    codecs: dict[str, Codec] = {
        "image": GivenLatents(width=WIDTH, dtype=dtype),
        "bytes": ByteCodec(),
        "sound": GivenLatents(width=WIDTH, dtype=dtype),
    }
    sizes = (tokenizer.vocab_size, *(codec.vocab_size for codec in codecs.values()))
    return Composer(Vocabulary(("text", *codecs), sizes), tokenizer, codecs)


def write(folder: Path, composer: Composer, n: int = 60, *, seed: int = 0) -> None:
    """Documents with no, one or several latent spans of odd sizes; one split in shards of 16."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    form = LatentFormat.of(composer.codecs)
    save_meaning(folder, composer)
    marks = fingerprints(composer.vocabulary, composer.tokenizer, composer.codecs)
    with ShardWriter(folder, "train", composer.vocabulary, marks, samples_per_shard=16, latents=form) as writer:
        for i in range(n):
            spans: list[Any] = [("text", f"{i} words"[: int(rng.integers(2, 8))])]
            if i % 4:
                spans.append(("image", rng.standard_normal((int(rng.integers(1, 8)), WIDTH))))
            if i % 3 == 1:
                spans.append(("bytes", rng.integers(0, 256, 5).astype(np.uint8)))
                spans.append(("sound", rng.standard_normal((int(rng.integers(1, 4)), WIDTH)) * 100))
            if i % 5 == 4:
                spans.append(("image", rng.standard_normal((1, WIDTH)) / 1000))
            tokens = composer.document(spans)
            lengths = [(m, len(composer.local_codes(m, c)) + (0 if m == "text" else 2)) for m, c in spans]
            writer.write(Sample(f"doc-{i:03d}", "mixed", tokens, lengths, latents=composer.latents(spans)))
    write_manifest(
        folder,
        name="latents",
        generator={"name": "test", "version": 1},
        provenance={},
        composer=composer,
        splits={"train": writer.indices},
    )


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer.train(["some words here and there"] * 20, 300)


@pytest.fixture(scope="module", params=["bfloat16", "float16"])
def folder(request: pytest.FixtureRequest, tokenizer: TextTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latents") / request.param
    write(folder, composer_of(tokenizer, request.param))
    return folder


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def config_of(folder: Path, **changes: Any) -> StreamConfig:
    config = StreamConfig(str(folder), seq_len=64, global_batch=12, micro_batch=1, window=20)
    return replace(config, **changes)


def whole(steps: list[Step]) -> dict[str, torch.Tensor]:
    batches = [batch for step in steps for batch in step.micro_batches]
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.floats(-60000, 60000, width=32), min_size=WIDTH, max_size=WIDTH), min_size=1, max_size=5),
    st.sampled_from(["bfloat16", "float16"]),
)
def test_rounding_is_torchs_and_members_are_safetensors(rows: list[list[float]], dtype: str) -> None:
    form = replace(FORM, dtype=dtype)
    expected = torch.tensor(rows, dtype=torch.float32).to(getattr(torch, dtype))
    bits = to_bits(np.array(rows), form, "x")
    member = to_member(bits, form)
    assert torch.equal(load(member)["latents"], expected), "the library reads what is written"
    assert parse_member(member, "x") == (len(rows), WIDTH, dtype)
    assert member[len(member) - bits.nbytes :] == bits.tobytes()
    assert np.array_equal(to_float(bits, form), expected.float().numpy())


def test_indices_say_where_latents_are_and_rebuild(folder: Path) -> None:
    dataset = Dataset.open(folder)
    split = dataset.split("train")
    assert sum(n for _, n in dataset.validate()) == 60
    assert dataset.latent_format == replace(FORM, dtype=folder.name) and split.latent_rows is not None
    for i in range(len(split)):
        members = split.members(i)
        bits = split.latents(i)
        assert ("latents.safetensors" in members) == (bits is not None) == bool(i % 4 or i % 5 == 4 or i % 3 == 1)
        if bits is not None:
            theirs = load(members["latents.safetensors"])["latents"]
            assert torch.equal(theirs.view(torch.int16), torch.from_numpy(bits.view(np.int16).copy()))
        counts = [int((split.tokens(i) == dataset.vocabulary.range_of(m).start).sum()) for m in ("image", "sound")]
        assert split.latent_rows.latent_counts[i].tolist() == [0, counts[0], 0, counts[1]]
    for tar in folder.glob("*.tar"):
        stored = ShardIndex.load(index_path(tar))
        again = scan_shard(tar)
        assert stored.header == again.header
        assert all(np.array_equal(stored.arrays()[name], array) for name, array in again.arrays().items())


def test_every_vector_lies_at_its_slot(folder: Path) -> None:
    dataset = Dataset.open(folder)
    split, table = dataset.split("train"), dataset.vocabulary.modality_table()
    weights = {"image": 0.5, "sound": 2.0}
    stream = Stream(dataset, config_of(folder, modality_weights=weights), dp_rank=0, dp_size=1)
    documents = {split.tokens(i).tobytes(): i for i in range(len(split))}
    slots = torch.tensor([dataset.vocabulary.range_of(m).start for m in ("image", "sound")])
    shapes, met = set(), 0
    for _ in range(4):
        step = stream.next()
        rows = whole([step])
        shapes.add(tuple(rows["latents"].shape))
        assert rows["latents"].dtype == getattr(torch, folder.name)
        weight = 0.0
        for r in range(12):
            pos, n = rows["latent_pos"][r], int((rows["latent_pos"][r] >= 0).sum())
            at = torch.isin(rows["tokens"][r], slots).nonzero()[:, 0]
            assert torch.equal(pos[:n], at) and (pos[n:] == -1).all()
            assert not rows["latents"][r, n:].any() and not rows["latent_weight"][r, n:].any()
            assert not rows["loss_weight"][r][torch.isin(rows["labels"][r], slots)].any()
            ends, used = rows["cu_seqlens"][r].tolist(), 0
            for a, b in zip(ends[:-1], ends[1:], strict=True):
                sample = documents.get(rows["tokens"][r, a:b].numpy().tobytes()) if b > a else None
                bits = None if sample is None else split.latents(sample)
                if bits is not None:
                    found = rows["latents"][r, used : used + len(bits)].view(torch.int16).numpy().view(np.uint16)
                    assert np.array_equal(found, bits)
                    used += len(bits)
            assert used == n
            met += n
            kinds = [["text", "image", "bytes", "sound"][table[t]] for t in rows["tokens"][r, at].tolist()]
            assert rows["latent_weight"][r, :n].tolist() == [weights[kind] for kind in kinds]
            weight += sum(weights[kind] for kind in kinds)
        assert step.latent_weight == pytest.approx(weight) and list(step.latents) == ["image", "sound"]
        assert step.latents["image"] * 0.5 + step.latents["sound"] * 2.0 == pytest.approx(weight)
        assert step.total_weight == pytest.approx(float(rows["loss_weight"].double().sum()), rel=1e-12)
    assert len(shapes) == 1 and met > 100, "one shape in every step"


def test_the_same_on_any_number_of_ranks_and_workers_and_after_a_resume(folder: Path) -> None:
    dataset = Dataset.open(folder)
    alone = Stream(dataset, config_of(folder), dp_rank=0, dp_size=1)
    first, state = whole([alone.next()]), json.loads(json.dumps(alone.state_dict()))
    second = whole([alone.next()])
    for size, workers in ((1, 0), (2, 0), (3, 1), (4, 0), (12, 0)):
        config = config_of(folder, workers=workers)
        streams = [Stream(dataset, config, dp_rank=rank, dp_size=size) for rank in range(size)]
        try:
            assert equal(whole([stream.next() for stream in streams]), first)
            for stream in streams:
                stream.load_state_dict(state)
            assert equal(whole([stream.next() for stream in streams]), second)
        finally:
            for stream in streams:
                stream.close()


def flip(folder: Path, sample: int) -> str:
    """Flips a bit of a sample's latents; where that is."""
    split = Dataset.open(folder).split("train")
    assert split.latent_rows is not None
    shard, offset = int(split.shard[sample]), int(split.latent_rows.latent_offset[sample])
    path = split.files.paths[shard]
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 4]))
    return f"{path.name}: corrupt .*offset {offset}"


def test_a_flipped_bit_is_found_masked_and_replayed(folder: Path, copy: Path) -> None:
    where = flip(copy, 5)
    with pytest.raises(BadSampleError, match=where):
        Dataset.open(copy).split("train").latents(5)
    with pytest.raises(DataError, match="sha256"):
        list(Dataset.open(copy).validate())
    bearing = {"quarantine": QuarantineConfig(9, 1.0, 99, max_window_share=1.0), "window": 60}
    streams = [Stream(Dataset.open(f), config_of(f, **bearing), dp_rank=0, dp_size=1) for f in (copy, folder)]
    masked, good = ([stream.next() for _ in range(2)] for stream in streams)
    (entry,) = streams[0].ledger
    assert entry["reason"] == "corrupt" and sum(step.masked for step in masked) > 0
    a, b = whole(masked), whole(good)
    lost = int((b["latent_pos"] >= 0).sum() - (a["latent_pos"] >= 0).sum())
    gone = Dataset.open(folder).split("train").latents(5)
    assert gone is not None and lost >= len(gone)
    assert [s.total_weight for s in masked] == [s.total_weight for s in good]
    assert [s.latent_weight for s in masked] == [s.latent_weight for s in good]
    for r in range(len(a["tokens"])):
        n = int((a["latent_pos"][r] >= 0).sum())
        kept = torch.isin(b["latent_pos"][r], a["latent_pos"][r, :n]) & (b["latent_pos"][r] >= 0)
        assert torch.equal(a["latents"][r, :n], b["latents"][r][kept])
        assert not a["latents"][r, n:].any() and (a["latent_pos"][r, n:] == -1).all()
    # From the ledger the readable copy is masked to the same bits.
    state = {**streams[0].state_dict(), "step": 0, "draws": 0, "places": [[0, 0, 0, 0]]}
    replayed = [
        Stream(Dataset.open(f), config_of(f, **bearing), dp_rank=0, dp_size=1, state=state) for f in (copy, folder)
    ]
    assert all(equal(whole([x]), whole([y])) for x, y in zip(*([s.next(), s.next()] for s in replayed), strict=True))


def _shared(folder: str, config: StreamConfig) -> Any:
    rank = dist.get_rank()
    dataset = Dataset.open(folder)
    together = Stream(dataset, config, dp_rank=0, dp_size=1, model_group=dist.group.WORLD)
    alone = Stream(dataset, config, dp_rank=0, dp_size=1)
    good = True
    for _ in range(3):
        batches = together.next().micro_batches
        good &= all(equal(a, b) for a, b in zip(batches, alone.next().micro_batches, strict=True))
        good &= all(same_everywhere(batch, dist.group.WORLD) for batch in batches)
    return rank, good


def test_latents_travel_within_a_model_parallel_group(folder: Path) -> None:
    assert run_ranks(2, _shared, str(folder), config_of(folder)) == [(0, True), (1, True)]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.floats(0, 1)), min_size=1, max_size=30), st.integers(40, 200))
def test_the_room_is_enough_for_any_row(documents: list[tuple[int, float]], seq_len: int) -> None:
    lengths = np.array([length for length, _ in documents])
    counts = np.array([int(length * share) for length, share in documents])
    most = most_in_a_row(lengths, counts, seq_len)
    # Brute force: the most latents that fit into seq_len tokens, by dynamic programming over all subsets.
    best = np.zeros(seq_len + 1, dtype=int)
    for length, count in zip(lengths.tolist(), counts.tolist(), strict=True):
        best[length:] = np.maximum(best[length:], best[:-length] + count)
    assert best.max() <= most <= seq_len


def test_refusals(tokenizer: TextTokenizer, folder: Path, copy: Path, tmp_path: Path) -> None:
    for latents, message in (
        (np.zeros((2, 4)), r"latents are float \[n, 3\], got float64 \[2, 4\]"),
        (np.full((2, 3), np.nan), "must be finite"),
        (np.full((2, 3), 1e39), "at most 3.38953e"),
        (np.zeros((2, 3), dtype=np.int64), "got int64"),
    ):
        with pytest.raises(DataError, match=f"doc: .*{message}"):
            to_bits(latents, FORM, "doc")
    with pytest.raises(DataError, match="at most 65504 in float16"):
        to_bits(np.full((1, 3), 7e4), replace(FORM, dtype="float16"), "doc")
    composer = composer_of(tokenizer)
    marks = fingerprints(composer.vocabulary, composer.tokenizer, composer.codecs)
    tokens = composer.document([("image", np.zeros((2, WIDTH)))])
    with pytest.raises(DataError, match="sample 'a': 2 slots among its tokens, but 1 latents"):
        with ShardWriter(tmp_path, "train", composer.vocabulary, marks, latents=FORM) as writer:
            writer.write(Sample("a", "x", tokens, [("image", 4)], latents=np.zeros((1, WIDTH))))
    assert not list(tmp_path.glob("*.tar*"))
    other = {"a": GivenLatents(width=3), "b": GivenLatents(width=4)}
    with pytest.raises(DataError, match="a has 3 x bfloat16, b has 4 x bfloat16"):
        LatentFormat.of(other)
    with pytest.raises(DataError, match="2 slots or more, but 1 latents"):
        composer.decode(tokens, np.zeros((1, WIDTH), dtype=np.float32))
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["latents"]["width"] = 9
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="its codecs make LatentFormat"):
        Dataset.open(copy)
    for payload in (b"", b"\xff" * 8, b"\x02" + bytes(7) + b"{}", to_member(np.zeros((2, 3), np.uint16), FORM)[:-1]):
        with pytest.raises(DataError, match=r"x: latents\.safetensors is no safetensors file with one tensor"):
            parse_member(payload, "x")


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_members_are_refused_and_nothing_else(draw: st.DataObject) -> None:
    member = bytearray(to_member(np.arange(12, dtype=np.uint16).reshape(4, 3), FORM))
    for _ in range(draw.draw(st.integers(1, 4))):
        member[draw.draw(st.integers(0, len(member) - 1))] = draw.draw(st.integers(0, 255))
    try:
        rows, width, _ = parse_member(bytes(member), "x")
    except DataError:
        return
    assert rows * width == 12


def test_a_folder_of_latents_becomes_a_data_set(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    torch.manual_seed(0)
    made = {}
    for i in range(6):
        made[f"p{i}"] = torch.randn(5 + i, 4).to(torch.float16 if i % 2 else torch.float32)
        save_file({"latents": made[f"p{i}"]}, source / f"p{i}.safetensors")
        (source / f"p{i}.txt").write_text(f"picture number {i} of a small set " * 3)
    list(encode_folder(source, tmp_path / "out", EncodeConfig(text_vocab=300)))
    dataset = Dataset.open(tmp_path / "out")
    assert dataset.vocabulary.modalities == ("text", "latent") and dataset.vocabulary.sizes[1] == 1
    split = dataset.split("train")
    for i in range(6):
        vectors = split.vectors(i)
        assert vectors is not None
        expected = made[Path(split.meta(i)["file"]).stem]
        assert np.array_equal(vectors, expected.to(torch.bfloat16).float().numpy())
    run = CliRunner().invoke(data, ["inspect", str(tmp_path / "out")])
    assert run.exit_code == 0 and "of which 45 latents of 4 x bfloat16" in run.output
    write_preview(dataset, "train", tmp_path / "p.html", samples=6, packs=2, seq_len=256, window=64, seed=0)
    assert (tmp_path / "p.html").read_text().count("latents of width 4") == 12  # alt and title
    save_file({"latents": torch.randn(5, 7)}, source / "q.safetensors")
    with pytest.raises(DataError, match=r"q\.safetensors: latents are float \[n, 4\], got float32 \(5, 7\)"):
        list(encode_folder(source, tmp_path / "other", EncodeConfig(text_vocab=300)))
