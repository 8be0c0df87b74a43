"""What the layers must know about the tokens of one micro-batch, computed once, on the host, for all layers.

The same on every tensor-parallel rank, so nothing of it is ever communicated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .context import Context, cut, halo_places
from .errors import PlanError
from .mesh import Mesh
from .routing import Route, route, to_device

HALO = 3  # the widest convolution that the kernels have reaches three tokens back


@dataclass(frozen=True)
class Layout:
    """Documents, positions and modalities of T flat tokens.

    Attributes:
        seq_idx: int32 [1, T]; a new number wherever a document starts, −1 on padding. Rows of a batch are documents
            of their own by construction.
        boundaries: host integers 0 … T, the edges of documents and of padding runs: attention stays inside each.
        position_ids: int64 [T], restarting in each document.
        modality: the route of tokens to modality banks.
        rows: int64 [T], the row of the micro-batch that each token lies in.
        n_rows: how many there are.
        context: under context parallelism, where these tokens lie in the whole micro-batch; `seq_idx`, `position_ids`,
            `modality` and `rows` then describe this rank's tokens, and `boundaries` is empty (`Context` has them).
        halo: the route of each segment's tokens with the `HALO` tokens before them, segment by segment.
        total_weight: W, Σ of loss weights over the global batch, by which terms that layers add to the loss are divided
            as the loss is; None where there is no loss.
    """

    seq_idx: Tensor
    boundaries: tuple[int, ...]
    position_ids: Tensor
    modality: Route
    rows: Tensor
    n_rows: int
    context: Context | None = None
    halo: Route | None = None
    total_weight: float | None = None

    def mine(self, values: Tensor) -> Tensor:
        """Of values [T] of the whole micro-batch, those of this rank's tokens."""
        return values if self.context is None else values[self.context.index]

    def whole(self, *values: Tensor) -> tuple[Tensor, ...]:
        """The opposite: values [T, ...] of this rank's tokens → of the whole micro-batch, without gradient."""
        if self.context is None:
            return values
        order, group = self.context.gathered_order.to(values[0].device), self.context.mesh.cp_group
        result = []
        for value in values:
            gathered = value.new_empty(group.size() * value.shape[0], *value.shape[1:])
            dist.all_gather_into_tensor(gathered, value.contiguous(), group=group)
            result.append(gathered[order])
        return tuple(result)

    @staticmethod
    def from_batch(
        batch: Mapping[str, Tensor],
        n_modalities: int,
        place: torch.device | Mesh,
        total_weight: float | None = None,
    ) -> Layout:
        """The layout of a batch (CPU tensors `modality_ids, doc_ids, position_ids` [mbs, S]), moved to the device.

        Args:
            place: a mesh, whose context-parallel ranks then share the tokens, or just a device.
            total_weight: see the attribute.

        Raises:
            PlanError: a modality id that the model has no bank for; tokens that do not divide over the ranks.
        """
        device = place.device if isinstance(place, Mesh) else place
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
        positions = batch["position_ids"].reshape(-1)
        row_of = torch.arange(rows).repeat_interleave(length)
        context, halo = None, None
        if isinstance(place, Mesh) and place.cp_size > 1:
            context = cut(place, seq_idx, boundaries, HALO)
            places = context.index.view(len(context.mine), -1)
            extended = torch.cat((halo_places(context, HALO), places), dim=1)
            halo = to_device(route(modality_ids[extended].reshape(-1), n_modalities), device)
            index = context.index
            seq_idx, positions, modality_ids, boundaries = seq_idx[index], positions[index], modality_ids[index], ()
            row_of = row_of[index]
        return Layout(
            seq_idx[None].to(device, non_blocking=True),
            boundaries,
            positions.to(device, non_blocking=True),
            to_device(route(modality_ids, n_modalities), device),
            row_of.to(device, non_blocking=True),
            rows,
            context,
            halo,
            total_weight,
        )
