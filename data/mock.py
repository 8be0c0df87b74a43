"""Random documents in the shape of a data set: for benchmarks and dry runs, never for learning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .errors import DataError
from .vocabulary import N_SPECIALS, Vocabulary

PATH = "mock"


@dataclass(frozen=True)
class MockSplit:
    """Attributes: see `dataset.Split`; tokens are drawn when they are asked for."""

    vocabulary: Vocabulary
    lengths: np.ndarray
    modality_lengths: np.ndarray
    latent_rows: None = None

    def __len__(self) -> int:
        return len(self.lengths)

    def latents(self, sample: int) -> None:
        """There are none."""

    def where(self, sample: int) -> str:
        """For messages."""
        return f"mock sample {sample}"

    def tokens(self, sample: int) -> np.ndarray:
        """int64 [length]: bos, a run of each modality, eos."""
        rng = np.random.default_rng([7, sample])
        runs = [[Vocabulary.BOS]]
        for modality, count in zip(self.vocabulary.modalities, self.modality_lengths[sample].tolist(), strict=True):
            ids = self.vocabulary.range_of(modality)
            # bos and eos count as text
            runs.append(rng.integers(ids.start, ids.stop, count - 2 if modality == "text" else count).tolist())
        return np.array([token for run in [*runs, [Vocabulary.EOS]] for token in run], dtype=np.int64)


class MockDataset:
    """An endless supply of random documents over any vocabulary.

    Args:
        modalities: names in bank order, text first.
        vocab_size: used ids, specials included; shared out evenly.
        max_length: longest document in tokens.

    Raises:
        DataError: a vocabulary too small for the specials and one id per modality.
    """

    def __init__(self, modalities: Sequence[str], vocab_size: int, max_length: int) -> None:
        count = len(modalities)
        share = (vocab_size - N_SPECIALS) // count
        shortest = 2 + 2 * count
        if share < 1 or max_length < shortest:
            raise DataError(
                f"mock data: {count} modalities need a vocabulary of at least {N_SPECIALS + count} ids and rows of at "
                f"least {shortest} tokens, got {vocab_size} ids and {max_length} tokens"
            )
        sizes = (vocab_size - N_SPECIALS - share * (count - 1), *[share] * (count - 1))
        self.vocabulary = Vocabulary(tuple(modalities), sizes)
        self.latent_format = None
        self.identity = f"mock-{count}-{vocab_size}-{max_length}"
        lengths = np.random.default_rng(5).integers(shortest, max_length + 1, 4096)
        modality_lengths = np.zeros((len(lengths), count), dtype=np.int64)
        modality_lengths[:] = ((lengths - 2) // count)[:, None]
        modality_lengths[:, 0] += lengths - modality_lengths.sum(axis=1)
        self._split = MockSplit(self.vocabulary, lengths.astype(np.int64), modality_lengths)

    def split(self, name: str) -> MockSplit:
        return self._split
