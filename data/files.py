"""Files that are either complete or absent: write aside, fsync, rename."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from .errors import DataError


def write_atomic(path: Path, payload: bytes) -> None:
    """Writes `payload` to `path` so that a killed process leaves the old file or none, never half of one."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Makes renames inside `folder` durable (a rename alone may be lost with the power)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_url(path: object) -> bool:
    """Whether this names a file system other than the local one, e.g. s3://bucket/folder."""
    return "://" in str(path)


def sha256_file(path: Path) -> str:
    """The file's sha256 as 64 hexadecimal digits.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def fingerprint(*parts: bytes) -> str:
    """128 bits of sha256 over length-prefixed `parts`, as 32 hexadecimal digits."""
    digest = hashlib.sha256()
    for part in parts:
        # The prefix keeps ("ab", "c") and ("a", "bc") apart.
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:32]
