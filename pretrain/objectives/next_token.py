"""Next-token prediction, summed with weights and reported per modality of the predicted token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...parallel.layout import Layout
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


def next_token(model: HybridModel, batch: Mapping[str, Tensor], total_weight: float) -> ObjectiveOutput:
    """Cross-entropy of one micro-batch.

    Args:
        model: gives the cross-entropy of each token.
        batch: the batch contract, CPU tensors [mbs, S].
        total_weight: W, Σ of loss weights over the *global* batch; every reduction afterwards is a sum.
    """
    device, n_modalities = model.mesh.device, len(model.config.modalities)
    layout = Layout.from_batch(batch, n_modalities, model.mesh, total_weight)
    fields = (batch["tokens"], batch["labels"], batch["loss_weight"], label_modalities(batch), has_label(batch))
    tokens, labels, weights, modality, labelled = (
        layout.mine(field.reshape(-1)).to(device, non_blocking=True) for field in fields
    )
    ce = model(tokens, layout, labels)
    loss = (ce * weights).sum() / total_weight
    counted = ce.detach() * labelled
    sums = torch.zeros(n_modalities, dtype=ce.dtype, device=device).index_add_(0, modality, counted)
    return ObjectiveOutput(loss, sums)
