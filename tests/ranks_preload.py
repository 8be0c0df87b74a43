"""Imported once by the fork server: everything that a rank needs."""

import torch

import polylepis.pretrain.train
from polylepis.parallel.megatron import preload

torch.set_num_threads(1)
preload()
__all__ = ["polylepis"]
