"""Which files of a source folder become which shards, before any is read: the same for every worker."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from .adopt import MIN_TOKENS
from .errors import DataError
from .sources import (
    IMAGE,
    LATENTS,
    LINES,
    MANY,
    MEGATRON,
    SERIES,
    SOUND,
    TABLE,
    TAR,
    TEXT,
    Item,
    Part,
    ending,
    parts,
    read_items,
)

# A tar's own documents may be of any modality.
_ENDINGS = {
    **dict.fromkeys((*TEXT, LINES, TABLE, TAR, MEGATRON), "text"),
    **dict.fromkeys(IMAGE, "image"),
    **dict.fromkeys(SOUND, "voice"),
    **dict.fromkeys(SERIES, "series"),
    **dict.fromkeys(LATENTS, "latent"),
}


@dataclass(frozen=True)
class EncodeConfig:
    """How files become documents.

    Attributes:
        max_tokens: longest text document; longer texts are cut between words.
        heldout: share that goes to split "heldout": of the files, and of the documents in files of many.
        shard_bytes: source bytes per shard, about.
        text_vocab: pieces of the tokenizer, where one is trained.
        image_side, patch, image_codes: pictures become squares of this side, a code per patch; in colour, unless all
            that the codec is trained on are grey.
        rate, hop, voice_codes: sounds are resampled to this rate, a code per hop.
        voice_model: folder of a pretrained Mimi or EnCodec, instead of a codec trained here; its first
            `voice_quantisers` quantisers count.
        image_model: folder of a pretrained AutoencoderKL (pictures become continuous latents) or Chameleon (codes).
        latent_dtype: how continuous latents are stored, "bfloat16" or "float16".
        byte_files: endings, e.g. ".pcap", of files that become byte streams.
        series_bins, series_law: columns of numbers go into so many bins, by "mu" or "uniform", see `SeriesCodec`;
        series_range: (low, high) of the bins; None takes that of the training files.
        megatron_eod: this id at the end of a Megatron document is left out; ours end with their own.
        originals: whether pictures and sounds are stored beside their codes, for `preview`.
        skip_bad: documents that cannot be read or encoded are left out and listed beside their shard, in
            `SHARD.skipped.jsonl`; otherwise the first ends the job.
    """

    max_tokens: int = 2048
    heldout: float = 0.0
    shard_bytes: int = 64 << 20
    text_vocab: int = 8192
    image_side: int = 32
    patch: int = 4
    image_codes: int = 512
    rate: int = 16000
    hop: int = 320
    voice_codes: int = 512
    voice_model: str = ""
    voice_quantisers: int = 8
    image_model: str = ""
    latent_dtype: str = "bfloat16"
    byte_files: tuple[str, ...] = ()
    series_bins: int = 1024
    series_law: str = "mu"
    series_range: tuple[float, float] | None = None
    megatron_eod: int | None = None
    originals: bool = True
    skip_bad: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens < MIN_TOKENS or not 0.0 <= self.heldout < 1.0 or self.shard_bytes < 1:
            raise DataError(
                f"max_tokens >= {MIN_TOKENS}, heldout in 0..1 and shard_bytes >= 1 are needed, got {self.max_tokens}, "
                f"{self.heldout} and {self.shard_bytes}"
            )
        taken = [end for end in self.byte_files if not end.startswith(".") or end in _ENDINGS]
        if taken:
            raise DataError(f"byte_files: {taken[0]!r} is no ending of its own; give others, like .pcap")

    def modality(self, file: str) -> str:
        """The modality of a file's main content, by its ending; "" for one that is not read."""
        if Path(file).suffix.lower() in self.byte_files:
            return "bytes"
        return _ENDINGS.get(ending(file), "")


class Unit(NamedTuple):
    """A file or a part of one, and its caption or "", relative to the source."""

    number: int
    file: str
    caption: str
    part: Part


class Task(NamedTuple):
    """The units of one shard."""

    split: str
    number: int
    units: list[Unit]

    @property
    def shard(self) -> str:
        return f"{self.split}-{self.number:05d}.tar"


