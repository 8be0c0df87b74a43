"""How fast a data set is read here, beside webdataset's own reader, in one run on one process.

`raw` is a sample's key and its members' bytes by name; `tokens` its token ids as an array and its key, all that
training reads (ours come by the index, without the other members and the .npy header); `decoded` all its members, with
the json parsed, the tokens as an array and the picture, where there is one, as pixels.
Rates are per second of CPU time, which a busy machine distorts less than wall time. The files should be in the page
cache: each reader reads twice, and the better run counts.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .bench_peers import PEERS, measure
from .dataset import Dataset
from .packing import PackPlan, permute
from .stream import Stream, StreamConfig


def bench(
    path: Path, *, split: str, samples: int, position: int, resident: int, python: str = sys.executable
) -> dict[str, Any]:
    """Measures a data set.

    Args:
        path, split: what to read.
        samples: read by each reader, cycling if there are fewer.
        position: documents before the resume that is timed.
        resident: samples read while watching the resident memory, through four workers.
        python: interpreter that has the peers' packages; those that it lacks are named with the reason.

    Returns:
        samples per CPU second by reader and kind, their ratios, seconds and bytes; see the keys.
    """
    chosen = Dataset.open(path).split(split)
    n = len(chosen)
    order = permute(np.arange(n), n, (1, 0, 0)).tolist()
    mine = [order[i % n] for i in range(samples)]
    ours = {
        "raw": _rate(samples, lambda: _drain((chosen.key(i), chosen.members(i)) for i in mine)),
        "tokens": _rate(samples, lambda: _drain((chosen.key(i), chosen.tokens(i)) for i in mine)),
        "decoded": _rate(samples, lambda: _drain(_decode(chosen.members(i)) for i in mine)),
    }
    urls = [str(tar) for tar in chosen.files.paths]
    theirs = {
        "raw": _rate(samples, lambda: _drain(_webdataset(urls, samples))),
        "tokens": _rate(samples, lambda: _drain(_array(s["tokens.npy"]) for s in _webdataset(urls, samples))),
        "decoded": _rate(samples, lambda: _drain(_decode(s) for s in _webdataset(urls, samples))),
    }
    others = {name: measure(name, python, path, split, samples) for name in PEERS}
    config = StreamConfig(str(path), split=split, seq_len=max(256, int(chosen.lengths.max())), global_batch=8)
    measured = {name: {kind: found[kind] for kind in ours} for name, found in others.items() if "error" not in found}
    return {
        "samples": samples,
        "samples_per_cpu_second": {"polylepis": ours, "webdataset": theirs, **measured},
        "peers": {name: found.get("version") or f"not measured: {found['error']}" for name, found in others.items()},
        "ratio": {kind: ours[kind] / theirs[kind] for kind in ours},
        "planning_us_per_document": planning(chosen.lengths),
        "resume": resume(config, (0, position)),
        "torch": _start(["-c", "import torch"], dict(os.environ), 1),
        "resident": resident_memory(config, resident, workers=4),
    }


def planning(lengths: np.ndarray, *, seq_len: int = 4096, window: int = 4096, documents: int = 65536) -> float:
    """CPU microseconds per document to plan an epoch; lengths are repeated to at least `documents`."""
    many = np.resize(np.minimum(lengths, seq_len), max(documents, len(lengths)))
    plan = PackPlan(many, seq_len=seq_len, window=window, seed=0)
    started = time.process_time()
    plan.packs_per_epoch()
    return (time.process_time() - started) / len(many) * 1e6


def resume(config: StreamConfig, positions: Sequence[int], runs: int = 5) -> dict[str, dict[str, float]]:
    """Seconds in a fresh process that goes on after so many documents, the fastest of `runs` processes.

    Returns:
        position -> {"process": from the call that starts the interpreter to the rows of the next step, as arrays.
        Its parts: "python" (until the first line of the script runs), "numpy", "imports" of all the rest (torch is not
        among it), "open" (data set opened, state loaded) and "first_batch". "site": the part of "python" that the
        module `site` takes, with the .pth files that editable installs and others leave. "cpu": CPU seconds}.
    """
    with tempfile.TemporaryDirectory() as compiled:
        # Bytecode is kept, as an installation does, also where the environment forbids it; the first run writes it.
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
        environment |= {"PYTHONPYCACHEPREFIX": compiled, "PYTHONDONTWRITEBYTECODE": ""}
        _first_batch(config, 0, environment)
        site = [_start([*flags, "-c", "pass"], environment, runs) for flags in (["-I"], ["-I", "-S"])]
        found = {at: [_first_batch(config, at, environment) for _ in range(runs)] for at in positions}
    best = {str(at): min(many, key=lambda one: one["process"]) for at, many in found.items()}
    return {at: {**one, "site": site[0] - site[1]} for at, one in best.items()}


def _first_batch(config: StreamConfig, position: int, environment: dict[str, str]) -> dict[str, float]:
    """One process of `resume`."""
    stream = Stream(Dataset.open(config.path), config, dp_rank=0, dp_size=1)
    here, passed = stream.planner.start, 0
    while passed < position:
        plan = stream.planner.step(here)
        passed += sum(len(pack.samples) for pack in plan.packs)
        here = plan.after
    state = stream.state_dict() | {
        "step": here.draws // config.global_batch,
        "draws": here.draws,
        "places": [list(place) for place in here.places],
    }
    keys = ("path", "split", "seq_len", "global_batch")
    given = json.dumps([{key: getattr(config, key) for key in keys}, state])
    command = [sys.executable, "-c", _RESUME]
    started = time.monotonic()
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=True, env=environment)
    *marks, cpu = json.loads(done.stdout)
    parts = dict(zip(_PARTS, np.diff([started, *marks]).tolist(), strict=True))
    return {"process": marks[-1] - started, "cpu": cpu, **parts}


def _start(arguments: list[str], environment: dict[str, str], runs: int) -> float:
    """Seconds in which an interpreter starts and ends, the fastest of `runs`."""
    best = float("inf")
    for _ in range(runs):
        started = time.monotonic()
        subprocess.run([sys.executable, *arguments], env=environment, check=True)
        best = min(best, time.monotonic() - started)
    return best


_PARTS = ("python", "numpy", "imports", "open", "first_batch")
# Linux's monotonic clock is one for all processes.
_RESUME = """
import time
marks = [time.monotonic()]
import numpy
marks.append(time.monotonic())
import json, sys
from polylepis.data.dataset import Dataset
from polylepis.data.stream import Stream, StreamConfig
marks.append(time.monotonic())
fields, state = json.load(sys.stdin)
stream = Stream(Dataset.open(fields["path"]), StreamConfig(**fields), dp_rank=0, dp_size=1, state=state)
marks.append(time.monotonic())
step = stream.next()
marks.append(time.monotonic())
assert step.rows["tokens"].size and "torch" not in sys.modules
print(json.dumps([*marks, time.process_time()]))
"""


def _webdataset(urls: list[str], samples: int) -> Iterator[dict[str, Any]]:
    import webdataset

    while samples > 0:
        for sample in webdataset.WebDataset(urls, shardshuffle=False, empty_check=False):
            yield sample
            samples -= 1
            if not samples:
                return


def _array(payload: bytes) -> np.ndarray:
    return np.lib.format.read_array(io.BytesIO(payload), allow_pickle=False).astype(np.int64)


def _decode(members: dict[str, Any]) -> dict[str, Any]:
    """The same work for both readers: whatever they can share is not what is compared."""
    found: dict[str, Any] = {"json": json.loads(members["json"])}
    if "tokens.npy" in members:
        found["tokens"] = _array(members["tokens.npy"])
    if "png" in members:
        from PIL import Image

        found["png"] = np.asarray(Image.open(io.BytesIO(members["png"])))
    return found


def _rate(samples: int, work: Callable[[], None]) -> float:
    """Samples per CPU second; the best of two runs, the first of which also warms the cache."""
    best = 0.0
    for _ in range(2):
        started = time.process_time()
        work()
        best = max(best, samples / (time.process_time() - started))
    return best


def _drain(items: Iterable[Any]) -> None:
    for _ in items:
        pass


def resident_memory(config: StreamConfig, samples: int, *, workers: int) -> dict[str, int]:
    """Bytes that a stream and its workers hold, early and late in reading `samples` documents (Linux).

    Returns:
        {"workers": …, "samples": read, "early": the most in the second fifth, "late": the most in the last fifth};
        anonymous memory, summed over the processes: pages of files belong to all of the node.
    """
    stream = Stream(Dataset.open(config.path), replace(config, workers=workers), dp_rank=0, dp_size=1)
    seen, early, late = 0, 0, 0
    try:
        while seen < samples:
            step = stream.next()
            seen += sum(int(batch["doc_ids"].amax(dim=1).add(1).sum()) for batch in step.micro_batches)
            if samples // 5 <= seen < 2 * samples // 5:
                early = max(early, _anonymous(os.getpid()))
            elif seen >= 4 * samples // 5:
                late = max(late, _anonymous(os.getpid()))
    finally:
        stream.close()
    return {"workers": workers, "samples": seen, "early": early, "late": late}


def _anonymous(process: int) -> int:
    """Anonymous resident bytes of a process and all below it; 0 where that is not to be had."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
        children = [path.read_text().split() for path in Path(f"/proc/{process}/task").glob("*/children")]
    except OSError:
        return 0  # ended meanwhile, or no Linux
    own = next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon")), 0)
    return own + sum(_anonymous(int(child)) for row in children for child in row)


