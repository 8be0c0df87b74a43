"""The kernels on a GPU: correctness, then times beside the roofline and beside peers. One call, at most 8 minutes.

    python -m benchmarks.gpu [--peers DIR] [--out benchmarks/results]
    python -m benchmarks.gpu --tune          # times the launch candidates and rewrites kernels/ssd/triton_table.py
    TRITON_INTERPRET=1 python -m benchmarks.gpu --rehearse     # the same code on a CPU, tiny, writes nothing

DIR holds checkouts or installations of mamba_ssm, fla and causal_conv1d. The checks, our launches one by one, our cases
and each peer run in a process of their own, with a kernel cache of their own, so that first steps are cold. Times are
the device's, with its queue full (polylepis.kernels.timing). What fails, ends its process, does not fit the device's
memory or the time left is written down as such, and the next case goes on in a fresh process.
Needs torch >= 2.11, Triton >= 3.6 and nothing else; an installed polylepis is used, this checkout otherwise.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .gpu_cases import LIBRARIES, MODULES, Sizes, least_bytes
from .gpu_launches import render as render_launches
from .gpu_launches import time_launches

ROOT = Path(__file__).parent.parent
SECONDS = 480
CHECKS, LAUNCHES = "checks", "launches"
CHECK_SECONDS, LAUNCH_SECONDS = 150, 60
BROKEN = 3  # exit status of a process that cannot use the device any more
LENGTHS, BATCHES = (4096, 16384, 131072), (1, 4)
TINY = {"d": 16, "h": 2, "p": 8, "g": 1, "n": 8}
# Issue 3, H200, bfloat16, per 4,096-token sequence, in microseconds
TARGETS = {("scan", "forward"): 130.0, ("scan", "backward"): 330.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, metavar="DIR")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--library", choices=[CHECKS, LAUNCHES, *LIBRARIES], help=argparse.SUPPRESS)
    parser.add_argument("--skip", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, default=0.0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.rehearse and not torch.cuda.is_available():
        sys.exit("benchmarks.gpu needs a CUDA device; TRITON_INTERPRET=1 … --rehearse runs it on the CPU, tiny")
    device = torch.device("cpu" if args.rehearse else "cuda")
    find_package()
    if args.library == CHECKS:
        from .gpu_checks import check_all

        check_all(device, args.skip, args.until, lambda rows: keep(rows, args.result, device))
    elif args.library == LAUNCHES:
        sizes = [Sizes(1, 40, **TINY)] if args.rehearse else [Sizes(b, LENGTHS[0]) for b in BATCHES]
        time_launches(sizes, device, args.until, lambda rows: keep(rows, args.result, device))
    elif args.library:
        time_library(args, device)
    elif args.tune:
        from polylepis.kernels.ssd.tune import tune

        tune(rehearse=args.rehearse)
    else:
        report(args, device)


def find_package() -> None:
    """Let this checkout be importable as ``polylepis``, here and in the processes to come, where nothing else is."""
    if importlib.util.find_spec("polylepis") is None:
        folder = Path(tempfile.mkdtemp(prefix="polylepis-"))
        (folder / "polylepis").symlink_to(ROOT)
        sys.path.insert(0, str(folder))
        os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])


def report(args: argparse.Namespace, device: torch.device) -> None:
    """Everything, then one JSON and one Markdown file, which are written after each process."""
    start = time.time()
    deadline = start + SECONDS - 20
    result: dict[str, Any] = {"facts": facts(device), CHECKS: [], LAUNCHES: [], "times": []}
    found = ["polylepis", *(name for name, module in MODULES.items() if _has(module, args.peers))]
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the cases run in other processes
    result["absent"] = [name for name in MODULES if name not in found]
    for position, name in enumerate([CHECKS, LAUNCHES, *found], start=-2):
        # ours before the peers, which share what is left of the time
        left, peers = deadline - time.time(), len(found) - 1
        if position < 0:
            share = min(left, CHECK_SECONDS if name == CHECKS else LAUNCH_SECONDS)
        elif position == 0:
            share = left / (2 if peers else 1)
        else:
            share = left / (peers + 1 - position)
        rows, error = run_process(name, args, time.time() + share)
        result[name if name in (CHECKS, LAUNCHES) else "times"] += rows
        if error:
            result.setdefault("errors", {})[name] = error
        result["seconds"] = round(time.time() - start, 1)
        text = render(result)
        if not args.rehearse:
            args.out.mkdir(parents=True, exist_ok=True)
            stem = "gpu_" + "".join(c if c.isalnum() else "_" for c in result["facts"]["device"].lower())
            (args.out / f"{stem}.json").write_text(json.dumps(result, indent=2) + "\n")
            (args.out / f"{stem}.md").write_text(text)
    print(text)


def run_process(name: str, args: argparse.Namespace, until: float) -> tuple[list[dict[str, Any]], str]:
    """(rows, error) of the checks or one library, in a process of its own, and another where that one broke."""
    rows: list[dict[str, Any]] = []
    paths = _paths(args.peers) if name in MODULES else []
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])}
        environment["TRITON_CACHE_DIR"] = str(Path(folder) / "cache")
        error = ""
        while True:
            file = Path(folder) / f"{len(rows)}.json"
            command = [sys.executable, "-m", "benchmarks.gpu", "--library", name, "--result", str(file)]
            command += ["--until", str(until), "--skip", str(len(rows)), *(["--rehearse"] if args.rehearse else [])]
            status = -1
            try:
                limit = max(until - time.time() + 15, 30)
                done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit)
                status = done.returncode
                error = done.stderr.strip()[-800:] if status not in (0, BROKEN) else error
            except subprocess.TimeoutExpired:
                error = "ran past its time and was stopped"
            fresh = json.loads(file.read_text()) if file.exists() else []
            rows += fresh
            if status == 0 or not fresh or time.time() > until:
                return rows, error


def keep(rows: list[dict[str, Any]], result: Path, device: torch.device) -> None:
    """Write the rows so far; end the process if the device fails every call after a kernel's error."""
    fresh = result.with_suffix(".new")
    fresh.write_text(json.dumps(rows))
    fresh.replace(result)
    try:
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    except Exception:
        sys.stdout.flush()
        os._exit(BROKEN)


