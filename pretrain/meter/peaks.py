"""Peak rates of devices, for MFU. A share of a peak means nothing without saying which peak: dense, by precision."""

from __future__ import annotations

from types import MappingProxyType

# Dense tensor-core peaks in TFLOP/s (no sparsity), NVIDIA's data sheets: bfloat16, and TF32 for float32.
# The first name that the device's own name contains is taken, so longer names come first.
PEAKS = MappingProxyType(
    {
        "GH200": (989.4, 494.7),
        "H200": (989.4, 494.7),
        "H100 PCIe": (756.0, 378.0),
        "H100 NVL": (835.0, 417.5),
        "H100": (989.4, 494.7),
        "H800": (989.4, 494.7),
        "B200": (2250.0, 1125.0),
        "A100": (312.0, 156.0),
        "A800": (312.0, 156.0),
        "L40S": (362.0, 183.0),
        "A10": (125.0, 62.5),
    }
)


def peak_flops(device_name: str, precision: str, configured: float = 0.0) -> float | None:
    """FLOP/s of one device, None where it is not known.

    Args:
        precision: `bfloat16` or `float32`.
        configured: TFLOP/s that the user states (`tracking.peak_tflops`), 0 for the table.
    """
    if configured:
        return configured * 1e12
    for name, (half, full) in PEAKS.items():
        if name in device_name:
            return (half if precision == "bfloat16" else full) * 1e12
    return None
