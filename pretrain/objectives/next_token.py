"""Next-token prediction, summed with weights and reported per modality of the predicted token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...parallel.layout import Layout
from ...parallel.mesh import Mesh
from ...parallel.model import HybridModel


@dataclass(frozen=True)
class ObjectiveOutput:
    """Attributes:
    loss: this rank's share of Σ w·ℓ / W, a scalar to call `backward` on.
    sums: unweighted Σ ℓ per modality [n_modalities], detached.
    """

    loss: Tensor
    sums: Tensor


def label_modalities(batch: Mapping[str, Tensor]) -> Tensor:
    """The modality of each position's label [mbs, S]: that of the token to its right (its own where there is none)."""
    ids = batch["modality_ids"]
    return torch.cat((ids[:, 1:], ids[:, -1:]), dim=1)


def has_label(batch: Mapping[str, Tensor]) -> Tensor:
    """Whether the token to the right belongs to the same document: bool [mbs, S], whatever its weight."""
    docs = batch["doc_ids"]
    result = torch.zeros(docs.shape, dtype=torch.bool)
    result[:, :-1] = (docs[:, 1:] == docs[:, :-1]) & (docs[:, :-1] >= 0)
    return result


@dataclass(frozen=True)
class PreparedTokens:
    """A micro-batch on the device; all of it [T/cp], this context rank's tokens.

    Attributes:
        tokens, labels: int64.
        weights: float32, the loss weights; `total_weight` is their sum over the global batch.
        modality: int64, of the label.
        labelled: bool, whether there is a label, whatever its weight.
        layout: documents and modalities.
    """

    tokens: Tensor
    labels: Tensor
    weights: Tensor
    modality: Tensor
    labelled: Tensor
    layout: Layout
    n_modalities: int
    total_weight: float

    def finish(self, ce_T: Tensor) -> ObjectiveOutput:
        """Loss and sums, given each token's cross-entropy."""
        loss = (ce_T * self.weights).sum() / self.total_weight
        counted = ce_T.detach() * self.labelled
        sums = torch.zeros(self.n_modalities, dtype=ce_T.dtype, device=ce_T.device)
        return ObjectiveOutput(loss, sums.index_add_(0, self.modality, counted))


class NextToken:
    """Cross-entropy of the next token; see `Objective`."""

    def prepare(
        self, batch: Mapping[str, Tensor], mesh: Mesh, n_modalities: int, total_weight: float
    ) -> PreparedTokens:
        """Move one micro-batch (the batch contract, CPU tensors [mbs, S]) to this rank's device, flat."""
        layout = Layout.from_batch(batch, n_modalities, mesh, total_weight)
        fields = (batch["tokens"], batch["labels"], batch["loss_weight"], label_modalities(batch), has_label(batch))
        tokens, labels, weights, modality, labelled = (
            layout.mine(field.reshape(-1)).to(mesh.device, non_blocking=True) for field in fields
        )
        return PreparedTokens(tokens, labels, weights, modality, labelled, layout, n_modalities, total_weight)

    def __call__(self, model: HybridModel, batch: Mapping[str, Tensor], total_weight: float) -> ObjectiveOutput:
        """One micro-batch through a whole model; total_weight is Σ of loss weights over the *global* batch."""
        ready = self.prepare(batch, model.mesh, len(model.config.modalities), total_weight)
        return ready.finish(model(ready.tokens, ready.layout, ready.labels))


next_token = NextToken()
