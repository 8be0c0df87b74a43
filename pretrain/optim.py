"""AdamW and its learning-rate schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from ..parallel.engines.fsdp import decay_groups
from ..parallel.model import HybridModel
from .errors import ConfigError


@dataclass(frozen=True)
class OptimConfig:
    """AdamW; decay falls on matrices of projections and embeddings, never on norms, biases, A, D or convolutions.

    Attributes:
        lr, min_lr: peak and final learning rate.
        warmup: steps of linear warm-up.
        schedule: `cosine` or `constant` after the warm-up, or `wsd` (constant, then linear over the last fifth).
        clip: largest gradient norm, 0 for no clipping.
    """

    lr: float = 3e-4
    min_lr: float = 3e-5
    warmup: int = 100
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0

    __pydantic_config__ = {"extra": "forbid"}

    def check(self) -> None:
        """Refuse values that cannot train."""
        if not 0 <= self.min_lr <= self.lr:
            raise ConfigError(f"optim: need 0 ≤ min_lr ≤ lr, got min_lr {self.min_lr} and lr {self.lr}")
        if self.warmup < 0 or self.clip < 0 or self.weight_decay < 0:
            raise ConfigError("optim: warmup, clip and weight_decay must not be negative")

    def factor(self, step: int, steps: int) -> float:
        """Learning rate of step `step` (from 0) of `steps`, over the peak."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        floor = self.min_lr / self.lr if self.lr else 0.0
        progress = min(1.0, (step - self.warmup) / max(1, steps - self.warmup))
        if self.schedule == "constant":
            return 1.0
        if self.schedule == "wsd":
            return floor + (1 - floor) * min(1.0, (1 - progress) / 0.2)
        return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2


def build_optimizer(config: OptimConfig, *models: HybridModel) -> torch.optim.AdamW:
    """AdamW over the sharded parameters of this rank; `lr` is set before each step from `OptimConfig.factor`."""
    both = [decay_groups(model) for model in models]
    decayed, plain = ([p for groups in both for p in groups[i]] for i in (0, 1))
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