def time_library(args: argparse.Namespace, device: torch.device) -> None:
    """One row per case and sizes, written after each; small problems first, so that a cut costs the largest only."""
    rows: list[dict[str, Any]] = []
    sizes = [Sizes(b, l) for l in LENGTHS for b in BATCHES]
    if args.rehearse:
        sizes = [Sizes(1, 20, **TINY)]
    plan = [(s, case) for s in sorted(sizes, key=lambda s: s.b * s.l) for case in LIBRARIES[args.library]]
    for s, case in plan[args.skip :]:
        row: dict[str, Any] = {"library": args.library, "case": case, "length": s.l, "batch": s.b}
        for direction, size in zip(("forward", "backward"), least_bytes(case, s), strict=True):
            row[f"{direction}_bytes"] = size
        rows.append(row | {"error": "the process ended here"})
        keep(rows, args.result, device)
        try:
            if time.time() > args.until:
                raise TimeoutError("no time left")
            build = LIBRARIES[args.library][case]
            row |= time_case(build(s, device, torch.bfloat16 if device.type == "cuda" else torch.float32), device)
        except torch.OutOfMemoryError:
            row["error"] = "out of memory"
        except Exception as error:  # a peer that fails is a result, too
            row["error"] = f"{type(error).__name__}: {error}"[:300].replace("\n", " ")
        rows[-1] = row
        keep(rows, args.result, device)


def time_case(built: tuple[Callable[[], Any], list[torch.Tensor]], device: torch.device) -> dict[str, float]:
    """Median microseconds of the forward (with autograd's graph) and of the backward; seconds of the first step."""
    from polylepis.kernels.timing import median_us

    forward, inputs = built
    begin = time.time()
    out = forward()
    dy = torch.randn_like(out)

    def backward() -> None:
        torch.autograd.grad(out, inputs, dy, retain_graph=True)

    backward()
    _wait(device)
    cold = time.time() - begin
    result = {"first_step_s": round(cold, 2)}
    for name, function in (("forward", forward), ("backward", backward)):
        result[f"{name}_us"] = round(median_us(function, device), 1)
    return result


