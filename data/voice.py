"""A synthetic voice: a small formant synthesiser that says the ten digits.

It is not recorded speech and not evidence about speech: it exists so that a data set with a spoken modality can be
made anywhere, without a download. The scheme is Klatt's parallel formant synthesiser (JASA 67, 1980) reduced to what
ten words need: glottal pulses and noise excite four resonators whose frequencies glide from phoneme to phoneme.
Speakers differ in pitch, vocal-tract length, tempo, breath and loudness.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .errors import DataError

RATE = 8000  # samples per second
_FRAME = 40  # samples per control frame: 5 ms
_BANDWIDTHS = np.array([70.0, 100.0, 140.0, 220.0])  # Hz, of the four resonators


@dataclass(frozen=True)
class Phoneme:
    """What the synthesiser holds for one sound.

    Attributes:
        milliseconds: duration at tempo 1.
        formants: frequencies of the first three resonances in Hz (the fourth stays at 3400 Hz).
        gains: amplitudes of the four resonators.
        voice: amplitude of the glottal pulses, 0..1.
        noise: amplitude of the turbulence noise, 0..1.
    """

    milliseconds: float
    formants: tuple[float, float, float]
    gains: tuple[float, float, float, float]
    voice: float
    noise: float


_VOWEL = (1.0, 0.6, 0.3, 0.1)
_NASAL = (1.0, 0.12, 0.08, 0.03)
# Formant frequencies after Peterson & Barney (1952), rounded; durations and gains set by ear and spectrogram.
PHONEMES: dict[str, Phoneme] = {
    "IY": Phoneme(130, (280, 2250, 2950), _VOWEL, 1.0, 0.0),
    "IH": Phoneme(85, (400, 1950, 2550), _VOWEL, 1.0, 0.0),
    "EH": Phoneme(95, (540, 1800, 2480), _VOWEL, 1.0, 0.0),
    "EY1": Phoneme(90, (500, 1900, 2500), _VOWEL, 1.0, 0.0),
    "EY2": Phoneme(90, (320, 2200, 2800), _VOWEL, 1.0, 0.0),
    "AY1": Phoneme(120, (730, 1150, 2450), _VOWEL, 1.0, 0.0),
    "AY2": Phoneme(95, (350, 2100, 2700), _VOWEL, 1.0, 0.0),
    "AH": Phoneme(120, (640, 1190, 2390), _VOWEL, 1.0, 0.0),
    "AX": Phoneme(60, (500, 1450, 2450), _VOWEL, 0.7, 0.0),
    "AO": Phoneme(150, (560, 840, 2410), _VOWEL, 1.0, 0.0),
    "OW1": Phoneme(90, (510, 950, 2350), _VOWEL, 1.0, 0.0),
    "OW2": Phoneme(100, (350, 800, 2250), _VOWEL, 0.9, 0.0),
    "UW": Phoneme(170, (300, 870, 2240), _VOWEL, 1.0, 0.0),
    "W": Phoneme(70, (290, 610, 2150), (1.0, 0.4, 0.1, 0.03), 0.8, 0.0),
    "R": Phoneme(75, (330, 1060, 1400), (1.0, 0.5, 0.4, 0.05), 0.8, 0.0),
    "N": Phoneme(85, (250, 1450, 2500), _NASAL, 0.7, 0.0),
    "S": Phoneme(115, (300, 1700, 2900), (0.0, 0.02, 0.4, 1.0), 0.0, 0.55),
    "Z": Phoneme(90, (280, 1700, 2900), (0.5, 0.02, 0.35, 0.9), 0.35, 0.4),
    "F": Phoneme(95, (320, 1100, 2100), (0.05, 0.15, 0.2, 0.25), 0.0, 0.4),
    "V": Phoneme(65, (280, 1100, 2100), (0.8, 0.2, 0.1, 0.1), 0.5, 0.12),
    "TH": Phoneme(85, (320, 1400, 2600), (0.05, 0.15, 0.3, 0.35), 0.0, 0.3),
    "T": Phoneme(25, (350, 1800, 2700), (0.05, 0.3, 0.8, 1.0), 0.0, 0.8),
    "K": Phoneme(30, (350, 1900, 2200), (0.05, 1.0, 0.6, 0.1), 0.0, 0.7),
    "_": Phoneme(45, (350, 1500, 2500), (0.1, 0.1, 0.1, 0.1), 0.0, 0.0),
}
WORDS: dict[str, tuple[str, ...]] = {
    "zero": ("Z", "IH", "R", "OW1", "OW2"),
    "one": ("W", "AH", "N", "N"),
    "two": ("T", "UW", "UW"),
    "three": ("TH", "R", "IY", "IY"),
    "four": ("F", "AO", "AO", "R"),
    "five": ("F", "AY1", "AY2", "V"),
    "six": ("S", "IH", "_", "K", "S"),
    "seven": ("S", "EH", "V", "AX", "N"),
    "eight": ("EY1", "EY2", "_", "T", "_"),
    "nine": ("N", "AY1", "AY2", "N"),
}
_MARGIN_MS = 25.0  # silence before and after


@dataclass(frozen=True)
class _Utterance:
    """Control tracks of one word, one row per 5 ms frame; see `_tracks`."""

    frequencies: np.ndarray  # [frames, 4] Hz
    gains: np.ndarray  # [frames, 4]
    voice: np.ndarray  # [frames]
    noise: np.ndarray  # [frames]
    pitch: np.ndarray  # [frames] Hz
    turbulence: np.ndarray  # [samples], standard normal
    loudness: float


def synthesise(word: str, seed: int | Sequence[int]) -> np.ndarray:
    """One utterance of a word: int16 [n] at 8 kHz, n a multiple of 40, 0.35 to 0.7 seconds.

    The seed chooses the speaker and the noise; the same word and seed give the same samples.

    Raises:
        DataError: a word that the voice cannot say.
    """
    return synthesise_all([word], [seed])[0]


def synthesise_all(words: Sequence[str], seeds: Sequence[int | Sequence[int]]) -> list[np.ndarray]:
    """Many utterances at once (a thousand take about a second); each equals `synthesise` of its word and seed.

    Raises:
        DataError: a word that the voice cannot say, or as many seeds as words are not given.
    """
    if len(words) != len(seeds):
        raise DataError(f"{len(words)} words but {len(seeds)} seeds")
    unknown = sorted(set(words) - set(WORDS))
    if unknown:
        raise DataError(f"the synthetic voice cannot say {', '.join(unknown)}; it says {', '.join(WORDS)}")
    waves: list[np.ndarray] = []
    for start in range(0, len(words), 512):
        stop = min(start + 512, len(words))
        waves.extend(_render([_tracks(words[i], np.random.default_rng(seeds[i])) for i in range(start, stop)]))
    return waves


def _tracks(word: str, rng: np.random.Generator) -> _Utterance:
    """The control tracks of one word by one random speaker."""
    height = rng.uniform(0.0, 1.0)  # 0 a long vocal tract and a low voice, 1 a short and high one
    scale = 0.92 + 0.2 * height + rng.normal(0.0, 0.015)
    pitch = 95.0 * 2.2**height * np.exp(rng.normal(0.0, 0.06))
    tempo = rng.uniform(0.85, 1.2)
    breath = rng.uniform(0.005, 0.03)
    sounds = [PHONEMES[name] for name in WORDS[word]]
    lengths = [max(2, round(s.milliseconds * tempo * np.exp(rng.normal(0.0, 0.06)) / 5.0)) for s in sounds]
    targets = np.array([(*s.formants, 3400.0, *s.gains, s.voice, s.noise) for s in sounds])
    targets[:, :3] *= np.exp(rng.normal(0.0, 0.02, (len(sounds), 3)))
    targets[:, :4] = np.minimum(targets[:, :4] * scale, 3700.0)
    track = np.repeat(targets, lengths, axis=0)
    margin = round(_MARGIN_MS / 5.0)
    track = np.pad(track, ((margin, margin), (0, 0)), mode="edge")
    track[:margin, 8:] = 0.0
    track[-margin:, 8:] = 0.0
    # Articulators are slow (about 40 ms), the onset of voice and noise is fast (about 15 ms).
    track[:, :8] = _smooth(track[:, :8], 9)
    track[:, 8:] = _smooth(track[:, 8:], 3)
    time = np.linspace(0.0, 1.0, len(track))
    contour = pitch * (1.08 - 0.22 * time) * (1.0 + rng.normal(0.0, 0.03) * np.sin(2 * np.pi * time))
    return _Utterance(
        frequencies=track[:, :4],
        gains=track[:, 4:8],
        voice=track[:, 8],
        noise=track[:, 9] + breath * track[:, 8],
        pitch=contour,
        turbulence=rng.standard_normal(len(track) * _FRAME),
        loudness=rng.uniform(0.45, 0.85),
    )


def _smooth(track: np.ndarray, width: int) -> np.ndarray:
    """Moving average of odd `width` over the rows of [frames, n], edges repeated."""
    padded = np.pad(track, ((width // 2, width // 2), (0, 0)), mode="edge")
    return np.lib.stride_tricks.sliding_window_view(padded, width, axis=0).mean(axis=-1)


def _glottis(pitch: np.ndarray) -> np.ndarray:
    """Derivative of Rosenberg's glottal pulse [samples] for a pitch [samples] in Hz."""
    phase = np.cumsum(pitch / RATE) % 1.0
    opening = np.sin(np.pi * phase / 0.4)
    closing = -2.5 * np.sin(np.pi * (phase - 0.4) / 0.32)
    return np.where(phase < 0.4, opening, np.where(phase < 0.56, closing, 0.0))


