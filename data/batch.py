"""Batches: documents laid into rows, as arrays and then tensors of fixed shape; and the loss weights of their tokens.

Everything that reads works on arrays; torch is imported where a tensor is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from .errors import DataError

if TYPE_CHECKING:
    import torch

Rows = dict[str, np.ndarray]  # latents are in it as bits, uint16
Batch: TypeAlias = "dict[str, torch.Tensor]"


def weight_vector(modalities: Sequence[str], weights: Mapping[str, float]) -> np.ndarray:
    """float32 [M] loss weights in bank order; DataError for an unknown name, or when nothing would be learnt."""
    unknown = sorted(set(weights) - set(modalities))
    if unknown:
        raise DataError(f"modality_weights names {', '.join(unknown)}; the data set has {', '.join(modalities)}")
    vector = np.array([weights.get(name, 1.0) for name in modalities], dtype=np.float32)
    if not vector.any():
        raise DataError("modality_weights are all zero: there would be nothing to learn")
    return vector


def lay_out(
    rows: Sequence[Sequence[np.ndarray]],
    seq_len: int,
    modality_table: np.ndarray,
    weights: np.ndarray,
    *,
    max_documents: int | None = None,
) -> Rows:
    """Arrays of documents laid into rows one after the other.

    Args:
        rows: per row its documents, unified tokens int64 [n] each.
        seq_len: S; a row's documents hold at most S tokens together.
        modality_table: int64 [vocabulary size], token -> modality.
        weights: float32 [M], loss weight of a target by modality.
        max_documents: D, at least the most documents of a row (default: exactly that).

    Returns:
        tokens, labels, modality_ids, doc_ids, position_ids int64 [rows, S]; loss_weight float32 [rows, S];
        cu_seqlens int32 [rows, D + 1], the documents' ends after a 0, the last repeated. `labels[t]` is the next token
        of the same document; a document's last token and the padding have label 0 and weight 0. Padding: token 0,
        doc_id -1, modality 0, position 0.

    Raises:
        DataError: a row longer than seq_len or with more than max_documents documents.
    """
    most = max((len(row) for row in rows), default=0) if max_documents is None else max_documents
    shape = (len(rows), seq_len)
    tokens, labels, modality_ids, positions = (np.zeros(shape, dtype=np.int64) for _ in range(4))
    doc_ids = np.full(shape, -1, dtype=np.int64)
    loss_weight = np.zeros(shape, dtype=np.float32)
    cu_seqlens = np.zeros((len(rows), most + 1), dtype=np.int32)
    for r, row in enumerate(rows):
        if sum(map(len, row)) > seq_len or len(row) > most:
            raise DataError(
                f"row {r}: {sum(map(len, row))} tokens in {len(row)} documents do not fit {seq_len} and {most}"
            )
        start = 0
        for d, document in enumerate(row):
            end = start + len(document)
            tokens[r, start:end] = document
            labels[r, start : end - 1] = document[1:]
            loss_weight[r, start : end - 1] = weights[modality_table[document[1:]]]
            modality_ids[r, start:end] = modality_table[document]
            doc_ids[r, start:end] = d
            positions[r, start:end] = np.arange(len(document))
            cu_seqlens[r, d + 1 :] = end
            start = end
    return {
        "tokens": tokens,
        "labels": labels,
        "loss_weight": loss_weight,
        "modality_ids": modality_ids,
        "doc_ids": doc_ids,
        "position_ids": positions,
        "cu_seqlens": cu_seqlens,
    }


def collate(
    rows: Sequence[Sequence[np.ndarray]], seq_len: int, modality_table: np.ndarray, weights: np.ndarray
) -> Batch:
    """`lay_out` as tensors."""
    return to_tensors(lay_out(rows, seq_len, modality_table, weights))


def to_tensors(rows: Rows, slots: Slots | None = None) -> Batch:
    """The same memory as tensors, latents in the type that `slots` names."""
    import torch

    batch = {name: torch.from_numpy(array) for name, array in rows.items() if name != "latents"}
    if slots is not None:
        batch["latents"] = torch.from_numpy(rows["latents"].view(np.int16)).view(getattr(torch, slots.dtype))
    return batch


@dataclass(frozen=True)
class Slots:
    """How latents go into a batch.

    Attributes:
        table: bool [vocabulary size], whether a token stands for a vector.
        most: N, room for latents in every row of the run.
        width, dtype: of the vectors, see `LatentFormat`.
    """

    table: np.ndarray
    most: int
    width: int
    dtype: str


def add_latents(batch: Rows, rows: Sequence[Sequence[np.ndarray]], slots: Slots, weights: np.ndarray) -> None:
    """Adds the latents of a batch's rows in place, and takes slots out of the next-token targets.

    Args:
        batch: of `lay_out`.
        rows: per row the latents of its documents, bits uint16 [n, width] each, one vector per slot of the row.
        slots: where they go.
        weights: float32 [M], loss weight by modality.

    Adds:
        latents uint16 [rows, N, width], bits of bfloat16 or float16; latent_pos int64 [rows, N], the slot of the row
        that each belongs to, ascending, -1 in the padding at the end; latent_weight float32 [rows, N], 0 in the latter.

    Raises:
        DataError: a row with another number of latents than slots, or more than N.
    """
    tokens, n = batch["tokens"], len(rows)
    bits = np.zeros((n, slots.most, slots.width), dtype=np.uint16)
    positions = np.full((n, slots.most), -1, dtype=np.int64)
    weight = np.zeros((n, slots.most), dtype=np.float32)
    for r, row in enumerate(rows):
        at = np.flatnonzero(slots.table[tokens[r]])
        given = sum(map(len, row))
        if given != len(at) or given > slots.most:
            raise DataError(f"row {r}: {given} latents for {len(at)} slots, and room for {slots.most}")
        if given:
            bits[r, :given] = np.concatenate(row)
            positions[r, :given] = at
            weight[r, :given] = weights[batch["modality_ids"][r, at]]
    batch |= {"latents": bits, "latent_pos": positions, "latent_weight": weight}
    # That a slot comes next says nothing of its vector: another objective learns that.
    batch["loss_weight"][slots.table[batch["labels"]]] = 0.0


def micro_batches(rows: Batch, size: int) -> list[Batch]:
    """`rows` cut along the leading axis into micro-batches of `size` (views)."""
    count = len(rows["tokens"])
    return [{name: value[i : i + size] for name, value in rows.items()} for i in range(0, count, size)]


def mask(rows: Rows, row: int, start: int, length: int) -> None:
    """Takes one document out of a batch in place: padding without weight in its slot, whose place and id it keeps."""
    for name in ("tokens", "labels", "modality_ids", "loss_weight"):
        rows[name][row, start : start + length] = 0
    if "latents" not in rows:
        return
    positions = rows["latent_pos"][row]
    kept = (positions >= 0) & ~((positions >= start) & (positions < start + length))
    count = int(kept.sum())
    for name, padding in (("latents", 0), ("latent_weight", 0), ("latent_pos", -1)):
        values = rows[name][row]
        values[:count] = values[kept]  # the same bits whether they were read and taken out, or never came
        values[count:] = padding
