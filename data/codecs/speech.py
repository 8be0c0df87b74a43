"""Speech as one code per frame, by k-means over log-mel spectra."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from .base import check_codes, codec_fingerprint, fit_kmeans, load_arrays, nearest, save_arrays

# Energies below this (waveform in -1..1) are all "silence": -80 dB or so under a loud frame.
_FLOOR = 1e-4


class LogMelKMeans:
    """Codes of mono waveforms: `rate / hop` per second, e.g. 25 Hz.

    Args:
        centres: float32 [k, n_mels], natural logarithms of mel-band energies.
        rate: samples per second.
        hop: samples from one frame to the next; frames are two hops long (Hann window).

    Raises:
        DataError: the shapes do not fit together.
    """

    id = "logmel-kmeans"
    kind = "discrete"

    def __init__(self, centres: np.ndarray, rate: int, hop: int) -> None:
        if centres.ndim != 2 or hop < 16 or rate < 1000:
            raise DataError(f"speech codec: centres {centres.shape}, rate {rate} Hz, hop {hop} samples are impossible")
        self.centres = np.ascontiguousarray(centres, dtype=np.float32)
        self.rate, self.hop = int(rate), int(hop)
        self._filters = mel_filters(centres.shape[1], self.rate, 2 * self.hop)

    @classmethod
    def train(
        cls,
        waveforms: Sequence[np.ndarray],
        *,
        rate: int = 8000,
        hop: int = 320,
        n_mels: int = 40,
        n_codes: int = 128,
        seed: int = 0,
    ) -> LogMelKMeans:
        """k-means over the log-mel frames of int16 or float waveforms [n].

        Raises:
            DataError: no waveforms, or fewer different frames than `n_codes`.
        """
        if not waveforms:
            raise DataError("speech codec: no waveforms to train on")
        filters = mel_filters(n_mels, rate, 2 * hop)
        rows = np.concatenate([_log_mel(as_float(wave), filters, hop) for wave in waveforms])
        return cls(fit_kmeans(rows, n_codes, seed, "speech codec"), rate, hop)

    @property
    def vocab_size(self) -> int:
        """Number of codes."""
        return len(self.centres)

    def mel(self, array: np.ndarray) -> np.ndarray:
        """Log-mel spectrogram float32 [ceil(n / hop), n_mels] of an int16 or float (-1..1) waveform [n]."""
        return _log_mel(as_float(np.asarray(array)), self._filters, self.hop)

    def encode(self, array: np.ndarray) -> np.ndarray:
        """Codes int64 [ceil(n / hop)] of an int16 or float waveform [n]; DataError for another shape or type."""
        return nearest(self.mel(array), self.centres)

    def decode(self, codes: Sequence[int] | np.ndarray) -> np.ndarray:
        """Log-mel spectrogram float32 [n, n_mels] of codes [n]; DataError for an unknown code."""
        return self.centres[check_codes(np.asarray(codes), self.vocab_size, "voice")]

    def to_waveform(self, mel: np.ndarray, *, iterations: int = 40) -> np.ndarray:
        """An int16 waveform [n * hop] whose spectrum resembles log-mel `mel` [n, n_mels] (Griffin & Lim 1984).

        Codes hold no phase and 40 bands only: the result is intelligible at best, not good.
        """
        frames = len(mel)
        if not frames:
            return np.zeros(0, dtype=np.int16)
        energies = np.exp(mel.astype(np.float64)) @ np.linalg.pinv(self._filters.astype(np.float64)).T
        magnitude = np.sqrt(np.maximum(energies, 0.0))
        phase = np.random.default_rng(0).uniform(-np.pi, np.pi, magnitude.shape)
        wave = np.zeros(frames * self.hop)
        for _ in range(iterations):
            wave = _overlap_add(magnitude * np.exp(1j * phase), self.hop)
            phase = np.angle(_stft(wave, self.hop))
        return np.rint(np.clip(wave, -1.0, 1.0) * 32767).astype(np.int16)

    def _settings(self) -> dict[str, Any]:
        return {"id": self.id, "version": 1, "rate": self.rate, "hop": self.hop}

    @property
    def fingerprint(self) -> str:
        """Changes with the settings or any bit of a centre."""
        return codec_fingerprint(self._settings(), self.centres)

    def save(self, path: str | Path) -> None:
        """Writes an .npz without pickle, atomically."""
        save_arrays(Path(path), self._settings(), self.centres)

    @classmethod
    def load(cls, path: str | Path) -> LogMelKMeans:
        """Reads `save`'s file; DataError when it is not one."""
        settings, centres = load_arrays(Path(path))
        if settings.get("id") != cls.id or settings.get("version") != 1:
            raise DataError(f"{path} holds codec {settings.get('id')!r} v{settings.get('version')}, not {cls.id} v1")
        return cls(centres, settings["rate"], settings["hop"])


