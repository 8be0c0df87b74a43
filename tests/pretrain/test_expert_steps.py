"""Expert layers in training: loads in the metrics, balancing that works, a router that gives NaN refuses the step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from polylepis.checkpoints.sharded import read_tensors
from polylepis.parallel.engines.fsdp import FSDPEngine, build_model
from polylepis.parallel.kinds.moe import MoE, MoEConfig
from polylepis.parallel.kinds.moe_router import Router
from polylepis.parallel.layout import Layout
from polylepis.parallel.mesh import MeshConfig, build_mesh
from polylepis.pretrain import train as train_module
from polylepis.pretrain.config import RunConfig, load_config
from polylepis.pretrain.errors import RouterError
from polylepis.pretrain.experts import check_routers, expert_layers, finish_experts, load_metrics
from polylepis.pretrain.meter.tracker import read_metrics
from polylepis.pretrain.objectives.next_token import next_token
from polylepis.pretrain.optim import OptimConfig, build_optimizer
from polylepis.pretrain.shrink import shrink
from ranks import run_ranks
from toys import toy, toy_batch


def small(folder: Path, mesh: MeshConfig, **moe: object) -> RunConfig:
    config = shrink(load_config("quickstart"), 3, mesh)
    changed = replace(config.model.moe, **moe)  # type: ignore[arg-type]
    return replace(
        config,
        folder=str(folder),
        model=replace(config.model, pattern="MEE", moe=changed),
        data=replace(config.data, global_batch=4),
    )


def test_training_with_ep_equals_one_process(tmp_path: Path) -> None:
    """Three steps with every term: losses, loads and terms agree, and the loads wait in the checkpoint."""
    terms = {"aux_sequence": 0.01, "aux_global": 0.01, "z_loss": 0.001, "router": "softmax"}
    run_ranks(1, train_module.train, small(tmp_path / "one", MeshConfig(dp_shard=1), **terms))
    run_ranks(4, train_module.train, small(tmp_path / "ep", MeshConfig(dp_shard=2, tp=2, ep=2), **terms))
    one, ep = read_metrics(tmp_path / "one"), read_metrics(tmp_path / "ep")
    assert len(one) == len(ep) == 3
    for a, b in zip(one, ep, strict=True):
        for key in ("loss", "grad_norm", "aux_sequence", "aux_global", "z_loss"):
            assert b[key] == pytest.approx(a[key], rel=1e-4), key
        for key in ("expert_load_cv", "expert_load_max", "expert_load_cv/text", "expert_load_max/image"):
            assert len(a[key]) == 2 and b[key] == pytest.approx(a[key], abs=0.05), key  # a near-tie may flip in fp32
    loads = read_tensors(tmp_path / "ep/checkpoints/step-00000003", "optimizer.expert_load.")
    assert sorted(loads) == [f"optimizer.expert_load.layers.{i}.mixer" for i in (1, 2)]
    for load in loads.values():
        assert float(load.sum()) == 2 * sum(ep[-1][f"tokens/{m}"] for m in ("text", "image", "voice"))  # top-2


def broken_router() -> tuple[str, bool]:
    """On rank 1 the router of layer 2 gives NaN for three tokens; what the step says, and whether weights moved."""
    config = toy("MEE", moe=MoEConfig(n_experts=4, top_k=2, d_ff=16, d_ff_shared=12))
    mesh = build_mesh(MeshConfig(dp_shard=2, ep=2), "cpu")
    model = build_model(config, mesh, seed=1)
    engine = FSDPEngine(model, build_optimizer(OptimConfig(), model), next_token)
    if mesh.dp_rank == 1:
        router = expert_layers(engine)[2].router

        def broken(module: Router, inputs: object, logits: torch.Tensor) -> torch.Tensor:
            return logits.index_fill(0, torch.tensor([0, 3, 5]), float("nan"))

        router.register_forward_hook(broken)
    before = [p.to_local().clone() for p in model.parameters()]  # type: ignore[attr-defined]
    engine.accumulate([toy_batch([[20]], 24, mesh.dp_rank)], 40.0)
    try:
        check_routers(engine, engine.gradient_norm())
    except RouterError as error:
        moved = any(not torch.equal(p.to_local(), b) for p, b in zip(model.parameters(), before, strict=True))  # type: ignore[attr-defined]
        return str(error), moved or any(p.grad is not None for p in model.parameters())
    return "accepted", True


def test_nan_in_a_router_is_refused_on_all_ranks() -> None:
    for message, moved in run_ranks(2, broken_router):
        assert message.startswith("the router of layer 2 gave logits that are not finite on rank 1 (3 tokens); ")
        assert not moved


def test_a_spoiled_weight_is_named() -> None:
    mesh = build_mesh(MeshConfig(), "cpu")
    model = build_model(toy("ME"), mesh)
    engine = FSDPEngine(model, build_optimizer(OptimConfig(), model), next_token)
    layer = expert_layers(engine)[1]
    with torch.no_grad():
        layer.router.weight.to_local()[0, 0] = float("nan")
    engine.accumulate([toy_batch([[20]], 24)], 40.0)
    with pytest.raises(RouterError, match=r"layer 1 .* rank 0 \(24 tokens\); its weight is not finite on rank 0"):
        check_routers(engine, engine.gradient_norm())


def skewed_load(rate: float) -> list[float]:
    """Load CV of 100 steps under a router whose first experts have large weights; the weights stay."""
    config = toy("E", moe=MoEConfig(n_experts=8, top_k=2, d_ff=4, d_ff_shared=4, bias_update_rate=rate))
    model = build_model(config, build_mesh(MeshConfig(), "cpu"), seed=2)
    engine = FSDPEngine(model, build_optimizer(OptimConfig(), model), next_token)
    expert_layers(engine)[0].router.weight.detach().to_local()[:3] *= 3  # the extremes win
    result = []
    for step in range(100):
        batch = toy_batch([[200], [200]], 200, step)
        layout = Layout.from_batch(batch, 3, model.mesh, 400.0)
        model(batch["tokens"].reshape(-1), layout, batch["labels"].reshape(-1)).sum().backward()
        engine.discard()
        result.append(finish_experts(engine)["expert_load_cv"][0])  # type: ignore[index]
    return result


def test_loss_free_balancing_lowers_the_load_cv() -> None:
    still, moving = skewed_load(0.0), skewed_load(0.005)
    assert still[0] == moving[0] > 0.3
    assert sum(moving[-50:]) < 0.6 * sum(still[-50:])


def test_metrics_measure_against_the_fair_share() -> None:
    """text may choose experts 0, 1 and the common 4, 5; image 2, 3 and those; voice only the common ones."""
    partition = {"text": 2, "image": 2, "voice": 0, "shared": 2}
    model = toy("E", moe=MoEConfig(n_experts=6, top_k=2, d_ff=4, d_ff_shared=4, partition=partition))
    load = torch.tensor([[4.0, 4, 0, 0, 4, 4], [0, 0, 8, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
    metrics = load_metrics(model, {0: load})
    assert metrics["expert_load_cv/text"] == [0.0] and metrics["expert_load_max/text"] == [1.0]
    assert metrics["expert_load_max/image"] == [4.0] and metrics["expert_load_cv/image"] == [round(3**0.5, 4)]
    assert metrics["expert_load_cv/voice"] == [0.0]
    # fair shares: 4, 4, 2, 2, 6, 6
    assert metrics["expert_load_max"] == [4.0]


def test_partitioned_biases_move_towards_the_shares() -> None:
    partition = {"text": 2, "image": 2, "voice": 0, "shared": 2}
    config = toy("E", moe=MoEConfig(n_experts=6, top_k=2, d_ff=4, d_ff_shared=4, partition=partition))
    layer = build_model(config, build_mesh(MeshConfig(), "cpu")).layers["0"].mixer
    assert isinstance(layer, MoE)
    layer.finish_step(torch.tensor([[4.0, 4, 0, 0, 4, 4], [0, 0, 8, 0, 0, 0], [0, 0, 0, 0, 0, 0]]))
    expected = torch.tensor([0.0, 0, -1, 1, 1, 1]) * layer.config.bias_update_rate
    torch.testing.assert_close(layer.selection_bias, expected)
