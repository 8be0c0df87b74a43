"""Bytes and series of numbers: codes within their stated error, through `encode`, `audit`, `inspect` and `preview`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from polylepis.data.codecs import ByteCodec, Codec, SeriesCodec, load_codec
from polylepis.data.commands import data
from polylepis.data.dataset import Dataset
from polylepis.data.encode import encode_folder
from polylepis.data.errors import DataError
from polylepis.data.media import read_series
from polylepis.data.preview import hex_dump, write_preview
from polylepis.data.stream import Stream, StreamConfig
from polylepis.data.tasks import EncodeConfig


@given(st.binary(min_size=1, max_size=300))
def test_bytes_are_their_codes(content: bytes) -> None:
    codec = ByteCodec()
    codes = codec.encode(np.frombuffer(content, np.uint8))
    assert codes.tolist() == list(content) and codec.decode(codes).tobytes() == content


@settings(max_examples=200, deadline=None)
@given(
    st.floats(-1e6, 1e6),
    st.floats(1e-3, 1e6),
    st.integers(2, 4096),
    st.sampled_from(["mu", "uniform"]),
    st.lists(st.one_of(st.floats(-0.5, 1.5), st.just(float("nan"))), min_size=1, max_size=50),
)
def test_numbers_come_back_within_half_a_bin(low: float, span: float, bins: int, law: str, at: list[float]) -> None:
    codec = SeriesCodec(low=low, high=low + span, bins=bins, law=law)
    values = low + np.array(at) * span
    codes = codec.encode(values)
    back = codec.decode(codes).astype(np.float64)
    missing = np.isnan(values)
    assert np.array_equal(codes == bins, missing) and np.array_equal(np.isnan(back), missing)
    assert codes.min() >= 0 and codes.max() < codec.vocab_size == bins + 1
    inside = np.clip(values[~missing], low, low + span)
    # The width of a bin at distance x of -1..1 from the middle; mu-law's derivative of the inverse grows with |x|.
    x = 2 * (inside - low) / span - 1
    width = span / bins
    if law == "mu":
        width = width * np.log(256) * (1 / 255 + np.abs(x)) * 256 ** (1 / bins)
    rounding = 1e-6 * (abs(low) + span)  # float32
    assert (np.abs(back[~missing] - inside) <= width + rounding).all()
    order = np.argsort(inside, kind="stable")
    assert (np.diff(codes[~missing][order]) >= 0).all(), "larger numbers never get smaller codes"


def test_the_curve_is_that_of_g711() -> None:
    codec = SeriesCodec(low=-1.0, high=1.0, bins=256, law="mu")
    x = np.linspace(-1, 1, 1001)
    curve = np.sign(x) * np.log(1 + 255 * np.abs(x)) / np.log(256)
    assert np.abs(codec.encode(x) - np.minimum((curve + 1) * 128, 255)).max() <= 1
    assert np.abs(codec.decode(codec.encode(np.array([0.001]))) - 0.001).max() < 1e-4


def test_files_and_fingerprints(tmp_path: Path) -> None:
    codecs: list[Codec] = [ByteCodec(), SeriesCodec(low=0, high=1, bins=8), SeriesCodec(low=0, high=1, bins=9)]
    for number, codec in enumerate(codecs):
        assert isinstance(codec, Codec)
        codec.save(tmp_path / f"{number}.npz")
        assert load_codec(tmp_path / f"{number}.npz").fingerprint == codec.fingerprint
    assert len({codec.fingerprint for codec in codecs}) == 3


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    rng = np.random.default_rng(0)
    for i in range(4):
        (folder / f"net{i}.pcap").write_bytes(rng.integers(0, 256, 500 + i).astype(np.uint8).tobytes())
        (folder / f"net{i}.txt").write_text("packets of a quiet network " * (i + 1))
        lines = ["date,flow,heat"]
        for t in range(120 + i):
            heat = "" if t % 50 == 7 else f"{np.cos(t / 9) * 30:.3f}"
            lines.append(f"2016-07-0{1 + t % 9},{np.sin(t / 5) * 100:.3f},{heat}")
        (folder / f"plant{i}.csv").write_text("\n".join(lines))
    return folder


CONFIG = EncodeConfig(max_tokens=128, text_vocab=300, byte_files=(".pcap",), series_bins=4096)


@pytest.fixture(scope="module")
def encoded(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("encoded") / "out"
    list(encode_folder(source, out, CONFIG))
    return out


def test_what_a_folder_of_bytes_and_series_becomes(source: Path, encoded: Path) -> None:
    dataset = Dataset.open(encoded)
    assert dataset.vocabulary.modalities == ("text", "bytes", "series")
    assert dataset.vocabulary.sizes[1:] == (256, 4097)
    split = dataset.split("train")
    assert sum(n for _, n in dataset.validate()) == len(split) and split.lengths.max() <= 128
    packets: dict[str, bytes] = {}
    columns: dict[tuple[str, str], list[np.ndarray]] = {}
    for _, meta, tokens in dataset.documents("train"):
        for modality, content in dataset.composer.decode(tokens):
            if modality == "bytes":
                packets[meta["file"]] = packets.get(meta["file"], b"") + np.asarray(content).tobytes()
            elif modality == "series":
                columns.setdefault((meta["file"], meta["column"]), []).append(np.asarray(content))
            else:
                assert content == (source / meta["file"]).with_suffix(".txt").read_text().strip()
    assert packets == {path.name: path.read_bytes() for path in source.glob("*.pcap")}
    assert len(columns) == 8, "the dates are no series"
    for (file, column), pieces in columns.items():
        expected = read_series((source / file).read_bytes(), file)[column]
        found = np.concatenate(pieces)
        assert np.array_equal(np.isnan(found), np.isnan(expected)) and np.isnan(expected).any() == (column == "heat")
        assert np.nanmax(np.abs(found - expected)) < 0.4  # of a range of 200, by 4,096 bins of the mu law


def test_they_stream_and_the_tools_show_them(encoded: Path, tmp_path: Path) -> None:
    dataset = Dataset.open(encoded)
    step = Stream(dataset, StreamConfig(str(encoded), global_batch=8), dp_rank=0, dp_size=1).next()
    assert min(step.tokens["bytes"], step.tokens["series"]) > 0 and step.latents == {}
    run = CliRunner()
    audit = run.invoke(data, ["audit", str(encoded), "--seq-len", "256", "--steps", "9"])
    assert audit.exit_code == 0 and "bytes" in audit.output and "each exactly once" in audit.output
    shown = run.invoke(data, ["inspect", str(encoded), "--samples", "12"])
    assert shown.exit_code == 0 and "bytes: uint8" in shown.output and "series: float32" in shown.output
    page = tmp_path / "p.html"
    write_preview(dataset, "train", page, samples=40, packs=2, seq_len=256, window=64, seed=0)
    text = page.read_text()
    assert "<pre>000000  " in text and '<path d="M' in text


def test_a_dump_reads_like_a_dump() -> None:
    dump = hex_dump(np.frombuffer(b"GET / HTTP/1.1\r\nHost: x", np.uint8))
    assert dump.splitlines()[0] == "000000  47 45 54 20 2f 20 48 54 54 50 2f 31 2e 31 0d 0a  GET / HTTP/1.1.."
    assert hex_dump(np.zeros(300, np.uint8)).splitlines()[-1] == "… 300 bytes"


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"low < high, bins >= 2 and a law among mu, uniform are needed, got 1\.0\.\.1"):
        SeriesCodec(low=1.0, high=1.0)
    with pytest.raises(DataError, match="finite or missing"):
        SeriesCodec(low=0, high=1).encode(np.array([np.inf]))
    with pytest.raises(DataError, match="two different finite numbers"):
        SeriesCodec.train([np.array([1.0, np.nan])], bins=4, law="mu")
    with pytest.raises(DataError, match=r"uint8 \[n\], got int64"):
        ByteCodec().encode(np.zeros(3, np.int64))
    with pytest.raises(DataError, match=r"byte_files: '\.png' is no ending of its own"):
        EncodeConfig(byte_files=(".png",))
    for content, message in (
        ("a,b\n1,2\n3\n", "row 3: 1 fields, 2 expected"),
        ("a,b\n1,2\n3,x\n", "row 3: could not convert"),
        ("a,b\n", "no column of numbers"),
        ("a,a\n1,2\n", "two of one name"),
        ("1,inf\n", "an infinite number"),
    ):
        (tmp_path / "x.csv").write_text(content)
        with pytest.raises(DataError, match=rf"x\.csv.*{message}"):
            read_series((tmp_path / "x.csv").read_bytes(), "x.csv")
