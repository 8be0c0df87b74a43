"""What the planner expected of this rank's memory; asked only when memory has run out."""

from __future__ import annotations

from dataclasses import asdict, replace

import torch.distributed as dist

from ...parallel.errors import PlanError
from ...parallel.pipeline.cost import Roofline
from ...parallel.pipeline.devices import find_device
from ..config import RunConfig
from ..errors import ConfigError
from ..plan.estimate import estimate

ANY_GPU = "h100"  # bytes do not depend on which one it is


def planned_memory(config: RunConfig, pp_rank: int) -> dict[str, float] | None:
    """Bytes by part of this pipeline rank, None where the planner cannot price the run."""
    try:
        resolved = replace(config, mesh=config.mesh.resolve(dist.get_world_size()))
        return asdict(estimate(resolved, Roofline(find_device(ANY_GPU))).memory[pp_rank])
    except (PlanError, ConfigError):
        return None
