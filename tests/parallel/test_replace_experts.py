"""Experts that move between ep ranks, moments with them: training goes on as if nothing had moved."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from equivalence import batches
from pipelines import placed_engine
from polylepis.checkpoints.tensors import state_tensors
from polylepis.parallel.engines.fsdp import build_model
from polylepis.parallel.errors import PlanError
from polylepis.parallel.kinds.moe import MoEConfig
from polylepis.parallel.mesh import ContextConfig, MeshConfig, build_mesh
from polylepis.parallel.model import ModelConfig
from polylepis.parallel.parts import named_parts, whole_entries
from polylepis.parallel.replace_experts import replace_experts
from polylepis.pretrain.experts import finish_experts
from polylepis.pretrain.optim import OptimConfig, build_optimizer
from ranks import run_ranks
from toys import ALL_ROUTED, toy

MOE = MoEConfig(
    n_experts=8, top_k=2, d_ff=16, d_ff_shared=12, activation="swiglu", aux_sequence=0.1, bias_update_rate=0.01
)
CONFIG = toy("M*EE", ALL_ROUTED, moe=MOE)
MOVED = ({2: (5, 0, 7, 2, 1, 6, 3, 4), 3: (7, 6, 5, 4, 3, 2, 1, 0)}, {2: (1, 0, 2, 3, 4, 5, 7, 6)})
Result = tuple[list[float], dict[str, Tensor], list[str]]


def trained(
    config: ModelConfig, mesh_config: MeshConfig, context: ContextConfig | None, moves: tuple[dict[int, Any], ...]
) -> Result:
    """Norms of three fp64 steps, the experts moved between them; parameters, moments and what lies on this rank."""
    engine = placed_engine(config, mesh_config, context)
    mesh = engine.mesh
    total = sum(float(b["loss_weight"].double().sum()) for b in batches())
    norms = []
    for step in range(3):
        engine.accumulate(batches()[mesh.dp_rank :: mesh.dp_size], total)
        norms.append(engine.gradient_norm())
        engine.update(0.01)
        finish_experts(engine)
        if step < len(moves):
            replace_experts(engine.models, engine.optimizer, moves[step])
    found: dict[str, Tensor] = {}
    for name, parameter, part in (entry for m in engine.models for entry in named_parts(m)):
        state = engine.optimizer.state[parameter]
        for prefix, value in (("", parameter), ("m.", state["exp_avg"]), ("v.", state["exp_avg_sq"])):
            assert isinstance(value, DTensor)
            found.update(whole_entries(value.detach(), part, prefix + name))
    here = [name for name in state_tensors(engine.models, engine.optimizer) if "layers.2.mixer.up_proj.weight" in name]
    return norms, found, here


MESHES = {
    "alone": (MeshConfig(), None),
    "ep × edp": (MeshConfig(dp_shard=4, ep=2), None),
    "ep × tp": (MeshConfig(dp_shard=2, tp=2, ep=2), None),
    "ep4": (MeshConfig(dp_shard=4, ep=4), None),
    "pp × ep": (MeshConfig(dp_shard=2, pp=2, ep=2), None),
    "ep × cp": (MeshConfig(dp_shard=1, cp=2, ep=2), ContextConfig("zigzag", "state", "gather")),
}
SLOW = ("ep × tp", "ep4", "ep × cp")


@pytest.fixture(scope="module")
def unmoved() -> Result:
    return run_ranks(1, trained, CONFIG, MeshConfig(), None, ())[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.full) if n in SLOW else n for n in MESHES])
def test_training_is_the_same(name: str, unmoved: Result) -> None:
    mesh, context = MESHES[name]
    results = run_ranks(mesh.n_processes, trained, CONFIG, mesh, context, MOVED, timeout=300)
    seen: dict[str, Tensor] = {}
    for norms, found, _ in results:
        assert norms == pytest.approx(unmoved[0], rel=1e-9)
        seen.update(found)
    assert seen.keys() == unmoved[1].keys()
    for key, value in unmoved[1].items():
        torch.testing.assert_close(seen[key], value, rtol=1e-7, atol=1e-9, msg=key)


def test_checkpoints_name_what_lies_here() -> None:
    """Over ep 2 after both moves slots hold 1, 0, 2, 3 | 4, 5, 7, 6; moments too."""
    results = run_ranks(2, trained, CONFIG, MeshConfig(dp_shard=2, ep=2), None, MOVED)
    names = [n for n in results[1][2] if n.startswith("layers.2.mixer.up_proj.weight.experts.")]
    assert [n.rpartition(".")[2] for n in names] == ["4", "5", "7", "6"]
    moments = [n.rpartition(".")[2] for n in results[0][2] if n.startswith("optimizer.exp_avg.")]
    assert moments == ["1", "0", "2", "3"]


def test_refusals() -> None:
    model = build_model(dataclasses.replace(CONFIG, pattern="E"), build_mesh(MeshConfig(), "cpu"))
    optimizer = build_optimizer(OptimConfig(), model)
    with pytest.raises(PlanError, match=r"placement of layer 0: each of the 8 experts must have exactly one slot"):
        replace_experts([model], optimizer, {0: (0, 0, 1, 2, 3, 4, 5, 6)})
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with pytest.raises(PlanError, match="has a gradient; experts move between steps only"):
        replace_experts([model], optimizer, {0: tuple(range(8))})
