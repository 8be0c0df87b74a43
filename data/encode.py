"""A folder of files as a data set: text, captioned pictures and sounds become shards, by as many workers as there are.

The files are cut into tasks, and each task makes one shard. What a task makes depends on its files alone: workers may
be processes of one machine or of a job array, may be killed, and may be started again; finished shards are not redone.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import wave
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .adopt import MIN_TOKENS, meaning, save_meaning
from .codecs import Codec, HubSpeech, LogMelKMeans, PatchKMeans
from .compose import Composer, Span
from .dataset import MANIFEST, Dataset, fingerprints, write_manifest
from .errors import DataError
from .files import write_atomic
from .index import ShardIndex, cut_text, index_path
from .shards import Sample, ShardWriter
from .tokenizer import TextTokenizer
from .vocabulary import Vocabulary

PLAN = "encode.json"
TEXT, IMAGE, SOUND = (".txt", ".md", ".rst"), (".png", ".jpg", ".jpeg", ".webp"), (".wav",)
MEGATRON = ".bin"  # with its .idx beside it
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

    def __post_init__(self) -> None:
        if self.max_tokens < MIN_TOKENS or not 0.0 <= self.heldout < 1.0 or self.shard_bytes < 1:
            raise DataError(
                f"max_tokens >= {MIN_TOKENS}, heldout in 0..1 and shard_bytes >= 1 are needed, got {self.max_tokens}, "
                f"{self.heldout} and {self.shard_bytes}"
            )


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
    files = sorted(path for path in source.rglob("*") if path.suffix.lower() in (*TEXT, ".jsonl", *IMAGE, *SOUND))
    files = sorted([*files, *(path for path in source.rglob("*" + MEGATRON) if path.with_suffix(".idx").exists())])
    media = {path.with_suffix("") for path in files if path.suffix.lower() in (*IMAGE, *SOUND)}
    units: list[Unit] = []
    for path in files:
        stem, suffix = path.with_suffix(""), path.suffix.lower()
        if suffix == ".txt" and stem in media:
            continue  # a caption
        caption = path.with_suffix(".txt")
        is_media = suffix in (*IMAGE, *SOUND)
        name = str(caption.relative_to(source)) if is_media and caption.exists() else ""
        units.append(Unit(len(units), str(path.relative_to(source)), name, path.stat().st_size))
    if not units:
        raise DataError(f"{source} holds no file of a known kind ({', '.join((*TEXT, '.jsonl', *IMAGE, *SOUND))})")
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
        source: folder of .txt, .md, .rst, .jsonl (field "text"), pictures, .wav and Megatron's .bin with .idx (whose
            ids are then the given tokenizer's); NAME.txt beside NAME.png or NAME.wav is its caption.
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
    composer = _claim(source, out, config, tasks, like, tokenizer)
    mine = tasks if worker is None else tasks[worker::workers]
    if worker is None and workers > 1:
        context = multiprocessing.get_context("forkserver")
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            arguments = ([source] * len(mine), [out] * len(mine), [config] * len(mine), [composer] * len(mine), mine)
            yield from pool.map(run_task, *arguments)
    else:
        yield from (run_task(source, out, config, composer, task) for task in mine)
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


def _claim(
    source: Path, out: Path, config: EncodeConfig, tasks: list[Task], like: Path | None, tokenizer: Path | None
) -> Composer:
    """The composer of this job, after `out` was found free or of the same job."""
    settings = repr((config, str(like), str(tokenizer), tasks)).encode()
    plan = json.dumps({"job": hashlib.sha256(settings).hexdigest(), "shards": len(tasks)}).encode()
    if (out / PLAN).exists():
        if (out / PLAN).read_bytes() != plan:
            raise DataError(f"{out} belongs to another encode job (other files or settings); choose another folder")
    elif out.exists() and any(out.iterdir()):
        raise DataError(f"{out} is not empty and belongs to no encode job; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / PLAN, plan)
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
            lines += [line for name in names for text in _texts(source / name) for line in text.split("\n")]
            if sum(map(len, lines)) > _TRAIN_BYTES:
                break
        tokenizer = TextTokenizer.train(lines, config.text_vocab)
    codecs: dict[str, Codec] = {}
    pictures = [source / unit.file for unit in units if Path(unit.file).suffix.lower() in IMAGE]
    sounds = [source / unit.file for unit in units if Path(unit.file).suffix.lower() in SOUND]
    if pictures:
        side = (config.image_side, config.image_side)
        images = np.stack([_picture(path, side) for path in pictures[:4096]])
        codecs["image"] = PatchKMeans.train(images, patch=config.patch, n_codes=config.image_codes)
    if sounds and config.voice_model:
        codecs["voice"] = HubSpeech.open(config.voice_model, n_q=config.voice_quantisers)
    elif sounds:
        waves = [_sound(path, config.rate) for path in sounds[:1024]]
        codecs["voice"] = LogMelKMeans.train(waves, rate=config.rate, hop=config.hop, n_codes=config.voice_codes)
    sizes = (tokenizer.vocab_size, *(codec.vocab_size for codec in codecs.values()))
    return Composer(Vocabulary(("text", *codecs), sizes), tokenizer, codecs)


def run_task(source: Path, out: Path, config: EncodeConfig, composer: Composer, task: Task) -> tuple[str, int, int]:
    """Makes one shard, if it is not there; returns (its name, documents, tokens)."""
    tar = out / task.shard
    if not tar.exists():
        marks = fingerprints(composer.vocabulary, composer.tokenizer, composer.codecs)
        writer = ShardWriter(out, task.split, composer.vocabulary, marks, samples_per_shard=1 << 62, first=task.number)
        with writer:
            _write_texts(writer, composer, source, config, [u for u in task.units if not _is_media(u)])
            for unit in filter(_is_media, task.units):
                writer.write(_media_sample(composer, source, config, unit))
    index = ShardIndex.load(index_path(tar))
    return task.shard, len(index), int(index.lengths.sum())


def _is_media(unit: Unit) -> bool:
    return Path(unit.file).suffix.lower() in (*IMAGE, *SOUND)


def _write_texts(
    writer: ShardWriter, composer: Composer, source: Path, config: EncodeConfig, units: Sequence[Unit]
) -> None:
    """Text documents, many to a block."""
    block: list[np.ndarray] = []
    files: list[str] = []
    blocks = 0
    for unit in units:
        if unit.file.endswith(MEGATRON):
            block += _megatron(source / unit.file, composer, config.max_tokens - 2)
        for text in () if unit.file.endswith(MEGATRON) else _texts(source / unit.file):
            for piece, _ in cut_text(text, config.max_tokens - 2, composer.tokenizer.encode):
                if piece.strip():
                    block.append(composer.document([("text", piece)]))
        files.append(unit.file)
        if sum(map(len, block)) >= _BLOCK_TOKENS:
            writer.write_block(f"text-{units[0].number:08d}-{blocks:04d}", block, {"files": files})
            block, files, blocks = [], [], blocks + 1
    if block:
        writer.write_block(f"text-{units[0].number:08d}-{blocks:04d}", block, {"files": files})


def _megatron(path: Path, composer: Composer, limit: int) -> Iterator[np.ndarray]:
    """The documents of a Megatron .bin/.idx pair, whose ids are this tokenizer's, in pieces of up to `limit` tokens."""
    try:
        from megatron.core.datasets.indexed_dataset import IndexedDataset
    except ImportError as error:
        raise DataError(f"reading {path} needs megatron-core") from error
    try:
        found = IndexedDataset(str(path.with_suffix("")))
    except Exception as error:  # damaged headers make it raise assertions and NumPy's errors
        raise DataError(f"{path.with_suffix('.idx')} is no Megatron index ({type(error).__name__}: {error})") from error
    edges = found.document_indices.tolist()
    for start, end in zip(edges[:-1], edges[1:], strict=True):
        ids = np.concatenate([np.asarray(found[i]) for i in range(start, end)] or [np.zeros(0)]).astype(np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= composer.tokenizer.vocab_size):
            raise DataError(
                f"{path}: ids {ids.min()}..{ids.max()}, but the tokenizer has {composer.tokenizer.vocab_size}: give "
                "the tokenizer that they were made with"
            )
        for i in range(0, len(ids), limit):
            yield composer.document([("text", ids[i : i + limit])])


