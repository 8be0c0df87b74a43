"""Set before anything imports torch; helper modules of each folder are importable by their own name."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
for room in ("parallel", "checkpoints", "pretrain"):
    sys.path.insert(0, str(Path(__file__).parent / room))