def facts(device: torch.device) -> dict[str, Any]:
    """What the figures depend on, the bandwidth of a large copy among them."""

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        except OSError:  # no git on this machine
            return ""
        return done.stdout.strip()

    commit = git("rev-parse", "--short", "HEAD") or "none"
    if git("status", "--porcelain", "--", "kernels"):
        commit += " (with uncommitted changes)"
    known = importlib.util.find_spec("triton") is not None
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU, rehearsal",
        "torch": torch.__version__,
        "triton": __import__("triton").__version__ if known else "none",
        "commit": commit,
        "command": " ".join(["python -m benchmarks.gpu", *sys.argv[1:]]),
        "copy_TB_s": copy_bandwidth(device),
    }


def copy_bandwidth(device: torch.device) -> float:
    """TB/s of copying 2 GiB within the device; 0 on a CPU."""
    if device.type == "cpu":
        return 0.0
    from polylepis.kernels.timing import median_us

    source = torch.empty(1 << 31, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return round(2 * source.numel() / median_us(lambda: target.copy_(source), device) / 1e6, 3)


def render(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = ["# Kernels on a GPU, bfloat16, 8B shape: 128 heads × 64, 8 groups, state 128", ""]
    lines += [f"- {key}: {value}" for key, value in result["facts"].items()]
    lines += [f"- {name}: not found, left out" for name in result["absent"]]
    lines += [f"- {name}: {error}" for name, error in result.get("errors", {}).items()]
    for name in LIBRARIES:
        cold = [row["first_step_s"] for row in result["times"] if row["library"] == name and "first_step_s" in row]
        if cold:
            lines.append(
                f"- {name}: slowest first step of a case, forward and backward with compilation: {max(cold)} s"
            )
    lines += [f"- took {result['seconds']} s", "", "## Correctness (relative error, two runs bitwise equal)", ""]
    lines += ["| check | dtype | worst | tensor | allowed | bitwise equal | passed |", "|---" * 7 + "|"]
    lines += ["| " + " | ".join(str(value) for value in check.values()) + " |" for check in result["checks"]]
    bandwidth = result["facts"]["copy_TB_s"]
    lines += render_launches(result[LAUNCHES], bandwidth)
    lines += ["", "## Medians, microseconds; least: the bytes that must move at the bandwidth of a copy", ""]
    lines += [
        "| case | length | batch | direction | library | µs | ours is faster by | least | target |",
        "|---" * 9 + "|",
    ]
    rows = result["times"]
    ours = {(r["case"], r["length"], r["batch"]): r for r in rows if r["library"] == "polylepis"}
    for row in sorted(rows, key=lambda r: (r["case"], r["length"], r["batch"], r["library"] != "polylepis")):
        mine = ours.get((row["case"], row["length"], row["batch"]), {})
        for direction in ("forward", "backward"):
            key = f"{direction}_us"
            ratio = f"{row[key] / mine[key]:.2f}×" if key in row and key in mine and row is not mine else "–"
            least = row.get(f"{direction}_bytes", 0) / bandwidth / 1e6 if bandwidth else 0.0
            target = TARGETS.get((row["case"], direction))
            goal = f"{target * row['length'] * row['batch'] / 4096:.0f} (H200)" if target else "–"
            cells = (
                row["case"],
                row["length"],
                row["batch"],
                direction,
                row["library"],
                row.get(key, row.get("error")),
            )
            lines.append(
                "| " + " | ".join(map(str, cells)) + f" | {ratio} | {f'{least:.0f}' if least else '–'} | {goal} |"
            )
    return "\n".join(lines) + "\n"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _paths(peers: Path | None) -> list[str]:
    """DIR and the folders directly in it: checkouts, or a target of ``pip install --target``."""
    if peers is None:
        return []
    return [str(peers.resolve()), *(str(path.resolve()) for path in sorted(peers.iterdir()) if path.is_dir())]


def _has(module: str, peers: Path | None) -> bool:
    """Whether ``module`` can be found; in another process, so that nothing of a peer is imported here."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*_paths(peers), os.environ.get("PYTHONPATH", "")])}
    code = f"import importlib.util as u, sys; sys.exit(u.find_spec({module!r}) is None)"
    return subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT).returncode == 0


if __name__ == "__main__":
    main()
