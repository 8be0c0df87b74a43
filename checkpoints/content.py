"""A hash of a logical tensor's content that does not depend on how the tensor is cut over ranks.

Every element is an unsigned word w of at most 32 bits (wider elements are two words), every index of dimension d has an
odd 64-bit key k_d(i), and the content's sum is Σ w · k_0(i_0) · k_1(i_1) · … modulo 2⁶⁴. Shards know their offsets, so
they sum what they hold and the sums add up, whatever the mesh. A product of odd numbers is odd, so no change of a
single word leaves the sum as it was; any other change does by a chance of about 2⁻³². It is no cryptographic hash: the
files' sha256 in the manifest guards against tampering, this one tells whether two checkpoints hold the same weights,
and whether what is read back is what the ranks held in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint32}
_BLOCK = 1 << 16  # words at a time, so that their 64-bit products stay in the processor's cache


def content_sum(value: Tensor, offsets: Sequence[int] | None = None) -> int:
    """The part of a logical tensor's sum (0 … 2⁶⁴ − 1) that a block of it makes; sums of disjoint blocks add up.

    Args:
        value: the block, any dtype of 1, 2, 4 or 8 bytes, on any device.
        offsets: of its first element in each dimension of the logical tensor; zeros by default.
    """
    block = value.detach().cpu().contiguous()
    if block.numel() == 0:
        return 0
    starts = list(offsets or [0] * block.dim()) or [0]
    words = block.reshape(block.shape or (1,)).view(torch.uint8).numpy().view(_WORDS[block.element_size()])
    per_element = words.shape[-1] // (block.shape[-1] if block.dim() else 1)
    starts[-1] *= per_element
    rows = np.ones(1, dtype=np.uint64)
    for dim in range(words.ndim - 1):
        rows = np.multiply.outer(rows, _keys(dim, starts[dim], words.shape[dim])).reshape(-1)
    columns = _keys(words.ndim - 1, starts[-1], words.shape[-1])
    matrix = words.reshape(len(rows), len(columns))
    step = max(1, _BLOCK // len(columns))
    total = np.zeros(1, dtype=np.uint64)  # arrays wrap around silently, scalars warn
    for first in range(0, len(rows), step):
        sums = np.einsum("ij,j->i", matrix[first : first + step], columns)
        total += (sums * rows[first : first + step]).sum(dtype=np.uint64)
    return int(total[0])


def content_hash(total: int, shape: Sequence[int], dtype: torch.dtype) -> str:
    """16 hexadecimal digits of a whole logical tensor, from the sum of all its blocks."""
    text = f"{dtype}{list(shape)}{total % 2**64:016x}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def hash_tensor(value: Tensor) -> str:
    """The content hash of a whole tensor."""
    return content_hash(content_sum(value), value.shape, value.dtype)


def _keys(dim: int, start: int, count: int) -> np.ndarray:
    """Odd 64-bit keys of `count` indices of a dimension: the finalizer of splitmix64 (Steele, Lea, Flood 2014)."""
    with np.errstate(over="ignore"):
        z = np.arange(start, start + count, dtype=np.uint64) + np.uint64((dim + 1) << 48)
        z *= np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) | np.uint64(1)
