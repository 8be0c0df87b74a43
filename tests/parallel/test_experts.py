"""Expert parallelism equals one process: loss, norm and every gradient, whatever the other axes and the routing."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from equivalence import assert_equal_gradients, gradients, gradients_alone
from polylepis.parallel.mesh import ContextConfig, MeshConfig
from ranks import run_ranks
from toys import ALL_ROUTED, toy

MOE = dataclasses.replace(toy("E").moe, n_experts=4, d_ff=16)
CONFIG = toy("M*E-E", ALL_ROUTED, moe=MOE)

MESHES = {
    "ep": (MeshConfig(dp_shard=2, ep=2), None),
    "ep × edp": (MeshConfig(dp_shard=4, ep=2), None),
    "ep4": (MeshConfig(dp_shard=4, ep=4), None),
    "ep × tp": (MeshConfig(dp_shard=2, tp=2, ep=2), None),
    "ep × cp": (MeshConfig(dp_shard=1, cp=2, ep=2), ContextConfig("zigzag", "state", "gather")),
    "ep × replicas": (MeshConfig(dp_replicate=2, dp_shard=2, ep=2), None),
}


@pytest.mark.parametrize("name", MESHES)
def test_expert_parallel(name: str) -> None:
    mesh, context = MESHES[name]
    expected = gradients_alone(CONFIG, torch.float64, (1,))
    world = mesh.dp_replicate * mesh.dp_shard * mesh.cp * mesh.tp
    for result in run_ranks(world, gradients, CONFIG, mesh, torch.float64, (1,), context):
        assert_equal_gradients(result, expected, 1e-9)