def _media_sample(composer: Composer, source: Path, config: EncodeConfig, unit: Unit) -> Sample:
    """A picture or sound and its caption, in the one order or the other, as one document."""
    path = source / unit.file
    modality = "image" if path.suffix.lower() in IMAGE else "voice"
    if modality not in composer.codecs:
        raise DataError(f"{path}: there is no codec for {modality}; use --like a data set that has one")
    codec = composer.codecs[modality]
    if modality == "image":
        shape = codec.image_shape if isinstance(codec, PatchKMeans) else (config.image_side, config.image_side)
        codes = codec.encode(_picture(path, shape))
    else:
        codes = codec.encode(_sound(path, codec.rate if isinstance(codec, LogMelKMeans | HubSpeech) else config.rate))
    spans: list[Span] = [(modality, codes)]
    lengths = [(modality, len(codes) + 2)]
    caption = next(_texts(source / unit.caption), "").strip() if unit.caption else ""
    kind = modality
    if caption:
        local = composer.local_codes("text", caption)
        spans.append(("text", local))
        lengths.append(("text", len(local)))
        kind = f"{modality}-caption"
        if zlib.crc32(unit.file.encode()) & 1:
            spans.reverse()
            lengths.reverse()
            kind = f"caption-{modality}"
    return Sample(
        key=f"{modality}-{unit.number:08d}",
        kind=kind,
        tokens=composer.document(spans),
        spans=lengths,
        text=caption or None,
        png=_png(path) if modality == "image" else None,
        wav=path.read_bytes() if modality == "voice" else None,
        meta={"file": unit.file},
    )


