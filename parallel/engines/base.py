"""What lies between a step's micro-batches and the updated weights: one protocol, several engines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..layout import Layout
from ..mesh import Mesh
from ..model import HybridModel


class Output(Protocol):
    """What an objective makes of one micro-batch.

    Attributes:
        loss: this rank's share of Σ w·ℓ / W, a scalar to call `backward` on.
        sums: unweighted Σ ℓ per modality [n_modalities], detached.
    """

    @property
    def loss(self) -> Tensor: ...

    @property
    def sums(self) -> Tensor: ...


class Prepared(Protocol):
    """A micro-batch on this rank's device, ready for the model.

    Attributes:
        tokens, labels: int64 [T/cp].
        layout: documents and modalities of the tokens.
    """

    @property
    def tokens(self) -> Tensor: ...

    @property
    def labels(self) -> Tensor: ...

    @property
    def layout(self) -> Layout: ...

    def finish(self, ce_T: Tensor) -> Output:
        """The loss, given the model's cross-entropy of each token."""
        ...


Batch = Mapping[str, Tensor]


class Objective(Protocol):
    """What is trained for. In two halves, because pipeline stages run the model between them."""

    def prepare(self, batch: Batch, mesh: Mesh, n_modalities: int, total_weight: float) -> Prepared:
        """
        Args:
            batch: CPU tensors of the batch contract.
            total_weight: W, Σ of loss weights over the *global* batch.
        """
        ...

    def __call__(self, model: HybridModel, batch: Batch, total_weight: float) -> Output:
        """Both halves with a whole model between them."""
        ...


@runtime_checkable
class Elsewhere(Protocol):
    """An optimizer whose state, and the weights' fp32 copy, do not lie in the parameters (ZeRO's partitions)."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...

    def pieces(self) -> Iterator[tuple[Tensor, int, Tensor]]:
        """What this rank keeps of each reduced gradient: parameter, where in its elements the piece begins, piece."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Copies of all logical tensors of a checkpoint; all ranks call it."""
        ...

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Write back what has been filled into the result of `tensors`; all ranks call it."""
        ...


Optimizer = torch.optim.Optimizer | Elsewhere


class Engine(Protocol):
    """Forward, backward and update of the layers that live on this rank.

    Attributes:
        mesh: of all ranks.
        models: the layers of this rank: one model, or one per pipeline stage that it holds.
        optimizer: over the parameters of `models`.
    """

    mesh: Mesh
    models: tuple[HybridModel, ...]

    @property
    def optimizer(self) -> Optimizer: ...

    def accumulate(self, batches: Sequence[Batch], total_weight: float) -> Tensor:
        """Forward and backward of this rank's micro-batches of one step; gradients wait for `update`.

        Args:
            batches: CPU tensors of the batch contract.
            total_weight: W, Σ of loss weights over the *global* batch; every reduction is a sum.

        Returns:
            Unweighted Σ ℓ per modality [n_modalities] over what this rank saw; every tp rank sees the same tokens.
        """
        ...

    def gradient_norm(self) -> float:
        """The 2-norm of the whole model's gradient, the same on all ranks."""
        ...

    def scale(self, factor: float) -> None:
        """Multiply every gradient, in place."""
        ...

    def update(self, lr: float) -> None:
        """One optimizer step; gradients are gone afterwards."""
        ...

    def discard(self) -> None:
        """Forget the gradients without a step."""
        ...
