"""`polylepis data bench` on the quickstart data set, written down: python -m benchmarks.data [FOLDER [PYTHON]].

PYTHON is an interpreter that has some of litdata, mosaicml-streaming and megatron-energon, and numpy and Pillow
for ours; they are no dependencies of this project.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def main(folder: str = "runs/quickstart/shards", python: str = sys.executable) -> None:
    from polylepis.data.bench import bench, report
    from polylepis.data.corpus import build_quickstart

    if not Path(folder).exists():
        build_quickstart(folder)
    result = bench(Path(folder), split="train", samples=20_000, position=15_000, resident=100_000, python=python)
    load = os.getloadavg()
    head = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(head, capture_output=True, text=True, cwd=RESULTS).stdout.strip() or "unknown"
    machine = f"{platform.machine()}, {os.cpu_count()} CPUs, load {load[0]:.1f}, Python {platform.python_version()}"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "data_cpu.json").write_text(
        json.dumps({"machine": machine, "commit": commit, **result}, indent=1) + "\n"
    )
    (RESULTS / "data_cpu.md").write_text(
        f"`python -m benchmarks.data`, commit {commit}, {machine}; quickstart data set, each reader in one process, "
        "files in the page cache.\n\n"
        f"```\n{report(result)}\n```\n"
    )
    print(report(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
