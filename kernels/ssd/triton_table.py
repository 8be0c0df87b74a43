"""The tuned launch configurations; written by ``polylepis bench tune`` on the device that they are for."""

from .triton_config import ScanConfig, default

# (architecture, P, N, "half" or "float", Triton minor version); P and N are the powers of two that hold them
Key = tuple[int, int, int, str, int]
TABLE: dict[Key, ScanConfig] = {}


def lookup(key: Key) -> ScanConfig:
    """The listed configuration, or the default of its architecture, size and precision."""
    return TABLE[key] if key in TABLE else default(*key[:4])
