"""Documents and prompts: text, images and voice as one sequence of unified tokens, and back."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .errors import DataError
from .vocabulary import Vocabulary

if TYPE_CHECKING:
    from .codecs import Codec
    from .tokenizer import Tokenizer

Content = str | Sequence[int] | np.ndarray
Span = tuple[str, Content]


@dataclass(frozen=True)
class Composer:
    """Builds token sequences of a data set's vocabulary.

    A document is `bos, spans…, eos`; a span of modality k >= 1 stands between its begin and end tokens, text stands
    bare. The content of a span is a `str` (text), local codes (a list, or an int32/int64 array [n]), or what the
    modality's codec takes: uint8 [height, width] for images, int16 or float [n] for voice. Of a continuous modality the
    content is its latents, float [n, width], or what its codec takes; the tokens then are n slots, and `latents` gives
    the vectors.
    """

    vocabulary: Vocabulary
    tokenizer: Tokenizer
    codecs: Mapping[str, Codec]

    def span(self, modality: str, content: Content) -> np.ndarray:
        """Unified tokens int64 [n] of one span, with its begin and end tokens; DataError for unusable content."""
        local = self.local_codes(modality, content)
        ids = self.vocabulary.to_unified(modality, local)
        if modality == "text":
            return ids
        return np.concatenate(([self.vocabulary.begin(modality)], ids, [self.vocabulary.end(modality)]))

    def local_codes(self, modality: str, content: Content) -> np.ndarray:
        """Local codes int64 [n] of a span's content; DataError for unusable content."""
        self.vocabulary.modality_id(modality)
        if isinstance(content, str):
            if modality != "text":
                raise DataError(f"{modality} spans take codes or an array, not a string")
            return np.array(self.tokenizer.encode(content), dtype=np.int64)
        is_codes = not isinstance(content, np.ndarray) or (content.ndim == 1 and content.dtype in (np.int32, np.int64))
        if is_codes:
            return np.asarray(content, dtype=np.int64).reshape(-1)
        if modality not in self.codecs:
            raise DataError(f"no codec for {modality} here; give its codes, or a modality among {list(self.codecs)}")
        if self.is_continuous(modality):
            return np.zeros(len(self.vectors(modality, content)), dtype=np.int64)
        return self.codecs[modality].encode(np.asarray(content))

    def is_continuous(self, modality: str) -> bool:
        """Whether spans of `modality` are latents in slots."""
        return modality in self.codecs and self.codecs[modality].kind == "continuous"

    def vectors(self, modality: str, content: Content) -> np.ndarray:
        """Latents float [n, width] of a span of a continuous modality: as they are given, or encoded."""
        array = np.asarray(content)
        given = array.ndim == 2 and np.issubdtype(array.dtype, np.floating)
        return array if given else self.codecs[modality].encode(array)

    def latents(self, spans: Sequence[Span]) -> np.ndarray | None:
        """The latents float [n, width] of all spans, in the order of their slots; None without any."""
        found = [self.vectors(modality, content) for modality, content in spans if self.is_continuous(modality)]
        return np.concatenate(found) if found else None

    def document(self, spans: Sequence[Span]) -> np.ndarray:
        """int64 [n]: bos, the spans, eos."""
        return np.concatenate((self.prompt(spans), [Vocabulary.EOS]))

    def prompt(self, spans: Sequence[Span], open: str | None = None) -> np.ndarray:
        """int64 [n]: bos, the spans, and the begin token of modality `open` if the model is to go on with one."""
        parts = [np.array([Vocabulary.BOS], dtype=np.int64)]
        parts += [self.span(modality, content) for modality, content in spans]
        if open is not None and open != "text":
            parts.append(np.array([self.vocabulary.begin(open)], dtype=np.int64))
        return np.concatenate(parts)

    def spans(self, tokens: Sequence[int] | np.ndarray) -> list[tuple[str, np.ndarray]]:
        """The inverse of `document`, as far as tokens are well formed: (modality, local codes int64 [n]) per span.

        Specials are dropped, reading stops at eos, and a span ends where the modality changes: also a sequence that a
        half-trained model generated can be read.
        """
        array = np.asarray(tokens, dtype=np.int64).reshape(-1)
        array = array[: np.argmax(array == Vocabulary.EOS)] if (array == Vocabulary.EOS).any() else array
        outside = array[(array < 0) | (array >= self.vocabulary.size)]
        if outside.size:
            raise DataError(f"token {outside[0]} is outside 0..{self.vocabulary.size - 1}")
        starts = np.array([self.vocabulary.range_of(modality).start for modality in self.vocabulary.modalities])
        owner = np.searchsorted(starts, array, side="right") - 1
        owner[array >= self.vocabulary.used] = -1
        begins = np.flatnonzero(np.diff(owner, prepend=-1))
        return [
            (self.vocabulary.modalities[owner[begin]], array[begin:end] - starts[owner[begin]])
            for begin, end in itertools.pairwise([*begins.tolist(), len(array)])
            if owner[begin] >= 0
        ]

    def decode(
        self, tokens: Sequence[int] | np.ndarray, latents: np.ndarray | None = None
    ) -> list[tuple[str, str | np.ndarray]]:
        """(modality, content) per span: text as `str`, others through their codec.

        Args:
            tokens: of a document.
            latents: float [n, width], one per slot; without them slots are returned as codes.

        Raises:
            DataError: a span that its codec cannot decode, e.g. an image with the wrong number of codes, or another
                number of latents than slots.
        """
        decoded: list[tuple[str, str | np.ndarray]] = []
        used = 0
        for modality, codes in self.spans(tokens):
            if modality == "text":
                decoded.append((modality, self.tokenizer.decode(codes.tolist())))
            elif self.is_continuous(modality) and latents is not None:
                vectors = latents[used : used + len(codes)]
                used += len(codes)
                if len(vectors) != len(codes):
                    raise DataError(f"{used} slots or more, but {len(latents)} latents")
                decoded.append((modality, self.codecs[modality].decode(vectors)))
            elif modality in self.codecs and not self.is_continuous(modality):
                decoded.append((modality, self.codecs[modality].decode(codes)))
            else:
                decoded.append((modality, codes))
        if latents is not None and used != len(latents):
            raise DataError(f"{used} slots, but {len(latents)} latents")
        return decoded
