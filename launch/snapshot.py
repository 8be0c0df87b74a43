"""What a job will run, kept in the run folder: resolved configuration, code, and where the code came from."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent.parent
ROOMS = ("kernels", "parallel", "data", "checkpoints", "pretrain", "launch")
SUFFIXES = (".py", ".yaml", ".j2", ".typed")


def package_files() -> list[Path]:
    """The files that the package consists of, relative to it."""
    found = [path for room in ROOMS for path in (PACKAGE / room).rglob("*")]
    found += [PACKAGE / "__init__.py", PACKAGE / "py.typed"]
    return sorted(path.relative_to(PACKAGE) for path in found if path.suffix in SUFFIXES and path.is_file())


def code_hash() -> str:
    """16 hexadecimal digits over names and contents of the package's files: equal on nodes that run the same code."""
    digest = hashlib.sha256()
    for file in package_files():
        digest.update(str(file).encode() + b"\0" + (PACKAGE / file).read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def next_folder(run: Path) -> Path:
    """A new numbered folder `RUN/launch/0001` for one launch; nothing is made yet."""
    numbers = [int(path.name) for path in (run / "launch").glob("[0-9][0-9][0-9][0-9]")]
    return run / "launch" / f"{max(numbers, default=0) + 1:04d}"


def take_snapshot(folder: Path) -> None:
    """Copy the package to `folder/code/polylepis` and describe its origin in `folder/code.json`; a git tree's
    uncommitted changes go to `folder/code.diff`."""
    target = folder / "code" / "polylepis"
    for file in package_files():
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(PACKAGE / file, target / file)
    origin: dict[str, Any] = {"code_hash": code_hash(), "commit": None, "changed_files": None}
    commit = _git("rev-parse", "HEAD") if (PACKAGE / ".git").exists() else None
    if commit is not None:
        diff = _git("diff", "HEAD", "--binary") or ""
        (folder / "code.diff").write_text(diff)
        changed = (_git("status", "--porcelain") or "").splitlines()
        origin |= {"commit": commit.strip(), "changed_files": [line[3:] for line in changed]}
    (folder / "code.json").write_text(json.dumps(origin, indent=1) + "\n")


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", *arguments], cwd=PACKAGE, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return result.stdout if result.returncode == 0 else None
