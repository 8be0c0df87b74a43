from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from polylepis.data.codecs import Codec, LogMelKMeans, PatchKMeans, load_codec
from polylepis.data.codecs.speech import mel_filters
from polylepis.data.corpus import DIGIT_NAMES, load_digits
from polylepis.data.dataset import Dataset
from polylepis.data.errors import DataError
from polylepis.data.voice import synthesise_all


def test_digits_survive_their_codes(dataset: Dataset) -> None:
    """Held-out digits come back at more than 23 dB."""
    codec = dataset.codecs["image"]
    assert isinstance(codec, Codec) and codec.kind == "discrete" and codec.vocab_size == 128
    images, _ = load_digits()
    index = [int(key.split("-")[1]) for key, meta, _ in dataset.documents("heldout") if meta["kind"] == "image-caption"]
    codes = [codec.encode(images[i]) for i in index]
    assert all(c.shape == (16,) and c.dtype == np.int64 for c in codes)
    errors = [np.mean((codec.decode(c).astype(float) - images[i]) ** 2) for c, i in zip(codes, index, strict=True)]
    assert 10 * np.log10(255**2 / np.mean(errors)) > 23.0
    # Codes of a decoded image are the same codes: centres are their own nearest centres.
    again = codec.encode(codec.decode(codes[0]))
    assert np.mean(again == codes[0]) > 0.9


def test_mel_spectra_survive_their_codes(dataset: Dataset) -> None:
    """More than 88 % of the variance of utterances by speakers that the codec was not trained on."""
    codec = dataset.codecs["voice"]
    assert isinstance(codec, LogMelKMeans)
    waves = synthesise_all([DIGIT_NAMES[i % 10] for i in range(60)], [[99, i] for i in range(60)])
    mel = np.concatenate([codec.mel(wave) for wave in waves])
    decoded = np.concatenate([codec.decode(codec.encode(wave)) for wave in waves])
    assert decoded.shape == mel.shape and mel.shape[1] == 40
    assert 1 - ((mel - decoded) ** 2).sum() / ((mel - mel.mean(axis=0)) ** 2).sum() > 0.88
    assert len(codec.encode(waves[0])) == -(-len(waves[0]) // 320)
    # int16 and float say the same.
    assert np.array_equal(codec.encode(waves[0]), codec.encode(waves[0] / 32768.0))


def test_a_waveform_can_be_made_from_codes(dataset: Dataset) -> None:
    codec = dataset.codecs["voice"]
    assert isinstance(codec, LogMelKMeans)
    (wave,) = synthesise_all(["seven"], [3])
    mel = codec.decode(codec.encode(wave))
    spoken = codec.to_waveform(mel)
    assert spoken.dtype == np.int16 and len(spoken) == len(mel) * 320
    assert np.corrcoef(codec.mel(spoken).ravel(), mel.ravel())[0, 1] > 0.9
    assert codec.to_waveform(np.zeros((0, 40), dtype=np.float32)).size == 0


def test_training_is_deterministic_and_files_are_the_same(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (50, 8, 8), dtype=np.uint8)
    a, b = (PatchKMeans.train(images, n_codes=32, seed=5) for _ in range(2))
    assert a.fingerprint == b.fingerprint
    assert a.fingerprint != PatchKMeans.train(images, n_codes=32, seed=6).fingerprint
    assert a.fingerprint != PatchKMeans(a.centres, (16, 16), 2).fingerprint
    a.save(tmp_path / "a.npz")
    b.save(tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    loaded = load_codec(tmp_path / "a.npz")
    assert loaded.fingerprint == a.fingerprint and np.array_equal(loaded.encode(images[0]), a.encode(images[0]))
    speech = LogMelKMeans.train([np.random.default_rng(0).normal(0, 0.1, 20_000)], n_codes=8)
    speech.save(tmp_path / "s.npz")
    assert load_codec(tmp_path / "s.npz").fingerprint == speech.fingerprint


def test_mel_filters_have_no_empty_band() -> None:
    filters = mel_filters(40, 8000, 640)
    assert filters.shape == (40, 321)
    assert np.allclose(filters.sum(axis=1), 1.0, atol=1e-5)
    peaks = filters.argmax(axis=1)
    assert (np.diff(peaks) >= 0).all() and peaks[-1] > 280


def test_refusals(tmp_path: Path) -> None:
    images = np.zeros((4, 8, 8), dtype=np.uint8)
    with pytest.raises(DataError, match="image codec: 16 codes need as many different vectors, the data has 1"):
        PatchKMeans.train(images, n_codes=16)
    with pytest.raises(DataError, match=r"not a multiple of the patch size 3"):
        PatchKMeans.train(images, patch=3)
    with pytest.raises(DataError, match=r"uint8 images \[n, height, width\(, 3\)\] expected"):
        PatchKMeans.train(images.astype(np.float32))
    codec = PatchKMeans(np.zeros((4, 4)), (8, 8), 2)
    with pytest.raises(DataError, match=r"codes must lie in 0\.\.3, got 4\.\.4"):
        codec.decode(np.full(16, 4))
    speech = LogMelKMeans(np.zeros((4, 40)), 8000, 320)
    with pytest.raises(DataError, match="non-empty 1-D int16 or float array, got int64"):
        speech.encode(np.zeros(100, dtype=np.int64))
    with pytest.raises(DataError, match="no waveforms"):
        LogMelKMeans.train([])
    (tmp_path / "x.npz").write_bytes(b"junk")
    with pytest.raises(DataError, match="cannot read the codec"):
        load_codec(tmp_path / "x.npz")
    codec.save(tmp_path / "i.npz")
    with pytest.raises(DataError, match="holds codec 'patch-kmeans' v1, not logmel-kmeans v1"):
        LogMelKMeans.load(tmp_path / "i.npz")
