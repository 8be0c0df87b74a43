"""Training with pipeline stages: the same losses as without, exact resume, checkpoints on other meshes, refusals."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from polylepis.checkpoints.manifest import newest_checkpoint, read_manifest
from polylepis.checkpoints.sharded import read_tensors
from polylepis.parallel.mesh import MeshConfig
from polylepis.parallel.pipeline.config import PipelineConfig
from polylepis.pretrain.config import RunConfig, load_config
from polylepis.pretrain.meter.tracker import read_metrics
from polylepis.pretrain.prepare import check_all
from polylepis.pretrain.shrink import shrink
from polylepis.pretrain.train import train
from ranks import run_ranks


def small(folder: Path, steps: int, mesh: MeshConfig, pipeline: PipelineConfig, **train_changes: Any) -> RunConfig:
    """The quickstart's structure, with an expert layer, on mock data: four micro-batches per step."""
    config = shrink(load_config("quickstart"), steps, mesh)
    data = replace(config.data, global_batch=4, micro_batch=1)
    model = replace(config.model, pattern="M*-E")
    changes = replace(config.train, **train_changes)
    return replace(config, folder=str(folder), model=model, data=data, pipeline=pipeline, train=changes)


def run(config: RunConfig) -> list[dict[str, Any]]:
    run_ranks(config.mesh.n_processes, train, config, timeout=240)
    return read_metrics(config.path)


def everything(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = newest_checkpoint(folder / "checkpoints")
    assert checkpoint is not None
    return read_tensors(checkpoint) | read_tensors(checkpoint, "optimizer.")


ONE = MeshConfig(dp_shard=1)
PP2 = MeshConfig(dp_shard=1, pp=2)


def test_trains_like_one_process(tmp_path: Path) -> None:
    expected = run(small(tmp_path / "one", 3, ONE, PipelineConfig()))
    actual = run(small(tmp_path / "pp", 3, PP2, PipelineConfig("interleaved")))
    for ours, theirs in zip(actual, expected, strict=True):
        for key in ("loss", "grad_norm", "loss/text", "loss/image", "loss/voice"):
            assert ours[key] == pytest.approx(theirs[key], rel=2e-4), key
        assert ours["tokens/text"] == theirs["tokens/text"]
    manifests = [read_manifest(tmp_path / name / "checkpoints" / "step-00000003") for name in ("one", "pp")]
    described = [
        {name: (value["shape"], value["dtype"]) for name, value in manifest["tensors"].items() if "random" not in name}
        for manifest in manifests
    ]
    assert described[0] == described[1]
    one, pipelined = everything(tmp_path / "one"), everything(tmp_path / "pp")
    assert one.keys() == pipelined.keys()
    bias = "layers.3.mixer.selection_bias"
    assert torch.equal(one[bias], pipelined[bias]) and bool(one[bias].any())


def test_stopped_and_resumed_is_bitwise_equal(tmp_path: Path) -> None:
    """On pp 2 × tp 2, recomputing everything."""
    mesh = MeshConfig(dp_shard=1, pp=2, tp=2)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = run(small(whole, 4, mesh, PipelineConfig(), checkpoint_every=2, keep=0))
    shutil.copytree(whole, parts, ignore=shutil.ignore_patterns("step-00000004"))
    actual = run(small(parts, 4, mesh, PipelineConfig()))
    assert len(actual) == 4 and actual[3]["time"] > expected[3]["time"]
    ours, theirs = everything(parts), everything(whole)
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    for key in ("loss", "grad_norm", "lr"):
        assert [line[key] for line in actual] == [line[key] for line in expected]


def test_refusals_before_the_first_step(tmp_path: Path) -> None:
    config = small(tmp_path, 1, PP2, PipelineConfig())
    few = replace(config, data=replace(config.data, global_batch=1))
    with pytest.raises(ValueError, match="1 micro-batches per rank and step, but 1f1b over pp 2 needs at least 2"):
        check_all(few, 2)
    with pytest.raises(ValueError, match=r"pp 8 × 1 stages per rank .*= 8 stages, but the pattern has only 4 layers"):
        check_all(replace(config, mesh=replace(PP2, pp=8)), 8)
    assert not list(tmp_path.iterdir())