class Plan(NamedTuple):
    """The tasks of a job, and how many files of which endings no reader takes."""

    tasks: list[Task]
    passed_over: dict[str, int]


def plan_tasks(source: Path, config: EncodeConfig) -> Plan:
    """All tasks of a source folder.

    Raises:
        DataError: it holds nothing that is known, or nothing for one of the splits.
    """
    if not source.is_dir():
        raise DataError(f"{source} is no folder")
    files, passed_over = _files(source, config)
    units: dict[str, list[Unit]] = {"train": [], "heldout": []}
    count = 0
    for path, caption in files:
        file = str(path.relative_to(source))
        many = config.heldout > 0 and _many(file, config)
        splits = ("train", "heldout") if many else (_split(file.encode(), config.heldout),)
        for part in parts(path, config.shard_bytes, raw=config.modality(file) == "bytes"):
            for split in splits:
                units[split].append(Unit(count, file, str(caption.relative_to(source)) if caption else "", part))
                count += 1
    if not count:
        raise DataError(
            f"{source} holds no file of a known kind ({', '.join((*_ENDINGS, *config.byte_files))}) with content"
        )
    empty = [split for split, found in units.items() if not found]
    if config.heldout and empty:
        raise DataError(
            f"split {empty[0]} would be empty: files are held out whole, {len(files)} of them with a share of "
            f"{config.heldout}; only {', '.join(MANY)} are held out document by document"
        )
    tasks = []
    for split, mine in units.items():
        start, total, number = 0, 0.0, 0
        for i, unit in enumerate(mine):
            shared = config.heldout > 0 and _many(unit.file, config)
            share = (config.heldout if split == "heldout" else 1 - config.heldout) if shared else 1.0
            total += unit.part.bytes * share
            if total >= config.shard_bytes or i + 1 == len(mine):
                tasks.append(Task(split, number, mine[start : i + 1]))
                start, total, number = i + 1, 0.0, number + 1
    return Plan(tasks, passed_over)


def _files(source: Path, config: EncodeConfig) -> tuple[list[tuple[Path, Path | None]], dict[str, int]]:
    """(file, its caption) in order, and how many files of which endings no reader takes."""
    everything = sorted(path for path in source.rglob("*") if path.is_file())
    known = {path for path in everything if config.modality(path.name)}
    if MEGATRON not in config.byte_files:
        known -= {p for p in known if ending(p.name) == MEGATRON and not p.with_suffix(".idx").exists()}
    indices = {path.with_suffix(".idx") for path in known if ending(path.name) == MEGATRON}
    media = {path.with_suffix("") for path in known if config.modality(path.name) != "text"}
    files: list[tuple[Path, Path | None]] = []
    for path in everything:
        if path not in known or (path.suffix.lower() == ".txt" and path.with_suffix("") in media):
            continue
        caption = path.with_suffix(".txt")
        files.append((path, caption if config.modality(path.name) != "text" and caption.exists() else None))
    strangers = Counter("".join(p.suffixes[-2:]) or p.name for p in everything if p not in known and p not in indices)
    return files, dict(strangers.most_common())


def _many(file: str, config: EncodeConfig) -> bool:
    return config.modality(file) == "text" and ending(file) in MANY


def _split(told_by: bytes, heldout: float) -> str:
    return "heldout" if zlib.crc32(told_by) < heldout * 2**32 else "train"


def unit_items(source: Path, config: EncodeConfig, unit: Unit, split: str) -> Iterator[Item | DataError]:
    """The documents of a unit that belong to `split`, and the errors of those that cannot be read."""
    every = not config.heldout
    try:
        yield from read_items(
            source / unit.file,
            unit.file,
            config.modality,
            unit.part,
            source / unit.caption if unit.caption else None,
            lambda told_by: every or _split(told_by, config.heldout) == split,
            config.megatron_eod,
        )
    except DataError as error:
        yield error
