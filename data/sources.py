"""Files of a source folder as arrays and texts: what `encode` reads. Every function names the file that is wrong."""

from __future__ import annotations

import csv
import io
import json
import wave
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .errors import DataError
from .latents import TENSOR

TEXT, IMAGE, SOUND = (".txt", ".md", ".rst"), (".png", ".jpg", ".jpeg", ".webp"), (".wav",)
SERIES, LATENTS = (".csv",), (".safetensors",)
MEGATRON = ".bin"  # with its .idx beside it


def read_texts(path: Path) -> Iterator[str]:
    """The texts of a file: the whole file, or one per line of a .jsonl."""
    try:
        content = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if path.suffix.lower() != ".jsonl":
        yield content
        return
    for number, line in enumerate(content.split("\n"), 1):  # JSON strings may hold the other line separators
        try:
            text = json.loads(line)["text"] if line.strip() else ""
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}, line {number}: no JSON object with a field text ({error!r})") from error
        if not isinstance(text, str):
            raise DataError(f"{path}, line {number}: text is {type(text).__name__}, not a string")
        yield text


def read_picture(path: Path, shape: tuple[int, int], *, channels: int = 1) -> np.ndarray:
    """uint8 [height, width] (grey), or [height, width, 3] with 3 channels."""
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError("reading pictures needs Pillow: pip install polylepis[quickstart]") from error
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB" if channels == 3 else "L").resize((shape[1], shape[0])))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no picture ({error})") from error


def picture_as_png(path: Path) -> bytes:
    """The picture as it is, as a PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    with Image.open(path) as image:
        image.convert("RGB").save(buffer, format="PNG")
    return buffer.getvalue()


def read_sound(path: Path, rate: int) -> np.ndarray:
    """int16 [n], the mean of the channels."""
    try:
        with wave.open(str(path), "rb") as file:
            channels, width, found = file.getnchannels(), file.getsampwidth(), file.getframerate()
            data = file.readframes(file.getnframes())
    except (OSError, wave.Error, EOFError) as error:
        raise DataError(f"{path} is no PCM .wav ({error})") from error
    if width != 2 or found != rate or not data:
        raise DataError(f"{path}: 16-bit samples at {rate} Hz are needed, got {8 * width}-bit at {found} Hz")
    samples = np.frombuffer(data[: len(data) // (2 * channels) * 2 * channels], dtype="<i2").reshape(-1, channels)
    return samples.mean(axis=1).astype(np.int16)


def read_bytes(path: Path) -> np.ndarray:
    """uint8 [n]; DataError for an empty file."""
    try:
        found = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    if not found.size:
        raise DataError(f"{path} is empty")
    return found


def read_series(path: Path) -> dict[str, np.ndarray]:
    """Column name -> float64 [rows] of a .csv, NaN where a field is empty.

    The first row may hold names; columns whose first value that is not empty is no number (dates, names) are left out.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [row for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    named = bool(rows) and not any(_is_number(field) for field in rows[0])
    names = rows[0] if named else [str(i) for i in range(len(rows[0]))] if rows else []
    body = rows[1:] if named else rows
    firsts = [next((row[i] for row in body if i < len(row) and row[i].strip()), "") for i in range(len(names))]
    chosen = [i for i, field in enumerate(firsts) if _is_number(field)]
    if not chosen or len(set(names)) != len(names):
        raise DataError(f"{path} holds no column of numbers, or two of one name")
    columns = np.empty((len(chosen), len(body)))
    for number, row in enumerate(body):
        try:
            if len(row) != len(names):
                raise ValueError(f"{len(row)} fields, {len(names)} expected")
            columns[:, number] = [float(row[i]) if row[i].strip() else np.nan for i in chosen]
        except ValueError as error:
            raise DataError(f"{path}, row {number + 1 + named}: {error}") from error
    if np.isinf(columns).any():
        raise DataError(f"{path} holds an infinite number")
    return {names[i]: column for i, column in zip(chosen, columns, strict=True)}


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True


def read_latents(path: Path) -> np.ndarray:
    """float32 [n, width]: the tensor `latents` of a safetensors file, of any floating type."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            found = file.get_tensor(TENSOR)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} is no safetensors file with a tensor {TENSOR!r} ({error})") from error
    if found.ndim != 2 or not found.is_floating_point() or not found.numel():
        raise DataError(f"{path}: latents are float [n, width], got {found.dtype} {list(found.shape)}")
    return found.float().numpy()


def read_megatron(path: Path, vocab_size: int) -> Iterator[np.ndarray]:
    """Ids int64 [n] of every document of a Megatron .bin/.idx pair, which must be below `vocab_size`."""
    try:
        from megatron.core.datasets.indexed_dataset import IndexedDataset
    except ImportError as error:
        raise DataError(f"reading {path} needs megatron-core") from error
    try:
        found = IndexedDataset(str(path.with_suffix("")))
    except Exception as error:  # damaged headers make it raise assertions and NumPy's errors
        raise DataError(f"{path.with_suffix('.idx')} is no Megatron index ({type(error).__name__}: {error})") from error
    edges = found.document_indices.tolist()
    for start, end in zip(edges[:-1], edges[1:], strict=True):
        ids = np.concatenate([np.asarray(found[i]) for i in range(start, end)] or [np.zeros(0)]).astype(np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
            raise DataError(
                f"{path}: ids {ids.min()}..{ids.max()}, but the tokenizer has {vocab_size}: give the tokenizer that "
                "they were made with"
            )
        yield ids
