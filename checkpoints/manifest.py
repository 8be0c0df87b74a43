"""The manifest of a checkpoint: written last, it says what the folder must hold, and so whether it is whole."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from .errors import CheckpointError

FORMAT = 2
# Formats that this version does not read, and who does. A newer one names its writer in its own manifest.
OLD_FORMATS = {1: "a development version before 0.1.0"}
MANIFEST = "manifest.json"
INDEX = ".metadata"  # DCP's


def hash_file(path: Path) -> dict[str, Any]:
    """Size and sha256 of a file."""
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def write_manifest(folder: Path, values: Mapping[str, Any]) -> None:
    """Write and flush the manifest, then the folder's entry of it."""
    with open(folder / MANIFEST, "w") as file:
        json.dump({"format": FORMAT, "polylepis": version(), **values}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)


def version() -> str:
    """Of this package; a plain checkout that is not installed has none."""
    try:
        return metadata.version("polylepis")
    except metadata.PackageNotFoundError:
        return "unknown"


def hash_config(config: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that name a resolved configuration."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest.

    Raises:
        CheckpointError: no manifest (an unfinished checkpoint), an unreadable one, or one of another format; then the
            message says which release reads it.
    """
    path = checkpoint / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{checkpoint}: no {MANIFEST} in it, so this is not a finished checkpoint")
    try:
        manifest = json.loads(path.read_text())
    except ValueError:
        raise CheckpointError(f"{path}: is not JSON, so the checkpoint cannot be trusted") from None
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        writer = OLD_FORMATS.get(found) or f"polylepis {manifest.get('polylepis', 'of another version')}"  # type: ignore[arg-type]
        raise CheckpointError(
            f"{path}: format {found}, which {writer} wrote and reads; this version ({version()}) reads format {FORMAT}"
        )
    return manifest


def damages(checkpoint: Path, content: bool = True) -> Iterator[str]:
    """One line for each file that is absent, of another size, or (`content`; the index always) of other content."""
    for name, expected in read_manifest(checkpoint).get("files", {}).items():
        path = checkpoint / name
        if not path.is_file():
            yield f"{name}: is missing"
        elif path.stat().st_size != expected["bytes"]:
            yield f"{name}: has {path.stat().st_size:,} bytes, but was written with {expected['bytes']:,}"
        elif (content or name == INDEX) and hash_file(path) != expected:
            yield f"{name}: its content has changed since it was written"


def complete_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step-*/{MANIFEST}"))


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest finished checkpoint, or None."""
    return next(reversed(complete_checkpoints(folder)), None)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def superfluous(folder: Path, keep: int, keep_every: int) -> list[Path]:
    """Checkpoints that may go: not among the newest `keep` (0: all stay), not at a multiple of `keep_every` steps."""
    if not keep:
        return []
    old = complete_checkpoints(folder)[:-keep]
    return [path for path in old if not (keep_every and step_of(path) % keep_every == 0)]


def discard(checkpoint: Path) -> None:
    """Remove a checkpoint. It stops being one by a rename, so that a crash half-way leaves none that looks whole."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def bring_back(folder: Path) -> None:
    """A checkpoint that a crash found between going and being replaced by its like comes back."""
    for old in folder.glob(".step-*.old"):
        original = old.with_name(old.stem.removeprefix("."))
        if (old / MANIFEST).is_file() and not original.exists() and not any(damages(old, content=False)):
            old.rename(original)


def clear_leftovers(folder: Path) -> None:
    """Remove what crashes have left in a folder in which nobody else is writing."""
    for left in (*folder.glob(".step-*.old"), *folder.glob(".step-*.part")):
        shutil.rmtree(left, ignore_errors=True)


def find_checkpoint(path: Path) -> Path:
    """A checkpoint, or the newest one of a run folder.

    Raises:
        CheckpointError: neither.
    """
    if (path / MANIFEST).is_file() and (path / INDEX).exists():
        return path
    newest = newest_checkpoint(path / "checkpoints")
    if newest is None:
        raise CheckpointError(f"{path}: neither a finished checkpoint nor a run folder that has one")
    return newest
