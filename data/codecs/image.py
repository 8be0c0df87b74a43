"""Images as one code per square patch, by k-means over patches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from .base import check_codes, codec_fingerprint, fit_kmeans, load_arrays, nearest, save_arrays


class PatchKMeans:
    """Codes of images of one fixed shape, patches in raster order.

    Args:
        centres: float32 [k, patch * patch * channels], in units of pixel value (0..255).
        image_shape: (height, width), multiples of `patch`.
        patch: side of a patch in pixels.
        channels: 1 (grey: images are [height, width]) or 3 (red, green, blue: [height, width, 3]).

    Raises:
        DataError: the shapes do not fit together.
    """

    id = "patch-kmeans"
    kind = "discrete"

    def __init__(self, centres: np.ndarray, image_shape: tuple[int, int], patch: int, channels: int = 1) -> None:
        if patch < 1 or any(side < 1 or side % patch for side in image_shape):
            raise DataError(f"image shape {image_shape} is not a multiple of the patch size {patch}")
        if channels not in (1, 3) or centres.ndim != 2 or centres.shape[1] != patch * patch * channels:
            raise DataError(f"centres of shape {centres.shape} do not describe {patch}x{patch}x{channels} patches")
        self.centres = np.ascontiguousarray(centres, dtype=np.float32)
        self.image_shape = (int(image_shape[0]), int(image_shape[1]))
        self.patch, self.channels = int(patch), int(channels)

    @classmethod
    def train(cls, images: np.ndarray, *, patch: int = 2, n_codes: int = 128, seed: int = 0) -> PatchKMeans:
        """k-means over all patches of `images` uint8 [n, height, width] or [n, height, width, 3].

        Raises:
            DataError: images are not such an array, or have fewer different patches than `n_codes`.
        """
        if (
            images.ndim not in (3, 4)
            or images.shape[3:] not in ((), (3,))
            or images.dtype != np.uint8
            or not len(images)
        ):
            raise DataError(f"uint8 images [n, height, width(, 3)] expected, got {images.dtype} {images.shape}")
        height, width = images.shape[1:3]
        if height % patch or width % patch:
            raise DataError(f"image shape {(height, width)} is not a multiple of the patch size {patch}")
        rows = np.concatenate([_patches(image, patch) for image in images])
        return cls(fit_kmeans(rows, n_codes, seed, "image codec"), (height, width), patch, 3 if images.ndim == 4 else 1)

    @property
    def vocab_size(self) -> int:
        """Number of codes."""
        return len(self.centres)

    @property
    def n_codes(self) -> int:
        """Codes per image."""
        return (self.image_shape[0] // self.patch) * (self.image_shape[1] // self.patch)

    def encode(self, array: np.ndarray) -> np.ndarray:
        """Codes int64 [n_codes] of an image uint8 [height, width(, 3)]; DataError for another shape or type."""
        image = np.asarray(array)
        if image.shape != self._array_shape or image.dtype != np.uint8:
            raise DataError(f"this codec takes uint8 images {self._array_shape}, got {image.dtype} {image.shape}")
        return nearest(_patches(image, self.patch), self.centres)

    def decode(self, codes: Sequence[int] | np.ndarray) -> np.ndarray:
        """The image uint8 [height, width(, 3)] of `n_codes` codes; DataError for another number or code."""
        flat = check_codes(np.asarray(codes), self.vocab_size, "image")
        if flat.size != self.n_codes:
            raise DataError(f"an image {self.image_shape} has {self.n_codes} codes, got {flat.size}")
        p, (height, width) = self.patch, self.image_shape
        grid = self.centres[flat].reshape(height // p, width // p, p, p, self.channels).transpose(0, 2, 1, 3, 4)
        return np.clip(np.rint(grid.reshape(self._array_shape)), 0, 255).astype(np.uint8)

    @property
    def _array_shape(self) -> tuple[int, ...]:
        return self.image_shape if self.channels == 1 else (*self.image_shape, self.channels)

    def _settings(self) -> dict[str, Any]:
        settings = {"id": self.id, "version": 1, "image_shape": list(self.image_shape), "patch": self.patch}
        # Grey codecs keep the fingerprint that they had before there were others.
        return settings if self.channels == 1 else {**settings, "channels": self.channels}

    @property
    def fingerprint(self) -> str:
        """Changes with the settings or any bit of a centre."""
        return codec_fingerprint(self._settings(), self.centres)

    def save(self, path: str | Path) -> None:
        """Writes an .npz without pickle, atomically."""
        save_arrays(Path(path), self._settings(), self.centres)

    @classmethod
    def load(cls, path: str | Path) -> PatchKMeans:
        """Reads `save`'s file; DataError when it is not one."""
        settings, centres = load_arrays(Path(path))
        if settings.get("id") != cls.id or settings.get("version") != 1:
            raise DataError(f"{path} holds codec {settings.get('id')!r} v{settings.get('version')}, not {cls.id} v1")
        height, width = settings["image_shape"]
        return cls(centres, (height, width), settings["patch"], settings.get("channels", 1))


def _patches(image: np.ndarray, patch: int) -> np.ndarray:
    """float32 [n, patch * patch * channels] of an image [height, width(, channels)], raster order."""
    height, width = image.shape[:2]
    grid = image.reshape(height // patch, patch, width // patch, patch, -1).transpose(0, 2, 1, 3, 4)
    return grid.reshape(len(grid) * grid.shape[1], -1).astype(np.float32)
