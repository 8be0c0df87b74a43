"""Expert parallelism equals one process: loss, norm and every gradient, whatever the other axes and the routing."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import Shard

from equivalence import SEQ_LEN, assert_equal_gradients, gradients, gradients_alone
from pipelines import Case, merged, pipelined
from polylepis.parallel.engines.fsdp import build_model
from polylepis.parallel.errors import PlanError
from polylepis.parallel.kinds import moe as moe_module
from polylepis.parallel.kinds.moe import MoEConfig
from polylepis.parallel.layout import Layout
from polylepis.parallel.mesh import ContextConfig, MeshConfig, build_mesh
from polylepis.parallel.model import ModelConfig
from polylepis.parallel.pipeline.config import PipelineConfig
from polylepis.parallel.recompute import RecomputeConfig
from polylepis.parallel.routing import Journey, by_entry, dispatch, send, send_back
from ranks import run_ranks
from toys import ALL_ROUTED, toy, toy_batch

MOE = MoEConfig(n_experts=4, top_k=2, d_ff=16, d_ff_shared=12, scale=1.5)
ZIGZAG, HEADS = ContextConfig("zigzag", "state", "gather"), ContextConfig("contiguous", "heads", "heads")
TERMS: dict[str, Any] = {"aux_sequence": 0.7, "aux_global": 0.4, "z_loss": 0.3}
PARTITION: dict[str, Any] = {"partition": {"text": 3, "image": 2, "voice": 1, "shared": 2}, "n_experts": 8}


def model(**changes: Any) -> ModelConfig:
    return toy("M*E-E", ALL_ROUTED, moe=dataclasses.replace(MOE, **changes))


def check(
    config: ModelConfig, mesh: MeshConfig, context: ContextConfig | None = None, bias: tuple[float, ...] = ()
) -> None:
    expected = gradients_alone(config, torch.float64, (1,), bias=bias)
    world = mesh.dp_replicate * mesh.dp_shard * mesh.cp * mesh.tp
    for result in run_ranks(world, gradients, config, mesh, torch.float64, (1,), context, 4, bias, timeout=240):
        assert_equal_gradients(result, expected, 1e-9)


MESHES = {
    "ep × edp": (MeshConfig(dp_shard=4, ep=2), None),
    "ep4": (MeshConfig(dp_shard=4, ep=4), None),
    "ep × tp": (MeshConfig(dp_shard=2, tp=2, ep=2), None),
    "ep × cp": (MeshConfig(dp_shard=1, cp=2, ep=2), ZIGZAG),
    "ep × replicas": (MeshConfig(dp_replicate=2, dp_shard=2, ep=2), None),
}


@pytest.mark.parametrize("name", MESHES)
def test_with_every_axis(name: str) -> None:
    check(model(), *MESHES[name])


@pytest.mark.full
def test_tp_cp_dp_ep() -> None:
    check(model(**TERMS), MeshConfig(dp_shard=2, cp=2, tp=2, ep=4), ZIGZAG)
    check(model(**TERMS), MeshConfig(dp_shard=4, tp=2, ep=2))


ROUTERS = {
    "softmax, swiglu, terms, ep × cp": (
        model(router="softmax", activation="swiglu", **TERMS),
        MeshConfig(dp_shard=1, cp=2, ep=2),
        ZIGZAG,
    ),
    "partition, terms, ep × tp": (model(**PARTITION, **TERMS), MeshConfig(dp_shard=2, tp=2, ep=2), None),
    "groups, ep": (model(n_experts=8, n_groups=4, top_groups=2), MeshConfig(dp_shard=2, ep=2), None),
    "capacity, terms, ep × cp": (
        model(capacity_factor=0.7, **PARTITION, **TERMS),
        MeshConfig(dp_shard=1, cp=2, ep=2),
        ZIGZAG,
    ),
    "capacity, tp × cp": (model(capacity_factor=0.7), MeshConfig(dp_shard=1, cp=2, tp=2), HEADS),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_every_router(name: str) -> None:
    check(*ROUTERS[name])


@pytest.mark.parametrize(
    ("bias", "top_k"),
    [((9.0, 0.0, 0.0, 0.0), 1), ((0.0, 0.0, 9.0, 9.0), 2), ((0.6, 0.3, 0.0, -0.5), 2)],
    ids=["all to one expert", "all to one rank", "skewed"],
)
def test_uneven_routing(bias: tuple[float, ...], top_k: int) -> None:
    check(model(top_k=top_k), MeshConfig(dp_shard=2, ep=2), None, bias)


PIPELINES = {
    "pp × ep, 1f1b": Case(MeshConfig(dp_shard=2, pp=2, ep=2)),
    "pp × ep, interleaved, recompute": Case(
        MeshConfig(dp_shard=2, pp=2, ep=2),
        PipelineConfig("interleaved"),
        recompute=RecomputeConfig("full", "full", "full", "full"),
    ),
    "pp × ep, split backward": Case(MeshConfig(dp_shard=2, pp=2, ep=2), PipelineConfig("zbv")),
    "pp × ep × tp": Case(MeshConfig(dp_shard=2, pp=2, tp=2, ep=2)),
    "pp × ep × edp": Case(MeshConfig(dp_shard=4, pp=2, ep=2)),
}


@pytest.mark.parametrize(
    "name",
    [n if n == "pp × ep, interleaved, recompute" else pytest.param(n, marks=pytest.mark.full) for n in PIPELINES],
)
def test_pipeline_stages(name: str) -> None:
    """Terms made in a middle stage reach the gradients of the stages before it."""
    config, case = toy("M*E-EM", ALL_ROUTED, moe=dataclasses.replace(MOE, **TERMS)), PIPELINES[name]
    expected = gradients_alone(config, torch.float64, case.absent, case.count)
    results = run_ranks(case.mesh.n_processes, pipelined, config, case, timeout=300)
    assert_equal_gradients(merged(results), expected, 1e-9)


def round_trip(sent_by: list[list[int]], n_entries: int) -> tuple[Tensor, Tensor, list[int]]:
    """Rows numbered by sender and place go to their entries, are multiplied there by (entry + 2), and come back."""
    rank, group = dist.get_rank(), dist.group.WORLD
    ids = torch.tensor(sent_by[rank], dtype=torch.int64)
    x = (100.0 * rank + torch.arange(len(ids), dtype=torch.float64))[:, None].requires_grad_()
    plan = dispatch(ids, n_entries, group)
    rows = by_entry(send(x[plan.route.order], plan).arrive(), plan)
    share = n_entries // dist.get_world_size()
    entries = torch.repeat_interleave(torch.arange(share), torch.tensor(plan.counts)) + rank * share
    assert len(entries) == len(rows)
    back = send_back(rows * (entries[:, None] + 2), plan).arrive()[plan.route.inverse]
    back.sum().backward()
    assert x.grad is not None
    return back.detach()[:, 0], x.grad[:, 0], list(plan.counts)


@pytest.mark.parametrize(
    "sent_by",
    [[[0, 3, 1, 3, 2], [2, 2, 0]], [[], [1, 0, 3]], [[], []], [[3, 3, 3], [3, 3]], [[0], []]],
    ids=["mixed", "a rank without rows", "no rows at all", "all to one", "one row"],
)
def test_rows_travel_and_come_back(sent_by: list[list[int]]) -> None:
    results = run_ranks(2, round_trip, sent_by, 4)
    for rank, (values, grads, counts) in enumerate(results):
        factor = torch.tensor(sent_by[rank], dtype=torch.float64) + 2
        torch.testing.assert_close(values, (100.0 * rank + torch.arange(len(factor))) * factor)
        torch.testing.assert_close(grads, factor)
        everyone = [entry for ids in sent_by for entry in ids]
        assert counts == [everyone.count(2 * rank), everyone.count(2 * rank + 1)]


def order_of_events() -> list[str]:
    mesh = build_mesh(MeshConfig(dp_shard=2, ep=2), "cpu")
    layer = build_model(toy("E", moe=MOE), mesh).layers["0"]
    events: list[str] = []
    start, wait = Journey.start, Journey.wait
    up, down = moe_module.project, moe_module.packed_linear

    def traced_start(self: Journey, *args: Any) -> Tensor:
        events.append("departs")
        return start(self, *args)

    def traced_wait(self: Journey) -> Tensor:
        events.append("arrives")
        return wait(self)

    def traced_up(h: Tensor, *args: Any) -> list[Tensor]:
        events.append("shared up")
        (result,) = up(h, *args)
        result.register_hook(lambda grad: events.append("shared up"))
        return [result]

    def traced_down(hidden: Tensor, *args: Any) -> Tensor:
        events.append("shared down")
        result = down(hidden, *args)
        result.register_hook(lambda grad: events.append("shared down"))
        return result

    Journey.start, Journey.wait = traced_start, traced_wait  # type: ignore[method-assign]
    moe_module.project, moe_module.packed_linear = traced_up, traced_down  # type: ignore[assignment]
    batch = toy_batch([[13, 1, 9]], SEQ_LEN)
    x = torch.randn(SEQ_LEN, 16, requires_grad=True)
    y = layer(x, Layout.from_batch(batch, 3, mesh))
    events.append("backward")
    y.sum().backward()
    return events


def test_the_shared_expert_is_computed_while_rows_travel() -> None:
    """In both directions; a hook in the backward fires just before the shared projection's own backward."""
    forward = ["departs", "shared up", "arrives", "departs", "shared down", "arrives"]
    backward = ["departs", "shared down", "arrives", "departs", "shared up", "arrives"]
    for events in run_ranks(2, order_of_events):
        assert events == [*forward, "backward", *backward]


