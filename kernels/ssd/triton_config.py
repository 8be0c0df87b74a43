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
HALVES: dict[str, tuple[Launch, ...]] = {
    "prep": (Launch(16, 4, 1), Launch(32, 4, 1)),
    "state": (Launch(64, 8, 3), Launch(64, 8, 2), Launch(32, 8, 3)),
    "output": (Launch(64, 8, 2), Launch(32, 8, 2), Launch(32, 8, 3)),
    "dstate": (Launch(64, 8, 2), Launch(64, 8, 3), Launch(32, 8, 2)),
    "dx": (Launch(64, 8, 2), Launch(32, 8, 2), Launch(32, 8, 3)),
    "dbc": (Launch(64, 8, 2), Launch(64, 8, 3), Launch(64, 4, 2)),
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


def chunks_of(dtype: torch.dtype, save_states: bool) -> tuple[int, int]:
    """Tokens per chunk of the forward and the backward on a GPU.

    Larger chunks write fewer bytes of states and work more per tile (kernel study, section 3). The backward wants tiles
    of 64 (larger ones spill); the forward takes 128 where nothing has to be kept for the backward.
    """
    if dtype == torch.float32:
        return 32, 32
    return (64 if save_states else 128), 64