def _render(utterances: list[_Utterance]) -> list[np.ndarray]:
    """Filters all utterances together: the recursion runs over time, NumPy over utterances and resonators."""
    frames = max(len(u.pitch) for u in utterances)
    count = len(utterances)
    source = np.zeros((frames * _FRAME, count))
    poles = np.zeros((frames, 2, count, 4))
    inputs = np.zeros((frames, count, 4))
    radius = np.exp(-np.pi * _BANDWIDTHS / RATE)
    signs = np.array([1.0, -1.0, 1.0, -1.0])  # neighbours in antiphase, or notches appear between them
    for i, u in enumerate(utterances):
        n = len(u.pitch)
        positions = np.arange(n * _FRAME) / _FRAME - 0.5
        voice, noise, pitch = (np.interp(positions, np.arange(n), track) for track in (u.voice, u.noise, u.pitch))
        source[: n * _FRAME, i] = voice * _glottis(pitch) + 0.5 * noise * u.turbulence
        angle = 2.0 * np.pi * u.frequencies / RATE
        poles[:n, 0, i] = 2.0 * radius * np.cos(angle)
        poles[:n, 1, i] = -(radius**2)
        # Unit gain at resonance, so that the gains mean the same at every frequency.
        peak = (1.0 - radius) * np.sqrt(1.0 - 2.0 * radius * np.cos(2.0 * angle) + radius**2)
        inputs[:n, i] = peak * u.gains * signs
    out = np.empty((frames * _FRAME, count))
    last, before = np.zeros((count, 4)), np.zeros((count, 4))
    for t in range(frames * _FRAME):
        f = t // _FRAME
        current = inputs[f] * source[t][:, None] + poles[f, 0] * last + poles[f, 1] * before
        before, last = last, current
        out[t] = current[:, 0] + current[:, 1] + current[:, 2] + current[:, 3]
    waves = []
    for i, u in enumerate(utterances):
        wave = out[: len(u.pitch) * _FRAME, i]
        wave = wave / np.abs(wave).max() * u.loudness
        waves.append(np.rint(wave * 32767).astype(np.int16))
    return waves
