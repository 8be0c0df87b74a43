"""The quickstart data set: real prose, real handwritten digits and a synthetic voice, built without a network.

Text is the English prose of Python's own manual (`pydoc_data.topics`), images are scikit-learn's 1,797 handwritten
digits, and every digit is also said by the synthetic voice. Each digit gives documents in four directions:
image -> caption, caption -> image, caption -> voice, voice -> caption.
"""

from __future__ import annotations

import io
import re
import sys
import tempfile
import wave
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .codecs import LogMelKMeans, PatchKMeans
from .compose import Composer, Span
from .dataset import Dataset
from .errors import DataError
from .folders import check_target, install
from .index import ShardIndex
from .manifest import codec_file, fingerprints, write_manifest
from .shards import Sample, ShardWriter
from .tokenizer import TextTokenizer
from .vocabulary import Vocabulary
from .voice import RATE, synthesise_all

GENERATOR_VERSION = 1
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# The first template is the one that evaluations compare the ten names in.
CAPTION_TEMPLATES = (
    "the digit {}",
    "a handwritten {}",
    "an image of {}",
    "this is a {}",
    "someone wrote {}",
    "handwritten digit {}",
    "the number {} by hand",
    "a small {} in ink",
)
VOICE_TEMPLATES = ("the spoken word {}", "a voice says {}", "someone says {}", "you hear {}", "spoken {}", "say {}")
KINDS = ("text", "image-caption", "caption-image", "caption-voice", "voice-caption")


@dataclass(frozen=True)
class QuickstartConfig:
    """What the quickstart data set depends on, besides the sources themselves.

    Attributes:
        seed: splits, speakers, captions and codecs all follow from it.
        text_vocab, image_codes, voice_codes: sizes of the three ranges of the vocabulary.
        max_document: longest text document in tokens, bos and eos included; longer prose is cut between words.
        heldout: share of digits (per class) and of prose sections that goes to split "heldout".
        image_repeats: documents per training digit and direction for images, each with another caption.
        voice_repeats: the same for the voice.
    """

    seed: int = 0
    text_vocab: int = 640
    image_codes: int = 128
    voice_codes: int = 128
    max_document: int = 240
    heldout: float = 0.1
    image_repeats: int = 3
    voice_repeats: int = 1

    def __post_init__(self) -> None:
        if not 0.0 < self.heldout < 0.5:
            raise DataError(f"heldout must lie between 0 and 0.5, got {self.heldout}")
        if self.max_document < 16:
            raise DataError(f"max_document must be at least 16 tokens, got {self.max_document}")
        for name, limit in (("image_repeats", len(CAPTION_TEMPLATES)), ("voice_repeats", len(VOICE_TEMPLATES))):
            if not 1 <= getattr(self, name) <= limit:
                raise DataError(f"{name} must lie in 1..{limit} (the number of captions), got {getattr(self, name)}")


def build_quickstart(
    out: str | Path,
    *,
    seed: int = 0,
    force: bool = False,
    config: QuickstartConfig | None = None,
    progress: Callable[[str], None] | None = None,
) -> Dataset:
    """Builds the quickstart data set into `out`, or opens the identical one that is there already.

    All is made in a folder beside `out` and renamed at the end: `out` never holds half a data set.

    Args:
        out: folder to make; its parents are made too.
        seed: shorthand for `config=QuickstartConfig(seed=seed)`.
        force: replace another data set that lies there.
        config: all settings; its seed then counts.
        progress: called with one line per stage.

    Raises:
        DataError: `out` holds something else, Python's manual or scikit-learn is missing, or the settings cannot be.
    """
    settings = config or QuickstartConfig(seed=seed)
    generator = {"name": "quickstart", "version": GENERATOR_VERSION, **asdict(settings)}
    target = Path(out)
    say = progress or (lambda line: None)
    if check_target(target, generator, force=force):
        say(f"{target} is up to date")
        return Dataset.open(target)
    say("reading sources")
    sections = prose_sections()
    images, digits = load_digits()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.part-", dir=target.parent) as scratch:
        folder = Path(scratch) / target.name
        folder.mkdir()
        _build(folder, settings, generator, sections, images, digits, say)
        install(folder, target, force=force)
    return Dataset.open(target)


