"""Experts placed by load while a run goes on, and its measured loads in predictions."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from polylepis.checkpoints.sharded import read_tensors
from polylepis.parallel.engines.fsdp import FSDPEngine, build_model
from polylepis.parallel.kinds.moe import MoEConfig
from polylepis.parallel.mesh import MeshConfig, build_mesh
from polylepis.parallel.pipeline.cost import Roofline
from polylepis.parallel.pipeline.devices import find_device
from polylepis.parallel.placement import busiest, place_experts
from polylepis.parallel.recompute import RecomputeConfig
from polylepis.pretrain import train as train_module
from polylepis.pretrain.config import RunConfig, load_config
from polylepis.pretrain.errors import ConfigError
from polylepis.pretrain.experts import expert_layers, finish_experts, place_by_load
from polylepis.pretrain.meter.tracker import read_metrics
from polylepis.pretrain.objectives.next_token import next_token
from polylepis.pretrain.optim import OptimConfig, build_optimizer
from polylepis.pretrain.plan.estimate import Assumptions, estimate, price
from polylepis.pretrain.plan.loads import busiest_ranks, modality_pressure, read_loads
from polylepis.pretrain.plan.report import table
from polylepis.pretrain.plan.search import candidates
from polylepis.pretrain.prepare import check_all, check_overlap, check_placement, stages_of
from polylepis.pretrain.shrink import shrink
from ranks import run_ranks
from toys import toy, toy_batch

EP2 = MeshConfig(dp_shard=2, ep=2)


def small(folder: Path, **train: Any) -> RunConfig:
    mesh = MeshConfig(dp_shard=2, ep=2)
    config = shrink(load_config("quickstart"), 4, mesh)
    moe = replace(config.model.moe, n_experts=8, top_k=2)
    return replace(
        config,
        folder=str(folder),
        mesh=mesh,
        model=replace(config.model, pattern="MEE", moe=moe),
        data=replace(config.data, global_batch=4),
        train=replace(config.train, checkpoint_every=1, keep=0, **train),
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    run_ranks(2, train_module.train, small(folder / "dealt"))
    run_ranks(2, train_module.train, small(folder / "placed", placement="load"))
    return folder


def test_training_is_the_same_and_placed_by_the_loads_before(runs: Path) -> None:
    config = small(runs / "other")
    dealt, placed = read_metrics(runs / "dealt"), read_metrics(runs / "placed")
    assert len(dealt) == len(placed) == 4
    for a, b in zip(dealt, placed, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
    for step in (1, 2, 3):  # each step is placed by the mean loads before it
        before = read_loads(runs / f"placed/checkpoints/step-{step:08d}", config.model)
        prefix = "optimizer.expert_load."
        now = read_tensors(runs / f"placed/checkpoints/step-{step + 1:08d}", prefix)
        expected = [
            busiest(
                now[f"{prefix}layers.{i}.mixer"].sum(dim=0).tolist(),
                place_experts(before[i].sum(dim=0).tolist(), 8, 2),
                2,
            )
            for i in (1, 2)
        ]
        assert placed[step]["expert_rank_max"] == pytest.approx(expected, abs=1e-4)
    names = {name: read_tensors(runs / name / "checkpoints/step-00000004") for name in ("dealt", "placed")}
    assert names["dealt"].keys() == names["placed"].keys()
    for key, value in names["dealt"].items():
        torch.testing.assert_close(names["placed"][key], value, rtol=1e-3, atol=1e-5, msg=key)


def skewed() -> list[float]:
    """Busiest of two ranks over the mean, in three steps of a router that prefers the first experts of 8; the experts
    are placed after the first step."""
    mesh = build_mesh(MeshConfig(dp_shard=2, ep=2), "cpu")
    moe = MoEConfig(n_experts=8, top_k=2, d_ff=4, d_ff_shared=4, bias_update_rate=0.0)
    model = build_model(toy("E", moe=moe), mesh, seed=2)
    engine = FSDPEngine(model, build_optimizer(OptimConfig(), model), next_token)
    expert_layers(engine)[0].selection_bias[:4] += 0.2
    found = []
    for step in range(3):
        engine.accumulate([toy_batch([[100], [100]], 100, 2 * step + mesh.dp_rank)], 400.0)
        engine.discard()
        found.append(finish_experts(engine)["expert_rank_max"][0])  # type: ignore[index]
        if step == 0:
            place_by_load(engine)
    return found


def test_placement_evens_out_a_skewed_router() -> None:
    """On batches that it has not seen."""
    for first, *later in run_ranks(2, skewed):
        assert first > 1.3 and max(later) < 1 + 0.5 * (first - 1), (first, later)


def test_loads_of_a_run_reach_predictions(runs: Path) -> None:
    config = small(runs / "other")
    loads = read_loads(runs / "dealt", config.model)
    assert list(loads) == [1, 2]
    seen = [
        read_tensors(runs / f"dealt/checkpoints/step-{n:08d}", "optimizer.expert_load.layers.1") for n in range(1, 5)
    ]
    mean = sum(0.05 * 0.95 ** (4 - n) * load for n, step in enumerate(seen, 1) for load in step.values())
    torch.testing.assert_close(loads[1], mean.double(), rtol=1e-5, atol=1e-5)  # type: ignore[union-attr]
    for index, load in loads.items():
        share = load.sum(dim=1) / load.sum()
        pressure = modality_pressure(loads, EP2)[index]
        whole = sum(float(s) * p for s, p in zip(share, pressure, strict=True))
        assert whole == pytest.approx(busiest_ranks(loads, EP2)[index])
        placed = place_experts(load.sum(dim=0).tolist(), 8, 2)
        assert busiest_ranks(loads, EP2, by_load=True)[index] == busiest(load.sum(dim=0).tolist(), placed, 2)
    timing = Roofline(find_device("h100"))
    even, skewed = (estimate(config, timing, None, Assumptions(loads=given)).seconds for given in ({}, loads))
    assert skewed > even


def test_cuts_see_the_loads() -> None:
    """Eight expert layers on two stages; all choices of the first two go to one of 8 ranks: the first stage shrinks."""
    config = load_config("hybrid-moe-30b-a3b")
    config = replace(config, model=replace(config.model, pattern="E" * 8), mesh=MeshConfig(dp_shard=8, pp=2, ep=8))
    even = torch.ones(1, 128, dtype=torch.float64)
    skewed = torch.zeros(1, 128, dtype=torch.float64)
    skewed[0, :16] = 1
    loads = {index: skewed if index < 2 else even for index in range(8)}
    timing = Roofline(find_device("h100"))
    cuts = [
        [stage.first for stage in price(config, timing, 1e15, Assumptions(loads=given), recut=True).stages]
        for given in ({}, loads)
    ]
    assert cuts[1][1] < cuts[0][1]


def test_the_search_looks_at_numbers_of_expert_ranks() -> None:
    config = replace(
        load_config("hybrid-moe-30b-a3b"), data=replace(load_config("hybrid-moe-30b-a3b").data, global_batch=8)
    )
    config = replace(config, mesh=replace(config.mesh, ep=2))
    meshes = [plan.mesh for plan in candidates(config, 8, 8)]
    assert {mesh.ep for mesh in meshes} == {1, 2, 8}  # none, the configuration's, a node's
    assert all(mesh.dp_shard * mesh.cp % mesh.ep == 0 for mesh in meshes)
    assert {plan.mesh.ep for plan in candidates(load_config("mamba2-hybrid-8b"), 8, 8)} == {1}


def test_refusals(runs: Path, tmp_path: Path) -> None:
    config = small(tmp_path, placement="load")
    check_placement(config)

    def refused(config: RunConfig, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            check_placement(config)

    refused(replace(config, model=replace(config.model, pattern="MM")), "no expert layers; accepted: dealt")
    refused(replace(config, engine="deepspeed"), "load needs engine: fsdp2")
    refused(replace(config, train=replace(config.train, checkpoint_every=0)), "checkpoint_every steps, which is 0")
    refused(replace(config, train=replace(config.train, local_folder="x")), "does not go with train.local_folder")
    refused(replace(config, train=replace(config.train, loads=str(tmp_path))), "is this run's own folder")
    with pytest.raises(ConfigError, match="neither a checkpoint nor a run folder"):
        read_loads(tmp_path, config.model)
    with pytest.raises(ConfigError, match=r"layer 1 has \[modalities, experts\] \(3, 4\), .* holds \(3, 8\)"):
        read_loads(runs / "dealt", replace(config.model, moe=replace(config.model.moe, n_experts=4)))
    with pytest.raises(ConfigError, match=r"holds loads of optimizer.expert_load_mean.layers.2.mixer"):
        read_loads(runs / "dealt", replace(config.model, pattern="MEM"))
    cut = replace(
        config, mesh=MeshConfig(dp_shard=2, pp=2, ep=2), train=replace(config.train, loads=str(runs / "dealt"))
    )
    assert len(stages_of(cut, 2)) == 2


def partitioned(folder: Path, mesh: MeshConfig, top_k: int, text: int, **train: Any) -> RunConfig:
    """A run whose modalities have experts of their own, so that loads stay as uneven as the mixture is."""
    config = small(folder, **({"placement": "load", "steps": 6} | train))
    shares = {"text": text, "image": 3, "voice": 5 - text, "shared": 0}
    moe = replace(config.model.moe, partition=shares, top_k=top_k, bias_update_rate=0.0)
    return replace(
        config,
        mesh=mesh,
        model=replace(config.model, moe=moe),
        data=replace(config.data, global_batch=8, micro_batch=2),
        train=replace(config.train, checkpoint_every=3),
    )


def worst(config: RunConfig) -> list[float]:
    """By step, tokens of the busiest ep rank over the mean, of the worse of two layers."""
    return [max(line["expert_rank_max"]) for line in read_metrics(config.path)]


def test_a_run_evens_out_its_ranks_by_its_own_loads_and_resumes(tmp_path: Path) -> None:
    """Placed after step 3 by the average of its loads so far; with a spare slot it also resumes with the same bits."""
    spare = replace(EP2, ep_spare=1)
    moved = partitioned(tmp_path / "moved", EP2, 2, 2)
    whole, again = (partitioned(tmp_path / name, spare, 2, 2) for name in ("whole", "again"))
    for config in (moved, whole):
        run_ranks(2, train_module.train, config)
    shutil.copytree(whole.path, again.path, ignore=shutil.ignore_patterns("step-00000006"))
    run_ranks(2, train_module.train, again)
    assert [line["loss"] for line in read_metrics(again.path)] == [line["loss"] for line in read_metrics(whole.path)]
    seen = worst(moved)
    assert min(seen[:3]) > 1.15 and max(seen[3:]) < 1 + 0.5 * (min(seen[:3]) - 1), seen
    assert [a["loss"] for a in read_metrics(whole.path)] == pytest.approx([a["loss"] for a in read_metrics(moved.path)])
    for prefix in ("", "optimizer."):
        ends = [read_tensors(c.checkpoints / "step-00000006", prefix) for c in (whole, again, moved)]
        assert ends[0].keys() == ends[1].keys() == ends[2].keys()  # replicas leave no trace in a checkpoint
        assert [key for key, value in ends[0].items() if not torch.equal(value, ends[1][key])] == []


@pytest.mark.full
def test_replicas_even_out_what_moving_cannot(tmp_path: Path) -> None:
    """Over four ranks one expert has all text, more than a rank's share: only its copies can share it."""
    alone, copied = (MeshConfig(dp_shard=4, ep=4, ep_spare=spare) for spare in (0, 1))
    moved, replicated = partitioned(tmp_path / "a", alone, 1, 1), partitioned(tmp_path / "b", copied, 1, 1)
    for config in (moved, replicated):
        run_ranks(4, train_module.train, config)
    before, after = worst(moved)[3:], worst(replicated)[3:]
    assert min(before) > 1.2 and max(after) < 1 + 0.5 * (min(before) - 1), (before, after)
    losses = [[line["loss"] for line in read_metrics(config.path)] for config in (moved, replicated)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_overlap_and_spare_slots_are_refused_where_they_cannot_be(tmp_path: Path) -> None:
    config = small(tmp_path, overlap_dispatch=True)

    def refused(message: str, mesh: MeshConfig = EP2, **changes: Any) -> None:
        with pytest.raises(ConfigError, match=message):
            check_overlap(replace(config, **changes), mesh)

    check_overlap(config, EP2)
    refused("needs engine: fsdp2", engine="deepspeed")
    refused("with mesh.ep 1 no rows travel", MeshConfig(dp_shard=2))
    refused("with mesh.pp 2 the pipeline's schedule", MeshConfig(dp_shard=2, pp=2, ep=2))
    refused("recompute.moe full the backward would repeat", recompute=RecomputeConfig(moe="full"))
    refused(
        r"global_batch 2 over dp 2 is 1 rows, and data.micro_batch is 1; accepted: global_batch ≥ 4",
        data=replace(config.data, global_batch=2),
    )
    plain = replace(small(tmp_path / "x"), mesh=replace(EP2, ep_spare=1))
    with pytest.raises(ConfigError, match=r"ep_spare: 1 spare slots .* accepted: ep_spare 0, or placement load"):
        check_all(plain, 2)


def test_the_plan_sees_spare_slots_and_overlap() -> None:
    config = load_config("hybrid-moe-30b-a3b")
    config = replace(config, mesh=MeshConfig(dp_shard=64, ep=8), data=replace(config.data, global_batch=128))
    timing = Roofline(find_device("h100"))

    def found(**changes: Any) -> Any:
        return price(replace(config, **changes), timing, 1e15)

    plain, spare = found(), found(mesh=replace(config.mesh, ep_spare=2))
    # Two slots more than 16 on each of 8 ranks: an eighth more of the experts' parameters.
    experts = 128 * 2 * 1856 * 2688 * 23
    assert spare.memory[0].parameters - plain.memory[0].parameters == pytest.approx(4 * experts / 8 / 64)
    overlapped = found(train=replace(config.train, overlap_dispatch=True))
    assert 0 <= overlapped.parts["expert parallel"] < 0.5 * plain.parts["expert parallel"]
    assert overlapped.parts["computation"] == pytest.approx(plain.parts["computation"])
    assert overlapped.memory[0].activations > 1.9 * plain.memory[0].activations
    forward, backward = overlapped.lanes
    hidden = forward.dispatched + backward.dispatched - sum(forward.exposed) - sum(backward.exposed)
    assert plain.parts["expert parallel"] - overlapped.parts["expert parallel"] == pytest.approx(hidden)
    text = table(overlapped.simulated(), "h100", "a roofline")
    assert "are not hidden behind layers of the other" in text and "two at once" in text
    with pytest.raises(ConfigError, match=r"mesh.pp 2 the pipeline's schedule"):
        found(mesh=MeshConfig(pp=2, dp_shard=64, ep=8), train=replace(config.train, overlap_dispatch=True))
