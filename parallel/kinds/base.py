"""What every layer kind declares, in one place: the single source of truth of the registry.

Shape suffixes in this folder: T tokens of a micro-batch (all rows, flat), D model dimension, H heads, P head
dimension, G groups, N state, I the mixer's inner width, E experts, F feed-forward width, b batch, s new tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, Protocol

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


@dataclass(frozen=True)
class Load:
    """What one rank has of a micro-batch: everything, besides the layer, that its cost depends on.

    Attributes:
        tokens: tokens of the micro-batch on this context-parallel rank.
        mean_keys: keys that a token attends to on average; for documents of lengths n_i, Σ n_i(n_i+1)/2 / Σ n_i.
        tp, cp: ranks along these axes.
        itemsize: bytes of an activation (of the compute dtype).
        modalities: modality banks that have tokens; with one, routed projections need no sorting.
        kernels: `triton` on a GPU, `torch` the reference path.
        busiest: tokens of the busiest expert-parallel rank over the mean (1 when balanced).
    """

    tokens: int
    mean_keys: float
    tp: int = 1
    cp: int = 1
    itemsize: int = 4
    modalities: int = 1
    kernels: Literal["torch", "triton"] = "torch"
    busiest: float = 1.0

    @property
    def wide(self) -> int:
        """Bytes of what is computed in at least float32."""
        return max(4, self.itemsize)


@dataclass(frozen=True)
class Work:
    """FLOPs of matrix products that one rank executes for one micro-batch (2 per multiply-add).

    Attributes:
        weights: forward products with weights; the backward of the inputs takes as many again, and so does that of
            the weights.
        last: of `weights`, the layer's last product, which recompute does not repeat.
        mixing, mixing_backward: products among activations (scan, attention), whole tiles as the operators work them
            off, what their backward computes again included.
    """

    weights: float
    last: float
    mixing: float = 0.0
    mixing_backward: float = 0.0

    @property
    def forward(self) -> float:
        return self.weights + self.mixing

    @property
    def backward(self) -> float:
        return 2 * self.weights + self.mixing_backward


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
        work: matrix products that a rank executes.
        saved: bytes that the mixer keeps for backward per micro-batch and rank, weights that were packed for one GEMM
            among them, parameters not.
        kept: of that, what `selective` recompute keeps besides the layer's input (`recompute.KEPT`).
    """

    symbol: str
    title: str
    section: str
    mixer: type[Mixer]
    parts: Parts
    check: Callable[[Any, Shape, int], None]
    flops: Callable[[Any, Shape, float], float]
    hf_keys: Callable[[Any], tuple[HFKey, ...]]
    work: Callable[[Any, Shape, Load], Work]
    saved: Callable[[Any, Shape, Load], float]
    kept: Callable[[Any, Shape, Load], float]


def flat(x_bsD: Tensor) -> Tensor:
    return x_bsD.reshape(-1, x_bsD.shape[-1])


def squared_relu(x: Tensor) -> Tensor:
    return torch.relu(x).square()


def skip(y: Tensor, x: Tensor, D_H: Tensor) -> Tensor:
    """y + D·x, both […, H, P]."""
    return y + (x * D_H[:, None]).to(y.dtype)