def prose_sections() -> list[tuple[str, str]]:
    """(topic, text) of about 1,500 characters each: the manual's prose paragraphs, every one only once.

    Topics repeat each other's paragraphs; without removing the repeats, held-out text would not be held out.

    Raises:
        DataError: this Python comes without its manual.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            "this Python lacks pydoc_data.topics, the quickstart's text; install the full standard library "
            "(e.g. libpython3-stdlib) or use python.org's, conda's or uv's Python"
        ) from error
    seen: set[str] = set()
    sections: list[tuple[str, str]] = []
    for topic in sorted(topics):
        current: list[str] = []
        for block in re.split(r"\n\s*\n", topics[topic]):
            paragraph = " ".join(block.split())
            if paragraph in seen or not _is_prose(paragraph):
                continue
            seen.add(paragraph)
            current.append(paragraph)
            if sum(map(len, current)) > 1500:
                sections.append((topic, "\n".join(current)))
                current = []
        if current:
            sections.append((topic, "\n".join(current)))
    return sections


def _is_prose(paragraph: str) -> bool:
    """Whether a paragraph reads as sentences: no code, tables, grammar or headings."""
    words = paragraph.split(" ")
    plain = sum(bool(re.fullmatch(r"[\"(*]*[A-Za-z][A-Za-z'-]*[\")*,.:;]*", word)) for word in words)
    marks = ("::=", ">>>", "+--", "***", "===", "---", " | ", "~~~")
    return (
        len(words) >= 8
        and plain >= 0.75 * len(words)
        and paragraph[-1] in ".:;)"
        and not any(mark in paragraph for mark in marks)
    )


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's handwritten digits: images uint8 [1797, 8, 8] (0 paper, 255 ink), digits int64 [1797].

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise DataError("the quickstart's digits come with scikit-learn: pip install polylepis[quickstart]") from error
    bunch = datasets.load_digits()
    return np.rint(bunch.images * (255.0 / 16.0)).astype(np.uint8), bunch.target.astype(np.int64)


def heldout_mask(labels: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """bool [n]: a random `share` of every class of `labels` [n], rounded, at least one each."""
    mask = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        mask[rng.permutation(members)[: max(1, round(share * len(members)))]] = True
    return mask


def split_text(tokenizer: TextTokenizer, text: str, limit: int) -> list[list[int]]:
    """Local ids of `text` in pieces of at most `limit` tokens, cut before a word where one begins; nothing is lost."""
    ids = tokenizer.encode(text)
    pieces: list[list[int]] = []
    while len(ids) > limit:
        cut = next((i for i in range(limit, limit // 2, -1) if tokenizer.starts_word(ids[i])), limit)
        pieces.append(ids[:cut])
        ids = ids[cut:]
    return [*pieces, ids]


def _build(
    folder: Path,
    settings: QuickstartConfig,
    generator: dict[str, Any],
    sections: list[tuple[str, str]],
    images: np.ndarray,
    digits: np.ndarray,
    say: Callable[[str], None],
) -> None:
    """Fills an empty folder; the manifest comes last."""
    seed = settings.seed
    held_digit = heldout_mask(digits, settings.heldout, np.random.default_rng([seed, 1]))
    held_text = heldout_mask(np.zeros(len(sections)), settings.heldout, np.random.default_rng([seed, 2]))
    say("speaking (synthetic voice)")
    words = [DIGIT_NAMES[d] for d in digits]
    waves = synthesise_all(words, [[seed, 3, i] for i in range(len(words))])
    say("training tokenizer and codecs (train split only)")
    kept = np.flatnonzero(~held_digit)
    captions = [t.format(n) for t in (*CAPTION_TEMPLATES, *VOICE_TEMPLATES) for n in DIGIT_NAMES]
    prose = [line for (_, text), held in zip(sections, held_text, strict=True) if not held for line in text.split("\n")]
    # Captions are short: repeating them makes the digits' names whole pieces.
    tokenizer = TextTokenizer.train([*prose, *captions * 20], settings.text_vocab)
    image = PatchKMeans.train(images[kept], n_codes=settings.image_codes, seed=seed)
    # A sixth of the utterances already holds every speaker and word.
    voice = LogMelKMeans.train([waves[i] for i in kept[::6]], rate=RATE, n_codes=settings.voice_codes, seed=seed)
    vocabulary = Vocabulary(("text", "image", "voice"), (tokenizer.vocab_size, image.vocab_size, voice.vocab_size))
    composer = Composer(vocabulary, tokenizer, {"image": image, "voice": voice})
    tokenizer.save(folder / tokenizer.file)
    image.save(folder / codec_file("image"))
    voice.save(folder / codec_file("voice"))
    marks = fingerprints(vocabulary, tokenizer, composer.codecs)
    indices: dict[str, list[ShardIndex]] = {}
    for split, held in (("train", False), ("heldout", True)):
        say(f"writing split {split}")
        samples = [
            *_text_samples(composer, tokenizer, settings, sections, np.flatnonzero(held_text == held)),
            *_digit_samples(composer, settings, images, digits, waves, np.flatnonzero(held_digit == held), held),
        ]
        # Shuffled once, so that also a reader that streams the tars in order meets all kinds.
        order = np.random.default_rng([seed, 4, int(held)]).permutation(len(samples))
        with ShardWriter(folder, split, vocabulary, marks) as writer:
            for i in order:
                writer.write(samples[i])
        indices[split] = writer.indices
    write_manifest(
        folder,
        name="quickstart",
        generator=generator,
        provenance=_provenance(),
        composer=composer,
        splits=indices,
    )


def _text_samples(
    composer: Composer,
    tokenizer: TextTokenizer,
    settings: QuickstartConfig,
    sections: list[tuple[str, str]],
    chosen: np.ndarray,
) -> Iterator[Sample]:
    for i in chosen:
        topic, text = sections[i]
        for n, piece in enumerate(split_text(tokenizer, text, settings.max_document - 2)):
            yield Sample(
                key=f"text-{i:04d}-{n}",
                kind="text",
                tokens=composer.document([("text", piece)]),
                spans=[("text", len(piece))],
                text=tokenizer.decode(piece),
                meta={"topic": topic},
            )


def _digit_samples(
    composer: Composer,
    settings: QuickstartConfig,
    images: np.ndarray,
    digits: np.ndarray,
    waves: Sequence[np.ndarray],
    chosen: np.ndarray,
    heldout: bool,
) -> Iterator[Sample]:
    """The documents of the chosen digits; held-out digits get one per direction, with the first template."""
    for i in chosen:
        name = DIGIT_NAMES[digits[i]]
        media: dict[str, tuple[np.ndarray, bytes]] = {
            "image": (composer.codecs["image"].encode(images[i]), _png(images[i])),
            "voice": (composer.codecs["voice"].encode(waves[i]), _wav(waves[i])),
        }
        rng = np.random.default_rng([settings.seed, 5, int(i)])
        plan = [
            (modality, caption_first, template)
            for modality, templates, repeats in (
                ("image", CAPTION_TEMPLATES, settings.image_repeats),
                ("voice", VOICE_TEMPLATES, settings.voice_repeats),
            )
            for caption_first in (False, True)
            for template in ([0] if heldout else rng.permutation(len(templates))[:repeats].tolist())
        ]
        for modality, caption_first, template in plan:
            caption = (CAPTION_TEMPLATES if modality == "image" else VOICE_TEMPLATES)[template].format(name)
            codes, payload = media[modality]
            text = composer.local_codes("text", caption)
            spans: list[Span] = [(modality, codes), ("text", text)]
            lengths = [(modality, len(codes) + 2), ("text", len(text))]
            kind = f"{modality}-caption"
            if caption_first:
                spans.reverse()
                lengths.reverse()
                kind = f"caption-{modality}"
            yield Sample(
                key=f"digit-{i:04d}-{kind}-{template}",
                kind=kind,
                tokens=composer.document(spans),
                spans=lengths,
                text=caption,
                png=payload if modality == "image" else None,
                wav=payload if modality == "voice" else None,
                meta={"digit": int(digits[i]), "caption": caption},
            )


def _png(image: np.ndarray) -> bytes:
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError("writing images needs Pillow: pip install polylepis[quickstart]") from error
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def _wav(samples: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(samples.astype("<i2").tobytes())
    return buffer.getvalue()


def _provenance() -> dict[str, Any]:
    from importlib.metadata import version

    return {
        "text": "prose of pydoc_data.topics, the manual inside CPython; licence PSF-2.0",
        "image": "Optical Recognition of Handwritten Digits (Alpaydin & Kaynak, UCI, CC BY 4.0), as shipped by "
        "scikit-learn (BSD-3-Clause); stored as 8x8 PNG",
        "voice": "synthetic voice: polylepis.data.voice, a formant synthesiser; not recorded speech",
        "versions": {"python": sys.version.split()[0], "scikit-learn": version("scikit-learn")},
    }