def mel_filters(n_mels: int, rate: int, window: int) -> np.ndarray:
    """Triangular mel filters float32 [n_mels, window // 2 + 1] (HTK scale, 60 Hz to half the rate, each sums to 1)."""

    def to_mel(hertz: np.ndarray) -> np.ndarray:
        return 2595.0 * np.log10(1.0 + hertz / 700.0)

    edges = np.linspace(to_mel(np.array(60.0)), to_mel(np.array(rate / 2.0)), n_mels + 2)
    bins = to_mel(np.arange(window // 2 + 1) * rate / window)
    # A band narrower than one bin would be empty: widen every triangle to at least one bin's distance.
    step = np.maximum(np.diff(edges), np.diff(bins).max())
    rise = 1.0 - (edges[1:-1, None] - bins[None, :]) / step[:-1, None]
    fall = 1.0 - (bins[None, :] - edges[1:-1, None]) / step[1:, None]
    filters = np.clip(np.minimum(rise, fall), 0.0, None)
    return (filters / filters.sum(axis=1, keepdims=True)).astype(np.float32)


def as_float(wave: np.ndarray) -> np.ndarray:
    """A waveform as float64 in -1..1; DataError unless it is 1-D int16 or floating point and not empty."""
    if wave.ndim != 1 or not wave.size or not (wave.dtype == np.int16 or np.issubdtype(wave.dtype, np.floating)):
        raise DataError(f"a waveform is a non-empty 1-D int16 or float array, got {wave.dtype} {wave.shape}")
    return wave / 32768.0 if wave.dtype == np.int16 else wave.astype(np.float64)


def _hann(hop: int) -> np.ndarray:
    return 0.5 - 0.5 * np.cos(np.pi * np.arange(2 * hop) / hop)


def _stft(wave: np.ndarray, hop: int) -> np.ndarray:
    """Complex spectra [ceil(n / hop), hop + 1]; frame i is centred half a hop after sample i * hop."""
    frames = -(-len(wave) // hop)
    padded = np.zeros((frames + 1) * hop)
    padded[hop // 2 : hop // 2 + len(wave)] = wave
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * hop)[::hop]
    return np.fft.rfft(windows * _hann(hop), axis=1)


def _overlap_add(spectra: np.ndarray, hop: int) -> np.ndarray:
    """The waveform [frames * hop] whose `_stft` is nearest to `spectra` in the least-squares sense."""
    window = _hann(hop)
    pieces = np.fft.irfft(spectra, n=2 * hop, axis=1) * window
    wave = np.zeros((len(spectra) + 1) * hop)
    norm = np.zeros_like(wave)
    for i, piece in enumerate(pieces):
        wave[i * hop : (i + 2) * hop] += piece
        norm[i * hop : (i + 2) * hop] += window**2
    wave /= np.maximum(norm, 1e-3)
    return wave[hop // 2 : hop // 2 + len(spectra) * hop]


def _log_mel(wave: np.ndarray, filters: np.ndarray, hop: int) -> np.ndarray:
    energy = np.abs(_stft(wave, hop)) ** 2
    bands = np.einsum("tf,mf->tm", energy, filters.astype(np.float64), optimize=False)
    return np.log(np.maximum(bands, _FLOOR)).astype(np.float32)
