"""A folder of files as a data set: text, captioned pictures and sounds become shards, by as many workers as there are.

The files are cut into tasks, and each task makes one shard. What a task makes depends on its files alone: workers may
be processes of one machine or of a job array, may be killed, and may be started again; finished shards are not redone.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock

from .adopt import MIN_TOKENS, meaning, save_meaning
from .codecs import (
    ByteCodec,
    Codec,
    GivenLatents,
    HubSpeech,
    LogMelKMeans,
    PatchKMeans,
    SeriesCodec,
    open_picture_model,
)
from .compose import Composer, Span
from .dataset import Dataset
from .errors import DataError
from .files import write_atomic
from .index import ShardIndex, index_path
from .latents import LatentFormat
from .manifest import MANIFEST, fingerprints, write_manifest
from .scan import cut_text
from .shards import Sample, ShardWriter
from .sources import (
    IMAGE,
    LATENTS,
    MEGATRON,
    SERIES,
    SOUND,
    TEXT,
    picture_as_png,
    read_bytes,
    read_latents,
    read_megatron,
    read_picture,
    read_series,
    read_sound,
    read_texts,
)
from .tokenizer import TextTokenizer
from .vocabulary import Vocabulary

PLAN, LOCK = "encode.json", "encode.lock"
_KINDS = {**dict.fromkeys(IMAGE, "image"), **dict.fromkeys(SOUND, "voice")}
_KINDS |= {**dict.fromkeys(SERIES, "series"), **dict.fromkeys(LATENTS, "latent")}
_BLOCK_TOKENS = 1 << 20
_TRAIN_BYTES = 16 << 20


@dataclass(frozen=True)
class EncodeConfig:
    """How files become documents.

    Attributes:
        max_tokens: longest text document; longer texts are cut between words.
        heldout: share of the files that goes to split "heldout".
        shard_bytes: source bytes per shard, about.
        text_vocab: pieces of the tokenizer, where one is trained.
        image_side, patch, image_codes: pictures become grey squares of this side, a code per patch.
        rate, hop, voice_codes: sounds must have this rate, a code per hop.
        voice_model: folder of a pretrained Mimi or EnCodec, instead of a codec trained here; its first
            `voice_quantisers` quantisers count.
        image_model: folder of a pretrained AutoencoderKL (pictures become continuous latents) or Chameleon (codes).
        latent_dtype: how continuous latents are stored, "bfloat16" or "float16".
        byte_files: endings, e.g. ".pcap", of files that become byte streams.
        series_bins, series_law: columns of numbers go into so many bins, by "mu" or "uniform", see `SeriesCodec`;
        series_range: (low, high) of the bins; None takes that of the training files.
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

    def __post_init__(self) -> None:
        if self.max_tokens < MIN_TOKENS or not 0.0 <= self.heldout < 1.0 or self.shard_bytes < 1:
            raise DataError(
                f"max_tokens >= {MIN_TOKENS}, heldout in 0..1 and shard_bytes >= 1 are needed, got {self.max_tokens}, "
                f"{self.heldout} and {self.shard_bytes}"
            )
        taken = [end for end in self.byte_files if not end.startswith(".") or end in (*_KINDS, *TEXT, ".jsonl")]
        if taken:
            raise DataError(f"byte_files: {taken[0]!r} is no ending of its own; give others, like .pcap")

    def modality(self, file: str) -> str:
        """The modality of a file's main content, by its ending; "" for one that is not read."""
        suffix = Path(file).suffix.lower()
        if suffix in self.byte_files:
            return "bytes"
        return "text" if suffix in (*TEXT, ".jsonl", MEGATRON) else _KINDS.get(suffix, "")


class Unit(NamedTuple):
    """One document's or text's files, relative to the source: the main file, and a caption or ""."""

    number: int
    file: str
    caption: str
    bytes: int


class Task(NamedTuple):
    """The units of one shard."""

    split: str
    number: int
    units: list[Unit]

    @property
    def shard(self) -> str:
        return f"{self.split}-{self.number:05d}.tar"


