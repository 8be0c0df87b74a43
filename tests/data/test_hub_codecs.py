"""Mimi and EnCodec, tiny and untrained, through the codec protocol and through `encode`."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polylepis.data.codecs import Codec, HubSpeech, load_codec
from polylepis.data.dataset import Dataset
from polylepis.data.encode import encode_folder
from polylepis.data.errors import DataError
from polylepis.data.preview import write_preview
from polylepis.data.tasks import EncodeConfig

transformers = pytest.importorskip("transformers")
WAVE = (np.random.default_rng(0).standard_normal(24000) * 3000).astype(np.int16)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    base = tmp_path_factory.mktemp("hub")
    size: dict[str, Any] = {"num_filters": 4, "codebook_dim": 16, "codebook_size": 64}
    encodec = transformers.EncodecConfig(hidden_size=16, num_lstm_layers=1, **size)
    mimi = transformers.MimiConfig(
        hidden_size=32,
        vector_quantization_hidden_dimension=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=32,
        num_quantizers=4,
        upsample_groups=32,
        **size,
    )
    for name, model in (
        ("encodec", transformers.EncodecModel(encodec)),
        ("mimi", transformers.MimiModel(mimi)),
    ):
        model.save_pretrained(base / name)
    return {name: base / name for name in ("encodec", "mimi")}


@pytest.mark.parametrize("name", ["encodec", "mimi"])
def test_codes_and_back(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    codec = HubSpeech.open(folders[name], n_q=3)
    assert isinstance(codec, Codec) and codec.vocab_size == 3 * 64 and codec.rate == 24000
    codes = codec.encode(WAVE)
    assert codes.dtype == np.int64 and len(codes) % 3 == 0
    assert np.array_equal(codes.reshape(-1, 3) // 64, np.tile([0, 1, 2], (len(codes) // 3, 1)))
    sound = codec.decode(codes)
    assert sound.dtype == np.float32 and sound.ndim == 1 and abs(len(sound) - len(WAVE)) <= 1920
    codec.save(tmp_path / "voice.codec.npz")
    again = load_codec(tmp_path / "voice.codec.npz")
    assert again.fingerprint == codec.fingerprint and np.array_equal(again.encode(WAVE), codes)
    assert HubSpeech.open(folders[name], n_q=2).fingerprint != codec.fingerprint
    with pytest.raises(DataError, match=r"come in frames of 3, got 4"):
        codec.decode([0, 64, 128, 0])
    with pytest.raises(DataError, match="out of step"):
        codec.decode([64, 0, 128])
    with pytest.raises(DataError, match=r"quantisers must lie in 1\.\.\d+, got 99"):
        HubSpeech.open(folders[name], n_q=99)


def test_a_folder_of_sounds(folders: dict[str, Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for i in range(3):
        with wave.open(str(source / f"s{i}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(24000)
            file.writeframes(np.roll(WAVE, 100 * i).tobytes())
        (source / f"s{i}.txt").write_text("noise that nobody should listen to for long " * 3)
    config = EncodeConfig(text_vocab=300, voice_model=str(folders["mimi"]), voice_quantisers=2)
    list(encode_folder(source, tmp_path / "out", config))
    dataset = Dataset.open(tmp_path / "out")
    assert sum(n for _, n in dataset.validate()) == 3
    write_preview(dataset, "train", tmp_path / "p.html", samples=3, packs=2, seq_len=512, window=64, seed=0)
    assert (tmp_path / "p.html").read_text().count("<audio") == 6


def test_refusals(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no model of Hugging Face"):
        HubSpeech.open(tmp_path, n_q=1)
    transformers.GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(DataError, match="holds a gpt2; speech codecs are mimi, encodec"):
        HubSpeech.open(tmp_path, n_q=1)
    codec = HubSpeech.open(folders["mimi"], n_q=2)
    moved = HubSpeech({**codec.settings, "weights": "other"})
    with pytest.raises(DataError, match="not the weights that the codes were made with"):
        moved.encode(WAVE)
    with pytest.raises(DataError, match="holds no weights"):
        HubSpeech({**codec.settings, "folder": str(tmp_path)}).encode(WAVE)
