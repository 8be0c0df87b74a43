"""Checkpoints of pipeline stages: the same bits on any cut, with or without stages; another model is refused on all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from pipelines import Case, build, step
from polylepis.checkpoints.errors import CheckpointError
from polylepis.checkpoints.manifest import newest_checkpoint, read_manifest
from polylepis.checkpoints.sharded import load_checkpoint, read_tensors, save_checkpoint
from polylepis.checkpoints.tensors import state_tensors
from polylepis.parallel.engines.fsdp import build_model
from polylepis.parallel.mesh import MeshConfig, build_mesh
from polylepis.parallel.pipeline.config import PipelineConfig
from polylepis.pretrain.optim import OptimConfig, build_optimizer
from ranks import run_ranks
from toys import ALL_ROUTED, toy

CONFIG = toy("M*-E", ALL_ROUTED)
STAGES = Case(MeshConfig(dp_shard=1, pp=2, tp=2), PipelineConfig("interleaved"), dtype=torch.float32)


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.full_tensor() if isinstance(t, DTensor) else t.clone() for n, t in tensors.items()}


def save_stages(folder: Path) -> dict[str, Tensor]:
    engine, _ = build(CONFIG, STAGES)
    step(engine, STAGES)
    engine.update(1e-2)
    save_checkpoint(folder, engine.models, engine.optimizer, {"step": 1})
    return whole(state_tensors(engine.models, engine.optimizer))


def resave_flat(folder: Path, other: Path) -> dict[str, Tensor]:
    """Load on four data-parallel ranks, save again."""
    mesh = build_mesh(MeshConfig(dp_shard=4), "cpu")
    model = build_model(CONFIG, mesh, seed=9)
    optimizer = build_optimizer(OptimConfig(), model)
    load_checkpoint(newest(folder), [model], optimizer)
    save_checkpoint(other, [model], optimizer, {"step": 2})
    return whole(state_tensors([model], optimizer))


def load_stages(folder: Path, case: Case) -> dict[str, Tensor]:
    engine, _ = build(CONFIG, case)
    load_checkpoint(newest(folder), engine.models, engine.optimizer)
    return whole(state_tensors(engine.models, engine.optimizer))


def refuse(folder: Path) -> str:
    engine, _ = build(toy("M*-M", ALL_ROUTED), STAGES)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(newest(folder), engine.models, engine.optimizer)
    return str(caught.value)


def newest(folder: Path) -> Path:
    checkpoint = newest_checkpoint(folder)
    assert checkpoint is not None
    return checkpoint


def union(results: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: tensor for result in results for name, tensor in result.items()}


def test_stages_and_none_open_each_other_bit_for_bit(tmp_path: Path) -> None:
    """pp 2 × tp 2 (four stages) → dp 4 → pp 2 × dp 2, cut elsewhere."""
    staged, flat = tmp_path / "staged", tmp_path / "flat"
    expected = union(run_ranks(4, save_stages, staged))
    assert set(read_manifest(newest(staged))["tensors"]) >= set(expected)
    assert any(name.startswith("layers.3") for name in expected) and "lm_head.weight" in expected
    for actual in run_ranks(4, resave_flat, staged, flat):
        assert actual.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []
    other = Case(MeshConfig(dp_shard=2, pp=2), PipelineConfig(cuts=(0, 3)), dtype=torch.float32)
    back = union(run_ranks(4, load_stages, flat, other))
    assert back.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(back[name], expected[name])] == []
    assert all(torch.equal(value, expected[name]) for name, value in read_tensors(newest(staged)).items())


def test_another_model_is_refused_on_every_rank(tmp_path: Path) -> None:
    run_ranks(4, save_stages, tmp_path)
    messages = run_ranks(4, refuse, tmp_path)
    assert len(set(messages)) == 1 and "layers.3.mixer.A_log is absent in it" in messages[0]
