"""What the planner assumes of a GPU and its links, where nothing has been measured.

Peaks, memory sizes and bandwidths are those of the vendor's data sheets as remembered (dense rates, no sparsity);
usable memory is what the driver reports. The shares that are reached in practice (matmul, mixing, stream, link) are
assumptions, stated in docs/planning.md: `polylepis bench layers` replaces them by measurements.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass

from ..errors import PlanError

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """One accelerator.

    Attributes:
        name: how the command line calls it.
        peak: dense bfloat16 FLOP/s of the matrix units.
        memory: usable bytes.
        bandwidth: bytes/s of its memory.
        nvlink, network: bytes/s that one GPU sends inside a node, and to other nodes.
        per_node: GPUs that nvlink connects.
        matmul, mixing: share of `peak` that products with weights, and scan and attention, reach.
        stream, link: share of a bandwidth that elementwise passes, and collectives, reach.
        latency: seconds that a collective or send takes at least.
        operation: seconds that the pipeline's runtime itself keeps a rank busy per forward or backward of a stage; on a
            GPU the host does that ahead of the device.
    """

    name: str
    peak: float
    memory: float
    bandwidth: float
    nvlink: float
    network: float
    per_node: int = 8
    matmul: float = 0.70
    mixing: float = 0.35
    stream: float = 0.80
    link: float = 0.80
    latency: float = 2e-5
    operation: float = 0.0

    def wire(self, span: int) -> float:
        """Bytes/s of a group whose ranks lie within `span` neighbouring GPUs."""
        return self.link * (self.nvlink if span <= self.per_node else self.network)


DEVICES = {
    device.name: device
    for device in (
        Device("a100", 312e12, 79.2 * GIB, 2.04e12, 300e9, 25e9),
        Device("h100", 989e12, 79.1 * GIB, 3.35e12, 450e9, 50e9),
        Device("h200", 989e12, 139.8 * GIB, 4.8e12, 450e9, 50e9),
        Device("b200", 2250e12, 178.4 * GIB, 7.7e12, 900e9, 50e9),
    )
}


def find_device(name: str) -> Device:
    """The device of this name.

    Raises:
        PlanError: none such; names the nearest and all.
    """
    if name.lower() not in DEVICES:
        near = difflib.get_close_matches(name.lower(), DEVICES, n=1, cutoff=0.3)
        hint = f"nearest is {near[0]}; " if near else ""
        raise PlanError(f"--gpu: unknown {name!r}; {hint}known: {', '.join(DEVICES)}")
    return DEVICES[name.lower()]


def collective_seconds(kind: str, size: float, ranks: int, wire: float, latency: float) -> float:
    """Seconds of a ring collective over `ranks`, counted as `volume.py` counts `size` bytes."""
    if ranks == 1 or not size:
        return 0.0
    rounds = 2 if kind == "all_reduce" else 1
    return rounds * size * (ranks - 1) / ranks / wire + latency * max(1, math.ceil(math.log2(ranks)))
