"""Contents of files as arrays: pictures, sounds, tables of numbers, latents. Every error names what was read."""

from __future__ import annotations

import csv
import io
import math
from typing import Any

import numpy as np

from .errors import DataError
from .latents import TENSOR

EXTRA = "pip install polylepis[files]"


def read_picture(data: bytes, name: str, shape: tuple[int, int], *, channels: int = 1) -> np.ndarray:
    """uint8 [height, width] (grey), or [height, width, 3] with 3 channels, of a picture that Pillow can read."""
    image = _open_picture(data, name).convert("RGB" if channels == 3 else "L")
    return np.asarray(image.resize((shape[1], shape[0])))


def picture_as_png(data: bytes, name: str) -> bytes:
    """The picture as it is, as a PNG."""
    buffer = io.BytesIO()
    _open_picture(data, name).convert("RGB").save(buffer, format="PNG")
    return buffer.getvalue()


def _open_picture(data: bytes, name: str) -> Any:
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except Exception as error:  # Pillow's readers raise OSError, ValueError, SyntaxError, struct.error and others
        raise DataError(f"{name} is no picture ({' '.join(str(error).split())})") from error
    return image


def read_sound(data: bytes, name: str, rate: int) -> np.ndarray:
    """int16 [n] at `rate`: the mean of the channels, resampled by a polyphase filter from another rate."""
    try:
        import soundfile
    except ImportError as error:
        raise DataError(f"reading {name} needs soundfile: {EXTRA}") from error
    try:
        samples, found = soundfile.read(io.BytesIO(data), dtype="float64", always_2d=True)
    except (soundfile.SoundFileError, OSError, TypeError) as error:
        raise DataError(f"{name} is no sound that libsndfile reads ({error})") from error
    mono = samples.mean(axis=1)
    if not mono.size:
        raise DataError(f"{name} holds no samples")
    if found != rate:
        try:
            from scipy.signal import resample_poly
        except ImportError as error:
            raise DataError(f"{name} has {found} Hz, {rate} are needed; resampling needs scipy: {EXTRA}") from error
        common = math.gcd(found, rate)
        mono = resample_poly(mono, rate // common, found // common)
    return np.clip(np.rint(mono * 32768), -32768, 32767).astype(np.int16)


def read_series(data: bytes, name: str) -> dict[str, np.ndarray]:
    """Column name -> float64 [rows] of a .csv, NaN where a field is empty.

    The first row may hold names; columns whose first value that is not empty is no number (dates, names) are left out.
    """
    try:
        rows = [row for row in csv.reader(io.StringIO(data.decode("utf-8"), newline="")) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read {name}: {error}") from error
    named = bool(rows) and not any(_is_number(field) for field in rows[0])
    names = rows[0] if named else [str(i) for i in range(len(rows[0]))] if rows else []
    body = rows[1:] if named else rows
    firsts = [next((row[i] for row in body if i < len(row) and row[i].strip()), "") for i in range(len(names))]
    chosen = [i for i, field in enumerate(firsts) if _is_number(field)]
    if not chosen or len(set(names)) != len(names):
        raise DataError(f"{name} holds no column of numbers, or two of one name")
    columns = np.empty((len(chosen), len(body)))
    for number, row in enumerate(body):
        try:
            if len(row) != len(names):
                raise ValueError(f"{len(row)} fields, {len(names)} expected")
            columns[:, number] = [float(row[i]) if row[i].strip() else np.nan for i in chosen]
        except ValueError as error:
            raise DataError(f"{name}, row {number + 1 + named}: {error}") from error
    if np.isinf(columns).any():
        raise DataError(f"{name} holds an infinite number")
    return {names[i]: column for i, column in zip(chosen, columns, strict=True)}


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True


def read_latents(data: bytes, name: str) -> np.ndarray:
    """float32 [n, width]: the tensor `latents` of a safetensors file, of any floating type."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        found = load(data)[TENSOR]
    except (KeyError, ValueError, SafetensorError) as error:
        raise DataError(f"{name} is no safetensors file with a tensor {TENSOR!r} ({error})") from error
    if found.ndim != 2 or not found.is_floating_point() or not found.numel():
        raise DataError(f"{name}: latents are float [n, width], got {found.dtype} {list(found.shape)}")
    return found.float().numpy()
