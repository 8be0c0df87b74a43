"""One step of a stream, as one rank sees it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from .batch import Batch, Rows, Slots, micro_batches, to_tensors


@dataclass(frozen=True)
class Step:
    """One optimizer step's data, as one rank sees it.

    Attributes:
        index: number of the step, from 0.
        rows: this rank's rows as arrays; see `batch.lay_out` and `batch.add_latents`.
        total_weight: sum of all planned loss weights of the *global* batch (quarantined samples included).
        target_tokens: targets of the global batch by modality (of the label).
        tokens: tokens of the global batch by modality, padding not counted.
        doc_digest: hash of the global batch: its documents, their order and rows (16 hexadecimal digits).
        epoch: the epoch that the step's first pack belongs to.
        source_tokens: tokens of the global batch by source.
        stage: number of the stage of the mix, from 0.
        masked: tokens of the global batch that are in quarantine.
        attended: pairs of a token and itself or an earlier one of its document, Σ n(n+1)/2 over the global batch.
        latents: continuous latents of the global batch by modality, for the modalities that are continuous.
        latent_weight: sum of their planned weights, the denominator of a loss on them.
        agreed: what all ranks must have in common: `doc_digest`, or a hash of it and of how packs are dealt out.
        dealt: what the function that deals packs out says of it, for the metrics.
        micro_batch: rows of a micro-batch.
        slots: how latents lie in the rows, where there are such.
    """

    index: int
    rows: Rows
    total_weight: float
    target_tokens: dict[str, int]
    tokens: dict[str, int]
    doc_digest: str
    epoch: int
    source_tokens: dict[str, int] = field(default_factory=dict)
    stage: int = 0
    masked: int = 0
    attended: int = 0
    latents: dict[str, int] = field(default_factory=dict)
    latent_weight: float = 0.0
    agreed: str = ""
    dealt: dict[str, float] = field(default_factory=dict)
    micro_batch: int = 1
    slots: Slots | None = None

    @cached_property
    def micro_batches(self) -> list[Batch]:
        """This rank's batches: `rows` as tensors, cut along the leading axis. Only this needs torch."""
        return micro_batches(to_tensors(self.rows, self.slots), self.micro_batch)
