"""The tuned launch configurations; written by ``polylepis bench tune`` on the device that they are for."""

from .triton_config import FLOAT, HALF, LARGE, ScanConfig

# (architecture, P, N, "half" or "float", Triton minor version); P and N are the powers of two that hold them
Key = tuple[int, int, int, str, int]
TABLE: dict[Key, ScanConfig] = {}


def lookup(key: Key) -> ScanConfig:
    """The listed configuration, or the default of its precision and size."""
    _, p, n, precision, _ = key
    default = FLOAT if precision == "float" else HALF if p * n <= 64 * 128 else LARGE
    return TABLE.get(key, default)
