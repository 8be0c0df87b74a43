"""Proof and forecast from lengths alone: what a stream will do, without reading a shard."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .dataset import Dataset, Split
from .errors import DataError
from .mixing import Source
from .packing import PackPlan
from .plan import Place, Planner, StepPlan, digest
from .stream import StreamConfig, open_sources


def parse_sources(texts: Sequence[str]) -> dict[str, Source]:
    """PATH[#SPLIT][=WEIGHT] -> sources, named by folder; DataError for a weight that is no number.

    An "=" before a slash is part of the path, as in date=2026-01-01/shards.
    """
    sources: dict[str, Source] = {}
    for text in texts:
        place, _, weight = text.rpartition("=")
        if not place or "/" in weight:
            place, weight = text, ""
        path, _, split = place.partition("#")
        name = Path(path).name
        while name in sources:
            name += "'"
        try:
            sources[name] = Source(float(weight or 1.0), path, split or "train")
        except ValueError as error:
            raise DataError(
                f"{text}: a source is written PATH[#SPLIT][=WEIGHT], and {weight!r} is no number"
            ) from error
    return sources


def planner_of(config: StreamConfig) -> tuple[Planner, list[Split]]:
    """The planner and the splits of a configuration, as a stream has them; DataError as `Stream`."""
    dataset = Dataset.open(config.path)
    opened = open_sources(dataset, config)
    splits = [source.split(split) for source, split in opened.values()]
    assert all(isinstance(split, Split) for split in splits)
    lengths = {name: split.lengths for name, split in zip(opened, splits, strict=True)}
    planner = Planner(
        lengths,
        config.mix(),
        seq_len=config.seq_len,
        window=config.window,
        seed=config.seed,
        global_batch=config.global_batch,
        block=config.block,
        spread=config.spread,
    )
    return planner, [split for split in splits if isinstance(split, Split)]


@dataclass(frozen=True)
class Audit:
    """What an audit found.

    Attributes:
        documents: documents per source and epoch, each met exactly once.
        epochs: audited.
        fill: share of positions that hold a token, by source.
        deviation: the largest distance of a source from its share, in packs, after any draw.
        tokens: by source and modality, over all steps.
        order_digest: after the last step, what a stream's state holds then.
    """

    documents: dict[str, int]
    epochs: int
    fill: dict[str, float]
    deviation: float
    tokens: dict[str, dict[str, int]]
    order_digest: str


def audit(config: StreamConfig, *, epochs: int, steps: int) -> Audit:
    """Replays the plan: `epochs` of every source, and `steps` of the mix.

    Raises:
        DataError: a document that is lost or comes twice in an epoch, a pack that overflows, or a mix that strays.
    """
    planner, splits = planner_of(config)
    names = planner.mix.names
    fill = {}
    for name, plan in zip(names, planner.plans, strict=True):
        fill[name] = _once_each(name, plan, epochs)
    modalities = Dataset.open(config.path).vocabulary.modalities
    tokens = {name: np.zeros(len(modalities), dtype=np.int64) for name in names}
    position, order, worst = planner.start, "", 0.0
    for _ in range(steps):
        plan_of_step = planner.step(position)
        _continues(planner, plan_of_step)
        for source, samples in plan_of_step.packs:
            tokens[names[source]] += splits[source].modality_lengths[samples].sum(axis=0)
        order, position = digest(order, plan_of_step.packs), plan_of_step.after
        for draws in range(plan_of_step.before.draws + 1, position.draws + 1):
            worst = max(worst, _deviation(planner, draws))
    return Audit(
        documents={name: len(split) for name, split in zip(names, splits, strict=True)},
        epochs=epochs,
        fill=fill,
        deviation=worst,
        tokens={n: dict(zip(modalities, counts.tolist(), strict=True)) for n, counts in tokens.items()},
        order_digest=order,
    )


def _once_each(name: str, plan: PackPlan, epochs: int) -> float:
    """Fill, after every epoch was found to hold every document exactly once and no pack to overflow."""
    n, packs = len(plan.lengths), 0
    for epoch in range(epochs):
        seen = np.zeros(n, dtype=np.int64)
        for window in range(plan.n_windows):
            for number, pack in enumerate(plan.packs(epoch, window)):
                np.add.at(seen, pack, 1)
                packs += 1
                if plan.lengths[pack].sum() > plan.seq_len:
                    raise DataError(f"source {name}: pack {number} of window {window}, epoch {epoch} overflows")
        if (seen != 1).any():
            bad = int(np.flatnonzero(seen != 1)[0])
            raise DataError(f"source {name}: epoch {epoch} holds document {bad} {seen[bad]} times")
    return float(epochs * plan.lengths.sum() / (packs * plan.seq_len))


def _continues(planner: Planner, step: StepPlan) -> None:
    """DataError unless every source goes on exactly where it stood, pack by pack."""
    for source, (plan, place) in enumerate(zip(planner.plans, step.before.places, strict=True)):
        epoch, window, pack, _ = place
        for drawn in (pack_ for pack_ in step.packs if pack_.source == source):
            here = plan.packs(epoch, window)
            if not np.array_equal(here[pack], drawn.samples):
                raise DataError(f"source {planner.mix.names[source]}: a pack was skipped or repeated at {place}")
            pack += 1
            if pack == len(here):
                pack, window = 0, window + 1
            if window == plan.n_windows:
                epoch, window = epoch + 1, 0


def _deviation(planner: Planner, draws: int) -> float:
    """The largest distance from a share inside the current stage, in packs."""
    mix = planner.mix
    stage = mix.stage(draws)
    table = np.array(mix.tables[stage])
    done = draws - mix.firsts[stage]
    counts = mix.counts(draws) - mix.counts(mix.firsts[stage])
    return float(np.abs(counts - done * table / table.sum()).max())


def describe_audit(result: Audit) -> Iterator[str]:
    """Lines for people."""
    for name, count in result.documents.items():
        yield (
            f"{name}: {count:,d} documents, each exactly once in each of {result.epochs} epochs; "
            f"fill {result.fill[name]:.4f}"
        )
    for name, tokens in result.tokens.items():
        yield f"{name}: " + ", ".join(f"{count:,d} {modality}" for modality, count in tokens.items()) + " tokens"
    yield f"mix: at most {result.deviation:.2f} packs from its shares"
    yield f"order digest {result.order_digest}"


@dataclass(frozen=True)
class Forecast:
    """What a cluster would read.

    Attributes:
        epochs: of every source, after the last step.
        tokens_per_step: mean.
        shards_per_step: mean number of different shards that one node touches in a step.
        read_per_step: mean bytes of tokens that one node reads in a step.
        fetched: bytes that the busiest node fetches in all, with its cache; hit_rate: of shards, over all nodes.
    """

    epochs: dict[str, float]
    tokens_per_step: float
    shards_per_step: float
    read_per_step: float
    fetched: int
    hit_rate: float


def simulate(config: StreamConfig, *, dp_size: int, ranks_per_node: int, steps: int, cache_bytes: int) -> Forecast:
    """Replays `steps` on a cluster whose nodes keep shards in a least-recently-used cache, without reading.

    Raises:
        DataError: a cluster that cannot cut the global batch.
    """
    if config.global_batch % dp_size or dp_size % ranks_per_node:
        raise DataError(
            f"global_batch {config.global_batch} must be a multiple of {dp_size} ranks, and these of {ranks_per_node} "
            "per node"
        )
    planner, splits = planner_of(config)
    sizes = [split.files.sizes() for split in splits]
    nodes = dp_size // ranks_per_node
    share = config.global_batch // nodes
    caches: list[OrderedDict[tuple[int, int], int]] = [OrderedDict() for _ in range(nodes)]
    fetched, hits, touched_all, read, tokens = [0] * nodes, 0, 0, 0, 0
    position = planner.start
    for _ in range(steps):
        plan = planner.step(position)
        for node, cache in enumerate(caches):
            mine = plan.packs[node * share : (node + 1) * share]
            touched = {(p.source, int(s)) for p in mine for s in np.unique(splits[p.source].shard[p.samples])}
            read += sum(int(splits[p.source].token_bytes[p.samples].sum()) for p in mine)
            tokens += sum(int(splits[p.source].lengths[p.samples].sum()) for p in mine)
            touched_all += len(touched)
            for shard in sorted(touched):
                if shard in cache:
                    hits += 1
                    cache.move_to_end(shard)
                    continue
                cache[shard] = sizes[shard[0]][shard[1]]
                fetched[node] += cache[shard]
                while sum(cache.values()) > cache_bytes and len(cache) > 1:
                    cache.popitem(last=False)
        position = plan.after
    done = {
        name: place.epoch + _documents_before(plan, place) / len(plan.lengths)
        for name, place, plan in zip(planner.mix.names, position.places, planner.plans, strict=True)
    }
    return Forecast(
        done, tokens / steps, touched_all / (steps * nodes), read / (steps * nodes), max(fetched), hits / touched_all
    )


def _documents_before(plan: PackPlan, place: Place) -> int:
    """Documents of its epoch that come before a place."""
    if place.window >= plan.n_windows:
        return len(plan.lengths)
    packs = plan.packs(place.epoch, place.window)[: place.pack]
    return place.window * plan.window + sum(map(len, packs))


def to_json(result: Audit | Forecast) -> str:
    """One line."""
    from dataclasses import asdict

    return json.dumps(asdict(result), sort_keys=True)
