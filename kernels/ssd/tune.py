"""Times the launch candidates of the scan at the 8B shape, one kernel at a time, and rewrites the table.

Behind ``polylepis bench tune`` and ``python -m benchmarks.gpu --tune``.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..operators import HAS_TRITON
from ..timing import median_us
from .api import ssd
from .triton_config import CHUNKS, HALF, HALVES, INTERPRETER, Launch, ScanConfig

TABLE = Path(__file__).parent / "triton_table.py"
FORWARD = ("prep", "state", "output")


class TuneError(ValueError):
    """There is nothing to time the kernels on, or nowhere to write the table."""

    exit_code = 2


def tune(*, rehearse: bool = False, say: Callable[[str], None] = print) -> None:
    """Greedy, kernel by kernel, for each size of chunks: forward kernels by the forward's time, the others by the
    backward's; then the size whose forward and backward together took least.

    Args:
        rehearse: on the CPU in Triton's interpreter, tiny; the table stays as it is.
        say: takes a line per kernel and one for the entry.

    Raises:
        TuneError: no CUDA device or no Triton, or a table that cannot be written; before anything is timed.
    """
    check(rehearse)
    from . import triton_scan

    device = torch.device("cpu" if rehearse else "cuda")
    forward, inputs = scan(device, (40, 2, 8, 1, 8) if rehearse else (4096, 128, 64, 8, 128))
    out = forward()
    dy = torch.randn_like(out)

    def backward(out: Tensor) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(out, inputs, dy, retain_graph=True)

    found: dict[float, ScanConfig] = {}
    for start in [INTERPRETER] if rehearse else [HALF._replace(chunk=chunk) for chunk in CHUNKS]:
        best = start
        for name in HALVES:
            times: dict[Launch, float] = {}
            for launch in [INTERPRETER.prep] if rehearse else HALVES[name]:
                changed: dict[str, Any] = {name: launch}
                with configured(triton_scan, best._replace(**changed)):
                    timed = forward if name in FORWARD else backward(forward())
                    times[launch] = median_us(timed, device)
            chosen = min(times, key=lambda launch: times[launch])
            best = best._replace(**{**changed, name: chosen})
            rounded = {tuple(launch): round(us, 1) for launch, us in times.items()}
            say(f"chunks of {best.chunk}: {name} {rounded} -> {tuple(chosen)}")
        with configured(triton_scan, best):
            parts = median_us(forward, device), median_us(backward(forward()), device)
        say(f"chunks of {best.chunk}: forward {parts[0]:.1f} µs, backward {parts[1]:.1f} µs")
        found[sum(parts)] = best
    if not rehearse:
        arch, minor = triton_scan._target()
        say(f"wrote {TABLE.name}: {write((arch, 64, 128, 'half', minor), found[min(found)])}")


def check(rehearse: bool) -> None:
    """Refuse in one line what cannot be tuned."""
    if not HAS_TRITON:
        raise TuneError("bench tune: triton is not installed, and it times Triton kernels; pip install triton")
    if rehearse:
        return
    if not torch.cuda.is_available():
        raise TuneError("bench tune: 0 CUDA devices here, expected one: run it on the machine that will train")
    if not os.access(TABLE, os.W_OK):
        raise TuneError(f"bench tune: {TABLE} cannot be written; install the package where you may write to it")


def scan(device: torch.device, sizes: tuple[int, int, int, int, int]) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """(forward, inputs) of one row of l tokens, h heads × p, g groups, state n, in training's ranges."""
    l, h, p, g, n = sizes
    low = torch.float32 if device.type == "cpu" else torch.bfloat16

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(low).requires_grad_()

    t: dict[str, Any] = {"x": new(1, l, h, p), "dt": new(1, l, h), "B": new(1, l, g, n), "C": new(1, l, g, n)}
    t["A"] = (-torch.linspace(1, 16, h, device=device)).requires_grad_()
    t["D"] = torch.ones(h, device=device).requires_grad_()
    t["dt_bias"] = torch.linspace(-7, -2.3, h, device=device).requires_grad_()

    def forward() -> Tensor:
        y = ssd(**t, dt_softplus=True, backend="triton")
        assert isinstance(y, Tensor)
        return y

    return forward, list(t.values())


@contextmanager
def configured(launches: Any, config: ScanConfig) -> Iterator[None]:
    """Make the launches use one configuration for a while."""
    kept = launches.configuration
    launches.configuration = lambda *tensors: config
    try:
        yield
    finally:
        launches.configuration = kept


def write(key: tuple[Any, ...], config: ScanConfig, table: Path = TABLE) -> str:
    """Put one entry into the table's source, in place of an older one of the same key; returns the entry."""
    text = table.read_text()
    values = ", ".join(f"Launch{tuple(value)!r}" if isinstance(value, Launch) else str(value) for value in config)
    entry = f"    {key!r}: ScanConfig({values}),  # fmt: skip  # noqa: E501\n"
    before, found, after = text.partition("TABLE: dict[Key, ScanConfig] = {")
    if not found:
        raise TuneError(f"bench tune: {table} holds no TABLE; restore it from the package")
    old, _, rest = after.partition("}")
    kept = "".join(f"{line}\n" for line in old.splitlines() if line.strip() and not line.strip().startswith(repr(key)))
    if not re.search(r"import .*\bLaunch\b", before):
        before = before.replace("import ScanConfig", "import Launch, ScanConfig")
    fresh = table.with_suffix(".new")
    fresh.write_text(f"{before}{found}\n{kept}{entry}}}{rest}")
    fresh.replace(table)
    return entry.strip()
