"""Launch configurations of the SSD kernels: a table, not a search, so that the first step is not spent on tuning.

:data:`.triton_table.TABLE` is keyed by (architecture, P, N, precision, Triton minor version); what is not listed takes
a default of its architecture, size and precision, on Hopper the first candidate of each kernel. ``polylepis
bench tune`` times the candidates on the device at hand and rewrites the table. A configuration is fixed before the
launch: results never depend on timing noise.
"""

from typing import NamedTuple


class Launch(NamedTuple):
    """``rows``: tokens (prep and decay: heads; the passes over states: rows of the state) of one program; warps and
    pipeline stages as Triton counts them."""

    rows: int
    warps: int
    stages: int


class ScanConfig(NamedTuple):
    """One launch per kernel.

    slots: programs that should be in flight; heads are split where that fills them better.
    chunk: tokens between two states, a power of two; the tiles of a program are the chunk or half of it.
    """

    prep: Launch
    state: Launch
    output: Launch
    dstate: Launch
    dx: Launch
    dbc: Launch
    decay: Launch
    slots: int = 264
    chunk: int = 64


# Candidates for bfloat16 and float16, the preferred one first; all compile for sm_90 at P 64, N 128 (the static gate).
# The order is read off bytes and machine code, not measured. Chunks of 128 tokens halve the bytes of the states, which
# at 64 are most of all that moves; tiles of 64 tokens fill one warpgroup's matrix instruction and leave its registers
# room, so that two programs of `output` and `dx` share an SM. `dbc` takes both tiles, a warpgroup each.
CHUNKS = (128, 64)
HALVES: dict[str, tuple[Launch, ...]] = {
    "prep": (Launch(16, 4, 1), Launch(8, 4, 1)),
    "state": (Launch(64, 8, 3), Launch(64, 8, 2), Launch(64, 4, 3)),
    "output": (Launch(64, 4, 2), Launch(64, 4, 3), Launch(128, 8, 2)),
    "dstate": (Launch(64, 8, 3), Launch(64, 8, 2), Launch(64, 4, 3)),
    "dx": (Launch(64, 4, 2), Launch(64, 4, 3)),
    "dbc": (Launch(128, 8, 3), Launch(128, 8, 2), Launch(64, 4, 3)),
    "decay": (Launch(16, 8, 1), Launch(8, 4, 1)),
}
HALF = ScanConfig._make([*(HALVES[name][0] for name in ScanConfig._fields[:-2]), 264, CHUNKS[0]])
# states of more than 64 × 128 values: what chunks of 128 tokens hold does not fit beside them
WIDE = HALF._replace(chunk=64)
# other architectures than Hopper: next to nothing spills on sm_80, sm_89 and sm_100, and 99 KB of shared memory suffice
PLAIN = HALF._replace(
    state=Launch(64, 8, 2),
    dstate=Launch(64, 8, 2),
    dx=Launch(64, 8, 1),
    dbc=Launch(64, 8, 2),
    chunk=64,
)
# still larger heads and states, and large ones of other architectures
LARGE = ScanConfig(
    prep=Launch(16, 4, 1),
    state=Launch(32, 8, 2),
    output=Launch(32, 8, 1),
    dstate=Launch(32, 8, 2),
    dx=Launch(32, 8, 1),
    dbc=Launch(32, 8, 1),
    decay=Launch(16, 8, 1),
    chunk=64,
)
# float32 multiplies in three tensor-core passes (tf32x3), which takes registers: small tiles, few bytes spilled
FLOAT = ScanConfig(
    prep=Launch(16, 4, 1),
    state=Launch(16, 8, 1),
    output=Launch(16, 8, 1),
    dstate=Launch(16, 8, 1),
    dx=Launch(16, 8, 1),
    dbc=Launch(16, 8, 1),
    decay=Launch(16, 8, 1),
    chunk=32,
)
SMALL = Launch(16, 1, 1)
INTERPRETER = ScanConfig(SMALL, SMALL, SMALL, SMALL, SMALL, SMALL, SMALL, slots=1, chunk=16)


def default(arch: int, p: int, n: int, precision: str) -> ScanConfig:
    """Where the table has no entry: by architecture (90 is Hopper; 0, no device, counts as it), the powers of two that
    hold head and state, and "half" or "float"."""
    if precision == "float":
        return FLOAT
    if arch not in (0, 90):
        return PLAIN if p * n <= 64 * 128 else LARGE
    return HALF if p * n <= 64 * 128 else WIDE if p * n <= 128 * 128 else LARGE