def plan_tasks(source: Path, config: EncodeConfig) -> list[Task]:
    """All tasks of a source folder; DataError when it holds nothing that is known."""
    if not source.is_dir():
        raise DataError(f"{source} is no folder")
    files = sorted(path for path in source.rglob("*") if path.is_file() and config.modality(path.name))
    lone = {path for path in files if path.suffix.lower() == MEGATRON and not path.with_suffix(".idx").exists()}
    files = [path for path in files if path not in lone or MEGATRON in config.byte_files]
    media = {path.with_suffix("") for path in files if config.modality(path.name) != "text"}
    units: list[Unit] = []
    for path in files:
        stem, suffix = path.with_suffix(""), path.suffix.lower()
        if suffix == ".txt" and stem in media:
            continue  # a caption
        caption = path.with_suffix(".txt")
        is_media = config.modality(path.name) != "text"
        name = str(caption.relative_to(source)) if is_media and caption.exists() else ""
        if size := path.stat().st_size:  # an empty file holds no document
            units.append(Unit(len(units), str(path.relative_to(source)), name, size))
    if not units:
        raise DataError(
            f"{source} holds no file of a known kind ({', '.join((*TEXT, '.jsonl', *_KINDS, *config.byte_files))})"
        )
    tasks = []
    for split in ("train", "heldout"):
        mine = [unit for unit in units if _is_heldout(unit, config.heldout) == (split == "heldout")]
        start, total, number = 0, 0, 0
        for i, unit in enumerate(mine):
            total += unit.bytes
            if total >= config.shard_bytes or i + 1 == len(mine):
                tasks.append(Task(split, number, mine[start : i + 1]))
                start, total, number = i + 1, 0, number + 1
    return tasks


def _is_heldout(unit: Unit, share: float) -> bool:
    return zlib.crc32(unit.file.encode()) < share * 2**32


def encode_folder(
    source: Path,
    out: Path,
    config: EncodeConfig,
    *,
    like: Path | None = None,
    tokenizer: Path | None = None,
    workers: int = 1,
    worker: int | None = None,
) -> Iterator[tuple[str, int, int]]:
    """Encodes a folder into a data set; a second call goes on where the first was cut off.

    Args:
        source: folder of .txt, .md, .rst, .jsonl (field "text"), pictures, .wav, .csv (columns of numbers),
            .safetensors (tensor "latents" [n, width]), byte files, and Megatron's .bin with .idx (whose ids are then
            the given tokenizer's); NAME.txt beside NAME.png or another of these is its caption.
        out: folder to make.
        like: a data set whose tokenizer and codecs to use, so that both can be mixed; or
        tokenizer: a sentencepiece model or tokenizer.json for text alone; without both they are trained on the source.
        workers: processes, or the size of the job array.
        worker: this member of the array, 0..workers-1; None runs all on this machine.

    Yields:
        (shard, documents, tokens) as shards are finished or found finished. The manifest is written once all are there.

    Raises:
        DataError: a file that cannot be read or encoded (named), or an `out` that belongs to something else.
    """
    if workers < 1 or (worker is not None and not 0 <= worker < workers):
        raise DataError(f"workers >= 1 and worker in 0..workers-1 are needed, got {workers} and {worker}")
    tasks = plan_tasks(source, config)
    fresh = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    alone = FileLock(out / LOCK)  # members of a job array start together, and end together
    try:
        with alone:
            composer = _claim(source, out, config, tasks, like, tokenizer)
    finally:
        _leave_no_trace(out, fresh)
    mine = tasks if worker is None else tasks[worker::workers]
    if worker is None and workers > 1:
        context = multiprocessing.get_context("forkserver")
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            arguments = ([source] * len(mine), [out] * len(mine), [config] * len(mine), [composer] * len(mine), mine)
            yield from pool.map(run_task, *arguments)
    else:
        yield from (run_task(source, out, config, composer, task) for task in mine)
    with alone:
        if all((out / task.shard).exists() for task in tasks) and not (out / MANIFEST).exists():
            splits: dict[str, list[ShardIndex]] = {}
            for task in tasks:
                splits.setdefault(task.split, []).append(ShardIndex.load(index_path(out / task.shard)))
            write_manifest(
                out,
                name=source.name,
                generator={"name": "encode", "version": 1, "source": source.name, "max_tokens": config.max_tokens},
                provenance={"text": f"files of {source.name}"},
                composer=composer,
                splits=splits,
            )
    if (out / MANIFEST).exists():
        (out / LOCK).unlink(missing_ok=True)


def _leave_no_trace(out: Path, fresh: bool) -> None:
    """After a refusal: neither the lock nor a folder that was not there before."""
    if not (out / PLAN).exists():
        (out / LOCK).unlink(missing_ok=True)
        if fresh and not any(out.iterdir()):
            out.rmdir()


