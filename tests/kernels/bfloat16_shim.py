"""What Triton's interpreter lacks for bfloat16: it multiplies the raw bits as integers and truncates when it rounds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def widen(handle: TensorHandle) -> np.ndarray:
    """The values of a handle; bfloat16 is stored as uint16, the upper half of a float32."""
    if handle.dtype.scalar == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data


def round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 to the nearest bfloat16, ties to even, as uint16."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


@pytest.fixture
def bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    cast = InterpreterBuilder.cast_impl

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> TensorHandle:
        product = np.matmul(widen(a).astype(d.data.dtype), widen(b).astype(d.data.dtype))
        return TensorHandle(product + d.data, d.dtype.scalar)

    def cast_impl(self: Any, source: Any, to: Any) -> TensorHandle:
        if source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            return TensorHandle(round_to_bfloat16(source.data), tl.bfloat16)
        return cast(self, source, to)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast_impl)
    for name in ("create_fp_trunc", "create_fp_ext"):
        monkeypatch.setattr(InterpreterBuilder, name, cast_impl)
    monkeypatch.setattr(
        InterpreterBuilder, "create_fp_to_fp", lambda self, source, to, rounding: cast_impl(self, source, to)
    )
