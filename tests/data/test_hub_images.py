"""AutoencoderKL and Chameleon's VQ-VAE, tiny and untrained, through the codec protocol and through `encode`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from polylepis.data.codecs import Codec, GivenLatents, HubImage, HubLatents, load_codec, open_picture_model
from polylepis.data.dataset import Dataset
from polylepis.data.encode import encode_folder
from polylepis.data.errors import DataError
from polylepis.data.preview import write_preview
from polylepis.data.tasks import EncodeConfig

SHAPE = (16, 24)
PICTURE = np.random.default_rng(0).integers(0, 256, (*SHAPE, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    autoencoder = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl")
    torch.manual_seed(0)
    model = autoencoder.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        shift_factor=0.25,
    )
    folder = tmp_path_factory.mktemp("hub") / "vae"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chameleons(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The codec alone, and inside a whole Chameleon."""
    pytest.importorskip("transformers")
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration, ChameleonVQVAEConfig

    sizes: dict[str, Any] = {"base_channels": 32, "channel_multiplier": [1, 1, 2], "num_res_blocks": 1}
    vq = ChameleonVQVAEConfig(embed_dim=8, latent_channels=8, num_embeddings=50, attn_resolutions=[], **sizes)
    tokens = {f"IMGIMG{chr(65 + i // 10)}{chr(65 + i % 10)}Z": i + 4 for i in range(50)} | {"<image>": 60}
    config = ChameleonConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vq_config=vq.to_dict(),
        vocabulary_map=tokens,
    )
    torch.manual_seed(0)
    whole = ChameleonForConditionalGeneration(config)
    base = tmp_path_factory.mktemp("chameleon")
    whole.save_pretrained(base / "whole")
    whole.model.vqmodel.save_pretrained(base / "alone")
    return {"whole": base / "whole", "alone": base / "alone"}


def test_latents_are_the_scaled_mode_and_come_back(vae: Path, tmp_path: Path) -> None:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    codec = open_picture_model(vae, image_shape=SHAPE, dtype="float16")
    assert isinstance(codec, HubLatents) and isinstance(codec, Codec) and codec.kind == "continuous"
    assert (codec.width, codec.dtype, codec.vocab_size, codec.n_codes) == (4, "float16", 1, 8 * 12)
    latents = codec.encode(PICTURE)
    model = AutoencoderKL.from_pretrained(vae).eval()
    pixels = torch.from_numpy(PICTURE).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        expected = (model.encode(pixels).latent_dist.mode() - 0.25) * model.config.scaling_factor
        back = model.decode(expected / model.config.scaling_factor + 0.25).sample[0].permute(1, 2, 0)
    assert latents.dtype == np.float32 and np.allclose(latents, expected[0].flatten(1).T.numpy(), atol=1e-6)
    picture = codec.decode(latents)
    assert picture.dtype == np.uint8 and picture.shape == (*SHAPE, 3)
    assert np.abs(picture - ((back.clamp(-1, 1) + 1) * 127.5).numpy()).max() <= 0.51
    codec.save(tmp_path / "image.codec.npz")
    again = load_codec(tmp_path / "image.codec.npz")
    assert again.fingerprint == codec.fingerprint and np.array_equal(again.encode(PICTURE), latents)
    assert HubLatents.open(vae, image_shape=(16, 16)).fingerprint != codec.fingerprint


def test_channels_with_their_own_mean_and_deviation(vae: Path) -> None:
    codec = HubLatents.open(vae, image_shape=SHAPE)
    plain = codec.encode(PICTURE)
    mean, deviation = [0.1, 0.2, -0.3, 0.0], [1.0, 2.0, 0.5, 4.0]
    model = codec._load()
    scale = model.config.scaling_factor
    model.register_to_config(latents_mean=mean, latents_std=deviation)
    expected = (plain / scale + 0.25 - np.array(mean)) * scale / np.array(deviation)
    latents = codec.encode(PICTURE)
    assert np.allclose(latents, expected, atol=1e-5)
    assert np.abs(codec.decode(latents).astype(int) - HubLatents.open(vae, image_shape=SHAPE).decode(plain)).max() <= 1


