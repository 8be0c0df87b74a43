"""Packed and cached attention against an explicit softmax, rotary positions against complex numbers."""

import math
import sys
import types
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from polylepis.kernels.attention import apply_rope, decode_attention, flash_varlen, packed_attention

BOUNDARIES = [0, 5, 5, 6, 11, 11, 19, 24]


def explicit(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float | None = None) -> Tensor:
    """Softmax attention with a (T, L) mask."""
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    logits = torch.einsum("ihd,jhd->hij", q, k) * (scale or 1 / math.sqrt(q.shape[-1]))
    return torch.einsum("hij,jhd->ihd", logits.masked_fill(~seen, -torch.inf).softmax(-1), v)


def draw(kv: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(24, n, 8, generator=rng).to(dtype).requires_grad_() for n in (4, kv, kv)]


def document_mask() -> Tensor:
    ids = torch.bucketize(torch.arange(24), torch.tensor(BOUNDARIES[1:]), right=True)
    return (ids[:, None] == ids[None]).tril()


@pytest.mark.parametrize("kv", [1, 2, 4])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_packed(kv: int, scale: float | None) -> None:
    tensors = draw(kv)
    got = packed_attention(*tensors, boundaries=BOUNDARIES, scale=scale)
    want = explicit(*tensors, document_mask(), scale)
    torch.testing.assert_close(got, want)
    weight = torch.randn_like(want)
    grads = [torch.autograd.grad((y * weight).sum(), tensors) for y in (got, want)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_packed_low_precision_and_determinism(dtype: torch.dtype, tolerance: float) -> None:
    low = draw(dtype=dtype)
    want = explicit(*(t.detach().double() for t in low), document_mask())
    got = packed_attention(*low, boundaries=BOUNDARIES)
    assert got.dtype == dtype and torch.equal(got, packed_attention(*low, boundaries=BOUNDARIES))
    assert (got.double() - want).norm() <= tolerance * want.norm()


def test_isolation_is_exact() -> None:
    tensors = draw()
    y = packed_attention(*tensors, boundaries=BOUNDARIES)
    for grad in torch.autograd.grad(y[6:11].square().sum(), tensors):
        assert (grad[:6] == 0).all() and (grad[11:] == 0).all() and (grad[6:11] != 0).any()


def test_no_tokens_keep_the_graph() -> None:
    q, k, v = (t.detach()[:0].requires_grad_() for t in draw())
    y = packed_attention(q, k, v, boundaries=[0, 0, 0])
    assert y.shape == (0, 4, 8)
    assert all(grad is not None for grad in torch.autograd.grad(y.sum(), (q, k, v)))


def test_flash_is_called_with_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """The contract of flash_attn_varlen_func, checked with a stand-in that computes what it asks for."""

    def stand_in(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        softmax_scale: float | None,
        causal: bool,
    ) -> Tensor:
        assert cu_q.dtype == torch.int32 and torch.equal(cu_q, cu_k) and max_q == max_k == 8 and causal
        return packed_attention(q, k, v, boundaries=cu_q.tolist(), scale=softmax_scale)

    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = stand_in  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    tensors = draw()
    lengths = [b - a for a, b in pairwise(BOUNDARIES) if b > a]
    want = packed_attention(*tensors, boundaries=BOUNDARIES, scale=0.2)
    torch.testing.assert_close(flash_varlen(*tensors, lengths, 0.2), want)


@pytest.mark.parametrize("s", [1, 3, 7])
def test_decode(s: int) -> None:
    q = torch.randn(2, s, 4, 8, dtype=torch.float64)
    k, v = (torch.randn(2, 7, 2, 8, dtype=torch.float64) for _ in range(2))
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, :5] = False
    y = decode_attention(q, k, v, key_mask=mask, scale=0.4)
    seen = torch.ones(s, 7, dtype=torch.bool).tril(7 - s) & mask[:, None]
    for row in range(2):
        want = explicit(q[row], k[row], v[row], seen[row], 0.4).nan_to_num(0.0)  # nan: nothing may be seen
        torch.testing.assert_close(y[row], want)


def test_decode_continues_packed() -> None:
    q, k, v = (t.detach() for t in draw())
    want = packed_attention(q, k, v, boundaries=[0, 24])
    mask = torch.ones(1, 24, dtype=torch.bool)
    for start, end in ((0, 10), (10, 11), (11, 24)):
        y = decode_attention(q[None, start:end], k[None, :end], v[None, :end], key_mask=mask[:, :end])
        torch.testing.assert_close(y[0], want[start:end])


def test_rope() -> None:
    x = torch.randn(6, 2, 8, dtype=torch.float64, requires_grad=True)
    position = torch.tensor([0, 1, 2, 0, 1, 100])
    turn = torch.exp(1j * position[:, None] * 500.0 ** -(torch.arange(4) / 4).double())[:, None]
    y = torch.complex(x[..., :4], x[..., 4:]) * turn
    torch.testing.assert_close(apply_rope(x, position, 500.0), torch.cat([y.real, y.imag], dim=-1))
    assert torch.equal(apply_rope(x, position * 0, 500.0), x)
    assert torch.autograd.gradcheck(lambda t: apply_rope(t, position, 500.0), (x,))
    low = x.detach().bfloat16()
    assert apply_rope(low, position, 500.0).dtype == torch.bfloat16


def test_refusals() -> None:
    q, k, v = (t.detach() for t in draw())
    with pytest.raises(ValueError, match="do not run from 0 to 24 rows"):
        packed_attention(q, k, v, boundaries=[0, 5])
    with pytest.raises(ValueError, match="without decrease"):
        packed_attention(q, k, v, boundaries=[0, 9, 5, 24])
    with pytest.raises(ValueError, match="3 key heads do not divide 4 query heads"):
        packed_attention(q, *(t[:, [0, 0, 1]] for t in (k, v)), boundaries=[0, 24])
    with pytest.raises(ValueError, match="q has 24 rows and k has 23"):
        packed_attention(q, k[:23], v[:23], boundaries=[0, 24])
    with pytest.raises(ValueError, match="24 queries in 1 rows do not fit a cache of 20 keys"):
        decode_attention(q[None], k[None, :20], v[None, :20], key_mask=torch.ones(1, 20, dtype=torch.bool))
    with pytest.raises(ValueError, match="expected bool"):
        decode_attention(q[None], k[None], v[None], key_mask=torch.ones(1, 24))
    with pytest.raises(ValueError, match="d even"):
        apply_rope(q[..., :7], torch.arange(24), 1e4)
