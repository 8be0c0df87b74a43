"""Experts with several slots: their copies share tokens, gradients and optimizer steps as if there were one of each."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.tensor import DTensor

from equivalence import assert_equal_gradients, batches, whole_gradients
from pipelines import placed_engine
from polylepis.parallel.engines.fsdp import build_model
from polylepis.parallel.errors import PlanError
from polylepis.parallel.kinds import moe as moe_module
from polylepis.parallel.kinds.moe import MoE, MoEConfig
from polylepis.parallel.mesh import ContextConfig, MeshConfig, build_mesh
from polylepis.parallel.parts import named_parts, whole_entries
from polylepis.parallel.placement import busiest, first_slots, place_experts, primaries
from polylepis.parallel.replace_experts import replace_experts
from polylepis.parallel.routing import Dispatch, Slots
from polylepis.pretrain.experts import expert_layers, finish_experts, place_by_load
from polylepis.pretrain.optim import OptimConfig, build_optimizer
from ranks import run_ranks
from toys import ALL_ROUTED, toy

MOE = MoEConfig(n_experts=8, top_k=2, d_ff=12, d_ff_shared=12, aux_sequence=0.1, bias_update_rate=0.01)
CONFIG = toy("M*EE", ALL_ROUTED, moe=MOE)
SKEWED = (1.5, 0.4, 0.0, 0.0, -0.3, 0.0, 0.2, -0.5)
Result = tuple[Any, list[float], dict[str, Tensor]]


def trained(mesh_config: MeshConfig, context: ContextConfig | None = None) -> Result:
    """Gradients of the first of four fp64 steps, the norms of all, and parameters and moments at the end; the experts
    are placed after each step where they have spare slots. Replicas are compared with their experts bit by bit."""
    engine = placed_engine(CONFIG, mesh_config, context, SKEWED)
    mesh, data = engine.mesh, batches()
    total = sum(float(b["loss_weight"].double().sum()) for b in data)
    gradients: dict[str, Tensor] = {}
    norms, layouts = [], set()
    for step in range(4):
        engine.accumulate(data[mesh.dp_rank :: mesh.dp_size], total)
        norms.append(engine.gradient_norm())
        if step == 0:
            gradients = {name: grad.clone() for name, grad in whole_gradients(engine.models).items()}
        if norms[-1] > 0.2:
            engine.scale(0.2 / norms[-1])
        engine.update(0.01)
        finish_experts(engine)
        if mesh.ep_spare:
            place_by_load(engine)
            layouts |= {(index, *layer.slots.tolist()) for index, layer in expert_layers(engine).items()}
    assert not layouts or len(layouts) > len(expert_layers(engine)), "the placement must have changed meanwhile"
    found: dict[str, Tensor] = {}
    for name, parameter, part in (entry for m in engine.models for entry in named_parts(m)):
        state = engine.optimizer.state[parameter]
        for prefix, value in (("", parameter), ("m.", state["exp_avg"]), ("v.", state["exp_avg_sq"])):
            assert isinstance(value, DTensor)
            found.update(whole_entries(value.detach(), part, prefix + name))
            if part.expert:
                everything = value.detach().full_tensor()
                for slot, expert in enumerate(part.entries):
                    assert torch.equal(everything[slot], everything[part.entries.index(expert)]), (prefix + name, slot)
    return gradients, norms, found


MESHES = {
    "ep": (MeshConfig(dp_shard=2, ep=2, ep_spare=1), None),
    "ep4": (MeshConfig(dp_shard=4, ep=4, ep_spare=2), None),
    "ep × edp": (MeshConfig(dp_shard=4, ep=2, ep_spare=3), None),
    "ep × tp": (MeshConfig(dp_shard=2, tp=2, ep=2, ep_spare=1), None),
    "pp × ep": (MeshConfig(dp_shard=2, pp=2, ep=2, ep_spare=1), None),
    "ep × cp": (MeshConfig(dp_shard=1, cp=2, ep=2, ep_spare=1), ContextConfig("zigzag", "state", "gather")),
    "ep × replicas": (MeshConfig(dp_replicate=2, dp_shard=2, ep=2, ep_spare=1), None),
}
QUICK = ("ep", "ep4", "pp × ep")


@pytest.fixture(scope="module")
def alone() -> Result:
    return run_ranks(1, trained, MeshConfig())[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.full) for n in MESHES])
def test_training_with_replicas_is_training_without(name: str, alone: Result) -> None:
    mesh, context = MESHES[name]
    gradients: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}
    for grads, norms, found in run_ranks(mesh.n_processes, trained, mesh, context, timeout=300):
        assert norms == pytest.approx(alone[1], rel=1e-9)
        gradients.update(grads)
        seen.update(found)
    assert_equal_gradients((1.0, 1.0, gradients), (1.0, 1.0, alone[0]), 1e-9)
    assert seen.keys() == alone[2].keys()
    for key, value in alone[2].items():
        torch.testing.assert_close(seen[key], value, rtol=1e-7, atol=1e-9, msg=key)


def rows_of_ranks(spare: int) -> list[float]:
    """Rows that arrived at the busiest ep rank over the mean, layer by layer, after a placement by what came before."""
    engine = placed_engine(CONFIG, MeshConfig(dp_shard=4, ep=4, ep_spare=spare), bias=SKEWED)
    mesh, data, arrived, original = engine.mesh, batches(), [], moe_module.dispatch

    def counted(*args: Any) -> Dispatch:
        plan = original(*args)
        arrived.append(sum(plan.counts))
        return plan

    for step in range(2):
        if step:
            moe_module.dispatch = counted
            place_by_load(engine)
        engine.accumulate(data[mesh.dp_rank :: mesh.dp_size], 100.0)
        engine.discard()
        finish_experts(engine)
    everyone = torch.zeros(mesh.ep_size, len(arrived), dtype=torch.int64)
    everyone[mesh.ep_rank] = torch.tensor(arrived)
    dist.all_reduce(everyone)
    return (everyone.amax(dim=0) / everyone.double().mean(dim=0)).tolist()


def test_replicas_take_load_off_the_busiest_rank() -> None:
    """Counted in rows that arrived, not computed from loads: lower than the best permutation, in both layers."""
    moved, replicated = run_ranks(4, rows_of_ranks, 0)[0], run_ranks(4, rows_of_ranks, 1)[0]
    assert len(moved) == len(replicated) == 2
    assert all(r < 1 + 0.75 * (m - 1) for m, r in zip(moved, replicated, strict=True)), (moved, replicated)


@given(
    loads=st.lists(st.integers(0, 50), min_size=4, max_size=4),
    spare=st.integers(0, 3),
    turn=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_rows_of_an_expert_take_its_slots_in_turn(loads: list[int], spare: int, turn: int, seed: int) -> None:
    placement = torch.tensor(place_experts(loads, 4 + 2 * spare, 2))
    experts = torch.repeat_interleave(torch.arange(4), torch.tensor(loads))
    experts = experts[torch.randperm(len(experts), generator=torch.Generator().manual_seed(seed))]
    slots = Slots.of(placement, 4).of_rows(experts, turn)
    assert torch.equal(placement[slots], experts)
    taken = torch.bincount(slots, minlength=len(placement))
    for expert in range(4):
        shares = taken[placement == expert]
        assert shares.sum() == loads[expert] and shares.max() - shares.min() <= 1


def test_first_slots_and_primaries() -> None:
    assert first_slots(6, 3) == tuple(range(6))
    assert first_slots(6, 3, 1) == (0, 1, 2, 2, 3, 4, 4, 5, 0)
    assert primaries(first_slots(6, 3, 1)) == [True, True, True, False, True, True, False, True, False]
    assert busiest([6.0, 0, 0, 0, 0, 0], first_slots(6, 3, 1), 3) == 1.5


def layer_of_two() -> MoE:
    model = build_model(toy("E", moe=MOE), build_mesh(MeshConfig(dp_shard=2, ep=2, ep_spare=1), "cpu"))
    with pytest.raises(PlanError, match=r"each of the 8 experts must have at least one of the 10 slots"):
        replace_experts([model], build_optimizer(OptimConfig(), model), {0: (0, 0, 0, 1, 2, 3, 4, 5, 6, 6)})
    return dist.get_rank()  # type: ignore[return-value]


def test_refusals() -> None:
    run_ranks(2, layer_of_two)
    with pytest.raises(PlanError, match=r"ep_spare 1 with ep 1; accepted: 0, or a number ≥ 1 where ep is ≥ 2"):
        MeshConfig(dp_shard=2, ep_spare=1).resolve(2)
    with pytest.raises(PlanError, match=r"5 spare slots on each rank, but the other ranks hold 4 of the 8 experts"):
        toy("E", moe=dataclasses.replace(MOE)).check_experts(MeshConfig(dp_shard=2, ep=2, ep_spare=5))
