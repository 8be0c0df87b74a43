"""What every layer kind declares, in one place: the single source of truth of the registry.

Shape suffixes in this folder: T tokens of a micro-batch (all rows, flat), D model dimension, H heads, P head
dimension, G groups, N state, I the mixer's inner width, E experts, F feed-forward width, b batch, s new tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from ..layout import Layout
from ..mesh import Mesh
from ..parts import Part, PartModule, add_part
from ..routing import Route


@dataclass(frozen=True)
class Shape:
    """What a kind must know of the model around it."""

    d_model: int
    n_layers: int
    modalities: tuple[str, ...]
    init_std: float
    norm_eps: float

    @property
    def output_std(self) -> float:
        """Standard deviation of projections back into the residual stream: std / √(2·layers) (GPT-2, Megatron)."""
        return self.init_std / (2 * self.n_layers) ** 0.5


@dataclass(frozen=True)
class HFKey:
    """One tensor of the Hugging Face layout, made of our parts concatenated along dim 0.

    Attributes:
        name: the key below `mixer.`; `{j}` stands for the expert.
        parts: our part names, in order.
        unsqueeze: the dimension of size 1 that the other side has (depthwise conv weights), or None.
    """

    name: str
    parts: tuple[str, ...]
    unsqueeze: int | None = None


class Mixer(PartModule):
    """A layer's body: from the normed tokens of the whole micro-batch to this rank's partial sum of the output.

    The block around it owns the norm, the residual and the sequence-parallel gather and reduce-scatter, so a mixer
    sees all tokens and only its own heads (or channels, or feed-forward columns).
    """

    def __init__(
        self,
        config: Any,
        shape: Shape,
        mesh: Mesh,
        parts: Mapping[str, Part],
        holders: Mapping[str, PartModule] = MappingProxyType({}),
    ) -> None:
        """`holders` are modules that own parts and compute with them; other parts only hang under their names."""
        super().__init__()
        self.config, self.shape, self.mesh = config, shape, mesh
        for name, holder in holders.items():
            self.add_module(name, holder)
        for name, part in parts.items():
            add_part(self, name, part, mesh)

    def forward(self, h_TD: Tensor, layout: Layout) -> Tensor:
        """[T, D] → [T, D], to be summed over tp."""
        raise AssertionError("each kind implements it")

    def extend(self, h_bsD: Tensor, new: NewTokens, cache: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Decoding: the outputs for `s` new tokens per sequence, and the cache that includes them.

        An empty cache starts a sequence; one call with s tokens equals s calls with one.
        """
        raise AssertionError("each kind implements it")


@dataclass(frozen=True)
class NewTokens:
    """What `extend` must know of the s new tokens of b sequences.

    Attributes:
        seq_idx: int32 [b, s]; 0 for a token, −1 for (left) padding.
        position_ids: int64 [b, s].
        key_mask: bool [b, L + s], which of all tokens so far are real.
        modality: route of the b·s tokens.
    """

    seq_idx: Tensor
    position_ids: Tensor
    key_mask: Tensor
    modality: Route


class Parts(Protocol):
    def __call__(self, config: Any, shape: Shape) -> dict[str, Part]: ...


@dataclass(frozen=True)
class Kind:
    """One row of the registry.

    Attributes:
        symbol, title: its character in the pattern, its name in messages.
        section: its section of the model configuration.
        mixer: the module.
        parts: its logical parameters.
        check: raises PlanError where the configuration does not fit the model or tensor parallelism.
        flops: forward FLOPs per token (2 per multiply-add), given the mean number of keys that a token attends to.
        hf_keys: its tensors in the layout that NemotronH, Mamba2 and vLLM read.
    """

    symbol: str
    title: str
    section: str
    mixer: type[Mixer]
    parts: Parts
    check: Callable[[Any, Shape, int], None]
    flops: Callable[[Any, Shape, float], float]
    hf_keys: Callable[[Any], tuple[HFKey, ...]]


def flat(x_bsD: Tensor) -> Tensor:
    return x_bsD.reshape(-1, x_bsD.shape[-1])


def squared_relu(x: Tensor) -> Tensor:
    return torch.relu(x).square()


def skip(y: Tensor, x: Tensor, D_H: Tensor) -> Tensor:
    """y + D·x, both […, H, P]."""
    return y + (x * D_H[:, None]).to(y.dtype)
