"""What the layers must know about the tokens of one micro-batch, computed once, on the host, for all layers.

The same on every tensor-parallel rank, so nothing of it is ever communicated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import PlanError
from .routing import Route, route, to_device


@dataclass(frozen=True)
class Layout:
    """Documents, positions and modalities of T flat tokens.

    Attributes:
        seq_idx: int32 [1, T]; a new number wherever a document starts, −1 on padding. Rows of a batch are documents
            of their own by construction.
        boundaries: host integers 0 … T, the edges of documents and of padding runs: attention stays inside each.
        position_ids: int64 [T], restarting in each document.
        modality: the route of tokens to modality banks.
    """

    seq_idx: Tensor
    boundaries: tuple[int, ...]
    position_ids: Tensor
    modality: Route

    @property
    def n_tokens(self) -> int:
        return self.boundaries[-1]

    @staticmethod
    def from_batch(batch: Mapping[str, Tensor], n_modalities: int, device: torch.device) -> Layout:
        """The layout of a batch (CPU tensors `modality_ids, doc_ids, position_ids` [mbs, S]), moved to `device`.

        Raises:
            PlanError: a modality id that the model has no bank for.
        """
        modality_ids = batch["modality_ids"].reshape(-1)
        if modality_ids.numel() and int(modality_ids.max()) >= n_modalities:
            raise PlanError(
                f"batch: modality id {int(modality_ids.max())} in it, but the model has {n_modalities} modalities "
                f"(ids 0 to {n_modalities - 1}); list them all in model.modalities"
            )
        doc_ids = batch["doc_ids"]
        rows, length = doc_ids.shape
        starts = torch.ones(rows, length, dtype=torch.bool)
        starts[:, 1:] = doc_ids[:, 1:] != doc_ids[:, :-1]
        flat_starts = starts.reshape(-1)
        segment = flat_starts.cumsum(0) - 1
        seq_idx = segment.where(doc_ids.reshape(-1) >= 0, -1).to(torch.int32)
        boundaries = (*flat_starts.nonzero()[:, 0].tolist(), rows * length)
        return Layout(
            seq_idx[None].to(device, non_blocking=True),
            boundaries,
            batch["position_ids"].reshape(-1).to(device, non_blocking=True),
            to_device(route(modality_ids, n_modalities), device),
        )
