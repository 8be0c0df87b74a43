"""What the commands do: rebuilding indices, and describing a data set in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .compose import Composer
from .dataset import Dataset, Split, text_reading
from .errors import DataError
from .index import ShardIndex, energon_path, index_path, save_energon
from .manifest import MANIFEST, find_tokenizer, read_manifest
from .packing import PackPlan, permute, shuffle_quality
from .scan import scan_shard
from .tokenizer import load_tokenizer
from .vocabulary import Vocabulary

_SHADES = " .:-=+*#%@"


def index_shards(shards: Sequence[Path]) -> Iterator[tuple[Path, ShardIndex]]:
    """Rebuilds the index of every tar, one after the other; an old index stays until its successor is complete.

    Raises:
        DataError: a tar that is missing, unsound (see `scan_shard`), or not the one that the manifest beside it lists.
    """
    missing = [str(tar) for tar in shards if not tar.is_file()]
    if missing:
        raise DataError(f"no such shard: {', '.join(missing)}")
    for tar in shards:
        reading = None
        listed: dict[str, dict[str, Any]] = {}
        if (tar.parent / MANIFEST).is_file():
            manifest, _ = read_manifest(tar.parent)
            splits = {shard["name"]: split for split, entries in manifest["splits"].items() for shard in entries}
            listed = {shard["name"]: shard for entries in manifest["splits"].values() for shard in entries}
            if tar.name not in listed:
                raise DataError(f"{tar} is not in the manifest beside it: a foreign shard; no index was written")
            if "text" in manifest:
                tokenizer = load_tokenizer(tar.parent / find_tokenizer(tar.parent, manifest))
                composer = Composer(Vocabulary.from_json(manifest["vocabulary"]), tokenizer, {})
                reading = text_reading(manifest, composer, splits[tar.name])
        found = scan_shard(tar, reading=reading)
        if listed and listed[tar.name]["sha256"] != found.header["sha256"]:
            raise DataError(f"{tar}: sha256 differs from the manifest: foreign or changed shard; no index written")
        found.save(index_path(tar))
        save_energon(energon_path(tar), found)
        yield tar, found


def tree(datasets: Mapping[str, Dataset]) -> Iterator[str]:
    """Lines of a tree: data set, splits, tokens per modality."""
    for name, dataset in datasets.items():
        total = sum(int(split.lengths.sum()) for split in dataset.splits.values())
        yield f"{name}  {total:,d} tokens"
        splits = list(dataset.splits.values())
        for split in splits:
            last = split is splits[-1]
            tokens = int(split.lengths.sum())
            yield f"{'└─' if last else '├─'} {split.name}  {tokens:,d} tokens in {len(split):,d} documents"
            counts = dict(zip(dataset.vocabulary.modalities, split.modality_lengths.sum(axis=0).tolist(), strict=True))
            for modality, count in counts.items():
                end = "└─" if modality == dataset.vocabulary.modalities[-1] else "├─"
                more = _of_which_latents(split, modality, dataset)
                yield f"{'   ' if last else '│  '}{end} {modality}  {count:,d}{more}"


def _of_which_latents(split: Split, modality: str, dataset: Dataset) -> str:
    """How many of a continuous modality's tokens are slots, and what their latents are; "" for a discrete one."""
    form, rows = split.latent_format, split.latent_rows
    if form is None or rows is None or modality not in form.modalities:
        return ""
    count = int(rows.latent_counts[:, dataset.vocabulary.modality_id(modality)].sum())
    return f", of which {count:,d} latents of {form.width} x {form.dtype}"


def describe(dataset: Dataset, *, seq_len: int, window: int, samples: int, seed: int) -> Iterator[str]:
    """Lines for people: where the data came from, a table of splits, packing figures, and decoded samples."""
    manifest, modalities = dataset.manifest, dataset.vocabulary.modalities
    generator = " ".join(f"{key}={value}" for key, value in manifest["generator"].items())
    yield f"{dataset.path}  identity {dataset.identity[:16]}"
    yield f"made by: {generator}"
    yield from (f"{name}: {manifest['provenance'][name]}" for name in modalities if name in manifest["provenance"])
    ranges = ", ".join(
        f"{name} {ids.start}..{ids.stop - 1}" for name, ids in ((m, dataset.vocabulary.range_of(m)) for m in modalities)
    )
    yield f"vocabulary: {dataset.vocabulary.used} of {dataset.vocabulary.size} ids used; {ranges}"
    yield ""
    head = "".join(f"{name:>10s}" for name in modalities)
    yield f"{'split':10s}{'shards':>7s}{'samples':>9s}{'tokens':>10s}{head}{'mean':>7s}{'longest':>8s}{'MB':>7s}"
    for name, split in dataset.splits.items():
        counts = "".join(f"{count:10,d}" for count in split.modality_lengths.sum(axis=0).tolist())
        megabytes = sum(shard["bytes"] for shard in manifest["splits"][name]) / 1e6
        yield (
            f"{name:10s}{len(split.files.paths):7d}{len(split):9,d}{split.lengths.sum():10,d}{counts}"
            f"{split.lengths.mean():7.1f}{split.lengths.max():8d}{megabytes:7.1f}"
        )
    yield ""
    for name, split in dataset.splits.items():
        if split.lengths.max() > seq_len:
            yield f"{name}: documents of up to {split.lengths.max()} tokens do not fit into seq_len {seq_len}"
            continue
        plan = PackPlan(split.lengths, seq_len=seq_len, window=window, seed=seed)
        yield (
            f"{name}: {plan.packs_per_epoch():,d} packs of {seq_len} per epoch, fill {plan.fill():.4f}, "
            f"shuffle quality {shuffle_quality(plan):.2f} (1.00: as if drawn at random)"
        )
    split = next(iter(dataset.splits.values())) if "train" not in dataset.splits else dataset.splits["train"]
    shown = permute(np.arange(min(samples, len(split))), len(split), (3, seed))
    for sample in shown.tolist():
        yield ""
        yield f"{split.key(sample)} ({split.meta(sample)['kind']}, {split.lengths[sample]} tokens)"
        for modality, content in dataset.composer.decode(split.tokens(sample), split.vectors(sample)):
            yield from _content(modality, content)


def _content(modality: str, content: str | np.ndarray) -> Iterator[str]:
    """One span: text as it is (shortened), an array as a small picture in characters."""
    if isinstance(content, str):
        text = " ".join(content.split())
        yield f"  {modality}: {text if len(text) <= 100 else text[:97] + '...'}"
        return
    yield f"  {modality}: {content.dtype} {list(content.shape)}"
    if content.ndim == 1 and content.dtype == np.uint8:
        yield f"    {bytes(content[:32]).hex(' ')}"
    elif content.ndim == 1 and content.dtype == np.float32:
        yield "    " + " ".join(f"{value:.4g}" for value in content[:12].tolist())
    if content.ndim != 2:
        return
    # Voice is time x bands: turn it, so that time runs to the right and high bands stand on top; every third is shown.
    picture = content.astype(np.float64) if content.dtype == np.uint8 else content.T[::-3].astype(np.float64)
    low, high = picture.min(), picture.max()
    for row in (picture - low) / max(high - low, 1e-9) * (len(_SHADES) - 1):
        yield "    " + "".join(_SHADES[round(value)] * 2 for value in row.tolist())
