"""The training stream: planned packs become tensors; every step is the same whatever the number of ranks.

Global step k owns packs [k * G, (k + 1) * G) of the endless sequence of epochs. A rank takes its contiguous slice of
them and cuts it into micro-batches. Sums over the *global* batch come from the plan, not from other ranks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from .dataset import Dataset
from .errors import DataError
from .mock import MockDataset
from .packing import PackPlan

STATE_VERSION = 1
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class StreamConfig:
    """What a stream reads, and in which order.

    Attributes:
        path: the data set's folder.
        split: its split.
        seq_len: tokens per row; every document fits into one row.
        global_batch: rows (packs) per step, over all ranks.
        micro_batch: rows per forward pass of one rank.
        seed: names the order.
        window: documents that are packed together.
        modality_weights: loss weight of a target by its modality; 1.0 where nothing is said.

    Raises:
        DataError: a size below 1, or a weight that is negative or not finite.
    """

    path: str
    split: str = "train"
    seq_len: int = 256
    global_batch: int = 32
    micro_batch: int = 4
    seed: int = 0
    window: int = 2048
    modality_weights: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in (("seq_len", 2), ("global_batch", 1), ("micro_batch", 1), ("window", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise DataError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name, weight in self.modality_weights.items():
            if not 0.0 <= weight < float("inf"):
                raise DataError(f"modality_weights.{name} must be finite and not negative, got {weight}")


@dataclass(frozen=True)
class Step:
    """One optimizer step's data, as one rank sees it.

    Attributes:
        index: number of the step, from 0.
        micro_batches: this rank's batches; see `collate`.
        total_weight: sum of all loss weights of the *global* batch.
        target_tokens: targets of the global batch by modality (of the label).
        tokens: tokens of the global batch by modality, padding not counted.
        doc_digest: hash of the global batch: its documents, their order and rows (16 hexadecimal digits).
        epoch: the epoch that the step's first pack belongs to.
    """

    index: int
    micro_batches: list[Batch]
    total_weight: float
    target_tokens: dict[str, int]
    tokens: dict[str, int]
    doc_digest: str
    epoch: int


class Stream:
    """Endless steps of a data set for one data-parallel rank; see the module's text.

    Args:
        dataset: an opened data set.
        config: what to read; `config.path` is not opened again.
        dp_rank: this rank, 0..dp_size-1.
        dp_size: data-parallel ranks.
        state: where to go on, a `state_dict` of any rank of any dp_size.

    Raises:
        DataError: before anything is read, when global_batch is no multiple of dp_size * micro_batch, documents do not
            fit into seq_len, a split or modality is unknown, all weights are zero, or the state is of another plan.
    """

    def __init__(
        self,
        dataset: Dataset | MockDataset,
        config: StreamConfig,
        *,
        dp_rank: int,
        dp_size: int,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        if not 0 <= dp_rank < dp_size:
            raise DataError(f"dp_rank must lie in 0..{dp_size - 1}, got {dp_rank}")
        if config.global_batch % (dp_size * config.micro_batch):
            raise DataError(
                f"global_batch {config.global_batch} is no multiple of data-parallel ranks {dp_size} x micro_batch "
                f"{config.micro_batch} = {dp_size * config.micro_batch}"
            )
        self.dataset, self.config = dataset, config
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self._split = dataset.split(config.split)
        self._modalities = dataset.vocabulary.modalities
        self._table = dataset.vocabulary.modality_table()
        self._weights = weight_vector(self._modalities, config.modality_weights)
        self.plan = PackPlan(self._split.lengths, seq_len=config.seq_len, window=config.window, seed=config.seed)
        self._epoch = self._window = self._pack = self._step = 0
        self._tokens = np.zeros(len(self._modalities), dtype=np.int64)
        self._digest = ""
        if state is not None:
            self.load_state_dict(state)

    def plan_fields(self) -> dict[str, Any]:
        """All that the order and weight of the data depend on; micro_batch and dp_size are not among it."""
        fields = asdict(self.config)
        del fields["path"], fields["micro_batch"]
        fields["modality_weights"] = dict(zip(self._modalities, self._weights.tolist(), strict=True))
        return {"dataset": self.dataset.identity, **fields}

    def packs_per_epoch(self) -> int:
        """Rows of the first epoch (later epochs differ by a few)."""
        return self.plan.packs_per_epoch(0)

    def next(self) -> Step:
        """Reads and returns the next step; the state advances only when that has succeeded.

        Raises:
            DataError: a shard that cannot be read, or does not hold what its index says.
        """
        packs, position = self._take(self.config.global_batch)
        documents = np.concatenate(packs)
        per_modality = self._split.modality_lengths[documents].sum(axis=0)
        targets = per_modality.copy()
        # A document's first token (bos, which counts as text) is nobody's target.
        targets[0] -= len(documents)
        digest = _digest("", packs)
        step = Step(
            index=self._step,
            micro_batches=self._batches(packs),
            total_weight=float((targets * self._weights.astype(np.float64)).sum()),
            target_tokens=self._named(targets),
            tokens=self._named(per_modality),
            doc_digest=digest,
            epoch=self._epoch,
        )
        self._epoch, self._window, self._pack = position
        self._step += 1
        self._tokens += per_modality
        self._digest = _digest(self._digest, packs)
        return step

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Step:
        return self.next()

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands: small, JSON-able, the same on every rank."""
        fields = self.plan_fields()
        return {
            "version": STATE_VERSION,
            "plan_hash": _plan_hash(fields),
            "plan": fields,
            "seed": self.config.seed,
            "epoch": self._epoch,
            "window": self._window,
            "pack_in_window": self._pack,
            "step": self._step,
            "tokens": self._named(self._tokens),
            "order_digest": self._digest,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state` was taken, on any number of ranks.

        Raises:
            DataError: the state is malformed, of another version, or of another plan (the message lists what differs).
        """
        needed = {"version", "plan_hash", "plan", "epoch", "window", "pack_in_window", "step", "tokens", "order_digest"}
        if needed - set(state):
            raise DataError(f"the data state lacks {', '.join(sorted(needed - set(state)))}")
        if state["version"] != STATE_VERSION:
            raise DataError(f"data state of version {state['version']}; this reads {STATE_VERSION}")
        fields = self.plan_fields()
        if state["plan_hash"] != _plan_hash(fields):
            there: Mapping[str, Any] = state["plan"]
            names = sorted(k for k in {*fields, *there} if fields.get(k) != there.get(k))
            differs = "; ".join(f"{k}: {_short(there.get(k))} then, {_short(fields.get(k))} now" for k in names)
            raise DataError(f"the data state belongs to another plan and cannot be resumed exactly ({differs})")
        epoch, window, pack, step = (int(state[k]) for k in ("epoch", "window", "pack_in_window", "step"))
        inside = epoch >= 0 and step >= 0 and 0 <= window < self.plan.n_windows
        if not inside or not 0 <= pack < len(self.plan.packs(epoch, window)):
            raise DataError(f"the data state points outside its plan: epoch {epoch}, window {window}, pack {pack}")
        self._epoch, self._window, self._pack, self._step = epoch, window, pack, step
        self._tokens = np.array([int(state["tokens"][name]) for name in self._modalities], dtype=np.int64)
        self._digest = str(state["order_digest"])

    def _take(self, count: int) -> tuple[list[np.ndarray], tuple[int, int, int]]:
        """The next `count` packs and the position after them; window and epoch tails run on into the next."""
        packs: list[np.ndarray] = []
        epoch, window, pack = self._epoch, self._window, self._pack
        while len(packs) < count:
            here = self.plan.packs(epoch, window)
            part = here[pack : pack + count - len(packs)]
            packs += part
            pack += len(part)
            if pack == len(here):
                pack, window = 0, window + 1
                if window == self.plan.n_windows:
                    window, epoch = 0, epoch + 1
        return packs, (epoch, window, pack)

    def _batches(self, packs: list[np.ndarray]) -> list[Batch]:
        share = len(packs) // self.dp_size
        mine = packs[self.dp_rank * share : (self.dp_rank + 1) * share]
        rows = [[self._split.tokens(sample) for sample in pack.tolist()] for pack in mine]
        most = max(len(row) for row in rows)
        size = self.config.micro_batch
        return [
            collate(rows[i : i + size], self.config.seq_len, self._table, self._weights, max_documents=most)
            for i in range(0, share, size)
        ]

    def _named(self, counts: np.ndarray) -> dict[str, int]:
        return dict(zip(self._modalities, counts.tolist(), strict=True))


def weight_vector(modalities: Sequence[str], weights: Mapping[str, float]) -> np.ndarray:
    """float32 [M] loss weights in bank order; DataError for an unknown name, or when nothing would be learnt."""
    unknown = sorted(set(weights) - set(modalities))
    if unknown:
        raise DataError(f"modality_weights names {', '.join(unknown)}; the data set has {', '.join(modalities)}")
    vector = np.array([weights.get(name, 1.0) for name in modalities], dtype=np.float32)
    if not vector.any():
        raise DataError("modality_weights are all zero: there would be nothing to learn")
    return vector


def collate(
    rows: Sequence[Sequence[np.ndarray]],
    seq_len: int,
    modality_table: np.ndarray,
    weights: np.ndarray,
    *,
    max_documents: int | None = None,
) -> Batch:
    """Tensors of documents laid into rows one after the other.

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
    arrays = {
        "tokens": tokens,
        "labels": labels,
        "loss_weight": loss_weight,
        "modality_ids": modality_ids,
        "doc_ids": doc_ids,
        "position_ids": positions,
        "cu_seqlens": cu_seqlens,
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _digest(before: str, packs: list[np.ndarray]) -> str:
    """16 hexadecimal digits over `before` and the samples of every pack, pack boundaries included."""
    state = hashlib.blake2b(before.encode(), digest_size=8)
    for pack in packs:
        state.update(len(pack).to_bytes(8, "little") + pack.astype("<i8").tobytes())
    return state.hexdigest()


def _plan_hash(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:32]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 48 else text[:12] + "…"
