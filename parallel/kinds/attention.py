"""`*`: grouped-query attention, inside each document, without positional encoding unless RoPE is asked for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.attention import apply_rope, decode_attention, packed_attention
from ..errors import PlanError
from ..layout import Layout
from ..linear import packed_linear, project
from ..parts import Init, Part
from .base import HFKey, Kind, Mixer, NewTokens, Shape, flat


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
            f"tp {tp}"
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
        y = packed_attention(q, k, v, boundaries=layout.boundaries)
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


def flops(config: AttentionConfig, shape: Shape, mean_keys: float) -> float:
    """Forward FLOPs per token; `mean_keys` counts what the mask lets through, not the whole square."""
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    return float(2 * shape.d_model * (2 * q + 2 * kv) + 4 * mean_keys * q)


def hf_keys(config: AttentionConfig) -> tuple[HFKey, ...]:
    return tuple(HFKey(f"{n}_proj.weight", (f"{n}_proj.weight",)) for n in "qkvo")


KIND = Kind("*", "attention", "attention", Attention, parts, check, flops, hf_keys)
