"""The guards under every engine: pipeline stages, experts on their own ranks, tensor parallelism, DeepSpeed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from faults import Fault, train_with
from polylepis.checkpoints.manifest import newest_checkpoint, read_manifest
from polylepis.checkpoints.sharded import read_tensors
from polylepis.parallel.engines.deepspeed import DeepSpeedConfig
from polylepis.parallel.mesh import MeshConfig
from polylepis.parallel.pipeline.config import PipelineConfig
from polylepis.pretrain.config import RunConfig, load_config
from polylepis.pretrain.health.config import HealthConfig
from polylepis.pretrain.health.events import read_events
from polylepis.pretrain.health.nonfinite import Finding, explain
from polylepis.pretrain.meter.tracker import read_metrics
from polylepis.pretrain.shrink import shrink
from ranks import run_ranks

PP, TP, EP, DP = (
    MeshConfig(dp_shard=1, pp=2),
    MeshConfig(dp_shard=1, tp=2),
    MeshConfig(dp_shard=2, ep=2),
    MeshConfig(dp_shard=2),
)
ENGINES: dict[str, tuple[str, MeshConfig, dict[str, Any]]] = {
    "pipeline": ("M*|-E", PP, {"pipeline": PipelineConfig("1f1b")}),
    "interleaved": ("M|*|-|E", PP, {"pipeline": PipelineConfig("interleaved")}),
    "zero bubble": ("M|*|-|M", PP, {"pipeline": PipelineConfig("zbv")}),
    "experts": ("M*EE", EP, {}),
    "tensor": ("M*-E", TP, {}),
    **{
        f"zero {stage}": ("M*-M", DP, {"engine": "deepspeed", "deepspeed": DeepSpeedConfig(stage=stage)})  # type: ignore[arg-type]
        for stage in (1, 2, 3)
    },
}
FULL = [pytest.mark.full]
QUIET = HealthConfig(straggler="off")
ACT = HealthConfig(spike="act", spike_history=4, spike_window=8, snapshot_every=3, straggler="off")


def on(engine: str, folder: Path, steps: int, health: HealthConfig = QUIET) -> RunConfig:
    """A toy run on two ranks of this engine."""
    pattern, mesh, changes = ENGINES[engine]
    config = shrink(load_config("quickstart"), steps, mesh)
    model = replace(config.model, pattern=pattern, d_model=32, vocab_size=256)
    model = replace(model, mamba=replace(model.mamba, routed=()) if engine == "zero bubble" else model.mamba)
    data = replace(config.data, seq_len=32, global_batch=4)
    optim = replace(config.optim, warmup=0)
    return replace(config, folder=str(folder), model=model, data=data, optim=optim, health=health, **changes)


def assert_same_end(a: Path, b: Path) -> None:
    """Weights, moments, the position in the data and what is left out of them, to the bit."""
    newest = [newest_checkpoint(folder / "checkpoints") for folder in (a, b)]
    ours, theirs = (read_tensors(c) | read_tensors(c, "optimizer.") for c in newest if c is not None)
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    states = [read_manifest(c)["data"] for c in newest if c is not None]
    positions = [[entry["position"] for entry in state["health"]["skipped"]] for state in states]
    assert states[0]["step"] == states[1]["step"] and positions[0] == positions[1] != []


def leave_out_the_same(a: Path, b: Path) -> None:
    """Give run `b` the ledger of `a`."""
    (b / "health").mkdir(parents=True)
    (b / "health" / "skipped.json").write_text((a / "health" / "skipped.json").read_text())


def messages(folder: Path) -> list[str]:
    return [event["message"] for event in read_events(folder) if event["guard"] != "run"]


def steps(folder: Path) -> list[int]:
    return [line["step"] for line in read_metrics(folder)]


def test_it_began_where_it_was_seen_first() -> None:
    """Forward before backward; on the way forward the lowest layer, on the way back the highest."""
    arrived = [Finding(0, True, forward="layers.11"), Finding(1, True, forward="layers.9"), Finding(2, False)]
    assert explain(arrived).startswith("began on rank 1 in layers.9; it did not come back")
    behind = [Finding(0, False, backward="layers.9", again=True), Finding(1, False, backward="layers.11", again=True)]
    assert explain(behind).startswith("began on rank 1 in layers.11; it came back")
    assert explain([*arrived, *behind]).startswith("began on rank 1 in layers.9; ")
    assert explain([Finding(0, False), Finding(1, True)]).startswith("began on rank 1; ")


SOME = ("pipeline", "experts", "zero 2")


@pytest.mark.parametrize("engine", [pytest.param(e, marks=[] if e in SOME else FULL) for e in ENGINES])
def test_a_nan_is_traced_and_left_out_as_if_it_had_never_been_there(engine: str, tmp_path: Path) -> None:
    """One rank's layer gives NaN: named, however it spreads; nothing of the step stays behind in any engine."""
    a, b = tmp_path / "a", tmp_path / "b"
    assert run_ranks(2, train_with, on(engine, a, 3), Fault("nan in a layer", 1, (1,))) == ["", ""]
    (said,) = messages(a)
    broken = {"interleaved": 1, "zero bubble": 1}.get(engine, 2)  # the first on rank 1, else the one in the middle
    assert f"began on rank 1 in layers.{broken}; found in the gradient of " in said
    assert said.endswith("it came back when the step was repeated; step left out")
    assert steps(a) == [1, 3]
    leave_out_the_same(a, b)
    assert run_ranks(2, train_with, on(engine, b, 3)) == ["", ""]
    assert_same_end(a, b)


@pytest.mark.full
@pytest.mark.parametrize("engine", ["pipeline", "experts", "tensor", "zero 1", "zero 2"])
def test_a_nan_in_one_gradient_is_found_where_it_lies(engine: str, tmp_path: Path) -> None:
    said = run_ranks(
        2, train_with, on(engine, tmp_path, 3, HealthConfig(nan_limit=1)), Fault("nan in a gradient", 1, (1,))
    )
    assert said[0] == said[1] and said[0].startswith("HealthError: 1 steps in a row were not finite")
    assert " on rank 1; it did not come back: suspect the hardware" in said[0] and "began" not in said[0]
    assert steps(tmp_path) == [1]


@pytest.mark.parametrize("engine", [pytest.param(e, marks=[] if e == "zero 2" else FULL) for e in ENGINES])
def test_a_spike_is_rolled_back_as_if_its_batches_had_never_been_there(engine: str, tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    assert run_ranks(2, train_with, on(engine, a, 7, ACT), Fault("spike", -1, (5,))) == ["", ""]
    spike, rollback = messages(a)
    assert (
        spike.startswith("spike: loss ") and rollback == "rolled back to step 3 (memory); batches 4 to 5 are left out"
    )
    assert steps(a) == [1, 2, 3, 4, 7]
    leave_out_the_same(a, b)
    assert run_ranks(2, train_with, on(engine, b, 7, ACT)) == ["", ""]
    assert_same_end(a, b)


@pytest.mark.full
@pytest.mark.parametrize("engine", ["zero 1", "zero 2"])
def test_a_drifting_replica_under_zero_stops_the_run_by_name(engine: str, tmp_path: Path) -> None:
    config = on(engine, tmp_path, 6, HealthConfig(replicas_every=3, straggler="off"))
    said = run_ranks(2, train_with, config, Fault("drift", 1, (2,)))
    assert len(said) == 2 and said[0] == said[1]
    assert said[0].startswith("HealthError: replicas hold different bits: layers.1.")
    assert "differs between ranks 0, 1" in said[0] and steps(tmp_path) == [1, 2]
