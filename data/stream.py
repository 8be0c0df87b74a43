"""The training stream: planned packs become tensors; every step is the same whatever the number of ranks.

Global step k owns packs [k * G, (k + 1) * G) of the endless sequence of draws. A rank takes its contiguous slice of
them and cuts it into micro-batches. Sums over the *global* batch come from the plan, not from other ranks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from .batch import Batch, Rows, Slots, collate, mask, weight_vector
from .dataset import Dataset
from .deal import Deal, Dealt, PackFacts, check_dealt, check_divides, dealt_digest
from .errors import DataError
from .latents import most_in_a_row, slot_table
from .mixing import Mix, Source, Stage
from .plan import Pack, Place, Planner, Position, StepPlan, digest, flat, short
from .quarantine import Entry, Ledger, QuarantineConfig, tell
from .reader import Ahead, Found, Order, Reader
from .share import is_reader, share
from .step import Step

if TYPE_CHECKING:
    import torch.distributed as dist

    from .mock import MockDataset

__all__ = ["Batch", "QuarantineConfig", "Source", "Stage", "Step", "Stream", "StreamConfig", "collate", "weight_vector"]

STATE_VERSION = 2
ALONE = "data"  # the name of the one source of a stream without a mix


@dataclass(frozen=True)
class StreamConfig:
    """What a stream reads, and in which order.

    Attributes:
        path: the data set's folder or URL; it also gives the vocabulary of a mix.
        split: its split, where there is no mix.
        seq_len: tokens per row; every document fits into one row.
        global_batch: rows (packs) per step, over all ranks.
        micro_batch: rows per forward pass of one rank.
        seed: names the order.
        window: documents that are packed together.
        block, spread: for object stores, see `PackPlan`: neighbours kept together, and blocks shuffled together.
        modality_weights: loss weight of a target by its modality; 1.0 where nothing is said.
        sources: a mix, name -> `Source`; empty reads `split` of `path` alone.
        stages: later weights of the mix.
        workers: processes that read ahead; 0 reads in the training process.
        prefetch: steps that each worker reads ahead.
        stall_seconds: after so long on one sample, its shard and offset are logged.
        quarantine: how many bad samples a run bears.

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
    block: int = 1
    spread: int = 32
    modality_weights: dict[str, float] = field(default_factory=dict)
    sources: dict[str, Source] = field(default_factory=dict)
    stages: tuple[Stage, ...] = ()
    workers: int = 0
    prefetch: int = 2
    stall_seconds: float = 60.0
    quarantine: QuarantineConfig = field(default_factory=QuarantineConfig)

    def __post_init__(self) -> None:
        sizes = (("seq_len", 2), ("global_batch", 1), ("micro_batch", 1), ("window", 1), ("seed", 0), ("workers", 0))
        for name, least in (*sizes, ("prefetch", 1), ("block", 1), ("spread", 1)):
            if getattr(self, name) < least:
                raise DataError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not self.stall_seconds > 0:
            raise DataError(f"stall_seconds must be positive, got {self.stall_seconds}")
        for name, weight in self.modality_weights.items():
            if not 0.0 <= weight < float("inf"):
                raise DataError(f"modality_weights.{name} must be finite and not negative, got {weight}")
        if self.stages and not self.sources:
            raise DataError(f"{len(self.stages)} stages, but no sources whose weights they could change")
        self.mix()

    def mix(self) -> Mix:
        """The schedule over the sources, in the order of their names; DataError for unusable weights."""
        weights = {name: self.sources[name].weight for name in sorted(self.sources)}
        return Mix(weights or {ALONE: 1.0}, self.stages)


