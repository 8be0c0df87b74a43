"""Imported once by the fork server: everything that a rank needs."""

import importlib.util
import os
import tempfile
from pathlib import Path

import torch

import polylepis.pretrain.train
from polylepis.parallel.megatron import preload
from polylepis.pretrain.meter.tracker import plot_losses

if importlib.util.find_spec("deepspeed"):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed  # noqa: F401
torch.set_num_threads(1)
preload()
if importlib.util.find_spec("matplotlib"):  # the first picture of a process costs half a CPU second
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "metrics.jsonl").write_text('{"step": 1, "loss/text": 1.0}\n')
        plot_losses(Path(folder), ["text"])
__all__ = ["polylepis"]
