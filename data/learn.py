"""Tokenizer and codecs learnt from a source folder, where none are given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

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
from .compose import Composer
from .errors import DataError
from .media import read_latents, read_picture, read_series, read_sound
from .sources import MEGATRON, TAR, Item, ending
from .tasks import EncodeConfig, Task, Unit, unit_items
from .tokenizer import TextTokenizer
from .vocabulary import Vocabulary

_TEXT_BYTES, _PICTURES, _SOUNDS, _TARS = 16 << 20, 4096, 1024, 16


def learn_meaning(source: Path, config: EncodeConfig, tasks: Sequence[Task], folder: Path) -> Composer:
    """What the first training files teach; every worker learns the same.

    Args:
        folder: a tokenizer that lies there already is taken.

    Raises:
        DataError: Megatron's ids without their tokenizer, no text, or too little of a modality for a codec.
    """
    examples = _Examples(source, config)
    for task in tasks:
        for unit in task.units:
            if ending(unit.file) == MEGATRON and config.modality(unit.file) == "text":
                raise DataError(f"{source / unit.file} holds ids of some tokenizer: name it with --tokenizer or --like")
            if task.split == "train":
                examples.add(unit)
    if (folder / TextTokenizer.file).exists():
        tokenizer = TextTokenizer.load(folder / TextTokenizer.file)
    else:
        if not any(line.strip() for line in examples.lines):
            raise DataError(
                f"{source} holds no text to train a tokenizer on: use another data set's with --like, or add captions "
                "(NAME.txt beside NAME.png)"
            )
        tokenizer = TextTokenizer.train(examples.lines, config.text_vocab)
    codecs = examples.codecs()
    sizes = (tokenizer.vocab_size, *(codec.vocab_size for codec in codecs.values()))
    return Composer(Vocabulary(("text", *codecs), sizes), tokenizer, codecs)


class _Examples:
    """The first documents of each modality, already in the form that its codec is trained on."""

    def __init__(self, source: Path, config: EncodeConfig) -> None:
        self.source, self.config = source, config
        self.lines: list[str] = []
        self._text_bytes = self._tars = 0
        self._files: dict[str, list[np.ndarray]] = {}

    def add(self, unit: Unit) -> None:
        """Takes of a unit what is still wanted; it is not opened where nothing is."""
        tar = ending(unit.file) == TAR and self.config.modality(unit.file) == "text"
        if tar and self._tars >= _TARS:
            return
        self._tars += tar
        if not (tar or self._wants(self.config.modality(unit.file))):
            return
        for item in unit_items(self.source, self.config, unit, "train"):
            try:
                if isinstance(item, DataError):
                    raise item
                self._add(item)
            except DataError:
                if not self.config.skip_bad:
                    raise
            if not (tar or self._wants(self.config.modality(unit.file))):
                break

    def _wants(self, modality: str) -> bool:
        found = len(self._files.get(modality, []))
        if modality == "text":
            return self._text_bytes <= _TEXT_BYTES
        if modality == "series":  # its range is that of all files
            return self.config.series_range is None or not found
        if modality == "image":
            return found < (1 if self.config.image_model else _PICTURES)
        return found < (1 if modality != "voice" or self.config.voice_model else _SOUNDS)

    def _add(self, item: Item) -> None:
        config, data = self.config, item.content
        text = item.caption or (data if isinstance(data, str) else "")
        if text and self._wants("text"):
            self.lines += text.split("\n")
            self._text_bytes += len(text)
        if not isinstance(data, bytes) or not self._wants(item.modality):
            return
        files = self._files.setdefault(item.modality, [])
        if item.modality == "image":
            files.append(read_picture(data, item.name, (config.image_side, config.image_side), channels=3))
        elif item.modality == "voice":
            files.append(np.zeros(0) if config.voice_model else read_sound(data, item.name, config.rate))
        elif item.modality == "series":
            files += read_series(data, item.name).values()
        else:
            files.append(read_latents(data, item.name)[:1] if item.modality == "latent" else np.zeros(0))

    def codecs(self) -> dict[str, Codec]:
        """A codec for every modality that was found, in bank order."""
        config, files = self.config, self._files
        codecs: dict[str, Codec] = {}
        side = (config.image_side, config.image_side)
        if "image" in files and config.image_model:
            codecs["image"] = open_picture_model(config.image_model, image_shape=side, dtype=config.latent_dtype)
        elif "image" in files:
            images = np.stack(files["image"])
            grey = bool((images == images[..., :1]).all())
            codecs["image"] = PatchKMeans.train(
                images[..., 0] if grey else images, patch=config.patch, n_codes=config.image_codes
            )
        if "voice" in files and config.voice_model:
            codecs["voice"] = HubSpeech.open(config.voice_model, n_q=config.voice_quantisers)
        elif "voice" in files:
            codecs["voice"] = LogMelKMeans.train(
                files["voice"], rate=config.rate, hop=config.hop, n_codes=config.voice_codes
            )
        if "bytes" in files:
            codecs["bytes"] = ByteCodec()
        if "series" in files and config.series_range:
            low, high = config.series_range
            codecs["series"] = SeriesCodec(low=low, high=high, bins=config.series_bins, law=config.series_law)
        elif "series" in files:
            codecs["series"] = SeriesCodec.train(files["series"], bins=config.series_bins, law=config.series_law)
        if "latent" in files:
            codecs["latent"] = GivenLatents(width=files["latent"][0].shape[1], dtype=config.latent_dtype)
        return codecs
