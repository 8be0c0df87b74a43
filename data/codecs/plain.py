"""Codecs without a model: bytes as they are, numbers in bins, and latents that somebody else has made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from ..errors import DataError
from ..files import fingerprint
from ..latents import DTYPES
from .base import check_codes, load_arrays, save_arrays

LAWS = ("mu", "uniform")
_MU = 255.0  # of ITU-T G.711, whose continuous curve this is


class _Plain:
    """A codec that is its settings. Subclasses give `id` and take the settings' other fields as arguments."""

    id = ""

    def __init__(self, **fields: Any) -> None:
        self.settings: dict[str, Any] = {"id": self.id, "version": 1, **fields}

    @property
    def fingerprint(self) -> str:
        """Changes with any setting."""
        return fingerprint(json.dumps(self.settings, sort_keys=True).encode())

    def save(self, path: str | Path) -> None:
        """Writes the settings as an .npz without pickle, atomically."""
        save_arrays(Path(path), self.settings, np.zeros(0, dtype=np.float32))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads `save`'s file; DataError when it is not one."""
        settings, _ = load_arrays(Path(path))
        if settings.get("id") != cls.id or settings.get("version") != 1:
            raise DataError(f"{path} holds codec {settings.get('id')!r} v{settings.get('version')}, not {cls.id} v1")
        return cls(**{name: value for name, value in settings.items() if name not in ("id", "version")})


class ByteCodec(_Plain):
    """Any file as its bytes: 256 codes."""

    id = "bytes"
    kind = "discrete"
    vocab_size = 256

    def encode(self, array: np.ndarray) -> np.ndarray:
        """Codes int64 [n] of uint8 [n]; DataError for another shape or type."""
        found = np.asarray(array)
        if found.ndim != 1 or found.dtype != np.uint8:
            raise DataError(f"byte streams are uint8 [n], got {found.dtype} {found.shape}")
        return found.astype(np.int64)

    def decode(self, codes: Sequence[int] | np.ndarray) -> np.ndarray:
        """uint8 [n] of codes [n]; DataError for a code outside 0..255."""
        return check_codes(np.asarray(codes), 256, "byte").astype(np.uint8)


class SeriesCodec(_Plain):
    """Numbers in bins over low..high: code b < bins is bin b, code `bins` is a missing value (NaN).

    Numbers outside the range go into the outermost bins. `uniform` makes bins of one width; `mu` makes them finer
    towards the middle of the range, as the companding law of telephony does (mu = 255): the error then grows with the
    distance from the middle. A number comes back as the middle of its bin.

    Args:
        low, high: the range, finite, low < high.
        bins: at least 2.
        law: "uniform" or "mu".
    """

    id = "series"
    kind = "discrete"

    def __init__(self, *, low: float, high: float, bins: int = 1024, law: str = "mu") -> None:
        if not np.isfinite([low, high]).all() or not low < high or bins < 2 or law not in LAWS:
            raise DataError(
                f"series: finite low < high, bins >= 2 and a law among {', '.join(LAWS)} are needed, "
                f"got {low}..{high}, {bins} and {law!r}"
            )
        super().__init__(low=float(low), high=float(high), bins=int(bins), law=law)
        self.low, self.high, self.bins, self.law = float(low), float(high), int(bins), law

    @classmethod
    def train(cls, series: Sequence[np.ndarray], *, bins: int, law: str) -> SeriesCodec:
        """The range is that of all numbers of `series`; DataError when there are not two different ones."""
        whole = np.concatenate([np.asarray(one, dtype=np.float64).reshape(-1) for one in series] or [np.zeros(0)])
        finite = whole[np.isfinite(whole)]
        if not finite.size or finite.min() == finite.max():
            raise DataError("series: a range needs two different finite numbers")
        return cls(low=float(finite.min()), high=float(finite.max()), bins=bins, law=law)

    @property
    def vocab_size(self) -> int:
        """Number of codes: the bins, and one for missing values."""
        return self.bins + 1

    def encode(self, array: np.ndarray) -> np.ndarray:
        """Codes int64 [n] of float [n]; DataError for another shape or type, or an infinite number."""
        found = np.asarray(array)
        if found.ndim != 1 or not np.issubdtype(found.dtype, np.floating):
            raise DataError(f"a series is float [n], got {found.dtype} {found.shape}")
        if np.isinf(found).any():
            raise DataError(f"a series is finite or missing (NaN), got {found[np.isinf(found)][0]}")
        missing = np.isnan(found)
        # -1..1 over the range
        x = np.clip((np.where(missing, self.low, found).astype(np.float64) - self.low) / (self.high - self.low), 0, 1)
        x = 2 * x - 1
        if self.law == "mu":
            x = np.sign(x) * np.log1p(_MU * np.abs(x)) / np.log1p(_MU)
        codes = np.minimum((x + 1) / 2 * self.bins, self.bins - 1).astype(np.int64)
        return np.where(missing, self.bins, codes)

    def decode(self, codes: Sequence[int] | np.ndarray) -> np.ndarray:
        """float32 [n] of codes [n], NaN where one is missing; DataError for a code outside the vocabulary."""
        flat = check_codes(np.asarray(codes), self.vocab_size, "series")
        x = (flat + 0.5) / self.bins * 2 - 1
        if self.law == "mu":
            x = np.sign(x) * np.expm1(np.abs(x) * np.log1p(_MU)) / _MU
        values = self.low + (x + 1) / 2 * (self.high - self.low)
        return np.where(flat == self.bins, np.nan, values).astype(np.float32)


class GivenLatents(_Plain):
    """Latents that were made elsewhere: they go in and come out as they are, but for the rounding of `dtype`.

    Args:
        width: numbers per vector.
        dtype: "bfloat16" or "float16".
    """

    id = "given-latents"
    kind = "continuous"
    vocab_size = 1

    def __init__(self, *, width: int, dtype: str = "bfloat16") -> None:
        if width < 1 or dtype not in DTYPES:
            raise DataError(
                f"latents need a width >= 1 and a type among {', '.join(DTYPES)}, got {width} and {dtype!r}"
            )
        super().__init__(width=int(width), dtype=dtype)
        self.width, self.dtype = int(width), dtype

    def encode(self, array: np.ndarray) -> np.ndarray:
        """float32 [n, width] of the same; DataError for another shape or type."""
        found = np.asarray(array)
        if found.ndim != 2 or found.shape[1] != self.width or not np.issubdtype(found.dtype, np.floating):
            raise DataError(f"latents are float [n, {self.width}], got {found.dtype} {found.shape}")
        return found.astype(np.float32)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """float32 [n, width] of the same."""
        return self.encode(np.asarray(codes, dtype=np.float32))