def report(result: dict[str, Any]) -> str:
    """The measurements as a person reads them."""
    rates, lines = (
        result["samples_per_cpu_second"],
        [f"{'samples per CPU second':26}" + "".join(f"{k:>12}" for k in result["ratio"])],
    )
    lines += [f"  {name:24}" + "".join(f"{rate:>12,.0f}" for rate in kinds.values()) for name, kinds in rates.items()]
    lines.append(f"  {'ratio':24}" + "".join(f"{ratio:>12.1f}" for ratio in result["ratio"].values()))
    lines.append(f"planning: {result['planning_us_per_document']:.2f} us of CPU per document")
    for at, seconds in result["resume"].items():
        ms = {name: f"{1e3 * value:.0f} ms" for name, value in seconds.items()}
        lines.append(
            f"resume after {at} documents: {ms['process']} from process start to the first batch, as arrays without "
            f"torch ({ms['cpu']} of CPU):\n  python {ms['python']} (of which site-packages' .pth files {ms['site']}), "
            f"numpy {ms['numpy']}, our imports {ms['imports']}, open {ms['open']}, batch {ms['first_batch']}"
        )
    lines.append(f"not among it: a process that imports torch, as a trainer does, {result['torch']:.2f} s")
    lines += [f"{name}: {what}" for name, what in result["peers"].items()]
    memory = result["resident"]
    lines.append(
        f"resident memory of reader and {memory['workers']} workers: {memory['early'] / 1e6:.1f} MB at a fifth, "
        f"{memory['late'] / 1e6:.1f} MB at the end of {memory['samples']:,d} samples"
    )
    return "\n".join(lines)
