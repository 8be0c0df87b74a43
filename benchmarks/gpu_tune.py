"""Times the launch candidates of the scan at the 8B shape, one kernel at a time, and rewrites the table."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from .gpu_cases import Sizes, our_scan

TABLE = Path(__file__).parent.parent / "kernels" / "ssd" / "triton_table.py"
FORWARD = ("prep", "state", "output")


def tune(device: torch.device, rehearse: bool) -> None:
    """Greedy, kernel by kernel: forward kernels by the forward's time, the others by the backward's."""
    from polylepis.kernels.ssd import triton_scan, triton_table
    from polylepis.kernels.ssd.triton_config import HALF, HALVES, INTERPRETER

    from .gpu import TINY, median_us

    s = Sizes(1, 20, **TINY) if rehearse else Sizes(1, 4096)
    dtype = torch.float32 if rehearse else torch.bfloat16
    forward, inputs = our_scan(s, device, dtype)
    best = INTERPRETER if rehearse else HALF
    key = (0, 0, 0, "half", 0) if rehearse else (*_arch(triton_scan), "half")
    for name, launches in HALVES.items():
        times: dict[Any, float] = {}
        for launch in launches if not rehearse else [INTERPRETER.prep]:
            tried = best._replace(**{name: launch})
            with _configured(triton_scan, triton_table, tried, rehearse):
                if name in FORWARD:
                    times[launch] = median_us(forward, device)
                else:
                    out = forward()
                    dy = torch.randn_like(out)
                    backward = lambda out=out, dy=dy: torch.autograd.grad(out, inputs, dy, retain_graph=True)  # noqa: E731
                    times[launch] = median_us(backward, device)
        chosen = min(times, key=lambda launch: times[launch])
        best = best._replace(**{name: chosen})
        print(name, {tuple(launch): round(us, 1) for launch, us in times.items()}, "->", tuple(chosen))
    if not rehearse:
        arch, minor = key[0], key[1]
        write((arch, 64, 128, "half", minor), best)


def _arch(triton_scan: Any) -> tuple[int, int]:
    arch, minor = triton_scan._target()
    return arch, minor


class _configured:  # noqa: N801
    """Make the launches use one configuration for a while."""

    def __init__(self, scan: Any, table: Any, config: Any, rehearse: bool) -> None:
        self.scan, self.config = scan, config
        self.name = "INTERPRETER" if rehearse else "lookup"

    def __enter__(self) -> None:
        self.kept = getattr(self.scan, self.name)
        setattr(self.scan, self.name, self.config if self.name == "INTERPRETER" else lambda key: self.config)

    def __exit__(self, *_: Any) -> None:
        setattr(self.scan, self.name, self.kept)


def write(key: tuple[Any, ...], config: Any) -> None:
    """Put one entry into triton_table.py, in place of an older one of the same key."""
    text = TABLE.read_text()
    entry = f"    {key!r}: ScanConfig._make({[*(tuple(v) for v in config[:-1]), config[-1]]!r}),\n"
    entry = re.sub(r"\((\d+, \d+, \d+)\)", r"Launch(\1)", entry)
    before, _, after = text.partition("TABLE: dict[Key, ScanConfig] = {")
    old, _, rest = after.partition("}")
    kept = "".join(f"{line}\n" for line in old.splitlines() if line.strip() and not line.strip().startswith(repr(key)))
    text = f"{before}TABLE: dict[Key, ScanConfig] = {{\n{kept}{entry}}}{rest}"
    if "Launch," not in before:
        text = text.replace("import FLOAT, HALF, LARGE, ScanConfig", "import FLOAT, HALF, LARGE, Launch, ScanConfig")
    TABLE.write_text(text)
    print(f"wrote {TABLE.name}: {entry.strip()}")