def _claim(
    source: Path, out: Path, config: EncodeConfig, tasks: list[Task], like: Path | None, tokenizer: Path | None
) -> Composer:
    """The composer of this job, after `out` was found free or of the same job."""
    settings = repr((config, str(like), str(tokenizer), tasks)).encode()
    plan = json.dumps({"job": hashlib.sha256(settings).hexdigest(), "shards": len(tasks)}).encode()
    if (out / PLAN).exists():
        if (out / PLAN).read_bytes() != plan:
            raise DataError(f"{out} belongs to another encode job (other files or settings); choose another folder")
        return _meaning(source, out, config, tasks, like, tokenizer)
    if any(entry.name != LOCK for entry in out.iterdir()):
        raise DataError(f"{out} is not empty and belongs to no encode job; choose another folder")
    write_atomic(out / PLAN, plan)
    try:
        return _meaning(source, out, config, tasks, like, tokenizer)
    except BaseException:  # a job that never began: other files or settings may have the folder
        (out / PLAN).unlink()
        raise


def _meaning(
    source: Path, out: Path, config: EncodeConfig, tasks: list[Task], like: Path | None, tokenizer: Path | None
) -> Composer:
    """The given tokenizer and codecs, or those learnt from the source; saved in `out`."""
    composer = meaning(like, tokenizer) if like or tokenizer else _train(source, out, config, tasks)
    save_meaning(out, composer)
    return composer


def _train(source: Path, out: Path, config: EncodeConfig, tasks: list[Task]) -> Composer:
    """Tokenizer and codecs learnt from the first training files; every worker learns the same, and only if needed."""
    units = [unit for task in tasks if task.split == "train" for unit in task.units]
    binary = next((unit.file for task in tasks for unit in task.units if unit.file.endswith(MEGATRON)), None)
    if binary is not None:
        raise DataError(f"{source / binary} holds ids of some tokenizer: name it with --tokenizer or --like")
    if (out / TextTokenizer.file).exists():
        tokenizer = TextTokenizer.load(out / TextTokenizer.file)
    else:
        lines: list[str] = []
        for unit in units:
            names = [name for name in (unit.file, unit.caption) if Path(name).suffix in (*TEXT, ".jsonl")]
            lines += [line for name in names for text in read_texts(source / name) for line in text.split("\n")]
            if sum(map(len, lines)) > _TRAIN_BYTES:
                break
        if not any(line.strip() for line in lines):
            raise DataError(
                f"{source} holds no text to train a tokenizer on: use another data set's with --like, or add captions "
                "(NAME.txt beside NAME.png)"
            )
        tokenizer = TextTokenizer.train(lines, config.text_vocab)
    codecs = _train_codecs(source, config, units)
    sizes = (tokenizer.vocab_size, *(codec.vocab_size for codec in codecs.values()))
    return Composer(Vocabulary(("text", *codecs), sizes), tokenizer, codecs)


def _train_codecs(source: Path, config: EncodeConfig, units: Sequence[Unit]) -> dict[str, Codec]:
    """A codec for every modality that the training files have, in bank order."""
    files: dict[str, list[Path]] = {}
    for unit in units:
        files.setdefault(config.modality(unit.file), []).append(source / unit.file)
    codecs: dict[str, Codec] = {}
    side = (config.image_side, config.image_side)
    if "image" in files and config.image_model:
        codecs["image"] = open_picture_model(config.image_model, image_shape=side, dtype=config.latent_dtype)
    elif "image" in files:
        images = np.stack([read_picture(path, side) for path in files["image"][:4096]])
        codecs["image"] = PatchKMeans.train(images, patch=config.patch, n_codes=config.image_codes)
    if "voice" in files and config.voice_model:
        codecs["voice"] = HubSpeech.open(config.voice_model, n_q=config.voice_quantisers)
    elif "voice" in files:
        waves = [read_sound(path, config.rate) for path in files["voice"][:1024]]
        codecs["voice"] = LogMelKMeans.train(waves, rate=config.rate, hop=config.hop, n_codes=config.voice_codes)
    if "bytes" in files:
        codecs["bytes"] = ByteCodec()
    if "series" in files and config.series_range:
        low, high = config.series_range
        codecs["series"] = SeriesCodec(low=low, high=high, bins=config.series_bins, law=config.series_law)
    elif "series" in files:
        columns = [column for path in files["series"] for column in read_series(path).values()]
        codecs["series"] = SeriesCodec.train(columns, bins=config.series_bins, law=config.series_law)
    if "latent" in files:
        width = read_latents(files["latent"][0]).shape[1]
        codecs["latent"] = GivenLatents(width=width, dtype=config.latent_dtype)
    return codecs


