"""`*`: grouped-query attention, inside each document, without positional encoding unless RoPE is asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.attention import apply_rope, decode_attention, packed_attention
from ..context import Context, gather_tokens, nearest_divisor, share_heads, to_heads, to_sequence
from ..errors import PlanError
from ..layout import Layout
from ..linear import packed_linear, project
from ..parts import Init, Part
from .base import HFKey, Kind, Load, Mixer, NewTokens, Shape, Work, flat


@dataclass(frozen=True)
class AttentionConfig:
    """Sizes of an attention layer.

    Attributes:
        n_heads, n_kv_heads, head_dim: query heads, key/value heads, width of each.
        rope_base: base of rotary embeddings; None (as in the 8B Mamba-2-Hybrid) for no positional encoding.
    """

    n_heads: int = 32
    n_kv_heads: int = 8
    head_dim: int = 128
    rope_base: float | None = None

    __pydantic_config__ = {"extra": "forbid"}


def check(config: AttentionConfig, shape: Shape, tp: int) -> None:
    """Refuse heads that do not divide, with the numbers."""
    if config.n_heads % config.n_kv_heads:
        raise PlanError(
            f"model.attention: n_heads {config.n_heads} is not a multiple of n_kv_heads {config.n_kv_heads}"
        )
    if config.n_heads % tp or config.n_kv_heads % tp:
        raise PlanError(
            f"model.attention: n_heads {config.n_heads} and n_kv_heads {config.n_kv_heads} must both be divisible by "
            f"tp {tp}; choose tp {nearest_divisor(math.gcd(config.n_heads, config.n_kv_heads), tp)}"
        )
    if config.rope_base is not None and config.head_dim % 2:
        raise PlanError(f"model.attention: RoPE needs an even head_dim, not {config.head_dim}")


def parts(config: AttentionConfig, shape: Shape) -> dict[str, Part]:
    normal, q, kv = (
        Init("normal", shape.init_std),
        config.n_heads * config.head_dim,
        config.n_kv_heads * config.head_dim,
    )
    widths = {"q": q, "k": kv, "v": kv}
    result = {f"{n}_proj.weight": Part((width, shape.d_model), normal, 0) for n, width in widths.items()}
    result["o_proj.weight"] = Part((shape.d_model, q), Init("normal", shape.output_std), 1)
    return result


class Attention(Mixer):
    """Causal attention with this rank's heads; keys and values of other documents do not exist."""

    config: AttentionConfig

    def forward(self, h_TD: Tensor, layout: Layout) -> Tensor:
        q, k, v = self._qkv(h_TD, layout)
        if self.config.rope_base is not None:
            q, k = (apply_rope(x, layout.position_ids, self.config.rope_base) for x in (q, k))
        if layout.context is None:
            y = packed_attention(q, k, v, boundaries=layout.boundaries)
        else:
            y = context_attention(q, k, v, layout.context)
        return packed_linear(y.flatten(-2), [self.o_proj.weight], layout.modality)

    def extend(self, h_bsD: Tensor, new: NewTokens, cache: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        b, s, _ = h_bsD.shape
        q, k, v = self._qkv(flat(h_bsD), new)
        if self.config.rope_base is not None:
            q, k = (apply_rope(x, new.position_ids.reshape(-1), self.config.rope_base) for x in (q, k))
        q, k, v = (x.view(b, s, *x.shape[1:]) for x in (q, k, v))
        if cache:
            k, v = torch.cat((cache["k"], k), dim=1), torch.cat((cache["v"], v), dim=1)
        y = decode_attention(q, k, v, key_mask=new.key_mask)
        return packed_linear(flat(y.flatten(-2)), [self.o_proj.weight], new.modality).view(b, s, -1), {"k": k, "v": v}

    def _qkv(self, h_TD: Tensor, tokens: Layout | NewTokens) -> list[Tensor]:
        weights = [self.q_proj.weight, self.k_proj.weight, self.v_proj.weight]
        return [x.unflatten(-1, (-1, self.config.head_dim)) for x in project(h_TD, weights, tokens.modality)]


def context_attention(q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
    """Attention of this rank's tokens to all tokens of their documents: q [T/cp, H, d], k and v [T/cp, K, d]."""
    n_heads, n_kv, size = q.shape[1], k.shape[1], context.mesh.cp_size
    divides = n_heads % size == 0 and (n_kv % size == 0 or size % n_kv == 0)
    choice = context.mesh.context.attention
    if choice == "gather" or (choice == "auto" and not divides):
        k, v = (gather_tokens(x.flatten(1), context).view(-1, n_kv, x.shape[-1]) for x in (k, v))
        return _attend_to_all(q, k, v, context)
    shares = share_heads(n_heads, n_kv, size, "model.attention")
    per_rank = [
        torch.cat((q_r.flatten(1), k[:, share].flatten(1), v[:, share].flatten(1)), dim=1)
        for q_r, share in zip(q.chunk(size, dim=1), shares, strict=True)
    ]
    width = q.shape[-1]
    everything = to_heads(per_rank, context).unflatten(1, (-1, width))
    kv = len(shares[0])
    q_all, k_all, v_all = everything.split((n_heads // size, kv, kv), dim=1)
    y = packed_attention(q_all, k_all, v_all, boundaries=context.boundaries)
    return to_sequence(y.flatten(1), context).unflatten(1, (-1, width))


def _attend_to_all(q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
    """Queries of this rank's segments against the keys of the whole micro-batch, document by document."""
    outputs, row = [], 0
    for segment in context.mine:
        start, stop = segment * context.length, (segment + 1) * context.length
        for first, last in zip(context.boundaries[:-1], context.boundaries[1:], strict=True):
            begin, end = max(first, start), min(last, stop)
            if begin < end:
                rows = q[row : row + end - begin].transpose(0, 1)[None]
                keys, values = (x[first:end].transpose(0, 1)[None] for x in (k, v))
                seen = torch.ones(end - begin, end - first, dtype=torch.bool, device=q.device).tril(begin - first)
                y = F.scaled_dot_product_attention(rows, keys, values, attn_mask=seen, enable_gqa=True)
                outputs.append(y[0].transpose(0, 1))
                row += end - begin
    return torch.cat(outputs)


def flops(config: AttentionConfig, shape: Shape, mean_keys: float) -> float:
    """Forward FLOPs per token; `mean_keys` counts what the mask lets through, not the whole square."""
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    return float(2 * shape.d_model * (2 * q + 2 * kv) + 4 * mean_keys * q)


def work(config: AttentionConfig, shape: Shape, load: Load) -> Work:
    """Fused attention skips what a causal mask hides; scaled_dot_product_attention per document is counted whole.

    The backward forms the scores again, so it has five products where the forward has two.
    """
    q, kv = config.n_heads * config.head_dim // load.tp, config.n_kv_heads * config.head_dim // load.tp
    keys = load.mean_keys if load.kernels == "triton" else 2 * load.mean_keys - 1
    mixing = 4 * load.tokens * keys * q
    product = load.tokens * 2 * shape.d_model
    return Work(product * (2 * q + 2 * kv), product * q, mixing, 2.5 * mixing)


def saved(config: AttentionConfig, shape: Shape, load: Load) -> float:
    """The input, q, k and v (as projected, or stacked by document, or turned by RoPE), output and its log-sum-exp."""
    q, kv = config.n_heads * config.head_dim // load.tp, config.n_kv_heads * config.head_dim // load.tp
    token = load.itemsize * (shape.d_model + 2 * q + 2 * kv) + 4 * config.n_heads // load.tp
    if config.rope_base is not None:
        token += 2 * load.wide * config.head_dim  # cos and sin, for q and for k
    if load.kernels == "torch" and 2 * load.mean_keys - 1 < load.tokens:
        token += load.itemsize * q  # several documents are put together again after the attention
    return load.tokens * token + load.itemsize * (q + 2 * kv) * shape.d_model


def kept(config: AttentionConfig, shape: Shape, load: Load) -> float:
    """The projections of q, k and v where they widen; the attention's output and log-sum-exp."""
    q, kv = config.n_heads * config.head_dim // load.tp, config.n_kv_heads * config.head_dim // load.tp
    token = load.itemsize * (q + (q + 2 * kv if q + 2 * kv > shape.d_model else 0))
    return load.tokens * (token + 4 * config.n_heads // load.tp)


def hf_keys(config: AttentionConfig) -> tuple[HFKey, ...]:
    return tuple(HFKey(f"{n}_proj.weight", (f"{n}_proj.weight",)) for n in "qkvo")


KIND = Kind("*", "attention", "attention", Attention, parts, check, flops, hf_keys, work, saved, kept)
