"""Collectives of one forward pass and the bytes they carry, as formulas of the axis sizes.

A gather is counted by what each rank ends up with, a reduce-scatter by what it puts in, an all-to-all and an all-reduce
by the tensor. The backward of a gather is a reduce-scatter of the same size and the other way round, so a backward
pass carries the same bytes; without context parallelism or with one exchange per layer the counts are equal too.
`tests/parallel/test_collectives.py` asserts every line against what is really called.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from .kinds.attention import AttentionConfig
from .kinds.mamba import MambaConfig
from .kinds.moe import MoEConfig
from .layout import HALO
from .mesh import ContextConfig, MeshConfig
from .model import ModelConfig


@dataclass
class Volume:
    """Attributes:
    calls: collectives by name, `all_gather`, `reduce_scatter`, `all_to_all`, `all_reduce`.
    bytes: what they carry.
    """

    calls: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)

    def add(self, name: str, elements: int, itemsize: int, calls: int = 1) -> None:
        self.calls[name] += calls
        self.bytes[name] += calls * elements * itemsize


def forward_volume(
    config: ModelConfig, mesh: MeshConfig, context: ContextConfig, n_tokens: int, itemsize: int = 4
) -> Volume:
    """Collectives of tensor, sequence, context and expert parallelism in a micro-batch's forward, seen by one rank.

    The rows that experts receive depend on the routing: here it is even, which is also the mean over ranks.
    Balancing terms and capacities that add counts up over context ranks are left out.

    Args:
        n_tokens: tokens of the micro-batch, all context ranks together.
        itemsize: bytes of an activation; states and losses travel in at least float32.
    """
    total = ends_volume(config, mesh, n_tokens, itemsize)
    for index in range(len(config.symbols)):
        for volume in layer_volume(config, index, mesh, context, n_tokens, itemsize):
            total.calls.update(volume.calls)
            total.bytes.update(volume.bytes)
    return total


def ends_volume(config: ModelConfig, mesh: MeshConfig, n_tokens: int, itemsize: int = 4) -> Volume:
    """What embedding, output projection and cross-entropy send over tp."""
    volume, local, wide = Volume(), n_tokens // mesh.cp, max(4, itemsize)
    if mesh.tp > 1:
        volume.add("reduce_scatter", local * config.d_model, itemsize)  # embedding
        volume.add("all_gather", local * config.d_model, itemsize)  # output projection
        volume.add("all_reduce", local, wide)  # largest logit
        volume.add("all_reduce", 2 * local, wide)  # Σ exp and the target's logit
    return volume


def layer_volume(
    config: ModelConfig, index: int, mesh: MeshConfig, context: ContextConfig, n_tokens: int, itemsize: int = 4
) -> tuple[Volume, Volume, Volume]:
    """What one layer sends over tp, over cp, and over ep (there when routing is even)."""
    over_tp, over_cp, over_ep = Volume(), Volume(), Volume()
    if mesh.tp > 1:
        over_tp.add("all_gather", n_tokens // mesh.cp * config.d_model, itemsize)
        over_tp.add("reduce_scatter", n_tokens // mesh.cp * config.d_model, itemsize)
    layer = config.layer(index)[1]
    if isinstance(layer, MambaConfig):
        if layer.n_groups % mesh.tp:  # sums of squares of norms that span ranks
            over_tp.add("all_reduce", n_tokens // mesh.cp * layer.n_groups, max(4, itemsize))
        if mesh.cp > 1:
            _mamba(over_cp, config, layer, mesh, context, n_tokens, itemsize)
    elif isinstance(layer, AttentionConfig) and mesh.cp > 1:
        _attention(over_cp, layer, mesh, context, n_tokens, itemsize)
    elif isinstance(layer, MoEConfig) and mesh.ep > 1:
        over_ep.add("all_to_all", layer.n_experts + mesh.ep * mesh.ep_spare, 8)  # counts; then rows there and back
        over_ep.add("all_to_all", n_tokens // mesh.cp * layer.top_k * config.d_model, itemsize, 2)
    return over_tp, over_cp, over_ep


def _mamba(
    volume: Volume,
    config: ModelConfig,
    layer: MambaConfig,
    mesh: MeshConfig,
    context: ContextConfig,
    n_tokens: int,
    itemsize: int,
) -> None:
    heads, wide = layer.n_heads(config.shape) // mesh.tp, max(4, itemsize)
    groups = max(1, layer.n_groups // mesh.tp)
    if context.mamba == "heads":
        shares = max(1, groups // mesh.cp)
        width = heads // mesh.cp * (layer.head_dim + 1) + 2 * shares * layer.d_state
        volume.add("all_to_all", n_tokens * width, itemsize)
        volume.add("all_to_all", n_tokens * (heads // mesh.cp) * layer.head_dim, itemsize)
    else:
        segments = mesh.cp * (2 if context.order == "zigzag" else 1)
        volume.add("all_gather", segments * HALO * config.d_model, itemsize)
        volume.add("all_gather", segments * heads * (layer.head_dim * layer.d_state + 1), wide)


def _attention(
    volume: Volume, layer: AttentionConfig, mesh: MeshConfig, context: ContextConfig, n_tokens: int, itemsize: int
) -> None:
    heads, kv = layer.n_heads // mesh.tp, layer.n_kv_heads // mesh.tp
    divides = heads % mesh.cp == 0 and (kv % mesh.cp == 0 or mesh.cp % kv == 0)
    if context.attention == "gather" or (context.attention == "auto" and not divides):
        volume.add("all_gather", n_tokens * kv * layer.head_dim, itemsize, 2)
    else:
        width = heads // mesh.cp + 2 * max(1, kv // mesh.cp)
        volume.add("all_to_all", n_tokens * width * layer.head_dim, itemsize)
        volume.add("all_to_all", n_tokens * heads // mesh.cp * layer.head_dim, itemsize)
