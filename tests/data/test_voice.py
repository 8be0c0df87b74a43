from __future__ import annotations

import numpy as np
import pytest

from polylepis.data.corpus import DIGIT_NAMES
from polylepis.data.dataset import Dataset
from polylepis.data.errors import DataError
from polylepis.data.voice import RATE, WORDS, synthesise, synthesise_all


def test_the_same_seed_says_the_same_alone_and_in_company() -> None:
    words = [*WORDS, "seven"]
    together = synthesise_all(words, [[1, i] for i in range(11)])
    for i, word in enumerate(words):
        assert np.array_equal(together[i], synthesise(word, [1, i]))
    assert not np.array_equal(together[7], together[10])


def test_utterances_are_short_loud_and_clean() -> None:
    waves = synthesise_all([DIGIT_NAMES[i % 10] for i in range(100)], list(range(100)))
    for wave in waves:
        assert wave.dtype == np.int16 and 0.25 * RATE < len(wave) < 0.75 * RATE
        assert 10_000 < np.abs(wave.astype(int)).max() < 32_000
        # Silence before and after, no constant offset.
        assert np.abs(wave[:80].astype(int)).max() < 3000
        assert abs(wave.mean()) < 500


def test_formants_are_where_the_phonemes_say() -> None:
    """Spectral peaks of the vowel in "three": energy near 280 and 2250-2950 Hz, little at 1000-1600 Hz."""
    for seed in range(5):
        wave = synthesise("three", seed).astype(float)
        part = wave[len(wave) // 2 : len(wave) // 2 + 1024] * np.hanning(1024)
        power = np.abs(np.fft.rfft(part)) ** 2
        hertz = np.fft.rfftfreq(1024, 1 / RATE)
        low, middle, high = (
            power[(hertz > a) & (hertz < b)].mean() for a, b in ((150, 450), (1000, 1600), (2000, 3300))
        )
        assert low > 30 * middle and high > 2 * middle


def test_ten_words_are_told_apart_from_their_codes(dataset: Dataset) -> None:
    """Nearest centroid of code histograms, on speakers of held-out seeds; chance is 0.10."""
    encode = dataset.codecs["voice"].encode
    labels = np.arange(400) % 10
    waves = synthesise_all([DIGIT_NAMES[d] for d in labels], [[77, i] for i in range(400)])
    histograms = np.sqrt([np.bincount(encode(wave), minlength=128) for wave in waves])
    centroids = np.array([histograms[:300][labels[:300] == d].mean(axis=0) for d in range(10)])
    guesses = ((histograms[300:, None] - centroids) ** 2).sum(axis=-1).argmin(axis=1)
    assert (guesses == labels[300:]).mean() > 0.9


def test_refusals() -> None:
    with pytest.raises(DataError, match="cannot say eleven; it says zero, one"):
        synthesise("eleven", 0)
    with pytest.raises(DataError, match="2 words but 1 seeds"):
        synthesise_all(["one", "two"], [0])
