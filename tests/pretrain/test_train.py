"""Training end to end on toy runs: resume is bitwise, every recipe runs, what cannot run is refused beforehand."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from polylepis.checkpoints.manifest import newest_checkpoint, read_manifest
from polylepis.checkpoints.sharded import read_tensors
from polylepis.parallel.engines.deepspeed import DeepSpeedConfig
from polylepis.parallel.mesh import ContextConfig, MeshConfig
from polylepis.pretrain.config import RunConfig, load_config, recipe_names
from polylepis.pretrain.errors import ConfigError
from polylepis.pretrain.meter.tracker import Tracker, plot_losses, read_metrics
from polylepis.pretrain.prepare import check_all, n_processes, open_data
from polylepis.pretrain.shrink import shrink
from polylepis.pretrain.train import train
from ranks import run_ranks


def small(folder: Path, steps: int, tp: int = 2, **train_changes: Any) -> RunConfig:
    """The quickstart with one layer of each kind, on mock data."""
    config = replace(shrink(load_config("quickstart"), steps), folder=str(folder))
    mesh, model = replace(config.mesh, tp=tp), replace(config.model, pattern="M*-E")
    return replace(config, mesh=mesh, model=model, train=replace(config.train, **train_changes))


def everything(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = newest_checkpoint(folder / "checkpoints")
    assert checkpoint is not None
    return read_tensors(checkpoint) | read_tensors(checkpoint, "optimizer.")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps without interruption on tp 2 with sequence parallelism, saved after every second."""
    folder = tmp_path_factory.mktemp("whole")
    run_ranks(2, train, small(folder, 6, checkpoint_every=2, keep=0))
    return folder


def cut(whole: Path, step: int, folder: Path) -> Path:
    """A copy of the run folder of a run that was killed before it saved again after `step`."""

    def later(_: str, names: list[str]) -> list[str]:
        return [name for name in names if name.startswith("step-") and name != f"step-{step:08d}"]

    return shutil.copytree(whole, folder, ignore=later)


def test_stopped_and_resumed_is_bitwise_equal_to_uninterrupted(whole: Path, tmp_path: Path) -> None:
    """Weights, both moments, data order and the metrics' losses, without saving in between."""
    parts = cut(whole, 2, tmp_path / "parts")
    run_ranks(2, train, small(parts, 6))
    assert sorted(path.name for path in (parts / "checkpoints").glob("step-*")) == ["step-00000002", "step-00000006"]
    expected, actual = everything(whole), everything(parts)
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []
    states = [read_manifest(newest_checkpoint(f / "checkpoints"))["data"] for f in (whole, parts)]  # type: ignore[arg-type]
    assert states[0] == states[1]
    keys = ("step", "loss", "grad_norm", "loss/text", "loss/image", "loss/voice", "lr")
    lines = [[{k: line[k] for k in keys} for line in read_metrics(f)] for f in (whole, parts)]
    assert lines[0] == lines[1] and len(lines[0]) == 6
    assert [line["time"] for line in read_metrics(parts)][2:] > [line["time"] for line in read_metrics(whole)][2:]


def test_checkpoint_continues_on_another_mesh(whole: Path, tmp_path: Path) -> None:
    """tp 2 → one process: the loaded values are the same bits, the next losses agree within reduction order."""
    (tmp_path / "checkpoints").mkdir()
    shutil.copytree(whole / "checkpoints" / "step-00000004", tmp_path / "checkpoints" / "step-00000004")
    run_ranks(1, train, small(tmp_path, 6, tp=1))
    lines = [{line["step"]: line["loss"] for line in read_metrics(folder)} for folder in (whole, tmp_path)]
    assert list(lines[1]) == [5, 6]
    for step in (5, 6):
        assert lines[1][step] == pytest.approx(lines[0][step], rel=1e-5)


def test_deepspeed_resumes_to_the_bit_and_reads_what_fsdp_wrote(tmp_path: Path) -> None:
    """ZeRO 2 on tp 2, interrupted; then the same checkpoint under ZeRO 3 on two data-parallel ranks, and FSDP2."""
    pytest.importorskip("deepspeed")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    second = replace(small(whole, 4, checkpoint_every=2, keep=0), engine="deepspeed")
    run_ranks(2, train, second)
    (parts / "checkpoints").mkdir(parents=True)
    shutil.copytree(whole / "checkpoints" / "step-00000002", parts / "checkpoints" / "step-00000002")
    run_ranks(2, train, replace(second, folder=str(parts)))
    expected, actual = everything(whole), everything(parts)
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []
    losses = [line["loss"] for line in read_metrics(whole)]
    third = DeepSpeedConfig(stage=3, persistent=100)
    others = {"fsdp2": {"engine": "fsdp2"}, "zero3": {"deepspeed": third, "mesh": MeshConfig(dp_shard=2)}}
    for name, changes in others.items():
        folder = tmp_path / name
        (folder / "checkpoints").mkdir(parents=True)
        shutil.copytree(whole / "checkpoints" / "step-00000002", folder / "checkpoints" / "step-00000002")
        data = replace(second.data, micro_batch=1)
        run_ranks(2, train, replace(second, folder=str(folder), data=data, **changes))
        assert [line["loss"] for line in read_metrics(folder)] == pytest.approx(losses[2:], rel=2e-5)


