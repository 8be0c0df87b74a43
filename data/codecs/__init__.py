"""Codecs: pictures, sounds, bytes, series and latents as codes or vectors; learnt in a second, pretrained, or plain."""

from __future__ import annotations

from pathlib import Path

from ..errors import DataError
from .base import Codec, load_arrays
from .hub import HubSpeech
from .hub_image import HubImage, HubLatents, open_picture_model
from .image import PatchKMeans
from .plain import ByteCodec, GivenLatents, SeriesCodec
from .speech import LogMelKMeans

__all__ = [
    "ByteCodec",
    "Codec",
    "GivenLatents",
    "HubImage",
    "HubLatents",
    "HubSpeech",
    "LogMelKMeans",
    "PatchKMeans",
    "SeriesCodec",
    "describe_codec",
    "load_codec",
    "open_picture_model",
]

_KNOWN = (PatchKMeans, LogMelKMeans, HubSpeech, HubImage, HubLatents, ByteCodec, SeriesCodec, GivenLatents)


def load_codec(path: str | Path) -> Codec:
    """Reads any codec that this version knows; DataError for another."""
    settings, _ = load_arrays(Path(path))
    for known in _KNOWN:
        if settings.get("id") == known.id:
            return known.load(path)
    raise DataError(f"{path}: unknown codec {settings.get('id')!r}; known are {', '.join(one.id for one in _KNOWN)}")


def describe_codec(codec: Codec) -> str:
    """What a codec makes of its arrays, for people: "patch-kmeans, 512 codes, 32x32 pixels in colour"."""
    parts = [codec.id, f"{codec.vocab_size:,d} codes" if codec.kind == "discrete" else "latents"]
    if shape := getattr(codec, "image_shape", None):
        colour = "in colour" if getattr(codec, "channels", 1) == 3 else "grey"
        parts.append(f"{shape[0]}x{shape[1]} pixels {colour}")
    if rate := getattr(codec, "rate", None):
        parts.append(f"{rate} Hz")
    return ", ".join(parts)
