"""Imported once by the fork server: everything that a rank needs."""

import importlib.util
import os

import torch

import polylepis.pretrain.train
from polylepis.parallel.megatron import preload

if importlib.util.find_spec("deepspeed"):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed  # noqa: F401
torch.set_num_threads(1)
preload()
__all__ = ["polylepis"]