def placements() -> dict[str, tuple[Any, ...]]:
    mesh = build_mesh(MeshConfig(dp_shard=4, tp=2, ep=2), "cpu")
    built = build_model(toy("E", moe=MOE), mesh)
    names = {name: p for name, p in built.named_parameters() if name.endswith("mixer.up_proj.weight")}
    return {n: (p.device_mesh.mesh_dim_names, p.placements, tuple(p.to_local().shape)) for n, p in names.items()}


def test_experts_lie_on_their_own_mesh() -> None:
    """4 experts of 16 × 16 over ep 2, tp 2 and edp 2: no rank holds none, no dimension is cut twice."""
    for result in run_ranks(8, placements):
        expected = (("edp", "ep", "tp"), (Shard(2), Shard(0), Shard(1)), (2, 8, 8))
        assert result == {"layers.0.mixer.up_proj.weight": expected}


def test_refusals() -> None:
    with pytest.raises(PlanError, match=r"ep 3 does not divide dp_shard 2 × cp 2 = 4.*accepted: 1, 2, 4"):
        MeshConfig(dp_shard=2, cp=2, ep=3).resolve(4)
    with pytest.raises(PlanError, match=r"n_experts 6 is not divisible by mesh.ep 4; accepted: 1, 2, 3, 6"):
        toy("E", moe=dataclasses.replace(MOE, n_experts=6)).check_experts(MeshConfig(dp_shard=4, ep=4))
    for message in run_ranks(6, refused):
        assert "layers.0.mixer.up_proj.weight: dimension 2 of the bank (4, 16, 16) is not divisible" in message
        assert "by dp_shard × cp / ep = 3; raise ep or dp_replicate instead" in message
    with pytest.raises(PlanError, match="ep 2, but the pattern MM has no expert layer"):
        toy("MM").check_experts(MeshConfig(dp_shard=2, ep=2))


def refused() -> str:
    try:
        build_model(toy("E", moe=MOE), build_mesh(MeshConfig(dp_shard=6, ep=2), "cpu"))
    except PlanError as error:
        return str(error)
    return "accepted"