QUICK = ("quickstart", "mixture-of-mamba-37m")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.full) for name in recipe_names()]
)
def test_every_recipe_runs_shrunk(name: str, tmp_path: Path) -> None:
    config = replace(shrink(load_config(name)), folder=str(tmp_path))
    run_ranks(config.mesh.n_processes, train, config)
    losses = [line["loss"] for line in read_metrics(tmp_path)]
    assert len(losses) == 2 and all(0 < loss < 20 for loss in losses)
    assert newest_checkpoint(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "step-00000002"


def test_bfloat16_trains(whole: Path, tmp_path: Path) -> None:
    run_ranks(2, train, small(tmp_path, 6, precision="bfloat16"))
    half, full = (read_metrics(folder)[-1]["loss"] for folder in (tmp_path, whole))
    assert half == pytest.approx(full, rel=0.02) and half != full
    assert {t.dtype for t in everything(tmp_path).values()} == {torch.float32}


def test_refuses_the_folder_of_another_run(tmp_path: Path) -> None:
    config = small(tmp_path, 1, tp=1)
    run_ranks(1, train, config)
    other = replace(config, optim=replace(config.optim, lr=0.123))
    with pytest.raises(ConfigError, match=r"holds a run that differs in optim\.lr: .* → 0\.123; choose another folder"):
        check_all(other, 1)
    check_all(config, 1)
    longer = replace(config, train=replace(config.train, steps=5))
    check_all(longer, 1)  # training on is allowed
    run_ranks(1, train, longer)
    with pytest.raises(ConfigError, match=r"train\.steps: 1, but .* has already trained to step-00000005"):
        check_all(config, 1)


def test_refusals_before_the_first_step(tmp_path: Path) -> None:
    config = small(tmp_path, 1)
    with pytest.raises(ValueError, match=r"= 65 tokens cannot be cut into 2 equal parts for tp 2 .*such as 64"):
        check_all(replace(config, data=replace(config.data, seq_len=65)), 2)
    with pytest.raises(ValueError, match=r"= 64 tokens cannot be cut into 24 equal parts for cp 6 \(zigzag\) and tp 2"):
        zigzag = replace(config, context=ContextConfig("zigzag"), mesh=replace(config.mesh, cp=6))
        check_all(zigzag, 12)
    with pytest.raises(ValueError, match="no multiple of data-parallel ranks 2"):
        mesh = replace(config.mesh, tp=1, dp_shard=2)
        check_all(replace(config, mesh=mesh, data=replace(config.data, global_batch=3)), 2)
    with pytest.raises(ConfigError, match=r"train\.steps: must be at least 1"):
        check_all(small(tmp_path, 0), 2)
    with pytest.raises(ValueError, match="need a vocabulary of at least"):
        open_data(replace(config, model=replace(config.model, vocab_size=30)))
    assert not list(tmp_path.iterdir())


def test_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert n_processes(load_config("quickstart")) == 2
    assert n_processes(load_config("quickstart", ["mesh={tp: 2, dp_shard: 2, dp_replicate: 3, cp: 4}"])) == 48
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert n_processes(load_config("quickstart")) == 8


def test_tracker_drops_what_a_resumed_run_writes_again(tmp_path: Path) -> None:
    line = {"tokens_per_second": 1.0, "step_seconds": 1.0, "loss/text": 1.0}
    with Tracker(tmp_path, 5, 0, progress=False) as tracker:
        for step in range(1, 5):
            tracker.log({"step": step, **line})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 5})[:-3])  # cut by a crash
    with Tracker(tmp_path, 5, 2, progress=False) as tracker:
        tracker.log({"step": 3, **line})
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1, 2, 3]
    assert plot_losses(tmp_path, ("text", "image")).stat().st_size > 5_000


def train_with_a_fault(config: RunConfig, fault: str) -> str:
    """Train; on rank 1, break something at step 2. What this rank said when it stopped."""
    from polylepis.pretrain import prepare as module

    class Faulty(module.Stream):
        def next(self) -> Any:
            step = super().next()
            if dist.get_rank() == 1 and step.index == 1:
                if fault == "dies":
                    raise OSError("the disk is gone")
                step = replace(step, agreed="0123456789abcdef")
            return step

    module.Stream = Faulty  # type: ignore[misc]
    try:
        train(config)
    except Exception as error:
        return "; ".join(error.__notes__) + f": {type(error).__name__}: {error}"
    return "nothing happened"


def test_a_rank_that_diverges_stops_all_and_is_named(tmp_path: Path) -> None:
    for rank, said in enumerate(run_ranks(2, train_with_a_fault, small(tmp_path, 4), "diverges")):
        assert said.startswith(f"rank {rank}, step 2: DivergenceError: step 2: ranks hold different batches; rank ")
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]


def test_a_rank_that_dies_is_named_and_nothing_hangs(tmp_path: Path) -> None:
    """Rank 0 waits in a collective that rank 1 never joins: it must give up by itself, within the timeout."""
    first, second = run_ranks(2, train_with_a_fault, small(tmp_path, 4, timeout=5.0), "dies", timeout=60)
    assert second == "rank 1, step 2: OSError: the disk is gone"
    assert first.startswith("rank 0, step 2: ") and "nothing happened" not in first
