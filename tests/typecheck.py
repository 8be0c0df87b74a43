"""Run mypy on the package through a scratch link called `polylepis`, whatever the clone's folder is called."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROOMS = ("kernels", "data", "parallel", "checkpoints", "pretrain", "launch")


def main() -> int:
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "polylepis").symlink_to(ROOT)
        packages = [argument for room in ROOMS for argument in ("-p", f"polylepis.{room}")]
        command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), *packages]
        environment = os.environ | {"MYPY_CACHE_DIR": str(ROOT / ".mypy_cache")}
        return subprocess.run(command, cwd=scratch, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
