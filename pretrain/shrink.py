"""The same structure at toy size: what `--shrink` runs, so that no recipe is only ever read."""

from __future__ import annotations

from dataclasses import replace

from ..parallel.mesh import MeshConfig
from .config import RunConfig, TrainConfig

D_MODEL, SEQ_LEN, VOCAB = 64, 64, 1024


def shrink(config: RunConfig, steps: int = 2, mesh: MeshConfig | None = None) -> RunConfig:
    """Pattern, routing, group and head counts, activations and modalities stay; widths, vocabulary and data shrink.

    Training goes to `<folder>-shrunk` on mock data, on `mesh`, or on two CPU processes at most: tensor-parallel ones,
    or expert-parallel ones where only that axis is used.
    """
    if mesh is None and config.mesh.ep % 2 == 0 and config.mesh.tp == 1:
        mesh = MeshConfig(dp_shard=2, ep=2)
    model = config.model
    inner = model.mamba.expand * D_MODEL
    # As many heads as divide into the groups: at least one per group, each of at least one channel.
    head_dim = max(1, min(8, inner // model.mamba.n_groups))
    small = replace(
        model,
        d_model=D_MODEL,
        vocab_size=min(VOCAB, model.vocab_size),
        mamba=replace(model.mamba, head_dim=head_dim, d_state=16, chunk_size=16),
        attention=replace(model.attention, head_dim=4),
        mlp=replace(model.mlp, d_ff=2 * D_MODEL),
        moe=replace(model.moe, d_ff=32, d_ff_shared=32),
        layers={
            index: {name: value for name, value in override.items() if name in ("routed", "activation", "top_k")}
            for index, override in model.layers.items()
        },
    )
    data = replace(
        config.data,
        path="mock",
        split="train",
        seq_len=SEQ_LEN,
        global_batch=2,
        micro_batch=1,
        window=64,
        sources={},
        stages=(),
        workers=0,
    )
    return replace(
        config,
        name=f"{config.name}-shrunk",
        folder=f"{config.folder}-shrunk",
        model=small,
        data=data,
        mesh=mesh or MeshConfig(dp_shard=1, tp=min(2, config.mesh.tp)),
        train=replace(TrainConfig(), steps=steps, checkpoint_every=0, device="cpu"),
        tracking=replace(config.tracking, wandb="disabled"),
    )
