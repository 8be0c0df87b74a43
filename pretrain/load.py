"""A trained run, loaded on one process whatever mesh it was trained on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from ..checkpoints.manifest import newest_checkpoint
from ..checkpoints.sharded import load_checkpoint
from ..data.dataset import Dataset
from ..parallel.engines.fsdp import build_model
from ..parallel.mesh import MeshConfig, build_mesh
from ..parallel.model import HybridModel
from .config import CONFIG_FILE, RunConfig, load_config
from .errors import ConfigError
from .prepare import open_data


@dataclass(frozen=True)
class LoadedRun:
    """A run's configuration, data, newest checkpoint (its step) and model in evaluation mode."""

    config: RunConfig
    dataset: Dataset
    model: HybridModel
    step: int


def load_run(folder: Path, device: str = "cpu") -> LoadedRun:
    """Load the newest finished checkpoint of a run folder on this process alone.

    Raises:
        ConfigError: not a run folder, nothing trained yet, or trained on mock data.
        DataError, CheckpointError: its data or checkpoint cannot be read.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise ConfigError(f"{folder}: no {CONFIG_FILE} in it, so this is no run folder; train first")
    config = load_config(str(folder))
    # The folder may have been moved since; what lies beside the configuration is what is meant.
    checkpoint = newest_checkpoint(folder / "checkpoints")
    if checkpoint is None:
        raise ConfigError(f"{folder}: no finished checkpoint yet; train it first")
    dataset = open_data(config)
    if not isinstance(dataset, Dataset):
        raise ConfigError(f"{folder}: was trained on mock data, there is nothing to evaluate or generate")
    torch.set_num_threads(os.cpu_count() or 1)
    model = build_model(config.model, build_mesh(MeshConfig(dp_shard=1), device))
    step = load_checkpoint(checkpoint, model)["step"]
    return LoadedRun(config, dataset, model.eval(), step)