def _texts(path: Path) -> Iterator[str]:
    """The texts of a file: the whole file, or one per line of a .jsonl."""
    try:
        content = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if path.suffix != ".jsonl":
        yield content
        return
    for number, line in enumerate(content.splitlines(), 1):
        try:
            text = json.loads(line)["text"] if line.strip() else ""
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}, line {number}: no JSON object with a field text ({error!r})") from error
        if not isinstance(text, str):
            raise DataError(f"{path}, line {number}: text is {type(text).__name__}, not a string")
        yield text


def _picture(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """uint8 [height, width], grey."""
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError("reading pictures needs Pillow: pip install polylepis[quickstart]") from error
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("L").resize((shape[1], shape[0])))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no picture ({error})") from error


def _png(path: Path) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    with Image.open(path) as image:
        image.convert("RGB").save(buffer, format="PNG")
    return buffer.getvalue()


def _sound(path: Path, rate: int) -> np.ndarray:
    """int16 [n], the mean of the channels."""
    try:
        with wave.open(str(path), "rb") as file:
            channels, width, found = file.getnchannels(), file.getsampwidth(), file.getframerate()
            data = file.readframes(file.getnframes())
    except (OSError, wave.Error, EOFError) as error:
        raise DataError(f"{path} is no PCM .wav ({error})") from error
    if width != 2 or found != rate or not data:
        raise DataError(f"{path}: 16-bit samples at {rate} Hz are needed, got {8 * width}-bit at {found} Hz")
    samples = np.frombuffer(data[: len(data) // (2 * channels) * 2 * channels], dtype="<i2").reshape(-1, channels)
    return samples.mean(axis=1).astype(np.int16)


def finished(out: Path) -> Dataset | None:
    """The data set, once all workers are done."""
    return Dataset.open(out) if (out / MANIFEST).exists() else None
