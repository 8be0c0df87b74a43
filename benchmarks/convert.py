"""Memory and time of exporting the 8,654,517,248-parameter shape: python -m benchmarks.convert [--source float32].

The checkpoint is zeros, written sparsely: the export reads, casts, hashes, writes and reads back every byte all the
same. The export runs in a process of its own, whose peak resident memory the kernel reports.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

RESULTS = Path(__file__).parent / "results"
RECIPE = "mamba2-hybrid-8b"
LIMIT_GIB, LIMIT_SECONDS = 2.5, 90
BLOCK = 1 << 20
ZEROS = bytes(BLOCK)


def write_zeros(folder: Path, dtype: Any) -> int:
    """A distributed checkpoint of the recipe's model, its elements holes in a file; the number of parameters."""
    import torch
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    from polylepis.checkpoints.hf.layout import model_shapes
    from polylepis.parallel.model import count_parameters
    from polylepis.pretrain.config import load_config

    config = load_config(RECIPE).model
    folder.mkdir(parents=True)
    entries, where = {}, {}
    with open(folder / "__0_0.distcp", "wb") as file:
        for name, shape in model_shapes(config).items():
            size = torch.Size(shape)
            start = file.tell()
            torch.save(torch.zeros(size, dtype=dtype), Sparse(file))
            origin = torch.Size([0] * len(size))
            chunks = [ChunkStorageMetadata(origin, size)]
            entries[name] = TensorStorageMetadata(TensorProperties(dtype), size, chunks)
            where[MetadataIndex(name, origin, 0)] = _StorageInfo("__0_0.distcp", start, file.tell() - start)
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata(state_dict_metadata=entries, storage_data=where)))
    return count_parameters(config)


class Sparse(io.RawIOBase):
    """Skips zeros instead of writing them: the file has a hole there, which reads as zeros."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), BLOCK):
            block = view[start : start + BLOCK]
            if block == ZEROS[: len(block)]:
                self._file.seek(len(block), os.SEEK_CUR)
            else:
                self._file.write(block)
        return len(view)


def export_once(source: Path, out: Path) -> None:
    """In a process of its own: export, and print seconds and peak memory as JSON."""
    started = time.perf_counter()
    import torch

    from polylepis.checkpoints.hf.export import export
    from polylepis.checkpoints.sources import Distributed
    from polylepis.pretrain.config import load_config

    torch.set_num_threads(2)
    export(load_config(RECIPE).model, Distributed(source), out, dtype=torch.bfloat16)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    times = os.times()
    result = {"seconds": time.perf_counter() - started, "cpu_seconds": times.user + times.system, "peak_bytes": peak}
    print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", choices=["float32", "bfloat16"], default="float32", help="dtype of the checkpoint")
    parser.add_argument("--folder", type=Path, help="where to write 17 GB, removed afterwards")
    parser.add_argument("--once", nargs=2, type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.once:
        export_once(*given.once)
        return
    import torch

    folder = Path(tempfile.mkdtemp(prefix="polylepis-", dir=given.folder))
    try:
        parameters = write_zeros(folder / "checkpoint", getattr(torch, given.source))
        command = [sys.executable, "-m", "benchmarks.convert", "--once", folder / "checkpoint", folder / "hf"]
        done = subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)
        result = json.loads(done.stdout.splitlines()[-1])
        written = sum(path.stat().st_size for path in (folder / "hf").iterdir())
    finally:
        shutil.rmtree(folder)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    load = os.getloadavg()[0]
    facts = {
        "command": f"python -m benchmarks.convert --source {given.source}",
        "commit": commit,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, load {load:.1f}, Python {platform.python_version()}, "
        f"torch {torch.__version__}",
        "parameters": parameters,
        "written_bytes": written,
        **result,
    }
    lines = [
        f"`{facts['command']}`, commit {commit}, {facts['machine']}.",
        "",
        "| | measured | goal |",
        "|---|---|---|",
        f"| parameters | {parameters:,} | |",
        f"| written, and read back | {written / 1e9:.1f} GB bfloat16 | |",
        f"| peak resident memory | {result['peak_bytes'] / 2**30:.2f} GiB | ≤ {LIMIT_GIB} GiB |",
        f"| wall time | {result['seconds']:.0f} s | ≤ {LIMIT_SECONDS} s |",
        f"| CPU time | {result['cpu_seconds']:.0f} s | |",
    ]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "convert_cpu.json").write_text(json.dumps(facts, indent=1) + "\n")
    (RESULTS / "convert_cpu.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
