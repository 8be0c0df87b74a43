"""SSD forward + backward on the CPU against its peers: ``python -m benchmarks.ssd`` in the repository root.

Peers: the published Listing 1 of the Mamba-2 paper (``--ssd-minimal`` names mamba_ssm/modules/ssd_minimal.py of a
checkout) and the torch path of the installed transformers (5.15.1 multiplies elementwise, 5.23.0 uses einsum), all in
one process. Repeats are interleaved and the minimum counts: the neighbours of a shared machine only ever add time.
"""

import argparse
import ast
import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
SHAPES = ((2, 512, 8, 64, 1, 64), (2, 512, 8, 64, 8, 64), (1, 4096, 8, 64, 1, 128))
Inputs = dict[str, Tensor]
Scan = Callable[[Inputs], Tensor]


def make_inputs(shape: tuple[int, ...]) -> Inputs:
    """Random x, dt > 0, A < 0, B, C for (b, l, h, p, g, n), float32, all with gradients."""
    b, l, h, p, g, n = shape
    draw = torch.Generator().manual_seed(0)
    inputs = {
        "x": torch.randn(b, l, h, p, generator=draw),
        "dt": F.softplus(torch.randn(b, l, h, generator=draw) - 4),
        "A": -torch.linspace(1, 16, h),
        "B": torch.randn(b, l, g, n, generator=draw),
        "C": torch.randn(b, l, g, n, generator=draw),
    }
    return {name: tensor.requires_grad_() for name, tensor in inputs.items()}


def ours(chunk: int) -> Scan:
    """This repository's scan."""
    ssd = importlib.import_module("polylepis.kernels.ssd").ssd
    return lambda t: ssd(t["x"], t["dt"], t["A"], t["B"], t["C"], chunk)


def ssd_minimal(path: Path, chunk: int) -> Scan:
    """The published listing, its functions taken out of the file (which imports packages that need a GPU)."""
    wanted = ("segsum", "ssd_minimal_discrete")
    functions = [
        node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef) and node.name in wanted
    ]
    if {node.name for node in functions} != set(wanted):
        raise ValueError(f"{path} does not define {' and '.join(wanted)}")
    scope: dict[str, Any] = {"torch": torch, "F": F, "rearrange": _rearrange, "repeat": _repeat}
    exec(compile(ast.Module(body=functions, type_ignores=[]), str(path), "exec"), scope)
    listing = scope["ssd_minimal_discrete"]

    def scan(t: Inputs) -> Tensor:
        heads = t["x"].shape[2] // t["B"].shape[2]
        B, C = (t[name].repeat_interleave(heads, dim=2) for name in ("B", "C"))
        return listing(t["x"] * t["dt"].unsqueeze(-1), t["A"] * t["dt"], B, C, chunk)[0]

    return scan


def _rearrange(x: Tensor, pattern: str, **sizes: int) -> Tensor:
    """The four einops patterns of the listing as plain views, so that einops' parsing is not on the peer's bill."""
    if pattern == "b (c l) ... -> b c l ...":
        return x.unflatten(1, (-1, sizes["l"]))
    if pattern == "b c l h -> b h c l":
        return x.permute(0, 3, 1, 2)
    if pattern == "b c l h p -> b (c l) h p":
        return x.flatten(1, 2)
    raise ValueError(f"unknown pattern {pattern!r}: the listing has changed")


def _repeat(x: Tensor, pattern: str, e: int) -> Tensor:
    if pattern != "... d -> ... d e":
        raise ValueError(f"unknown pattern {pattern!r}: the listing has changed")
    return x.unsqueeze(-1).repeat(*(1,) * x.dim(), e)  # a copy, as einops makes one


def transformers_scan(chunk: int) -> Scan:
    """The torch path of transformers' Mamba2Mixer."""
    module = importlib.import_module("transformers.models.mamba2.modeling_mamba2")
    if not hasattr(module, "mamba2_chunk_scan"):
        version = importlib.metadata.version("transformers")
        raise ValueError(f"transformers {version} has no mamba2_chunk_scan; 5.23.0 has")
    return lambda t: module.mamba2_chunk_scan(t["x"], t["dt"], t["A"], t["B"], t["C"], chunk)


