"""Pretrained picture codecs: Chameleon's VQ-VAE (codes) and diffusers' AutoencoderKL (continuous latents).

Both take RGB pictures of one fixed shape, scaled to -1..1, and give one code or vector per cell of a grid, in raster
order.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from .base import check_codes
from .hub_base import HubCodec, hash_weights, read_config

_PREFIX = "model.vqmodel."  # of the codec's weights inside a whole Chameleon


class _HubPicture(HubCodec):
    """What both have in common. Attributes: image_shape (height, width), channels 3, grid (rows, columns) of codes."""

    channels = 3

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        self.image_shape = (int(settings["image_shape"][0]), int(settings["image_shape"][1]))
        self.grid = (int(settings["grid"][0]), int(settings["grid"][1]))

    @property
    def n_codes(self) -> int:
        """Codes or vectors per picture."""
        return self.grid[0] * self.grid[1]

    def _tensor(self, array: np.ndarray) -> Any:
        """float32 [1, 3, height, width] in -1..1 of a picture uint8 [height, width, 3]."""
        import torch

        image = np.asarray(array)
        if image.shape != (*self.image_shape, 3) or image.dtype != np.uint8:
            raise DataError(
                f"this codec takes uint8 pictures {(*self.image_shape, 3)}, got {image.dtype} {image.shape}"
            )
        return torch.from_numpy(image.astype(np.float32) / 127.5 - 1.0).permute(2, 0, 1)[None].contiguous()


class HubImage(_HubPicture):
    """Codes by the VQ-VAE of Chameleon (arXiv 2405.09818), from its own folder or out of a whole Chameleon's.

    The library has its encoder only: `decode` gives the codebook's vectors, not pixels.
    """

    id = "hub-image"
    kind = "discrete"

    @classmethod
    def open(cls, folder: str | Path, *, image_shape: tuple[int, int]) -> HubImage:
        """A ChameleonVQVAE (or a Chameleon that holds one) saved by `save_pretrained`, for pictures of `image_shape`.

        Raises:
            DataError: transformers is missing, there is no such model, or the shape does not suit it.
        """
        path = Path(folder).resolve()
        config = read_config(path)
        kind = config.get("model_type")
        if kind not in ("chameleon", "chameleon_vqgan"):
            raise DataError(f"{path} holds a {kind}; this takes chameleon and chameleon_vqgan")
        fields = config.get("vq_config", {}) if kind == "chameleon" else config
        settings = {
            "id": cls.id,
            "version": 1,
            "folder": str(path),
            "model_type": kind,
            "weights": hash_weights(path),
            "vocab_size": int(fields.get("num_embeddings", 8192)),
            "image_shape": list(image_shape),
            "grid": [1, 1],
        }
        codec = cls(settings)
        down = 2 ** (len(codec._load().config.channel_multiplier) - 1)
        if min(image_shape) < down or any(side % down for side in image_shape):
            raise DataError(f"{path}: pictures must be multiples of {down} pixels, got {image_shape}")
        settings["grid"] = [side // down for side in image_shape]
        settings["vocab_size"] = int(codec._load().config.num_embeddings)
        return cls(settings)

    @property
    def vocab_size(self) -> int:
        """Number of codes."""
        return int(self.settings["vocab_size"])

    def encode(self, array: np.ndarray) -> np.ndarray:
        """Codes int64 [n_codes] of a picture uint8 [height, width, 3]; DataError for another shape or type."""
        import torch

        with torch.no_grad():
            found = self._load().encode(self._tensor(array)).image_tokens
        return found.reshape(-1).numpy().astype(np.int64)

    def decode(self, codes: Sequence[int] | np.ndarray) -> np.ndarray:
        """The codebook's vectors float32 [rows, columns, width] of `n_codes` codes; DataError for another number."""
        flat = check_codes(np.asarray(codes), self.vocab_size, "image")
        if flat.size != self.n_codes:
            raise DataError(f"a picture {self.image_shape} has {self.n_codes} codes, got {flat.size}")
        book = self._load().quantize.embedding.weight.detach().numpy()
        return book[flat].reshape(*self.grid, -1).astype(np.float32)

    def _build(self, folder: Path) -> Any:
        from transformers.models.chameleon.configuration_chameleon import ChameleonConfig
        from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE

        if self.settings["model_type"] == "chameleon_vqgan":
            return ChameleonVQVAE.from_pretrained(folder, local_files_only=True).eval()
        # Of a whole Chameleon only the codec's tensors are read.
        from safetensors import safe_open

        vq_config: Any = ChameleonConfig.from_pretrained(folder, local_files_only=True).vq_config
        model, found = ChameleonVQVAE(vq_config), dict[str, Any]()
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                names = [name for name in tensors.keys() if name.startswith(_PREFIX)]
                found |= {name.removeprefix(_PREFIX): tensors.get_tensor(name) for name in names}
        model.load_state_dict(found)
        return model.float().eval()


