"""Continuous latents: vectors beside the tokens of a document, in bfloat16 or float16, one for each of its slots.

A continuous modality has a single code, its slot: a span of it is begin, one slot per vector, end, so that it takes
positions, is packed and is never split like any other span. The vectors of all slots of a document stand, in order, in
one safetensors member; the index knows where, how many, and what they hash to.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

import numpy as np

from .errors import DataError
from .vocabulary import Vocabulary

MEMBER = "latents.safetensors"
TENSOR = "latents"
# name here -> (safetensors' name, largest finite value)
DTYPES = {"bfloat16": ("BF16", 3.3895313892515355e38), "float16": ("F16", 65504.0)}
_BYTES = 2
_MOST_HEADER = 1 << 16


@dataclass(frozen=True)
class LatentFormat:
    """What the latents of a data set are; the same for all of its continuous modalities.

    Attributes:
        width: numbers per vector (d).
        dtype: "bfloat16" or "float16", in shards and batches.
        modalities: the continuous ones, in bank order.
    """

    width: int
    dtype: str
    modalities: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.width < 1 or self.dtype not in DTYPES or not self.modalities:
            raise DataError(
                f"latents need a width >= 1, a type among {', '.join(DTYPES)} and a modality, got {self.width}, "
                f"{self.dtype!r} and {list(self.modalities)}"
            )

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "modalities": list(self.modalities)}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """The format of `to_json`; DataError when a field is missing or malformed."""
        try:
            return cls(int(fields["width"]), str(fields["dtype"]), tuple(map(str, fields["modalities"])))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"no description of latents ({error!r})") from error

    @classmethod
    def of(cls, codecs: Mapping[str, Any]) -> Self | None:
        """The format that the continuous ones of `codecs` share; None without any; DataError when they differ."""
        found = {name: codec for name, codec in codecs.items() if codec.kind == "continuous"}
        formats = {name: (codec.width, codec.dtype) for name, codec in found.items()}
        if len(set(formats.values())) > 1:
            raise DataError(
                "continuous modalities of one data set share width and type: "
                + ", ".join(f"{name} has {width} x {dtype}" for name, (width, dtype) in formats.items())
            )
        return cls(*next(iter(formats.values())), tuple(found)) if found else None


def slot_table(vocabulary: Vocabulary, form: LatentFormat) -> np.ndarray:
    """bool [size]: whether a token stands for a vector; DataError unless continuous modalities have one code each."""
    table = np.zeros(vocabulary.size, dtype=bool)
    for modality in form.modalities:
        ids = vocabulary.range_of(modality)
        if len(ids) != 1:
            raise DataError(f"{modality} is continuous and has one code, its slot, but the vocabulary has {len(ids)}")
        table[ids.start] = True
    return table


def slot_counts(tokens: np.ndarray, vocabulary: Vocabulary, form: LatentFormat) -> list[int]:
    """Slots of each modality of the vocabulary among `tokens` [n]; 0 for discrete ones."""
    return [
        int((tokens == vocabulary.range_of(name).start).sum()) if name in form.modalities else 0
        for name in vocabulary.modalities
    ]


def to_bits(latents: np.ndarray, form: LatentFormat, where: str) -> np.ndarray:
    """Vectors float [n, width] rounded to the stored type, as bits uint16 [n, width].

    Raises:
        DataError: another shape, or numbers that the type cannot hold (not finite, too large); names `where`.
    """
    import torch

    array = np.asarray(latents)
    if array.ndim != 2 or array.shape[1] != form.width or not np.issubdtype(array.dtype, np.floating):
        raise DataError(f"{where}: latents are float [n, {form.width}], got {array.dtype} {list(array.shape)}")
    most = DTYPES[form.dtype][1]
    if not np.isfinite(array).all() or (array.size and np.abs(array).max() > most):
        raise DataError(f"{where}: latents must be finite and at most {most:g} in {form.dtype}")
    rounded = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)).to(getattr(torch, form.dtype))
    return rounded.view(torch.int16).numpy().view(np.uint16)


def to_float(bits: np.ndarray, form: LatentFormat) -> np.ndarray:
    """float32 [n, width] of stored bits uint16 [n, width]."""
    if form.dtype == "float16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_member(bits: np.ndarray, form: LatentFormat) -> bytes:
    """A safetensors file with one tensor; any reader of that format opens it."""
    import torch
    from safetensors.torch import save

    return save({TENSOR: torch.from_numpy(bits.view(np.int16)).view(getattr(torch, form.dtype))})


def parse_member(payload: bytes, where: str) -> tuple[int, int, str]:
    """(rows, width, type) of a member's tensor, whose bytes are the member's last rows * width * 2.

    Read by hand because indexing wants the place of the bytes and no copy of them; nothing is allocated or run.

    Raises:
        DataError: it is no safetensors file with exactly this one tensor.
    """
    try:
        size = int.from_bytes(payload[:8], "little")
        if len(payload) < 8 or size > min(_MOST_HEADER, len(payload) - 8):
            raise ValueError(f"a header of {size} bytes")
        header = json.loads(payload[8 : 8 + size])
        entry = header[TENSOR]
        (rows, width), (start, end) = entry["shape"], entry["data_offsets"]
        dtype = next(name for name, (theirs, _) in DTYPES.items() if theirs == entry["dtype"])
        whole = all(isinstance(x, int) and x >= 0 for x in (rows, width, start, end))
        if set(header) - {"__metadata__"} != {TENSOR} or not whole or start or rows < 1 or width < 1:
            raise ValueError("not one tensor of vectors")
        if not end == rows * width * _BYTES == len(payload) - 8 - size:
            raise ValueError(f"{rows} x {width} announced, {len(payload) - 8 - size} bytes there")
    except (ValueError, KeyError, TypeError, StopIteration, RecursionError) as error:
        raise DataError(f"{where}: {MEMBER} is no safetensors file with one tensor {TENSOR!r} ({error!r})") from error
    return rows, width, dtype


@dataclass(frozen=True)
class LatentRows:
    """Where the latents of n documents over M modalities lie in their tars.

    Attributes:
        latent_offset, latent_bytes: int64 [n], of the vectors alone (0, 0 for a document without any).
        latent_crc32: uint32 [n], of those bytes.
        latent_counts: int64 [n, M], vectors (slots) by modality.
    """

    latent_offset: np.ndarray
    latent_bytes: np.ndarray
    latent_crc32: np.ndarray
    latent_counts: np.ndarray

    ARRAYS: ClassVar[tuple[str, ...]] = ("latent_offset", "latent_bytes", "latent_crc32", "latent_counts")

    @classmethod
    def none(cls, n: int, modalities: int) -> Self:
        """Rows of n documents without latents."""
        zeros = np.zeros(n, dtype=np.int64)
        return cls(zeros, zeros, np.zeros(n, dtype=np.uint32), np.zeros((n, modalities), dtype=np.int64))

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """Rows of several shards as one."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in cls.ARRAYS))

    def arrays(self) -> dict[str, np.ndarray]:
        """By name, as the index stores them."""
        return {name: getattr(self, name) for name in self.ARRAYS}

    def contradiction(self, header: Mapping[str, Any], modality_lengths: np.ndarray) -> str | None:
        """Why these cannot be the latents of documents of `modality_lengths` int64 [n, M], or None."""
        n = len(modality_lengths)
        for name, array in self.arrays().items():
            shape = modality_lengths.shape if name == "latent_counts" else (n,)
            dtype = np.dtype(np.uint32 if name == "latent_crc32" else np.int64)
            if array.shape != shape or array.dtype != dtype:
                return f"{name} is {array.dtype} {list(array.shape)}"
            if array.dtype == np.int64 and (array.min() < 0 or array.max() > max(header["bytes"], 0)):
                return f"{name} points outside the tar"
        try:
            width = LatentFormat(header["latents"]["width"], header["latents"]["dtype"], ("any",)).width
        except (KeyError, TypeError, DataError) as error:
            return f"its header does not say what the latents are ({error})"
        if not np.array_equal(self.latent_counts.sum(axis=1) * width * _BYTES, self.latent_bytes):
            return "numbers of latents and their bytes do not match"
        if (self.latent_counts > modality_lengths).any():
            return "a document has more latents than tokens"
        if (self.latent_offset + self.latent_bytes > header["bytes"]).any():
            return "latents lie outside the tar"
        return None


def most_in_a_row(lengths: np.ndarray, counts: np.ndarray, seq_len: int) -> int:
    """An upper bound, the same in every step, of the latents in a row of `seq_len` tokens.

    Documents i of a row have sum(counts_i) <= max(counts_i / lengths_i) * sum(lengths_i), and the latter is <= seq_len.

    Args:
        lengths, counts: int64 [n], tokens and latents per document.
    """
    return int((seq_len * counts // lengths).max(initial=0))