def run_task(source: Path, out: Path, config: EncodeConfig, composer: Composer, task: Task) -> tuple[str, int, int]:
    """Makes one shard, if it is not there; returns (its name, documents, tokens)."""
    tar = out / task.shard
    if not tar.exists():
        marks = fingerprints(composer.vocabulary, composer.tokenizer, composer.codecs)
        writer = ShardWriter(
            out,
            task.split,
            composer.vocabulary,
            marks,
            samples_per_shard=1 << 62,
            first=task.number,
            latents=LatentFormat.of(composer.codecs),
        )
        texts = [unit for unit in task.units if config.modality(unit.file) == "text"]
        with writer:
            _write_texts(writer, composer, source, config, texts)
            for unit in task.units:
                if config.modality(unit.file) != "text":
                    for sample in _media_samples(composer, source, config, unit):
                        writer.write(sample)
        if not tar.exists():
            files = ", ".join(unit.file for unit in task.units)
            raise DataError(f"{source}: {files[:200]} hold no document (blank text?); take them out and begin again")
    index = ShardIndex.load(index_path(tar))
    return task.shard, len(index), int(index.lengths.sum())


def _write_texts(
    writer: ShardWriter, composer: Composer, source: Path, config: EncodeConfig, units: Sequence[Unit]
) -> None:
    """Text documents, many to a block."""
    block: list[np.ndarray] = []
    files: list[str] = []
    blocks = 0
    for unit in units:
        if unit.file.endswith(MEGATRON):
            limit = config.max_tokens - 2
            for ids in read_megatron(source / unit.file, composer.tokenizer.vocab_size):
                block += [composer.document([("text", ids[i : i + limit])]) for i in range(0, len(ids), limit)]
        for text in () if unit.file.endswith(MEGATRON) else read_texts(source / unit.file):
            for piece, _ in cut_text(text, config.max_tokens - 2, composer.tokenizer.encode):
                if piece.strip():
                    block.append(composer.document([("text", piece)]))
        files.append(unit.file)
        if sum(map(len, block)) >= _BLOCK_TOKENS:
            writer.write_block(f"text-{units[0].number:08d}-{blocks:04d}", block, {"files": files})
            block, files, blocks = [], [], blocks + 1
    if block:
        writer.write_block(f"text-{units[0].number:08d}-{blocks:04d}", block, {"files": files})


def _media_samples(composer: Composer, source: Path, config: EncodeConfig, unit: Unit) -> Iterator[Sample]:
    """What a file holds and its caption, in the one order or the other: one document, or several of a long file."""
    path, modality = source / unit.file, config.modality(unit.file)
    if modality not in composer.codecs:
        raise DataError(f"{path}: there is no codec for {modality}; use --like a data set that has one")
    caption = next(read_texts(source / unit.caption), "").strip() if unit.caption else ""
    local = composer.local_codes("text", caption)
    room = config.max_tokens - 4 - len(local)
    pieces = _contents(composer, config, path, modality, room)
    for number, (content, name) in enumerate(pieces):
        spans: list[Span] = [(modality, content)]
        lengths = [(modality, len(content) + 2)]
        kind = modality
        if caption:
            spans.append(("text", local))
            lengths.append(("text", len(local)))
            kind = f"{modality}-caption"
            if zlib.crc32(unit.file.encode()) & 1:
                spans.reverse()
                lengths.reverse()
                kind = f"caption-{modality}"
        yield Sample(
            key=f"{modality}-{unit.number:08d}" + (f"-{number:06d}" if modality in _LONG else ""),
            kind=kind,
            tokens=composer.document(spans),
            spans=lengths,
            text=caption or None,
            png=picture_as_png(path) if modality == "image" else None,
            wav=path.read_bytes() if modality == "voice" else None,
            meta={"file": unit.file, **({"column": name} if name else {})},
            latents=composer.latents(spans),
        )


_LONG = ("bytes", "series")  # what may be cut into several documents


def _contents(
    composer: Composer, config: EncodeConfig, path: Path, modality: str, room: int
) -> Iterator[tuple[np.ndarray, str]]:
    """(codes int64 [n] or latents float [n, width], name of the column or "") of every document of a file."""
    codec = composer.codecs[modality]
    if modality in _LONG and room < 1:
        raise DataError(f"{path}: its caption leaves no room for {modality} in {config.max_tokens} tokens")
    if modality == "image":
        shape = getattr(codec, "image_shape", (config.image_side, config.image_side))
        yield codec.encode(read_picture(path, shape, channels=getattr(codec, "channels", 1))), ""
    elif modality == "voice":
        yield codec.encode(read_sound(path, getattr(codec, "rate", config.rate))), ""
    elif modality == "latent":
        try:
            yield codec.encode(read_latents(path)), ""
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
    else:
        columns = {"": read_bytes(path)} if modality == "bytes" else read_series(path)
        for name, column in columns.items():
            codes = codec.encode(column)
            yield from ((codes[i : i + room], name) for i in range(0, len(codes), room))


def finished(out: Path) -> Dataset | None:
    """The data set, once all workers are done."""
    return Dataset.open(out) if (out / MANIFEST).exists() else None