def run_once(scan: Scan, inputs: Inputs, dy: Tensor) -> tuple[float, tuple[Tensor, ...]]:
    """(seconds of one forward and backward, the gradients)."""
    start = time.perf_counter()
    y = scan(inputs)
    grads = torch.autograd.grad(y, list(inputs.values()), dy)
    return time.perf_counter() - start, grads


def measure(scans: dict[str, Scan], shape: tuple[int, ...], repeats: int) -> dict[str, float]:
    """Milliseconds of every scan, the minimum over interleaved repeats; refuses to time scans that disagree."""
    inputs = make_inputs(shape)
    dy = torch.randn(inputs["x"].shape, generator=torch.Generator().manual_seed(1))
    gradients = {name: run_once(scan, inputs, dy)[1] for name, scan in scans.items()}
    first = next(iter(gradients))
    for name, grads in gradients.items():
        for key, mine, other in zip(inputs, gradients[first], grads, strict=True):
            error = ((mine - other).norm() / other.norm()).item()
            if not error < 1e-4:
                raise ValueError(f"{first} and {name} disagree about d{key} by {error:.1e} at {shape}")
    best = dict.fromkeys(scans, float("inf"))
    for _ in range(repeats):
        for name, scan in scans.items():
            best[name] = min(best[name], run_once(scan, inputs, dy)[0])
    return {name: seconds * 1e3 for name, seconds in best.items()}


def machine() -> dict[str, str]:
    """What the figures depend on."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "cores": str(len(os.sched_getaffinity(0))),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "commit": _commit(),
        "command": " ".join(["python -m benchmarks.ssd", *sys.argv[1:]]),
    }


def _commit() -> str:
    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    commit = git("rev-parse", "--short", "HEAD") or "none"
    return f"{commit} (with uncommitted changes)" if git("status", "--porcelain", "--", "kernels") else commit


def render(rows: list[dict[str, Any]], facts: dict[str, str], notes: list[str]) -> str:
    """The result as Markdown."""
    names = list(rows[0]["ms"])
    peers = names[1:]
    lines = [
        "# SSD forward + backward, CPU, float32, milliseconds (minimum of interleaved repeats)",
        "",
        *(f"- {key}: {value}" for key, value in facts.items()),
        *(f"- {note}" for note in notes),
        "",
        "| b, l, h, p, g, n | " + " | ".join(names) + " | " + " | ".join(f"{peer} ÷ ours" for peer in peers) + " |",
        "|---" * (1 + len(names) + len(peers)) + "|",
    ]
    for row in rows:
        ms = row["ms"]
        cells = [f"{ms[name]:.1f}" for name in names] + [f"{ms[peer] / ms[names[0]]:.2f}" for peer in peers]
        lines.append("| " + ", ".join(map(str, row["shape"])) + " | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--ssd-minimal", type=Path, metavar="PATH", help="mamba_ssm/modules/ssd_minimal.py of a checkout"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    notes = [f"chunk {args.chunk} everywhere; {args.repeats} repeats"]
    scans = {"ours": ours(args.chunk)}
    if args.ssd_minimal:
        scans["ssd_minimal"] = ssd_minimal(args.ssd_minimal, args.chunk)
    else:
        notes.append("ssd_minimal was left out: give --ssd-minimal PATH of a state-spaces/mamba checkout")
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        notes.append("transformers was left out: it is not installed")
    else:
        scans[f"transformers {version}"] = transformers_scan(args.chunk)
    rows = [{"shape": shape, "ms": measure(scans, shape, args.repeats)} for shape in SHAPES]
    facts = machine()
    text = render(rows, facts, notes)
    print(text)
    if args.markdown:
        args.markdown.write_text(text)
    if args.json:
        args.json.write_text(json.dumps({"facts": facts, "notes": notes, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
