"""What the tests of saving share: a toy model that changes from step to step, and all of its state."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor

from polylepis.checkpoints.tensors import state_tensors
from polylepis.parallel.engines.fsdp import build_model
from polylepis.parallel.layout import Layout
from polylepis.parallel.mesh import MeshConfig, build_mesh
from polylepis.parallel.model import HybridModel
from polylepis.pretrain.optim import OptimConfig, build_optimizer
from toys import ALL_ROUTED, toy, toy_batch

CONFIG = toy("M*-E", ALL_ROUTED)
State = tuple[HybridModel, torch.optim.Optimizer]


def model_and_optimizer(mesh_config: MeshConfig, seed: int) -> State:
    mesh = build_mesh(mesh_config, "cpu")
    model = build_model(CONFIG, mesh, seed=seed)
    return model, build_optimizer(OptimConfig(), model)


def step(model: HybridModel, optimizer: torch.optim.Optimizer) -> None:
    """One step on a fixed batch."""
    batch = toy_batch([[13, 1, 9], [20]], 24)
    layout = Layout.from_batch(batch, 3, model.mesh.device)
    model(batch["tokens"].reshape(-1), layout, batch["labels"].reshape(-1)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def local_state(state: State) -> dict[str, torch.Tensor]:
    """Copies of all that this rank holds."""
    tensors = state_tensors((state[0],), state[1])
    return {n: (t.to_local() if isinstance(t, DTensor) else t).clone() for n, t in tensors.items()}


def differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Names whose bits differ."""
    return sorted(n for n in a.keys() | b.keys() if n not in a or n not in b or not torch.equal(a[n], b[n]))
