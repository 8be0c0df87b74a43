"""A foreign checkpoint becomes a run folder: a configuration and a checkpoint at step 0, written tensor by tensor."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml
from torch import Tensor

from ...parallel.mesh import MeshConfig, build_mesh
from ...parallel.model import count_parameters
from ..errors import CheckpointError
from ..saving import write_checkpoint
from ..transforms import Source
from . import hf, mamba_ssm, megatron
from .base import Foreign

READERS = {"hf": hf.read, "mamba_ssm": mamba_ssm.read, "megatron": megatron.read}
