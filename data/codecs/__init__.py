"""Codecs: images and speech as integer codes, learnt without gradients in about a second, or pretrained."""

from __future__ import annotations

from pathlib import Path

from ..errors import DataError
from .base import Codec, load_arrays
from .hub import HubSpeech
from .image import PatchKMeans
from .speech import LogMelKMeans

__all__ = ["Codec", "HubSpeech", "LogMelKMeans", "PatchKMeans", "load_codec"]


def load_codec(path: str | Path) -> PatchKMeans | LogMelKMeans | HubSpeech:
    """Reads any codec that this version knows; DataError for another."""
    settings, _ = load_arrays(Path(path))
    for known in (PatchKMeans, LogMelKMeans, HubSpeech):
        if settings.get("id") == known.id:
            return known.load(path)
    raise DataError(
        f"{path}: unknown codec {settings.get('id')!r}; known are {PatchKMeans.id}, {LogMelKMeans.id}, {HubSpeech.id}"
    )
