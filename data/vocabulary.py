"""One token table for all modalities: 32 specials, then one contiguous range per modality, padded.

The modality of a token is a range lookup, so a model's export needs no per-token table of its own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .errors import DataError
from .files import fingerprint

N_SPECIALS = 32
MAX_MODALITIES = 1 + (N_SPECIALS - 4) // 2


@dataclass(frozen=True)
class Vocabulary:
    """The unified vocabulary.

    Args:
        modalities: names in bank order; `modalities[0]` must be "text".
        sizes: number of local codes of each modality, in the same order.
        vocab_multiple: `size` is the used table rounded up to this multiple (pad logits are the model's business).

    Raises:
        DataError: no text first, names repeated, a size below 1, or more than 15 modalities.
    """

    modalities: tuple[str, ...]
    sizes: tuple[int, ...]
    vocab_multiple: int = 1024

    PAD: ClassVar[int] = 0
    BOS: ClassVar[int] = 1
    EOS: ClassVar[int] = 2
    UNK: ClassVar[int] = 3

    def __post_init__(self) -> None:
        if not self.modalities or self.modalities[0] != "text":
            raise DataError(f"modality 0 must be 'text', got {list(self.modalities)}")
        if len(set(self.modalities)) != len(self.modalities):
            raise DataError(f"modality names must differ, got {list(self.modalities)}")
        if len(self.modalities) > MAX_MODALITIES:
            raise DataError(f"{len(self.modalities)} modalities, but the 32 specials have room for {MAX_MODALITIES}")
        if len(self.sizes) != len(self.modalities) or any(size < 1 for size in self.sizes):
            raise DataError(f"one size >= 1 per modality {list(self.modalities)} is needed, got {list(self.sizes)}")
        if self.vocab_multiple < 1:
            raise DataError(f"vocab_multiple must be >= 1, got {self.vocab_multiple}")

    @property
    def used(self) -> int:
        """Number of ids that mean something: specials and all ranges, without the padding."""
        return N_SPECIALS + sum(self.sizes)

    @property
    def size(self) -> int:
        """Number of ids of the padded table: the first dimension of an embedding."""
        return -(-self.used // self.vocab_multiple) * self.vocab_multiple

    def modality_id(self, modality: str) -> int:
        """Position of `modality` in the bank order; DataError when it is unknown."""
        if modality not in self.modalities:
            raise DataError(f"unknown modality {modality!r}; this vocabulary has {', '.join(self.modalities)}")
        return self.modalities.index(modality)

    def range_of(self, modality: str) -> range:
        """The unified ids of the modality's own codes (its begin and end tokens lie among the specials)."""
        k = self.modality_id(modality)
        start = N_SPECIALS + sum(self.sizes[:k])
        return range(start, start + self.sizes[k])

    def begin(self, modality: str) -> int:
        """The token that opens a span of `modality`; text has none (DataError)."""
        k = self.modality_id(modality)
        if k == 0:
            raise DataError("text spans have no begin or end token")
        return 4 + 2 * (k - 1)

    def end(self, modality: str) -> int:
        """The token that closes a span of `modality`; text has none (DataError)."""
        return self.begin(modality) + 1

    def to_unified(self, modality: str, local: Sequence[int] | np.ndarray) -> np.ndarray:
        """Local codes [n] of one modality as unified ids int64 [n]; DataError for a code outside its range."""
        ids = self.range_of(modality)
        codes = np.asarray(local, dtype=np.int64).reshape(-1)
        if codes.size and (codes.min() < 0 or codes.max() >= len(ids)):
            raise DataError(f"{modality} codes must lie in 0..{len(ids) - 1}, got {codes.min()}..{codes.max()}")
        return codes + ids.start

    def modality_table(self) -> np.ndarray:
        """int64 [size]: token id -> modality id.

        Begin and end tokens take their span's modality; other specials and the padding take text (0).
        """
        table = np.zeros(self.size, dtype=np.int64)
        for k, modality in enumerate(self.modalities):
            ids = self.range_of(modality)
            table[ids.start : ids.stop] = k
            if k:
                table[[self.begin(modality), self.end(modality)]] = k
        return table

    def to_json(self) -> dict[str, Any]:
        """A JSON-able description, the argument of `from_json`."""
        return {
            "modalities": list(self.modalities),
            "sizes": list(self.sizes),
            "specials": N_SPECIALS,
            "vocab_multiple": self.vocab_multiple,
        }

    @classmethod
    def from_json(cls, description: dict[str, Any]) -> Vocabulary:
        """The vocabulary of `to_json`; DataError when a field is missing or the specials are not ours."""
        try:
            if description["specials"] != N_SPECIALS:
                raise DataError(f"vocabulary with {description['specials']} specials; this version reads {N_SPECIALS}")
            return cls(
                tuple(str(name) for name in description["modalities"]),
                tuple(int(size) for size in description["sizes"]),
                int(description["vocab_multiple"]),
            )
        except (KeyError, TypeError) as error:
            raise DataError(f"not a vocabulary description (field {error} is missing or malformed)") from error

    @property
    def fingerprint(self) -> str:
        """32 hexadecimal digits that change with any field."""
        return fingerprint(b"vocabulary-1", json.dumps(self.to_json(), sort_keys=True).encode())