class Stream:
    """Endless steps for one data-parallel rank; see the module's text.

    Args:
        dataset: an opened data set.
        config: what to read; `config.path` is not opened again.
        dp_rank: this rank, 0..dp_size-1.
        dp_size: data-parallel ranks.
        state: where to go on, a `state_dict` of any rank of any dp_size.
        group: all processes that read this stream (those of other model-parallel coordinates too); they tell each
            other of bad samples. Without one, several ranks stop at the first bad sample.
        model_group: the processes of this data-parallel coordinate; its first rank reads and sends to the others.
            Without one every rank reads for itself, with the same result.
        deal: deals the packs of a step out to ranks and micro-batches: a pure function, the same on all ranks. The
            global batch and the state are those without it. None keeps the packs in their order.

    Raises:
        DataError: before anything is read, when global_batch is no multiple of dp_size * micro_batch, documents do not
            fit into seq_len, a split, source or modality is unknown, sources have different vocabularies, all weights
            are zero, or the state is of another plan.
    """

    def __init__(
        self,
        dataset: Dataset | MockDataset,
        config: StreamConfig,
        *,
        dp_rank: int,
        dp_size: int,
        state: Mapping[str, Any] | None = None,
        group: dist.ProcessGroup | None = None,
        model_group: dist.ProcessGroup | None = None,
        deal: Deal | None = None,
    ) -> None:
        if not 0 <= dp_rank < dp_size:
            raise DataError(f"dp_rank must lie in 0..{dp_size - 1}, got {dp_rank}")
        check_divides(config.global_batch, config.micro_batch, dp_size)
        self.dataset, self.config, self.group, self.model_group = dataset, config, group, model_group
        self.dp_rank, self.dp_size, self._deal = dp_rank, dp_size, deal
        self._modalities = dataset.vocabulary.modalities
        self._weights = weight_vector(self._modalities, config.modality_weights)
        self._sources = open_sources(dataset, config)
        self._splits = [source.split(split) for source, split in self._sources.values()]
        lengths = {name: split.lengths for name, split in zip(self._sources, self._splits, strict=True)}
        self.planner = Planner(
            lengths,
            config.mix(),
            seq_len=config.seq_len,
            window=config.window,
            seed=config.seed,
            global_batch=config.global_batch,
            block=config.block,
            spread=config.spread,
        )
        self._slots = self._room_for_latents()
        reader = Reader(
            self._splits,
            seq_len=config.seq_len,
            table=dataset.vocabulary.modality_table(),
            weights=self._weights,
            stall_seconds=config.stall_seconds,
            slots=self._slots,
        )
        self._ahead = Ahead(reader, self.planner, self._cut, workers=config.workers, prefetch=config.prefetch)
        self._position, self._step = self.planner.start, 0
        self._tokens = np.zeros(len(self._modalities), dtype=np.int64)
        self._digest = ""
        self._ledger = Ledger(config.quarantine, self.planner.mix.names)
        if state is not None:
            self.load_state_dict(state)

    def plan_fields(self) -> dict[str, Any]:
        """All that the order and weight of the data depend on; how ranks cut and read it is not among it."""
        config, mix = self.config, self.planner.mix
        return {
            **{
                name: getattr(config, name) for name in ("seq_len", "global_batch", "seed", "window", "block", "spread")
            },
            "modality_weights": dict(zip(self._modalities, self._weights.tolist(), strict=True)),
            "sources": {name: _digest(f"{source.identity}/{split}") for name, (source, split) in self._sources.items()},
            # Later stages as hashes: a state stays small with many sources and stages.
            "weights": [mix.tables[0], *(_digest(json.dumps(table)) for table in mix.tables[1:])],
            "stages": mix.firsts[1:],
        }

    @property
    def ledger(self) -> list[dict[str, Any]]:
        """Every bad sample so far, in words: source, where (shard, key and offset), step and reason."""
        return [
            {
                "source": self.planner.mix.names[entry.source],
                "where": self._splits[entry.source].where(entry.sample),
                "step": entry.step,
                "reason": entry.why,
            }
            for entry in sorted(self._ledger.entries.values())
        ]

    def packs_per_epoch(self) -> int:
        """Rows of the first epoch of all sources together (later epochs differ by a few)."""
        return sum(plan.packs_per_epoch(0) for plan in self.planner.plans)

    def next(self) -> Step:
        """Reads and returns the next step; the state advances only when that has succeeded.

        Raises:
            DataError: a shard that cannot be read, or does not hold what its index says, and quarantine bears no more.
        """
        plan, found = self._read()
        bears = self.config.quarantine.max_per_source > 0 and (self.group is not None or self.dp_size == 1)
        if found.bad and not bears:
            raise DataError(found.bad[0][3])
        news = [Entry(source, sample, self._step, why) for source, sample, why, _ in found.bad]
        ledger = self._ledger.with_new(tell(news, self.group) if bears else [])
        counts = np.stack([self._counts(pack) for pack in plan.packs])
        per_modality = counts.sum(axis=0)
        listed = [at for pack in plan.packs for at in self._listed(pack, ledger)]
        masked = sum(int(self._splits[source].lengths[sample]) for source, sample in listed)
        ledger.check_share(self._step, masked, int(per_modality.sum()))
        ledger = ledger.with_masked(self._step, masked, self.config.global_batch * self.config.seq_len)
        if listed:
            self._mask(plan, found.rows, ledger)
        targets = per_modality.copy()
        # A document's first token (bos, which counts as text) is nobody's target, and neither is a slot.
        targets[0] -= sum(len(pack.samples) for pack in plan.packs)
        latents = np.sum([self._latents(pack) for pack in plan.packs], axis=0)
        targets -= latents
        by_source = np.zeros(len(self._splits), dtype=np.int64)
        np.add.at(by_source, [pack.source for pack in plan.packs], counts.sum(axis=1))
        dealt, batch_digest = self._dealt(plan), digest("", plan.packs)
        step = Step(
            index=self._step,
            rows=found.rows,
            total_weight=float((targets * self._weights.astype(np.float64)).sum()),
            target_tokens=self._named(targets),
            tokens=self._named(per_modality),
            doc_digest=batch_digest,
            epoch=plan.epoch,
            source_tokens=dict(zip(self.planner.mix.names, by_source.tolist(), strict=True)),
            stage=self.planner.mix.stage(plan.before.draws),
            masked=masked,
            attended=sum(self._attended(pack) for pack in plan.packs),
            latents={m: n for m, n in self._named(latents).items() if m in self._continuous},
            latent_weight=float((latents * self._weights.astype(np.float64)).sum()),
            agreed=batch_digest if dealt is None else dealt_digest(batch_digest, dealt.order),
            dealt={} if dealt is None else dealt.facts,
            micro_batch=self.config.micro_batch,
            slots=self._slots,
        )
        self._position, self._ledger = plan.after, ledger
        self._step += 1
        self._tokens += per_modality
        self._digest = digest(self._digest, plan.packs)
        return step

    def skip(self) -> str:
        """Passes over the next step without reading it; its tokens count as passed. Returns its `doc_digest`."""
        plan = self.planner.step(self._position)
        self._position = plan.after
        self._step += 1
        self._tokens += sum(self._counts(pack) for pack in plan.packs)
        self._digest = digest(self._digest, plan.packs)
        return digest("", plan.packs)

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Step:
        return self.next()

    def close(self) -> None:
        """Ends the workers; a later `next` starts new ones."""
        self._ahead.close()

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands: small, JSON-able, the same on every rank; what was only read ahead is not in it."""
        fields = self.plan_fields()
        return {
            "version": STATE_VERSION,
            "plan_hash": _plan_hash(fields),
            "plan": fields,
            "step": self._step,
            "draws": self._position.draws,
            "places": [list(place) for place in self._position.places],
            "tokens": self._named(self._tokens),
            "order_digest": self._digest,
            "ledger": [list(entry) for entry in sorted(self._ledger.entries.values())],
            "streak": self._ledger.streak,
            "masked": [list(pair) for pair in self._ledger.masked],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state` was taken, on any number of ranks and workers.

        Raises:
            DataError: the state is malformed, of another version, or of another plan (the message lists what differs).
        """
        if state.get("version", STATE_VERSION) != STATE_VERSION:
            raise DataError(f"data state of version {state['version']}; this reads {STATE_VERSION}")
        needed = {"version", "plan_hash", "plan", "step", "draws", "places", "tokens", "order_digest", "ledger"}
        if needed - set(state):
            raise DataError(f"the data state lacks {', '.join(sorted(needed - set(state)))}")
        fields = self.plan_fields()
        if state["plan_hash"] != _plan_hash(fields):
            there, here = flat(state["plan"]), flat(fields)
            names = sorted(k for k in {*here, *there} if here.get(k) != there.get(k))
            differs = "; ".join(f"{k}: {short(there.get(k))} then, {short(here.get(k))} now" for k in names)
            raise DataError(f"the data state belongs to another plan and cannot be resumed exactly ({differs})")
        try:
            position = Position(int(state["draws"]), tuple(Place(*map(int, place)) for place in state["places"]))
            step = int(state["step"])
            tokens = np.array([int(state["tokens"][name]) for name in self._modalities], dtype=np.int64)
            ledger = Ledger(
                self.config.quarantine,
                self.planner.mix.names,
                state["ledger"],
                int(state.get("streak", 0)),
                state.get("masked", ()),
            )
        except (TypeError, ValueError, KeyError, IndexError) as error:
            raise DataError(f"the data state is malformed ({error!r})") from error
        self.planner.check(position)
        if step * self.config.global_batch != position.draws:
            raise DataError(f"the data state contradicts itself: step {step}, but {position.draws} draws")
        self._position, self._step, self._tokens, self._ledger = position, step, tokens, ledger
        self._digest = str(state["order_digest"])

    def _read(self) -> tuple[StepPlan, Found]:
        """The next step's plan and rows, read here or by the model group's reader."""
        if self.model_group is None:
            return self._ahead.read(self._position)
        reads = is_reader(self.model_group)
        plan, found = self._ahead.read(self._position) if reads else (self.planner.step(self._position), None)
        shape = (self.config.global_batch // self.dp_size, self.config.seq_len)
        rows = share(
            found.rows if found else None,
            len(found.bad) if found else 0,
            shape=shape,
            most=plan.most,
            group=self.model_group,
            slots=self._slots,
        )
        n_bad = int(rows.pop("n_bad")[0])
        bears = self.config.quarantine.max_per_source > 0 and self.group is not None
        if n_bad and found is None and not bears:
            raise DataError(
                f"step {self._step}: the reader of this rank's model-parallel group met {n_bad} bad samples"
            )
        return plan, Found(rows, found.bad if found else [])

    def _cut(self, plan: StepPlan) -> Order:
        """This rank's slice of a step."""
        share, dealt = len(plan.packs) // self.dp_size, self._dealt(plan)
        packs = plan.packs if dealt is None else [plan.packs[number] for number in dealt.order]
        mine = packs[self.dp_rank * share : (self.dp_rank + 1) * share]
        return Order([(pack.source, pack.samples.tolist()) for pack in mine], plan.most)

    def _dealt(self, plan: StepPlan) -> Dealt | None:
        """How a step's packs are dealt out; the same whenever and wherever it is asked for."""
        if self._deal is None:
            return None
        lengths = [self._splits[pack.source].lengths[pack.samples] for pack in plan.packs]
        facts = [PackFacts(n, self._counts(pack)) for n, pack in zip(lengths, plan.packs, strict=True)]
        dealt = self._deal(facts)
        check_dealt(dealt, len(facts))
        return dealt

    def _counts(self, pack: Pack) -> np.ndarray:
        return self._splits[pack.source].modality_lengths[pack.samples].sum(axis=0)

    def _attended(self, pack: Pack) -> int:
        lengths = self._splits[pack.source].lengths[pack.samples].astype(np.int64)
        return int((lengths * (lengths + 1) // 2).sum())

    @property
    def _continuous(self) -> tuple[str, ...]:
        form = self.dataset.latent_format
        return form.modalities if form else ()

    def _latents(self, pack: Pack) -> np.ndarray:
        """int64 [M]: the planned latents of a pack by modality."""
        rows = self._splits[pack.source].latent_rows
        if rows is None:
            return np.zeros(len(self._modalities), dtype=np.int64)
        return rows.latent_counts[pack.samples].sum(axis=0)

    def _room_for_latents(self) -> Slots | None:
        """How latents go into batches: the same shape in every step of the run; None where all is discrete."""
        form = self.dataset.latent_format
        if form is None:
            return None
        most = max(
            most_in_a_row(split.lengths, split.latent_rows.latent_counts.sum(axis=1), self.config.seq_len)
            for split in self._splits
            if split.latent_rows is not None
        )
        return Slots(slot_table(self.dataset.vocabulary, form), most, form.width, form.dtype)

    def _listed(self, pack: Pack, ledger: Ledger) -> list[tuple[int, int]]:
        if not ledger.entries:
            return []
        return [(pack.source, sample) for sample in pack.samples.tolist() if (pack.source, sample) in ledger]

    def _mask(self, plan: StepPlan, rows: Rows, ledger: Ledger) -> None:
        """Takes what the ledger lists out of this rank's rows."""
        for row, (source, samples) in enumerate(self._cut(plan).packs):
            start = 0
            for sample in samples:
                length = int(self._splits[source].lengths[sample])
                if (source, sample) in ledger:
                    mask(rows, row, start, length)
                start += length

    def _named(self, counts: np.ndarray) -> dict[str, int]:
        return dict(zip(self._modalities, counts.tolist(), strict=True))


Opened: TypeAlias = "dict[str, tuple[Dataset | MockDataset, str]]"


def open_sources(dataset: Dataset | MockDataset, config: StreamConfig) -> Opened:
    """Source name -> (its data set, its split), in the order of the mix.

    Raises:
        DataError: a source that cannot be opened, or whose tokens mean something else than the first data set's.
    """
    if not config.sources:
        return {ALONE: (dataset, config.split)}
    opened: Opened = {}
    for name in sorted(config.sources):
        source = config.sources[name]
        if not isinstance(dataset, Dataset) or source.path in ("", config.path):
            opened[name] = (dataset, source.split)
            continue
        try:
            other = Dataset.open(source.path)
        except DataError as error:
            raise DataError(f"source {name}: {error}") from error
        ours, theirs = dataset.manifest["fingerprints"], other.manifest["fingerprints"]
        differing = sorted(k for k in {*ours, *theirs} if ours.get(k) != theirs.get(k))
        if differing:
            sizes = [dict(zip(v.modalities, v.sizes, strict=True)) for v in (dataset.vocabulary, other.vocabulary)]
            raise DataError(
                f"source {name}: {source.path} and {config.path} differ in {', '.join(differing)}, so the same ids "
                f"would mean different things (sizes {sizes[1]} there, {sizes[0]} here); encode it again with "
                "the tokenizer and codecs of the first"
            )
        opened[name] = (other, source.split)
    return opened


def _plan_hash(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:32]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
