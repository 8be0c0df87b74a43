"""The same structure at toy size, so that what holds for the small model says something of the large one."""

from __future__ import annotations

from dataclasses import replace

from .model import ModelConfig

D_MODEL, VOCAB = 64, 1024


def shrink_model(model: ModelConfig) -> ModelConfig:
    """Pattern, routing, group and head counts, activations and modalities stay; widths and vocabulary shrink."""
    inner = model.mamba.expand * D_MODEL
    # As many heads as divide into the groups: at least one per group, each of at least one channel.
    head_dim = max(1, min(8, inner // model.mamba.n_groups))
    return replace(
        model,
        d_model=D_MODEL,
        vocab_size=min(VOCAB, model.vocab_size),
        mamba=replace(model.mamba, width=None, head_dim=head_dim, d_state=16, chunk_size=16),
        attention=replace(model.attention, head_dim=4),
        mlp=replace(model.mlp, d_ff=2 * D_MODEL),
        moe=replace(model.moe, d_ff=32, d_ff_shared=32),
        layers={
            index: {name: value for name, value in override.items() if name in ("routed", "activation", "top_k")}
            for index, override in model.layers.items()
        },
    )
