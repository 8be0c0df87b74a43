"""How long a function keeps the device busy; for ``bench tune`` and the benchmarks."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

HEAD_START = 2_000_000  # cycles, about a millisecond


def median_us(function: Callable[[], Any], device: torch.device, budget: float = 1.5) -> float:
    """Median microseconds of one call: at most 50 runs in at most ``budget`` seconds, after three to warm up.

    On a GPU the second-level cache is emptied before each run, and the device is kept waiting while the host asks for
    the whole call: what counts is the device's time, as in a training step whose host runs ahead, not the time that
    Python takes for some launches of ten microseconds each. On a CPU, where the rehearsals run, one run is timed.
    """
    if device.type == "cpu":
        begin = time.perf_counter()
        function()
        return (time.perf_counter() - begin) * 1e6
    for _ in range(3):
        function()
    flush = torch.empty(1 << 28, dtype=torch.int8, device=device)
    samples: list[float] = []
    until = time.time() + budget
    while len(samples) < 50 and (time.time() < until or len(samples) < 3):
        flush.zero_()
        torch.cuda._sleep(HEAD_START)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        function()
        last.record()
        last.synchronize()
        samples.append(first.elapsed_time(last) * 1e3)
    return statistics.median(samples)
