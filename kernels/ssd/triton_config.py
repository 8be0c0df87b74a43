"""Launch configurations of the SSD kernels: a table, not a search, so that the first step is not spent on tuning.

:data:`.triton_table.TABLE` is keyed by (architecture, P, N, precision, Triton minor version); what is not listed takes
the first of its precision's two to four candidates per kernel. ``polylepis bench tune`` times the candidates on the
device at hand and rewrites the table. A configuration is fixed before the launch: results never depend on timing noise.
"""

from typing import NamedTuple

import torch


class Launch(NamedTuple):
    """``rows``: tokens (or rows of the state) of one program; warps and pipeline stages as Triton counts them."""

    rows: int
    warps: int
    stages: int


class ScanConfig(NamedTuple):
    """One launch per kernel. ``slots``: programs that should be in flight; heads are split until there are as many."""

    prep: Launch
    state: Launch
    output: Launch
    dstate: Launch
    dx: Launch
    dbc: Launch
    decay: Launch
    slots: int = 264


# Candidates for bfloat16 and float16, the preferred one first; all compile for sm_90 at P 64, N 128 (the static gate).
# The order is read off the machine code, not measured: four warps are one warpgroup, whose matrix instruction takes the
# whole tile and of which two programs fit an SM; with two stages there is one buffer, and copies wait for the products.
HALVES: dict[str, tuple[Launch, ...]] = {
    "prep": (Launch(16, 4, 1), Launch(32, 4, 1)),
    "state": (Launch(64, 8, 3), Launch(64, 4, 3), Launch(64, 8, 2)),
    "output": (Launch(64, 4, 3), Launch(64, 8, 3), Launch(64, 4, 2)),
    "dstate": (Launch(64, 8, 2), Launch(64, 8, 3), Launch(64, 4, 2)),
    "dx": (Launch(64, 4, 3), Launch(64, 8, 2), Launch(32, 8, 2)),
    "dbc": (Launch(64, 4, 3), Launch(64, 4, 2), Launch(64, 8, 3)),
    "decay": (Launch(1, 4, 1), Launch(1, 2, 1)),
}
HALF = ScanConfig._make([*(HALVES[name][0] for name in ScanConfig._fields[:-1]), 264])
# heads or states beyond 64 × 128: shared memory and registers hold less of them
LARGE = ScanConfig(
    prep=Launch(16, 4, 1),
    state=Launch(32, 8, 2),
    output=Launch(32, 8, 1),
    dstate=Launch(32, 8, 2),
    dx=Launch(32, 8, 1),
    dbc=Launch(32, 8, 1),
    decay=Launch(1, 4, 1),
)
# float32 multiplies in three tensor-core passes (tf32x3), which takes registers: small tiles, few bytes spilled
FLOAT = ScanConfig(
    prep=Launch(16, 4, 1),
    state=Launch(16, 8, 1),
    output=Launch(16, 8, 1),
    dstate=Launch(16, 8, 1),
    dx=Launch(16, 8, 1),
    dbc=Launch(16, 8, 1),
    decay=Launch(1, 4, 1),
)
SMALL = Launch(16, 1, 1)
INTERPRETER = ScanConfig(SMALL, SMALL, SMALL, SMALL, SMALL, SMALL, SMALL, slots=1)


def chunks_of(dtype: torch.dtype) -> tuple[int, int]:
    """Tokens per chunk of the forward and the backward on a GPU; powers of two.

    Larger chunks write fewer bytes of states, smaller ones leave registers: at 128 the output kernel fills all of them,
    one program fits an SM and half of its products are masked; at 64 two fit (the static gate).
    """
    return (32, 32) if dtype == torch.float32 else (64, 64)
