"""Checkpoints of experts that lie on different ranks: the same keys and bits with and without expert parallelism."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from polylepis.checkpoints.errors import CheckpointError
from polylepis.checkpoints.manifest import newest_checkpoint, read_manifest
from polylepis.checkpoints.sharded import load_checkpoint, read_tensors, save_checkpoint
from polylepis.parallel.engines.fsdp import build_model
from polylepis.parallel.kinds.moe import MoEConfig
from polylepis.parallel.layout import Layout
from polylepis.parallel.mesh import MeshConfig, build_mesh
from polylepis.parallel.model import HybridModel, ModelConfig
from polylepis.parallel.parts import named_parts, whole_entries
from polylepis.pretrain.optim import OptimConfig, build_optimizer
from ranks import run_ranks
from toys import toy, toy_batch

CONFIG = toy("ME", moe=MoEConfig(n_experts=4, top_k=2, d_ff=16, d_ff_shared=12))
Tensors = dict[str, torch.Tensor]


def build(mesh: MeshConfig, seed: int, config: ModelConfig = CONFIG) -> tuple[HybridModel, torch.optim.Optimizer]:
    model = build_model(config, build_mesh(mesh, "cpu"), seed=seed)
    return model, build_optimizer(OptimConfig(), model)


def whole(model: HybridModel, optimizer: torch.optim.Optimizer) -> Tensors:
    result: Tensors = {name: load.clone() for name, load in model.named_buffers() if name.endswith("expert_load")}
    assert result
    for name, parameter, part in named_parts(model):
        for key, value in {"": parameter, **optimizer.state[parameter]}.items():
            if isinstance(value, DTensor):
                result |= {f"{key} {n}": t for n, t in whole_entries(value.detach(), part, name).items()}
    return result


def save(mesh: MeshConfig, folder: Path) -> Tensors:
    model, optimizer = build(mesh, seed=1)
    batch = toy_batch([[13, 1, 9], [20]], 24)
    layout = Layout.from_batch(batch, 3, model.mesh, 10.0)
    model(batch["tokens"].reshape(-1), layout, batch["labels"].reshape(-1)).sum().backward()
    optimizer.step()
    model.layers["1"].mixer.expert_load += 7
    save_checkpoint(folder, model, optimizer, {"step": 1, "data": {}})
    return whole(model, optimizer)


def load(mesh: MeshConfig, folder: Path, config: ModelConfig = CONFIG) -> Tensors:
    model, optimizer = build(mesh, 2, config)
    newest = newest_checkpoint(folder)
    assert newest is not None
    load_checkpoint(newest, model, optimizer)
    for _, parameter, part in named_parts(model):  # a checkpoint holds one of each expert: copies are made anew
        for value in (parameter, *optimizer.state[parameter].values()):
            if part.expert and isinstance(value, DTensor):
                rows = value.detach().full_tensor()
                assert all(torch.equal(r, rows[part.entries.index(e)]) for r, e in zip(rows, part.entries, strict=True))
    return whole(model, optimizer)


MESHES = {
    "ep": MeshConfig(dp_shard=2, ep=2),
    "none": MeshConfig(dp_shard=1),
    "ep × edp": MeshConfig(dp_shard=4, ep=2),
    "ep × tp": MeshConfig(dp_shard=2, tp=2, ep=2),
    "spare slots": MeshConfig(dp_shard=2, ep=2, ep_spare=1),
}


@pytest.mark.parametrize(
    ("saver", "loader"), [("ep", "none"), ("none", "ep × edp"), ("ep × edp", "spare slots"), ("spare slots", "ep × tp")]
)
def test_any_mesh_reads_any_mesh(saver: str, loader: str, tmp_path: Path) -> None:
    def ranks(name: str) -> int:
        return MESHES[name].dp_shard * MESHES[name].tp

    saved = run_ranks(ranks(saver), save, MESHES[saver], tmp_path)
    for result in run_ranks(ranks(loader), load, MESHES[loader], tmp_path):
        assert result.keys() == saved[0].keys()
        assert [name for name in result if not torch.equal(result[name], saved[0][name])] == []
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    experts = {f"layers.1.mixer.{p}_proj.weight.experts.{j}" for p in ("up", "down") for j in range(4)}
    assert experts <= set(read_manifest(newest)["tensors"])
    assert experts <= set(read_tensors(newest, "layers.1.mixer."))


def test_another_model_is_refused_on_every_rank(tmp_path: Path) -> None:
    run_ranks(2, save, MESHES["ep"], tmp_path)
    for message in run_ranks(2, refusal, tmp_path):
        assert "layers.1.mixer.down_proj.weight.experts.4 is absent in it and (16, 16) here" in message


def refusal(folder: Path) -> str:
    try:
        load(MESHES["ep"], folder, toy("ME", moe=MoEConfig(n_experts=6, top_k=2, d_ff=16, d_ff_shared=12)))
    except CheckpointError as error:
        return str(error)
    return "accepted"
