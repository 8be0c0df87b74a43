"""A real object store on loopback, that also answers 503, stops short and lies; and the cache before it."""

from __future__ import annotations

import http.client
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polylepis.data.audit import simulate
from polylepis.data.dataset import Dataset
from polylepis.data.errors import BadSampleError, DataError
from polylepis.data.files import is_url
from polylepis.data.remote import RemoteFolder
from polylepis.data.stream import Stream, StreamConfig

SHARD = "heldout-00000.tar"


class Store:
    """moto's S3 behind a proxy that misbehaves on demand: `faults` of one name are served one after the other."""

    def __init__(self) -> None:
        moto = pytest.importorskip("moto.server")
        pytest.importorskip("s3fs")
        self.moto = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self.moto.start()
        self.port = self.moto.get_host_and_port()[1]
        self.faults: list[str] = []
        self.gets: list[str] = []
        self.sent = 0  # bytes of shards
        store = self

        class Proxy(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def forward(self) -> None:
                connection = http.client.HTTPConnection("127.0.0.1", store.port)
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                connection.request(self.command, self.path, body, dict(self.headers))
                answer = connection.getresponse()
                payload = answer.read()
                is_shard = self.command == "GET" and self.path.partition("?")[0].endswith(".tar")
                fault = store.faults.pop(0) if is_shard and store.faults else ""
                if is_shard:
                    store.gets.append(self.path)
                if fault == "503":
                    self.send_response(503)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                if fault == "empty":  # says so, and is short all the same
                    payload = b""
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    # Without the store's own checksums only ours can find a lie.
                    skipped = ("transfer-encoding", "connection", "server", "date")
                    value = "0" if fault == "empty" and name.lower() == "content-length" else value
                    if name.lower() not in skipped and not name.lower().startswith("x-amz-checksum"):
                        self.send_header(name, value)
                self.end_headers()
                if fault == "short":
                    self.wfile.write(payload[: len(payload) // 2])
                    self.close_connection = True
                    return
                if is_shard:
                    store.sent += len(payload)
                if fault == "corrupt" and payload:
                    middle = len(payload) // 2
                    payload = payload[:middle] + bytes([payload[middle] ^ 1]) + payload[middle + 1 :]
                if self.command != "HEAD":
                    self.wfile.write(payload)

            do_GET = do_HEAD = do_PUT = do_POST = forward  # noqa: N815

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.proxy = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
        threading.Thread(target=self.proxy.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.proxy.server_address[1]}"

    def stop(self) -> None:
        self.proxy.shutdown()
        self.proxy.server_close()
        self.moto.stop()


@pytest.fixture(scope="module")
def store(small: Path) -> Iterator[Store]:
    store = Store()
    environment = {
        "AWS_ENDPOINT_URL": store.url,
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()
        system = s3fs.S3FileSystem()
        system.mkdir("bucket")
        for path in sorted(small.iterdir()):
            system.put_file(str(path), f"bucket/data/{path.name}")
        yield store
    store.stop()


@pytest.fixture
def cache(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    store.faults.clear()
    monkeypatch.setenv("POLYLEPIS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("polylepis.data.remote.time.sleep", lambda seconds: None)
    return tmp_path / "cache"


def test_a_stream_from_s3_is_the_stream_from_the_folder(store: Store, small: Path, cache: Path) -> None:
    remote, local = Dataset.open("s3://bucket/data"), Dataset.open(small)
    assert remote.identity == local.identity and not list(cache.rglob("*.tar"))
    config = StreamConfig("s3://bucket/data", split="heldout", global_batch=8)
    a, b = (Stream(dataset, config, dp_rank=0, dp_size=1) for dataset in (remote, local))
    for _ in range(3):
        x, y = a.next(), b.next()
        assert all(torch.equal(p[k], q[k]) for p, q in zip(x.micro_batches, y.micro_batches, strict=True) for k in p)
    assert [path.name for path in cache.rglob("*.tar")] == [SHARD], "only what was read was fetched"
    assert not list(cache.rglob("*.part"))
    cluster = {"dp_size": 2, "ranks_per_node": 1, "steps": 4, "cache_bytes": 10**9}
    assert simulate(config, **cluster) == simulate(replace(config, path=str(small)), **cluster)
    store.gets.clear()
    again = Stream(Dataset.open("s3://bucket/data"), config, dp_rank=0, dp_size=1, state=a.state_dict())
    assert again.next().doc_digest == b.next().doc_digest and not store.gets


@pytest.mark.parametrize("fault", ["503", "short", "corrupt"])
def test_faults_of_the_store_are_survived(store: Store, small: Path, cache: Path, fault: str) -> None:
    split = Dataset.open("s3://bucket/data").split("heldout")
    store.faults[:] = [fault] * 2
    assert np.array_equal(split.tokens(0), Dataset.open(small).split("heldout").tokens(0))
    assert not store.faults
    (copy,) = cache.rglob("*.tar")
    assert copy.read_bytes() == (small / SHARD).read_bytes()


@pytest.mark.parametrize("how", ["no cache", "large shards"])
def test_without_room_for_a_shard_samples_are_read_by_range(
    store: Store, small: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """mosaicml-streaming #713 and webdataset #432: early ends of range reads must not become samples."""
    monkeypatch.setenv("POLYLEPIS_CACHE_GB" if how == "no cache" else "POLYLEPIS_RANGE_GB", "0")
    config = StreamConfig("s3://bucket/data", split="heldout", global_batch=2, micro_batch=1)
    a, b = (Stream(Dataset.open(p), config, dp_rank=0, dp_size=1) for p in ("s3://bucket/data", small))
    store.gets.clear()
    store.sent = 0
    x, y = a.next(), b.next()
    assert all(torch.equal(p[k], q[k]) for p, q in zip(x.micro_batches, y.micro_batches, strict=True) for k in p)
    documents = sum(int(batch["doc_ids"].max()) + 1 for batch in x.micro_batches)
    width = int(Dataset.open(small).split("heldout").token_bytes[0] // Dataset.open(small).split("heldout").lengths[0])
    assert len(store.gets) == documents, "one request per sample"
    assert store.sent == width * sum(x.tokens.values()), "and not a byte beside its tokens"
    assert not list(cache.rglob("*.tar"))
    # Faults of every kind are survived, whichever request they hit.
    split, local = Dataset.open("s3://bucket/data").split("heldout"), Dataset.open(small).split("heldout")
    for sample, fault in enumerate(["503", "short", "corrupt", "empty"]):
        store.faults[:] = [fault] * 2
        assert np.array_equal(split.tokens(sample), local.tokens(sample)) and not store.faults
    assert split.members(2) == local.members(2), "whole samples are read by range too"
    store.faults[:] = ["corrupt"] * 99
    with pytest.raises(
        BadSampleError,
        match=rf"{SHARD}: 6 tries failed, .* crc32 \w{{8}} at offset \d+, the index says \w{{8}} \('.*' at offset",
    ):
        split.tokens(5)
    store.faults.clear()
    if how == "no cache":
        return
    # A copy that somebody has brought is used.
    RemoteFolder("s3://bucket/data").fetch(SHARD)
    store.gets.clear()
    assert np.array_equal(Dataset.open("s3://bucket/data").split("heldout").tokens(7), local.tokens(7))
    assert not store.gets


def test_sizes_of_the_cache_are_numbers(store: Store, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYLEPIS_CACHE_GB", "much")
    with pytest.raises(DataError, match="POLYLEPIS_CACHE_GB is 'much'; a number of gigabytes >= 0 is needed"):
        RemoteFolder("s3://bucket/data")


def test_a_store_that_always_lies_makes_bad_samples(store: Store, cache: Path) -> None:
    split = Dataset.open("s3://bucket/data").split("heldout")
    store.faults[:] = ["corrupt"] * 99
    with pytest.raises(
        BadSampleError, match=rf"s3://bucket/data/{SHARD}: 6 tries failed, .* sha256 is not the expected"
    ):
        split.tokens(0)
    store.faults.clear()
    assert not list(cache.rglob("*.tar")), "nothing bad got a final name"
    assert len(split.tokens(0)) == split.lengths[0]


def test_a_copy_that_goes_bad_in_the_cache_is_fetched_again(store: Store, small: Path, cache: Path) -> None:
    split = Dataset.open("s3://bucket/data").split("heldout")
    split.tokens(0)
    (copy,) = cache.rglob("*.tar")
    with open(copy, "r+b") as file:
        file.seek(int(split.token_offset[3]))
        file.write(b"\xff\xff")
    store.gets.clear()
    assert np.array_equal(split.tokens(3), Dataset.open(small).split("heldout").tokens(3))
    assert store.gets and copy.read_bytes() == (small / SHARD).read_bytes()


def test_missing_things_are_named(store: Store, cache: Path) -> None:
    with pytest.raises(DataError, match=r"s3://bucket/nowhere/manifest\.json is missing"):
        Dataset.open("s3://bucket/nowhere")
    with pytest.raises(DataError, match="no file system for it here"):
        Dataset.open("nonsense://bucket/data")


def test_many_readers_fetch_once(store: Store, cache: Path, small: Path) -> None:
    size = (small / SHARD).stat().st_size
    store.gets.clear()
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: RemoteFolder("s3://bucket/data").fetch(SHARD, size=size), range(8)))
    assert len(set(paths)) == 1 and paths[0].read_bytes() == (small / SHARD).read_bytes()
    parts = {get.partition("?")[0] for get in store.gets}
    assert len(parts) == 1 and len(store.gets) <= 1 + size // (4 << 20) + 1


def test_the_cache_keeps_its_size(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for i in range(5):
        (source / f"{i}.tar").write_bytes(bytes([i]) * 1000)
    folder = RemoteFolder(f"file://{source}", cache=tmp_path / "cache", cache_bytes=2500)
    for i in (0, 1, 0, 2, 3):
        os.utime(folder.fetch(f"{i}.tar", size=1000), (i + 10, i + 10 if i else 100))
    kept = sorted(path.name for path in folder.local.glob("*.tar"))
    assert kept == ["0.tar", "3.tar"], "the least recently used went"
    tiny = RemoteFolder(f"file://{source}", cache=tmp_path / "tiny", cache_bytes=10)
    assert tiny.fetch("4.tar").read_bytes() == bytes([4]) * 1000, "one shard always fits"


def test_what_is_a_url() -> None:
    assert is_url("s3://a/b") and is_url("file:///a") and not is_url("/a/b") and not is_url(Path("runs/x"))
