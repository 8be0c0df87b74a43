"""Planning: predictions, search, refusals, pictures, measured tables, rehearsal."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from polylepis.launch.cli import main
from polylepis.launch.rehearse import small_mesh
from polylepis.parallel.mesh import MeshConfig
from polylepis.parallel.pipeline.config import PipelineConfig
from polylepis.parallel.pipeline.cost import Roofline
from polylepis.parallel.pipeline.devices import GIB, find_device
from polylepis.pretrain import spawn
from polylepis.pretrain.config import RunConfig, load_config, plan_sizes, recipe_names
from polylepis.pretrain.errors import ConfigError
from polylepis.pretrain.plan import crowd, measure
from polylepis.pretrain.plan.estimate import Assumptions, estimate
from polylepis.pretrain.plan.picture import page, save_timeline
from polylepis.pretrain.plan.search import fit_recompute, overrides, search, why_not
from ranks import forked_workers

H200 = Roofline(find_device("h200"))


def resolved(gpus: int, *values: str, recipe: str = "mamba2-hybrid-8b") -> RunConfig:
    config = load_config(recipe, values)
    return replace(config, mesh=config.mesh.resolve(gpus))


def test_the_parts_of_a_step_sum_and_every_rank_is_there() -> None:
    found = estimate(resolved(64, "gpus=64"), H200)
    assert len(found.memory) == 2 and len(found.stages) == 4
    assert found.seconds == pytest.approx(sum(found.parts.values()))
    hidden = found.parts["data parallel"] + found.parts["optimizer"]
    assert found.seconds - hidden == pytest.approx(found.timeline.seconds)
    assert all(memory.unsharded_gradients == 2 * memory.gathered for memory in found.memory)  # float32, bfloat16
    assert 0 < found.mfu < 1


def test_bytes_follow_the_axes() -> None:
    one, two = (estimate(resolved(8, f"mesh.tp={tp}"), H200).memory[0] for tp in (2, 4))
    assert one.parameters == pytest.approx(two.parameters, rel=1e-3)  # what tp does not cut, dp does
    assert one.activations > 1.7 * two.activations
    shorter = estimate(resolved(8), H200, assumptions=Assumptions(document=512))
    assert shorter.seconds < estimate(resolved(8), H200).seconds


def test_recompute_only_as_much_as_needed() -> None:
    plan = resolved(8, "mesh.tp=4")
    free = fit_recompute(plan, H200, None, None)
    assert set(vars(free.config.recompute).values()) == {"none"}
    tight = fit_recompute(plan, H200, 45 * GIB, None)
    assert tight.fits and set(vars(tight.config.recompute).values()) != {"none"}
    assert tight.seconds > free.seconds
    hopeless = fit_recompute(plan, H200, 10 * GIB, None)
    assert not hopeless.fits
    assert "pipeline rank 0 needs" in why_not(hopeless.simulated())[0]


def test_search_finds_the_best_of_what_it_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config("mamba2-hybrid-8b")
    few = [
        replace(
            config,
            mesh=MeshConfig(1, 16 // tp // pp, 1, tp, pp),
            pipeline=PipelineConfig("interleaved", 2) if pp > 1 else PipelineConfig(),
            data=replace(config.data, micro_batch=micro),
        )
        for tp, pp, micro in ((1, 1, 1), (1, 1, 16), (2, 1, 2), (2, 2, 1), (8, 1, 4), (3, 1, 1))
    ]
    monkeypatch.setattr("polylepis.pretrain.plan.search.candidates", lambda *_: iter(few))
    found = search(config, 16, H200, keep=2)
    assert (found.tried, found.refused) == (5, 1) and "tp 3" in found.example
    priced = [fit_recompute(plan, H200, None, None) for plan in few[:5]]
    assert found.best[0].seconds == min(p.simulated().seconds for p in priced if p.fits)
    assert found.best[0].seconds <= found.best[1].seconds
    again = load_config("mamba2-hybrid-8b", overrides(found.best[0]))
    assert estimate(replace(again, mesh=again.mesh.resolve(16)), H200).seconds == pytest.approx(found.best[0].seconds)


@pytest.mark.parametrize("recipe", ["mamba2-hybrid-8b", "mamba2-hybrid-8b-128k"])
def test_recipes_carry_plans_that_fit(recipe: str) -> None:
    assert plan_sizes(recipe) == [8, 64, 1024]
    for gpus in plan_sizes(recipe):
        found = estimate(resolved(gpus, f"gpus={gpus}", recipe=recipe), Roofline(find_device("h100")))
        assert found.fits and found.config.mesh.n_processes == gpus


def test_all_plans_of_all_recipes_are_valid() -> None:
    for name in recipe_names():
        for gpus in plan_sizes(name):
            assert load_config(name, [f"gpus={gpus}"]).mesh.resolve(gpus).n_processes == gpus


def test_plans_of_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gpus=32: .* carries plans for these numbers of GPUs: 8, 64, 1024"):
        load_config("mamba2-hybrid-8b", ["gpus=32"])
    text = (Path(measure.__file__).parents[1] / "recipes/mamba2-hybrid-8b.yaml").read_text()
    (tmp_path / "bad.yaml").write_text(text.replace("plans:\n", "plans: [1]\nrest:\n"))
    with pytest.raises(ConfigError, match=r"plans: expected a number of GPUs"):
        load_config(str(tmp_path / "bad.yaml"))
    assert load_config("mamba2-hybrid-8b", ["gpus=64", "mesh.tp=4"]).mesh.tp == 4  # what is asked for goes on top


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "h300"], "unknown 'h300'; nearest is h200"),
        (["--gpus", "0"], "--gpus: must be at least 1, not 0"),
        (["--gpus", "6", "--as-written"], "the world size is 6; the nearest that fits is 8"),
        (["--gpus", "8", "--as-written", "--memory", "20"], "does not fit: pipeline rank 0 needs"),
        (["--as-written", "--layers", "none.json", "--gpus", "8"], "no such table of measured layers"),
        (["--gpus", "8", "--as-written", "--timeline", "x.pdf"], "drawn as .png or .html, not .pdf"),
    ],
)
def test_refusals(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "mamba2-hybrid-8b", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_command_writes_json_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--gpus", "64", "--gpu", "h200", "--as-written", "--json", str(tmp_path / "p.json")]
    assert main(["plan", "mamba2-hybrid-8b", *arguments, "--timeline", str(tmp_path / "t.html")]) == 0
    told = json.loads((tmp_path / "p.json").read_text())
    assert told["fits"] and told["gpus"] == 64 and "mesh.pp=2" in told["overrides"]
    assert told["step_seconds"] == pytest.approx(sum(told["parts"].values()))
    text = (tmp_path / "t.html").read_text()
    found = estimate(resolved(64, "gpus=64"), H200)
    assert text.count("<rect") == len(found.timeline.spans)
    assert page(found.timeline, "<a>").startswith("<!doctype html>") and "&lt;a&gt;" in page(found.timeline, "<a>")
    save_timeline(found.timeline, tmp_path / "t.png", "t")
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")
    assert "stages: 0–15 M-M-M--M-M*-M-M-" in capsys.readouterr().out


def tiny(folder: Path, *values: str) -> RunConfig:
    config = load_config("quickstart", [f"folder={folder}", "data.path=mock", "data.seq_len=64", *values])
    return replace(config, model=replace(config.model, vocab_size=928), mesh=MeshConfig(dp_shard=1))


def test_measured_layers_become_a_prediction(tmp_path: Path) -> None:
    config = tiny(tmp_path / "run")
    times = measure.measure_layers(config, repeats=1)
    assert len(times.seconds) == 4 + 2  # M*M-ME: four kinds, two ends
    assert measure.predicted_step(config, 1) == {}
    measure.write_layers(times, config.path / measure.LAYERS_FILE)
    assert measure.read_layers(config.path / measure.LAYERS_FILE) == times
    predicted = measure.predicted_step(config, 1)
    layers = [times.seconds[measure.layer_key(*config.model.layer(i), config.model)] for i in range(6)]
    ends = [times.seconds[measure.end_key(name, config.model)] for name in ("embedding", "head")]
    per_micro_batch = sum(forward + backward for forward, backward in (*layers, *ends)) + times.prepare
    assert predicted["predicted_step_seconds"] > per_micro_batch
    assert predicted["predicted_bubble"] == 0.0
    other = replace(times, machine="another")
    measure.write_layers(other, config.path / measure.LAYERS_FILE)
    assert measure.predicted_step(config, 1) == {}
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(ConfigError, match="not a table of measured layers"):
        measure.read_layers(tmp_path / "broken.json")


def test_what_an_operation_adds_is_in_the_step(tmp_path: Path) -> None:
    times = measure.measure_layers(tiny(tmp_path), repeats=1)
    config = replace(tiny(tmp_path, "data.global_batch=16"), mesh=MeshConfig(dp_shard=1, pp=2))
    plain = estimate(config, measure.measured_timing(times))
    slower = estimate(config, measure.measured_timing(replace(times, operation=0.01, send=0.0)))
    assert slower.parts["computation"] - plain.parts["computation"] == pytest.approx(8 * 2 * 0.01)
    assert slower.seconds == pytest.approx(slower.timeline.seconds + slower.parts["optimizer"])
    alone = replace(config, mesh=MeshConfig(dp_shard=1))
    whole = [estimate(alone, measure.measured_timing(replace(times, operation=x))).seconds for x in (0.0, 1.0)]
    assert whole[0] == whole[1]


@pytest.mark.full
def test_a_mistake_is_told_once_however_many_measure(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    values = [f"folder={tmp_path}", f"data.path={tmp_path / 'none'}", "mesh.dp_shard=1", "mesh.tp=1", "mesh.pp=2"]
    assert main(["bench", "layers", "quickstart", *values]) == 2
    told = capfd.readouterr().err
    assert "Traceback" not in told and told.count("polylepis:") == 1


@pytest.mark.full
def test_measured_as_a_plan_runs_on_this_machine(tmp_path: Path) -> None:
    config = replace(tiny(tmp_path), mesh=MeshConfig(dp_shard=1, pp=2))
    assert crowd.processes_here(config) == 2 and crowd.processes_here(tiny(tmp_path)) == 1
    times = crowd.measure(config, repeats=1)
    assert times.processes == 2 and len(times.seconds) == 4 + 2
    assert times.operation > 0 and times.send is not None and times.send >= 0


@pytest.mark.parametrize(
    ("mesh", "expected"),
    [
        (MeshConfig(dp_shard=4, tp=2), {"dp_shard": 2, "tp": 2}),
        (MeshConfig(16, 4, 1, 4, 4), {"dp_replicate": 1, "dp_shard": 2, "tp": 2, "pp": 2}),
        (MeshConfig(1, 2, 8, 4, 2), {"dp_shard": 1, "cp": 2, "tp": 2, "pp": 2}),
        (MeshConfig(1, 1, 1, 1, 3), {"pp": 3}),
    ],
)
def test_small_meshes_keep_the_axes(mesh: MeshConfig, expected: dict[str, Any]) -> None:
    small = small_mesh(mesh, 8)
    assert small.n_processes <= 8
    assert {axis: getattr(small, axis) for axis in expected} == expected


@pytest.mark.full
@pytest.mark.parametrize("gpus", [8, 64, 1024])
@pytest.mark.parametrize("recipe", ["mamba2-hybrid-8b", "mamba2-hybrid-8b-128k"])
def test_recipes_rehearse(recipe: str, gpus: int) -> None:
    assert main(["rehearse", recipe, "--gpus", str(gpus)]) == 0


@pytest.mark.parametrize("workers", ["forked", pytest.param("started", marks=pytest.mark.full)])
def test_rehearsal_of_a_small_plan(
    workers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Both halves with real processes: two pipeline stages, a checkpoint, and on from it."""
    if workers == "forked":
        monkeypatch.setattr(spawn, "run_workers", forked_workers)
    config = tmp_path / "small.yaml"
    config.write_text(
        "name: small\nfolder: runs/small\n"
        "model: {pattern: 'M*-M', d_model: 64, vocab_size: 1000, mamba: {d_state: 16, head_dim: 8, n_groups: 2},\n"
        "  attention: {n_heads: 4, n_kv_heads: 2, head_dim: 16}, mlp: {d_ff: 128}}\n"
        "data: {path: shards, seq_len: 256, global_batch: 8, micro_batch: 1}\n"
        "plans: {2: {mesh: {pp: 2}}}\n"
    )
    assert main(["rehearse", str(config), "--gpus", "2"]) == 0
    told = capfd.readouterr().out
    assert "pipeline 1: " in told and "the last two continued from the checkpoint" in told
    assert main(["rehearse", str(config), "--gpus", "2", "--memory", "0.001"]) == 2
