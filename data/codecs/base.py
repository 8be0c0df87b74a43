"""What every codec is: arrays to integer codes and back, with a fingerprint; and how k-means ones are stored."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ..errors import DataError
from ..files import fingerprint, write_atomic


@runtime_checkable
class Codec(Protocol):
    """Turns one modality's arrays into local codes and back.

    Attributes:
        id: name of the method, e.g. "patch-kmeans".
        kind: "discrete" (integer codes), or "continuous": then `encode` gives latents float32 [n, width], `decode`
            takes them, `vocab_size` is 1 (the slot), and there are `width` and `dtype` ("bfloat16" or "float16", how
            they are stored).
        vocab_size: number of different codes.
        fingerprint: 32 hexadecimal digits; equal exactly when encode and decode are.
    """

    id: str
    kind: str

    @property
    def vocab_size(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    def encode(self, array: np.ndarray) -> np.ndarray:
        """The array's codes, int64 [n] (latents float32 [n, width] where continuous)."""
        ...

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """An array like those that were encoded, as far as the codes hold it."""
        ...

    def save(self, path: str | Path) -> None: ...


def fit_kmeans(rows: np.ndarray, n_codes: int, seed: int, what: str) -> np.ndarray:
    """Centres float32 [n_codes, d] of `rows` [n, d], the same bits for the same rows and seed.

    Centres are sorted (by mean, then coordinates), so that neighbouring codes look alike and numbering is stable.

    Raises:
        DataError: scikit-learn is missing, or there are fewer different rows than codes.
    """
    distinct = np.unique(rows, axis=0)
    if len(distinct) < n_codes:
        raise DataError(f"{what}: {n_codes} codes need as many different vectors, the data has {len(distinct)}")
    try:
        from sklearn.cluster import KMeans
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise DataError("training a codec needs scikit-learn: pip install polylepis[quickstart]") from error
    # One thread: partial sums of several threads would meet in an order that is not ours to choose.
    with threadpool_limits(limits=1):
        model = KMeans(n_clusters=n_codes, n_init=1, max_iter=25, random_state=seed, algorithm="lloyd")
        centres = model.fit(rows.astype(np.float64)).cluster_centers_.astype(np.float32)
    order = np.lexsort((*centres.T[::-1], centres.mean(axis=1)))
    return np.ascontiguousarray(centres[order])


def nearest(rows: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Index int64 [n] of the centre [k, d] nearest to each row [n, d]; ties go to the lower index."""
    rows64, centres64 = rows.astype(np.float64), centres.astype(np.float64)
    # einsum, not BLAS: a BLAS may block by shape, and one array must get the same codes alone and in a batch.
    products = np.einsum("nd,kd->nk", rows64, centres64, optimize=False)
    return np.argmin((centres64**2).sum(axis=1)[None, :] - 2 * products, axis=1).astype(np.int64)


def check_codes(codes: np.ndarray, vocab_size: int, what: str) -> np.ndarray:
    """`codes` as int64 [n]; DataError when one lies outside 0..vocab_size-1."""
    flat = np.asarray(codes).astype(np.int64).reshape(-1)
    if flat.size and (flat.min() < 0 or flat.max() >= vocab_size):
        raise DataError(f"{what} codes must lie in 0..{vocab_size - 1}, got {flat.min()}..{flat.max()}")
    return flat


def codec_fingerprint(settings: dict[str, Any], centres: np.ndarray) -> str:
    """Hash of a k-means codec: its settings and the bits of its centres."""
    return fingerprint(json.dumps(settings, sort_keys=True).encode(), centres.astype("<f4").tobytes())


def save_arrays(path: Path, settings: dict[str, Any], centres: np.ndarray) -> None:
    """Writes settings (JSON) and centres as an .npz without pickle, atomically."""
    buffer = io.BytesIO()
    header = np.frombuffer(json.dumps(settings, sort_keys=True).encode(), dtype=np.uint8)
    np.savez(buffer, header=header, centres=centres)
    write_atomic(path, buffer.getvalue())


def load_arrays(path: Path) -> tuple[dict[str, Any], np.ndarray]:
    """Settings and centres of `save_arrays`; DataError when the file is missing or not of that form."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return json.loads(archive["header"].tobytes()), archive["centres"]
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"cannot read the codec {path}: {error}") from error
