"""Toy models and batches of the parallel tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polylepis.parallel.kinds.attention import AttentionConfig
from polylepis.parallel.kinds.mamba import ROUTABLE, MambaConfig
from polylepis.parallel.kinds.mlp import MLPConfig
from polylepis.parallel.kinds.moe import MoEConfig
from polylepis.parallel.model import ModelConfig


def toy(pattern: str, routed: tuple[str, ...] = (), **changes: Any) -> ModelConfig:
    """A model of width 16 whose sizes are all different, three modalities, a padded vocabulary."""
    values: dict[str, Any] = {
        "pattern": pattern,
        "d_model": 16,
        "vocab_size": 45,
        "vocab_multiple": 16,
        "modalities": ("text", "image", "voice"),
        "init_std": 0.2,
        "mamba": MambaConfig(d_state=6, head_dim=4, n_groups=2, chunk_size=8, routed=routed),
        "attention": AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=6),
        "mlp": MLPConfig(d_ff=20),
        "moe": MoEConfig(n_experts=3, top_k=2, d_ff=10, d_ff_shared=12, scale=1.5),
    }
    return ModelConfig(**(values | changes))


ALL_ROUTED = ROUTABLE


def toy_batch(
    documents: list[list[int]], seq_len: int, seed: int = 0, absent: tuple[int, ...] = ()
) -> dict[str, Tensor]:
    """A micro-batch whose row r packs documents of the given lengths; random tokens, modality runs, loss weights.

    Args:
        absent: modality ids that must not occur.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = len(documents)
    tokens = torch.randint(0, 45, (rows, seq_len), generator=generator)
    allowed = torch.tensor([m for m in range(3) if m not in absent])
    runs = torch.randint(0, len(allowed), (rows, -(-seq_len // 5)), generator=generator).repeat_interleave(5, dim=1)
    modality = allowed[runs[:, :seq_len]]
    doc_ids = torch.full((rows, seq_len), -1)
    positions = torch.zeros(rows, seq_len, dtype=torch.int64)
    for row, lengths in enumerate(documents):
        start = 0
        for index, length in enumerate(lengths):
            doc_ids[row, start : start + length] = index
            positions[row, start : start + length] = torch.arange(length)
            start += length
    padding = doc_ids < 0
    has_label = torch.zeros(rows, seq_len, dtype=torch.bool)
    has_label[:, :-1] = (doc_ids[:, 1:] == doc_ids[:, :-1]) & ~padding[:, :-1]
    weight = torch.rand(rows, seq_len, generator=generator) + 0.5
    return {
        "tokens": tokens.masked_fill(padding, 0),
        "labels": tokens.roll(-1, dims=1).masked_fill(~has_label, 0),
        "loss_weight": weight * has_label,
        "modality_ids": modality.masked_fill(padding, 0),
        "doc_ids": doc_ids,
        "position_ids": positions,
    }


def flop_costs(model: ModelConfig, mean_keys: float) -> list[float]:
    """Forward FLOPs per token of each layer; the output projection counts with the last (embedding is a look-up).

    mean_keys: keys that a token attends to on average.
    """
    layers = [model.layer(index) for index in range(len(model.symbols))]
    costs = [kind.flops(config, model.shape, mean_keys) for kind, config in layers]
    costs[-1] += 2 * model.d_model * model.padded_vocab
    return costs
