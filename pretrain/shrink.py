"""The same structure at toy size: what `--shrink` runs, so that no recipe is only ever read."""

from __future__ import annotations

from dataclasses import replace

from ..parallel.mesh import MeshConfig
from ..parallel.shrink import shrink_model
from .config import RunConfig, TrainConfig

SEQ_LEN = 64


def shrink(config: RunConfig, steps: int = 2, mesh: MeshConfig | None = None) -> RunConfig:
    """Pattern, routing, group and head counts, activations and modalities stay; widths, vocabulary and data shrink.

    Training goes to `<folder>-shrunk` on mock data, on `mesh`, or on two CPU processes at most: tensor-parallel ones,
    or expert-parallel ones where only that axis is used.
    """
    if mesh is None and config.mesh.ep % 2 == 0 and config.mesh.tp == 1:
        mesh = MeshConfig(dp_shard=2, ep=2)
    small = shrink_model(config.model)
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
