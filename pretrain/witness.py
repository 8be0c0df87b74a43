"""An objective that looks on: a step's loss, and which experts were chosen by micro-batch, whatever the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..parallel.kinds.moe import MoE
from ..parallel.layout import Layout
from ..parallel.mesh import Mesh
from ..parallel.model import HybridModel
from .objectives.next_token import NextToken, ObjectiveOutput, PreparedTokens

Choices = dict[str, list[Tensor]]


@dataclass(frozen=True)
class _Watched(PreparedTokens):
    losses: list[Tensor]

    def finish(self, ce_T: Tensor) -> ObjectiveOutput:
        output = super().finish(ce_T)
        self.losses.append(output.loss.detach())
        return output


class Witness(NextToken):
    """Next-token prediction of one step, its micro-batches in any order and repeated where layers are recomputed.

    A layer knows its micro-batch by the layout that comes with the tokens: the forwards of stages interleave.

    Args:
        choices: experts [T, k] to replay, by layer and global micro-batch; None lets the routers choose.
        first: global number of this rank's first micro-batch.
        margin: see `MoE.replay_margin`.
    """

    def __init__(self, choices: Choices | None, first: int, margin: float) -> None:
        self.losses: list[Tensor] = []
        self._choices, self._first, self._margin = choices, first, margin
        self._layouts: list[Layout] = []
        self._made: dict[str, dict[int, Tensor]] = {}
        self._flips: dict[tuple[str, int], int] = {}

    def prepare(
        self, batch: Mapping[str, Tensor], mesh: Mesh, n_modalities: int, total_weight: float
    ) -> PreparedTokens:
        ready = super().prepare(batch, mesh, n_modalities, total_weight)
        self._layouts.append(ready.layout)
        return _Watched(**vars(ready), losses=self.losses)

    def watch(self, models: Sequence[HybridModel]) -> None:
        """Look at every expert layer of these models."""
        for model in models:
            for name, layer in model.named_modules():
                if isinstance(layer, MoE):
                    layer.replay_margin, self._made[name] = self._margin, {}
                    layer.register_forward_pre_hook(partial(self._before, name))
                    layer.register_forward_hook(partial(self._after, name))

    def loss(self, like: Tensor) -> Tensor:
        """Σ over this rank's micro-batches; zero where their losses are computed on another rank."""
        return torch.stack(self.losses).sum() if self.losses else torch.zeros_like(like)

    @property
    def made(self) -> Choices:
        """The choices of this rank's layers, by its micro-batches."""
        return {name: [made[number] for number in sorted(made)] for name, made in self._made.items()}

    @property
    def flips(self) -> int:
        """Tokens that would have chosen otherwise than replayed, by more than the margin explains."""
        return sum(self._flips.values())

    def _number(self, layout: Layout) -> int:
        return next(number for number, known in enumerate(self._layouts) if known is layout)

    def _before(self, name: str, layer: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(layer, MoE)
        if self._choices is not None:
            layout = args[1]
            layer.replay = layout.mine(self._choices[name][self._first + self._number(layout)])

    def _after(self, name: str, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        assert isinstance(layer, MoE) and layer.chosen is not None
        number = self._number(args[1])
        self._made[name][number], self._flips[name, number] = layer.chosen, layer.flips
