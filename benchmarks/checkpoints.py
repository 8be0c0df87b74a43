"""Saving and restoring on one process: ``python -m benchmarks.checkpoints --folder DIR`` in the repository root.

The quickstart's model, ``--width`` wide, trains on mock data. What counts is how long a step waits for a save (in the
loop, in the background, on a local disk), how long the background writes, what that costs the steps meanwhile, and how
long each tier takes to come back. ``--repeats`` rounds, the least of each row: neighbours only ever add time.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.ssd import machine
from polylepis.checkpoints.content import content_sum
from polylepis.checkpoints.host import Snapshot
from polylepis.checkpoints.keeper import Keeper
from polylepis.checkpoints.manifest import hash_file
from polylepis.checkpoints.rules import KeepRules
from polylepis.checkpoints.sharded import content_damages, load_checkpoint
from polylepis.checkpoints.tensors import state_tensors
from polylepis.data.mock import MockDataset
from polylepis.data.stream import Stream
from polylepis.parallel.engines.fsdp import FSDPEngine, build_model
from polylepis.parallel.mesh import MeshConfig, build_mesh
from polylepis.parallel.model import count_parameters
from polylepis.pretrain.config import load_config
from polylepis.pretrain.objectives.next_token import next_token
from polylepis.pretrain.optim import build_optimizer
from polylepis.pretrain.shrink import shrink

Rows = dict[str, list[float]]


def timed(rows: Rows, name: str, action: Callable[[], Any]) -> Any:
    started = time.perf_counter()
    result = action()
    rows.setdefault(name, []).append(time.perf_counter() - started)
    return result


def round_of_saves(rows: Rows, folder: Path, models: Any, optimizer: Any) -> None:
    """One save of each kind and one return from each tier."""

    def keeper(name: str, **rules: Any) -> Keeper:
        return Keeper(folder / name, models, optimizer, KeepRules(**({"every": 1, "keep": 1} | rules)))

    with keeper("sync", asynchronous=False) as sync:
        timed(rows, "durable, in the loop: the step waits", lambda: sync.save(1, {}))
    with keeper("async") as background:
        timed(rows, "durable, in the background: the first step waits", lambda: background.save(1, {}))
        background.wait()
        background.times()
        timed(rows, "durable, in the background: later steps wait", lambda: background.save(2, {}))
        background.wait()
        rows.setdefault("durable, in the background: it writes", []).append(background.times()["write_seconds"])
    local = {"local_folder": str(folder / "fast"), "local_every": 1}
    tier = keeper("local", **(local | {"every": 0}))
    tier.resume()
    tier.after_step(1, dict)
    tier.wait()
    tier.times()
    timed(rows, "local: the step waits", lambda: tier.after_step(2, dict))
    tier.wait()
    rows.setdefault("local: it writes", []).append(tier.times()["local_write_seconds"])
    timed(rows, "local: comes back, hash checked", tier.resume)
    newest = folder / "async" / "step-00000002"
    timed(rows, "durable: comes back, content checked", lambda: load_checkpoint(newest, models, optimizer))
    unchecked = {"check_content": False}
    timed(rows, "durable: comes back, unchecked", lambda: load_checkpoint(newest, models, optimizer, **unchecked))
    timed(rows, "verify, tensor by tensor", lambda: list(content_damages(newest)))
    snapshot = Snapshot()
    snapshot.take(models, optimizer, {})
    timed(rows, "memory: the step waits", lambda: snapshot.take(models, optimizer, {}))
    timed(rows, "memory: comes back", snapshot.restore)
    tensors = state_tensors(models, optimizer)
    values = [t.to_local() if hasattr(t, "to_local") else t for t in tensors.values()]
    timed(rows, "content hash of everything", lambda: [content_sum(value) for value in values])
    timed(rows, "sha256 of the file", lambda: hash_file(newest / "__0_0.distcp"))
    shutil.rmtree(folder)


def steps_meanwhile(rows: Rows, folder: Path, engine: FSDPEngine, stream: Stream) -> None:
    """Steps while nothing is written, and while the background writes."""

    def step() -> None:
        data = stream.next()
        engine.accumulate(data.micro_batches, data.total_weight)
        engine.update(1e-6)

    step()
    for _ in range(4):
        timed(rows, "a step while nothing is written", step)
    with Keeper(folder, engine.models, engine.optimizer, KeepRules(every=1, keep=1)) as keeper:
        keeper.save(1, {})
        while keeper.writing:
            timed(rows, "a step while the background writes", step)
    shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the files go; the system's temporary folder otherwise")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = load_config("quickstart")
    model_config = replace(config.model, d_model=args.width)
    model = build_model(model_config, build_mesh(MeshConfig(dp_shard=1), "cpu"))
    optimizer = build_optimizer(config.optim, model)
    data = replace(shrink(config).data, seq_len=256)
    stream = Stream(MockDataset(model_config.modalities, model_config.vocab_size, 256), data, dp_rank=0, dp_size=1)
    engine = FSDPEngine(model, optimizer, next_token)
    state = sum(t.numel() * t.element_size() for t in state_tensors((model,), optimizer).values())
    rows: Rows = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for number in range(args.repeats):
            round_of_saves(rows, Path(folder) / str(number), (model,), optimizer)
            steps_meanwhile(rows, Path(folder) / "meanwhile", engine, stream)
    lines = ["# Checkpoints on one process", "", " ".join((__doc__ or "").split()), ""]
    facts = machine() | {"command": " ".join(["python -m benchmarks.checkpoints", *sys.argv[1:]])}
    facts["load average"] = " ".join(f"{load:.1f}" for load in os.getloadavg())
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    parameters = f"{count_parameters(model_config):,} parameters"
    lines += [
        f"- {parameters}, {state / 1e6:,.0f} MB with both moments; {args.repeats} rounds",
        "",
        "| what | s | GB/s |",
        "|---|---|---|",
    ]
    for name, seconds in rows.items():
        rate = "" if name.startswith("a step") else f"{state / min(seconds) / 1e9:.2f}"
        lines.append(f"| {name} | {min(seconds):.3f} | {rate} |")
    median = {name: statistics.median(seconds) for name, seconds in rows.items() if name.startswith("a step")}
    lines += ["", "Medians of steps: " + "; ".join(f"{name} {value:.3f} s" for name, value in median.items()) + "."]
    text = "\n".join(lines) + "\n"
    print(text)
    if args.markdown:
        args.markdown.write_text(text)


if __name__ == "__main__":
    main()
