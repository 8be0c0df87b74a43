"""The content hash: the same on any cut, equal to its definition, changed by any single bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polylepis.checkpoints.content import content_hash, content_sum, hash_tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.float16]


def splitmix(value: int) -> int:
    mask = 2**64 - 1
    z = value * 0x9E3779B97F4A7C15 & mask
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
    return (z ^ z >> 31) | 1


def by_definition(value: torch.Tensor) -> int:
    """Word by word in Python's integers."""
    size = value.element_size()
    per_element = 2 if size == 8 else 1
    raw = bytes(value.contiguous().reshape(-1).view(torch.uint8).tolist())
    width = size // per_element
    words = [int.from_bytes(raw[i : i + width], "little") for i in range(0, len(raw), width)]
    shape = [*value.shape[:-1], value.shape[-1] * per_element] if value.dim() else [per_element]
    total = 0
    for position, word in enumerate(words):
        key, rest = 1, position
        for dim in reversed(range(len(shape))):
            rest, index = divmod(rest, shape[dim])
            key *= splitmix(((dim + 1) << 48) + index)
        total += word * key
    return total % 2**64


def random_tensor(shape: list[int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(0, 256, [*shape[:-1], shape[-1] * size] if shape else [size], generator=generator)
    return raw.to(torch.uint8).view(dtype).reshape(shape)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), shape=st.lists(st.integers(1, 7), max_size=4))
def test_sums_of_any_cut_add_up_and_any_bit_counts(data: Any, dtype: torch.dtype, shape: list[int]) -> None:
    value = random_tensor(shape, dtype, data.draw(st.integers(0, 99)))
    whole = content_sum(value)
    assert whole == by_definition(value)
    pieces = [(value, [0] * len(shape))]
    for dim in range(len(shape)):
        at = data.draw(st.integers(0, shape[dim]))
        cut = []
        for block, offsets in pieces:
            cut.append((block.narrow(dim, 0, at), offsets))
            cut.append((block.narrow(dim, at, shape[dim] - at), [o + at * (d == dim) for d, o in enumerate(offsets)]))
        pieces = cut
    assert sum(content_sum(block, offsets) for block, offsets in pieces) % 2**64 == whole
    raw = value.clone().reshape(-1).view(torch.uint8)
    raw[data.draw(st.integers(0, raw.numel() - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert content_sum(raw.view(dtype).reshape(shape)) != whole


def test_order_shape_and_dtype_count() -> None:
    value = torch.randn(300, 500)
    others = [value.flip(0), value.flip(1), value.roll(1, 1), -value, value.reshape(500, 300), value.view(torch.int32)]
    hashes = {hash_tensor(value), *(hash_tensor(other) for other in others)}
    assert len(hashes) == 1 + len(others)
    assert hash_tensor(torch.zeros(3)) != hash_tensor(torch.zeros(4))
    assert hash_tensor(value.t()) == hash_tensor(value.t().contiguous())  # how it lies in memory does not
    assert content_sum(value.double(), [2**33, 2**40]) != content_sum(value.double(), [2**33, 2**40 + 1])


def test_pairs_of_sign_flips_are_found() -> None:
    """They cancel modulo 2⁶⁴ in a sum over 64-bit words."""
    value = torch.arange(1.0, 9.0, dtype=torch.float64)
    flipped = value.clone()
    flipped[[2, 5]] *= -1
    assert hash_tensor(flipped) != hash_tensor(value)


@pytest.mark.parametrize("shape", [(0,), (3, 0), ()])
def test_empty_and_scalar(shape: tuple[int, ...]) -> None:
    value = torch.ones(shape)
    assert content_sum(value) == (0 if value.numel() == 0 else by_definition(value))
    assert len(content_hash(0, shape, torch.float32)) == 16