class HubLatents(_HubPicture):
    """Latents by a variational autoencoder of diffusers: the mode of its posterior, shifted and scaled as it says.

    Attributes: width (channels of the latents), dtype (as stored).
    """

    id = "hub-latents"
    kind = "continuous"
    vocab_size = 1

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        self.width, self.dtype = int(settings["width"]), str(settings["dtype"])

    @classmethod
    def open(cls, folder: str | Path, *, image_shape: tuple[int, int], dtype: str = "bfloat16") -> HubLatents:
        """An AutoencoderKL saved by `save_pretrained`, for pictures of `image_shape`, stored as `dtype`.

        Raises:
            DataError: diffusers is missing, there is no such model, or the shape does not suit it.
        """
        path = Path(folder).resolve()
        kind = read_config(path).get("_class_name")
        if kind != "AutoencoderKL":
            raise DataError(f"{path} holds a {kind}; latents are made by AutoencoderKL")
        settings = {
            "id": cls.id,
            "version": 1,
            "folder": str(path),
            "weights": hash_weights(path),
            "width": 1,
            "dtype": dtype,
            "image_shape": list(image_shape),
            "grid": [1, 1],
        }
        config = cls(settings)._load().config
        down = 2 ** (len(config.block_out_channels) - 1)
        if config.in_channels != 3 or config.out_channels != 3:
            raise DataError(f"{path} takes pictures of {config.in_channels} channels; 3 are needed")
        if min(image_shape) < down or any(side % down for side in image_shape):
            raise DataError(f"{path}: pictures must be multiples of {down} pixels, got {image_shape}")
        return cls({**settings, "grid": [side // down for side in image_shape], "width": int(config.latent_channels)})

    def encode(self, array: np.ndarray) -> np.ndarray:
        """Latents float32 [n_codes, width] of a picture uint8 [height, width, 3]; DataError for another shape."""
        import torch

        model = self._load()
        with torch.no_grad():
            found = model.encode(self._tensor(array)).latent_dist.mode()
            shift, scale = self._scaling(model.config)
            found = (found - shift) * scale
        return found[0].permute(1, 2, 0).reshape(-1, self.width).numpy().astype(np.float32)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """The picture uint8 [height, width, 3] of latents float [n_codes, width]; DataError for another shape."""
        import torch

        latents = np.asarray(codes, dtype=np.float32)
        if latents.shape != (self.n_codes, self.width):
            raise DataError(
                f"a picture {self.image_shape} has latents {(self.n_codes, self.width)}, got {latents.shape}"
            )
        model = self._load()
        shift, scale = self._scaling(model.config)
        grid = torch.from_numpy(latents.reshape(*self.grid, self.width)).permute(2, 0, 1)[None]
        with torch.no_grad():
            pixels = model.decode(grid / scale + shift).sample
        return ((pixels[0].permute(1, 2, 0).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()

    def _scaling(self, config: Any) -> tuple[Any, Any]:
        """(shift, factor): latents are (z - shift) * factor; by channel where the model knows mean and deviation."""
        import torch

        if config.latents_mean is not None and config.latents_std is not None:
            mean, deviation = (torch.tensor(x).view(1, -1, 1, 1) for x in (config.latents_mean, config.latents_std))
            return mean, config.scaling_factor / deviation
        return config.shift_factor or 0.0, config.scaling_factor

    def _build(self, folder: Path) -> Any:
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        return AutoencoderKL.from_pretrained(folder, local_files_only=True, low_cpu_mem_usage=False).eval()


def open_picture_model(folder: str | Path, *, image_shape: tuple[int, int], dtype: str) -> HubImage | HubLatents:
    """The codec of whatever picture model lies in `folder`; DataError for another kind of model."""
    config = read_config(Path(folder))
    if config.get("_class_name") == "AutoencoderKL":
        return HubLatents.open(folder, image_shape=image_shape, dtype=dtype)
    if config.get("model_type") in ("chameleon", "chameleon_vqgan"):
        return HubImage.open(folder, image_shape=image_shape)
    kind = config.get("_class_name") or config.get("model_type")
    raise DataError(f"{folder} holds a {kind}; picture codecs are AutoencoderKL, chameleon and chameleon_vqgan")
