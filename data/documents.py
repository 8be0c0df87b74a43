"""Documents of files as samples of a shard: tokenised, coded, cut where they are long, many texts to a block."""

from __future__ import annotations

import io
import json
import wave
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .compose import Composer, Span
from .cut import cut_text
from .errors import DataError
from .files import write_atomic
from .latents import LatentFormat
from .manifest import fingerprints
from .media import picture_as_png, read_latents, read_picture, read_series, read_sound
from .shards import Sample, ShardWriter
from .sources import Item
from .tasks import EncodeConfig, Task, unit_items

SKIPPED = ".skipped.jsonl"
_BLOCK_TOKENS = 1 << 20
_LONG = ("bytes", "series")  # what may be cut into several documents


def write_shard(source: Path, out: Path, config: EncodeConfig, composer: Composer, task: Task) -> None:
    """Writes the shard of a task; none where its files hold no document.

    Raises:
        DataError: a document that cannot be read or encoded, unless `config.skip_bad`.
    """
    writer = ShardWriter(
        out,
        task.split,
        composer.vocabulary,
        fingerprints(composer.vocabulary, composer.tokenizer, composer.codecs),
        samples_per_shard=1 << 62,
        first=task.number,
        latents=LatentFormat.of(composer.codecs),
    )
    skipped: list[dict[str, str]] = []
    with writer:
        texts = _Texts(writer)
        for unit in task.units:
            count = 0
            for item in unit_items(source, config, unit, task.split):
                try:
                    if isinstance(item, DataError):
                        raise item
                    if item.modality == "text":
                        texts.add(list(_texts(composer, config, item)), unit.number, unit.file)
                    else:
                        for sample in list(_samples(composer, config, item, f"{unit.number:08d}-{count:06d}")):
                            writer.write(sample)
                except DataError as error:
                    if not config.skip_bad:
                        raise DataError(f"{error} (--skip-bad leaves such documents out, and lists them)") from error
                    skipped.append({"file": unit.file, "reason": str(error)})
                count += 1
        texts.flush()
        if skipped:  # before the shard, whose presence says that the task is done
            lines = "".join(json.dumps(entry) + "\n" for entry in skipped)
            write_atomic(out / (task.shard + SKIPPED), lines.encode())


class _Texts:
    """Collects text documents and writes them by blocks of about a million tokens."""

    def __init__(self, writer: ShardWriter) -> None:
        self.writer = writer
        self.documents: list[np.ndarray] = []
        self.files: list[str] = []
        self.tokens = self.blocks = self.number = 0

    def add(self, documents: list[np.ndarray], number: int, file: str) -> None:
        """Appends documents of a unit; the first unit names the block."""
        if not documents:
            return
        if not self.documents:
            self.number = number
        if file not in self.files[-1:]:
            self.files.append(file)
        self.documents += documents
        self.tokens += sum(map(len, documents))
        if self.tokens >= _BLOCK_TOKENS:
            self.flush()

    def flush(self) -> None:
        """Writes what is there, if anything."""
        if self.documents:
            key = f"text-{self.number:08d}-{self.blocks:04d}"
            self.writer.write_block(key, self.documents, {"files": self.files})
            self.documents, self.files, self.tokens, self.blocks = [], [], 0, self.blocks + 1


def _texts(composer: Composer, config: EncodeConfig, item: Item) -> Iterator[np.ndarray]:
    """Documents int64 [n] of a text or of its ids."""
    limit = config.max_tokens - 2
    if isinstance(item.content, np.ndarray):
        ids, most = item.content, composer.tokenizer.vocab_size
        if ids.size and (ids.min() < 0 or ids.max() >= most):
            raise DataError(
                f"{item.name}: ids {ids.min()}..{ids.max()}, but the tokenizer has {most}: give the tokenizer that "
                "they were made with"
            )
        yield from (composer.document([("text", ids[i : i + limit])]) for i in range(0, len(ids), limit))
        return
    try:
        for piece, codes in cut_text(str(item.content), limit, composer.tokenizer.encode):
            if piece.strip():
                yield composer.document([("text", codes)])
    except DataError as error:
        raise DataError(f"{item.name}: {error}") from error


def _samples(composer: Composer, config: EncodeConfig, item: Item, key: str) -> Iterator[Sample]:
    """What a file holds and its caption, in the one order or the other: one document, or several of a long file."""
    modality, data = item.modality, item.content
    assert isinstance(data, bytes)
    if modality not in composer.codecs:
        raise DataError(f"{item.name}: there is no codec for {modality}; use --like a data set that has one")
    local = composer.local_codes("text", item.caption)
    room = config.max_tokens - 4 - len(local)
    for number, (content, column) in enumerate(_contents(composer, config, item, room)):
        if len(content) > room:
            raise DataError(
                f"{item.name}: {len(content)} codes of {modality} and a caption of {len(local)} tokens need "
                f"{len(content) + len(local) + 4} tokens, --max-tokens is {config.max_tokens}"
            )
        spans: list[Span] = [(modality, content)]
        lengths = [(modality, len(content) + 2)]
        kind = modality
        if item.caption:
            spans.append(("text", local))
            lengths.append(("text", len(local)))
            kind = f"{modality}-caption"
            if zlib.crc32(item.name.encode()) & 1:
                spans.reverse()
                lengths.reverse()
                kind = f"caption-{modality}"
        yield Sample(
            key=f"{modality}-{key}" + (f"-{number:06d}" if modality in _LONG else ""),
            kind=kind,
            tokens=composer.document(spans),
            spans=lengths,
            text=item.caption or None,
            png=picture_as_png(data, item.name) if config.originals and modality == "image" else None,
            wav=_as_wav(composer, config, item) if config.originals and modality == "voice" else None,
            meta={"file": item.name, **({"column": column} if column else {})},
            latents=composer.latents(spans),
        )


def _contents(composer: Composer, config: EncodeConfig, item: Item, room: int) -> Iterator[tuple[np.ndarray, str]]:
    """(codes int64 [n] or latents float [n, width], name of the column or "") of every document of a file."""
    modality, data, name = item.modality, item.content, item.name
    codec = composer.codecs[modality]
    assert isinstance(data, bytes)
    if modality in _LONG and room < 1:
        raise DataError(f"{name}: its caption leaves no room for {modality} in {config.max_tokens} tokens")
    if modality == "image":
        shape = getattr(codec, "image_shape", (config.image_side, config.image_side))
        yield codec.encode(read_picture(data, name, shape, channels=getattr(codec, "channels", 1))), ""
    elif modality == "voice":
        yield codec.encode(read_sound(data, name, _rate(composer, config))), ""
    elif modality == "latent":
        try:
            yield codec.encode(read_latents(data, name)), ""
        except DataError as error:
            raise DataError(f"{name}: {error}") from error
    else:
        columns = {"": np.frombuffer(data, np.uint8)} if modality == "bytes" else read_series(data, name)
        for column, values in columns.items():
            codes = codec.encode(values)
            yield from ((codes[i : i + room], column) for i in range(0, len(codes), room))


def _rate(composer: Composer, config: EncodeConfig) -> int:
    return int(getattr(composer.codecs["voice"], "rate", config.rate))


def _as_wav(composer: Composer, config: EncodeConfig, item: Item) -> bytes:
    """The file where it is a .wav, else what was encoded, as one."""
    assert isinstance(item.content, bytes)
    if item.name.lower().endswith(".wav"):
        return item.content
    rate = _rate(composer, config)
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(read_sound(item.content, item.name, rate).astype("<i2").tobytes())
    return buffer.getvalue()
