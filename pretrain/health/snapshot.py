"""The last good state of this rank in host memory."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ...checkpoints.sharded import model_tensors, optimizer_tensors
from ...parallel.model import HybridModel


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


class Snapshot:
    """`take` copies weights, buffers, optimizer state and the position in the data; `restore` writes them back."""

    def __init__(self) -> None:
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._state: dict[str, Any] | None = None

    @torch.no_grad()
    def take(
        self, models: Sequence[HybridModel], optimizer: torch.optim.Optimizer, stream_state: Mapping[str, Any]
    ) -> None:
        tensors = [t for model in models for t in (model_tensors(model) | optimizer_tensors(model, optimizer)).values()]
        self._pairs = [(_local(t), _local(t).detach().to("cpu", copy=True)) for t in tensors]
        self._state = copy.deepcopy(dict(stream_state))

    @torch.no_grad()
    def restore(self) -> dict[str, Any]:
        if self._state is None:
            raise RuntimeError("no snapshot has been taken that could be restored")
        for live, kept in self._pairs:
            live.copy_(kept)
        return copy.deepcopy(self._state)
