"""When a build may take a folder: never over something else, and all at once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .dataset import Dataset
from .errors import DataError
from .files import fsync_folder
from .index import SUFFIX
from .manifest import MANIFEST, codec_file, read_manifest


def check_target(target: Path, generator: Mapping[str, Any], *, force: bool) -> bool:
    """Whether `target` already holds this data set, whole.

    Returns:
        True: it is there and opens; there is nothing to build. False: the place is free, or may be replaced.

    Raises:
        DataError: something else lies there and `force` is not set, or it is no data set at all (never replaced).
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    _refuse_strangers(target)
    manifest, _ = read_manifest(target)
    if manifest["generator"] == generator:
        try:
            Dataset.open(target)
            return True
        except DataError as error:
            if not force:
                raise DataError(f"{target} is this data set, but damaged ({error}); --force builds it again") from error
    elif not force:
        asked, there = dict(generator), manifest["generator"]
        names = [name for name in asked if there.get(name) != asked[name]]
        differs = ", ".join(f"{name} {there.get(name)!r} there, {asked[name]!r} asked" for name in names)
        raise DataError(f"{target} holds another data set ({differs}); choose another --out, or replace it by --force")
    return False


def install(folder: Path, target: Path, *, force: bool) -> None:
    """Moves a finished folder to `target` by renaming; an old data set there goes only after `force`.

    Raises:
        DataError: something has appeared at `target` meanwhile.
    """
    old = folder.with_name("replaced")
    if target.exists() and any(target.iterdir()):
        if not force:
            raise DataError(f"{target} has appeared while this build ran; nothing was overwritten")
        _refuse_strangers(target)
        os.rename(target, old)
    os.rename(folder, target)
    fsync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _refuse_strangers(target: Path) -> None:
    """DataError unless every file in `target` is one that a build writes."""
    if not target.is_dir():
        raise DataError(f"{target} is a file; give a folder that is new, empty or holds a data set")
    if not (target / MANIFEST).is_file():
        raise DataError(f"{target} is not empty and holds no {MANIFEST}; it is left alone: give another folder")
    manifest, _ = read_manifest(target)
    known = {MANIFEST, *manifest["files"], *(codec_file(modality) for modality in manifest.get("modalities", []))}
    for shards in manifest["splits"].values():
        for shard in shards:
            known |= {shard["name"], shard["name"] + SUFFIX, shard["name"] + ".idx"}
    strangers = sorted(entry.name for entry in target.iterdir() if entry.name not in known)
    if strangers:
        raise DataError(f"{target} also holds {strangers[0]!r}, which no build wrote; move it away first")
