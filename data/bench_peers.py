"""Other projects' readers on the same samples: PYTHON -m polylepis.data.bench_peers NAME PATH SPLIT SAMPLES.

They are no dependencies: a peer is measured, in a process of its own, where the given Python can import it. Conversion
into its format is not timed; reading is, in CPU seconds, shuffled as the peer does it, without workers.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

PEERS = ("litdata", "mosaicml-streaming", "megatron-energon")
_SECONDS = 600
Samples = Iterator[dict[str, Any]]


def measure(name: str, python: str, path: Path, split: str, samples: int) -> dict[str, Any]:
    """{version, raw, tokens, decoded (samples per CPU second)} of a peer, or {error: why not}."""
    command = [python, "-m", "polylepis.data.bench_peers", name, str(path), split, str(samples)]
    with tempfile.TemporaryDirectory() as path_entry:
        # Another interpreter knows nothing of this installation, and a checkout's folder can have any name.
        (Path(path_entry) / "polylepis").symlink_to(Path(__file__).resolve().parents[1])
        environment = {**os.environ, "PYTHONPATH": path_entry}
        try:
            done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=_SECONDS)
        except subprocess.TimeoutExpired:
            return {"error": f"no result within {_SECONDS} s"}
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    lines = done.stderr.strip().splitlines()
    return {"error": lines[-1] if lines else f"exit code {done.returncode}"}


def _litdata(folder: Path, members: Callable[[], Samples], work: Path) -> Callable[[], Samples]:
    from litdata import StreamingDataset
    from litdata.streaming.cache import Cache

    cache = Cache(str(work), chunk_bytes="64MB")
    for i, sample in enumerate(members()):
        cache[i] = sample
    cache.done()
    cache.merge()
    return lambda: iter(StreamingDataset(str(work), shuffle=True))


def _mosaic(folder: Path, members: Callable[[], Samples], work: Path) -> Callable[[], Samples]:
    from streaming import MDSWriter, StreamingDataset

    columns = dict.fromkeys(next(members()), "bytes")
    with MDSWriter(out=str(work), columns=columns) as writer:
        for sample in members():
            writer.write(sample)
    return lambda: iter(StreamingDataset(local=str(work), shuffle=True, batch_size=64))


def _energon(folder: Path, members: Callable[[], Samples], work: Path) -> Callable[[], Samples]:
    """Reads our tars as they are; only its own counts and index are made beside them."""
    from megatron import energon
    from megatron.energon.epathlib import EPath
    from megatron.energon.flavors.webdataset import prepare

    preparator = next(value for name, value in vars(prepare).items() if name.startswith("WebdatasetPrep"))
    paths = sorted(tar.name for tar in folder.glob("*.tar"))
    preparator.prepare_dataset(EPath(folder), paths, split_parts_ratio=[("train", 1.0)], shuffle_seed=None, workers=1)
    crude = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
    (folder / ".nv-meta" / "dataset.yaml").write_text(json.dumps(crude))

    @dataclass
    class Raw(energon.Sample):
        members: dict[str, Any]

    def cook(raw: dict[str, Any]) -> Raw:
        return Raw(**energon.basic_sample_keys(raw), members=raw)

    class AsItIs(energon.DefaultTaskEncoder):
        decoder = None
        cookers = (energon.Cooker(energon.stateless(cook)),)

        @energon.stateless
        def batch(self, samples: list[Any]) -> list[Any]:
            return samples

    def read() -> Samples:
        workers = energon.WorkerConfig(rank=0, world_size=1, num_workers=0)
        chosen = energon.get_train_dataset(
            str(folder),
            worker_config=workers,
            batch_size=100,  # its loader collects garbage every ten batches, which would be every ten samples
            shuffle_buffer_size=1000,
            max_samples_per_sequence=100,
            repeat=False,
            task_encoder=AsItIs(),
        )
        return (sample.members for batch in energon.get_loader(chosen) for sample in batch)

    return read


_OPEN = dict(zip(PEERS, (_litdata, _mosaic, _energon), strict=True))


def main(name: str, path: str, split: str, samples: str) -> None:
    """Converts, reads, and prints one line of JSON."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = version(name)
    except PackageNotFoundError:
        sys.exit(f"{name} is not installed")
    from .bench import _array, _decode
    from .dataset import Dataset

    chosen = Dataset.open(path).split(split)

    def members() -> Samples:
        for i in range(len(chosen)):
            whole = chosen.members(i)
            yield {"json": whole["json"], "tokens": whole["tokens.npy"], "png": whole.get("png", b"")}

    count = int(samples)
    with tempfile.TemporaryDirectory() as work:
        source = Path(work) / "tars"
        source.mkdir()
        for tar in chosen.files.paths:  # this split's shards alone
            os.symlink(tar.resolve(), source / tar.name)
        target = Path(work) / "converted"
        target.mkdir()
        read = _OPEN[name](source, members, target)

        def cycle() -> Samples:
            while True:
                yield from read()

        def decode(sample: dict[str, Any]) -> Any:
            members = {"json": _member(sample, "json"), "tokens.npy": _member(sample, "tokens")}
            png = sample.get("png")
            return _decode({**members, "png": png} if png else members)

        kinds: dict[str, Callable[[dict[str, Any]], Any]] = {
            "raw": lambda sample: sample,
            "tokens": lambda sample: _array(_member(sample, "tokens")),
            "decoded": decode,
        }
        rates = {}
        for kind, work_on in kinds.items():
            best = 0.0
            for _ in range(2):
                started = _cpu()
                for sample in islice(cycle(), count):
                    work_on(sample)
                best = max(best, count / (_cpu() - started))
            rates[kind] = best
    print(json.dumps({"version": found, **rates}))


def _member(sample: dict[str, Any], start: str) -> Any:
    """A member by the beginning of its name, as bytes."""
    return next(bytes(value) for key, value in sample.items() if key.startswith(start))


def _cpu() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(found.ru_utime + found.ru_stime for found in used)


if __name__ == "__main__":
    main(*sys.argv[1:])
