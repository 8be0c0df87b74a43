"""Causal grouped-query attention over packed documents and over a decode cache, and rotary positions."""

import functools
import importlib.util
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .operators import check_ids, check_tensors


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, *, boundaries: Sequence[int], scale: float | None = None
) -> Tensor:
    """Causal attention in which each document sees only itself.

    Args:
        q: (T, h, d). k, v: (T, kv, d), kv divides h. boundaries: host ints [0, …, T]; document i is the rows
            boundaries[i]:boundaries[i+1] and may be empty. scale: of the logits, 1/sqrt(d) if None.

    Returns:
        (T, h, d) in q's dtype: flash_attn's varlen kernel when it is installed and the tensors are half precision on
        CUDA, scaled_dot_product_attention per document otherwise.

    Raises:
        ValueError: shapes or boundaries that do not fit.
    """
    _check_heads(q, k, v, dims=3)
    ends = [int(end) for end in boundaries]
    lengths = [b - a for a, b in pairwise(ends)]
    if not lengths or ends[0] != 0 or ends[-1] != q.shape[0] or min(lengths) < 0:
        raise ValueError(f"boundaries {_short(ends)} do not run from 0 to {q.shape[0]} rows without decrease")
    if q.shape[0] == 0:
        return q + 0.0 * (k.sum() + v.sum())  # the graph keeps its edges on a rank without tokens
    lengths = [length for length in lengths if length]
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and _flash_is_installed():
        return flash_varlen(q, k, v, lengths, scale)
    return _sdpa_per_document(q, k, v, lengths, scale)


@functools.cache
def _flash_is_installed() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def flash_varlen(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float | None) -> Tensor:
    """flash_attn's varlen kernel over documents of ``lengths`` > 0; shapes as in :func:`packed_attention`."""
    from flash_attn import flash_attn_varlen_func

    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    if q.is_cuda:
        ends = ends.pin_memory().to(q.device, non_blocking=True)
    longest = max(lengths)
    return flash_attn_varlen_func(q, k, v, ends, ends, longest, longest, softmax_scale=scale, causal=True)


def _sdpa_per_document(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float | None) -> Tensor:
    """Documents of equal length go through one call: most of a small call is its overhead."""
    parts = [t.split(lengths) for t in (q, k, v)]
    members: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        members.setdefault(length, []).append(index)
    outputs: list[Tensor] = [q] * len(lengths)
    for documents in members.values():
        # (documents, heads, length, d)
        qs, ks, vs = (torch.stack([part[i] for i in documents]).transpose(1, 2) for part in parts)
        y = _sdpa(qs, ks, vs, None, scale).transpose(1, 2)
        for index, document in zip(documents, y.unbind(0), strict=True):
            outputs[index] = document
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0].contiguous()


def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *, key_mask: Tensor, scale: float | None = None
) -> Tensor:
    """Attention of the newest tokens over a cache.

    Args:
        q: (b, s, h, d); the s queries are the last s of the L cached positions, causal among themselves.
        k_cache, v_cache: (b, L, kv, d). key_mask: (b, L) bool, False excludes a key (padding). scale: as in
            :func:`packed_attention`.

    Returns:
        (b, s, h, d) in q's dtype; a query that may see no key at all (padding) gets zeros.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    _check_heads(q, k_cache, v_cache, dims=4)
    (b, s), L = q.shape[:2], k_cache.shape[1]
    if s > L or s < 1 or k_cache.shape[0] != b:
        raise ValueError(f"{s} queries in {b} rows do not fit a cache of {L} keys in {k_cache.shape[0]} rows")
    if tuple(key_mask.shape) != (b, L) or key_mask.dtype != torch.bool:
        raise ValueError(f"key_mask is {key_mask.dtype} {tuple(key_mask.shape)}, expected bool ({b}, {L})")
    if key_mask.device != q.device:
        raise ValueError(f"key_mask is on {key_mask.device}, expected {q.device} as q")
    causal = torch.ones(s, L, dtype=torch.bool, device=q.device).tril(diagonal=L - s)
    seen = causal & key_mask[:, None, :]
    blind = ~seen.any(dim=-1, keepdim=True)  # softmax over nothing is nan: look at everything, then drop the result
    y = _sdpa(q.transpose(1, 2), k_cache.transpose(1, 2), v_cache.transpose(1, 2), (seen | blind)[:, None], scale)
    return y.transpose(1, 2).masked_fill(blind[..., None], 0.0)


def apply_rope(x: Tensor, position_ids: Tensor, base: float = 10000.0) -> Tensor:
    """Rotary positions (RoFormer), in Hugging Face's halves layout: channel i turns with channel i + d/2.

    Args:
        x: (T, h, d), d even. position_ids: (T,) integers. base: of the wavelengths.

    Returns:
        Like x; computed in float32, or float64 when x is.

    Raises:
        ValueError: shapes that do not fit, or an odd d.
    """
    if x.dim() != 3 or x.shape[-1] % 2 or tuple(position_ids.shape) != (x.shape[0],):
        raise ValueError(
            f"x {tuple(x.shape)} and position_ids {tuple(position_ids.shape)} do not fit (T, h, d even) and (T,)"
        )
    check_tensors(x, {"x": x})
    check_ids("position_ids", position_ids, (x.shape[0],), x.device)
    d = x.shape[-1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    frequency = 1.0 / base ** (torch.arange(0, d, 2, device=x.device, dtype=dtype) / d)
    angle = position_ids.to(dtype)[:, None, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    left, right = x.to(dtype).chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1).to(x.dtype)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def _check_heads(q: Tensor, k: Tensor, v: Tensor, dims: int) -> None:
    if q.dim() != dims or k.dim() != dims or k.shape != v.shape or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit each other")
    check_tensors(q, {"q": q, "k": k, "v": v}, "q")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q is {q.dtype}, k is {k.dtype} and v is {v.dtype}, expected one dtype")
    if dims == 3 and q.shape[0] != k.shape[0]:
        raise ValueError(f"q has {q.shape[0]} rows and k has {k.shape[0]}, expected the same number")
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(f"{k.shape[-2]} key heads do not divide {q.shape[-2]} query heads")


def _short(ends: list[int]) -> str:
    return str(ends) if len(ends) <= 8 else f"[{ends[0]}, {ends[1]}, …, {ends[-1]}] ({len(ends)} numbers)"