@pytest.mark.parametrize("name", ["alone", "whole"])
def test_chameleons_codes(chameleons: dict[str, Path], tmp_path: Path, name: str) -> None:
    from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE

    codec = open_picture_model(chameleons[name], image_shape=SHAPE, dtype="bfloat16")
    assert isinstance(codec, HubImage) and isinstance(codec, Codec)
    assert (codec.vocab_size, codec.n_codes, codec.kind) == (50, 4 * 6, "discrete")
    codes = codec.encode(PICTURE)
    oracle = ChameleonVQVAE.from_pretrained(chameleons["alone"]).eval()
    pixels = torch.from_numpy(PICTURE).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        expected = oracle.encode(pixels).image_tokens.reshape(-1).numpy()
    assert codes.dtype == np.int64 and np.array_equal(codes, expected)
    vectors = codec.decode(codes)
    assert vectors.shape == (4, 6, 8)
    assert np.array_equal(vectors[1, 2], oracle.quantize.embedding.weight[codes[8]].detach().numpy())
    codec.save(tmp_path / "image.codec.npz")
    assert np.array_equal(load_codec(tmp_path / "image.codec.npz").encode(PICTURE), codes)


def folder_of_pictures(source: Path) -> None:
    source.mkdir()
    rng = np.random.default_rng(1)
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (20, 20, 3)).astype(np.uint8)).save(source / f"p{i}.png")
        (source / f"p{i}.txt").write_text(f"picture {i} shows nothing but noise " * 4)


def test_a_folder_of_pictures_as_latents(vae: Path, tmp_path: Path) -> None:
    folder_of_pictures(tmp_path / "source")
    config = EncodeConfig(text_vocab=300, image_model=str(vae), image_side=16)
    list(encode_folder(tmp_path / "source", tmp_path / "out", config))
    dataset = Dataset.open(tmp_path / "out")
    assert dataset.latent_format is not None and dataset.latent_format.modalities == ("image",)
    assert sum(n for _, n in dataset.validate()) == 3
    split = dataset.split("train")
    file = tmp_path / "source" / split.meta(1)["file"]
    pixels = np.asarray(Image.open(file).convert("RGB").resize((16, 16)))
    expected = torch.from_numpy(dataset.codecs["image"].encode(pixels)).to(torch.bfloat16).float().numpy()
    assert np.array_equal(split.vectors(1), expected)  # type: ignore[arg-type]
    write_preview(dataset, "train", tmp_path / "p.html", samples=3, packs=2, seq_len=512, window=64, seed=0)
    assert (tmp_path / "p.html").read_text().count('alt="from its codes"') == 3


def test_a_folder_of_pictures_as_chameleons_codes(chameleons: dict[str, Path], tmp_path: Path) -> None:
    folder_of_pictures(tmp_path / "source")
    config = EncodeConfig(text_vocab=300, image_model=str(chameleons["alone"]), image_side=16)
    list(encode_folder(tmp_path / "source", tmp_path / "out", config))
    dataset = Dataset.open(tmp_path / "out")
    assert dataset.latent_format is None and dataset.vocabulary.sizes[1] == 50
    assert sum(n for _, n in dataset.validate()) == 3
    write_preview(dataset, "train", tmp_path / "p.html", samples=3, packs=2, seq_len=512, window=64, seed=0)
    assert (tmp_path / "p.html").read_text().count("image: float32 [4, 4, 8]") == 3


def test_refusals(vae: Path, chameleons: dict[str, Path], tmp_path: Path) -> None:
    for folder, down in ((vae, 2), (chameleons["alone"], 4)):
        with pytest.raises(DataError, match=rf"pictures must be multiples of {down} pixels, got \(15, 16\)"):
            open_picture_model(folder, image_shape=(15, 16), dtype="bfloat16")
        codec = open_picture_model(folder, image_shape=(16, 16), dtype="bfloat16")
        with pytest.raises(DataError, match=r"takes uint8 pictures \(16, 16, 3\), got uint8 \(16, 16\)"):
            codec.encode(np.zeros((16, 16), np.uint8))
    with pytest.raises(DataError, match="holds no model of Hugging Face"):
        open_picture_model(tmp_path, image_shape=(16, 16), dtype="bfloat16")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(DataError, match="holds a gpt2; picture codecs are AutoencoderKL, chameleon"):
        open_picture_model(tmp_path, image_shape=(16, 16), dtype="bfloat16")
    with pytest.raises(DataError, match="need a width >= 1 and a type among bfloat16, float16, got 4 and 'float64'"):
        GivenLatents(width=4, dtype="float64")
    with pytest.raises(DataError, match=r"has latents \(64, 4\), got \(3, 4\)"):
        HubLatents.open(vae, image_shape=(16, 16)).decode(np.zeros((3, 4)))
