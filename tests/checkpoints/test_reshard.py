"""Any mesh opens what any mesh saved, bit for bit: weights, both moments, step counts and buffers."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from polylepis.checkpoints.manifest import read_manifest
from polylepis.checkpoints.rules import OPTIMIZER
from polylepis.checkpoints.sharded import load_checkpoint, save_checkpoint
from polylepis.checkpoints.tensors import state_tensors
from polylepis.parallel.engines.base import Elsewhere, Optimizer
from polylepis.parallel.engines.fsdp import build_model
from polylepis.parallel.engines.pipeline import build_stages
from polylepis.parallel.kinds.moe import MoEConfig
from polylepis.parallel.mesh import MeshConfig, build_mesh
from polylepis.parallel.model import HybridModel
from polylepis.parallel.pipeline.config import PipelineConfig, cut_stages
from polylepis.pretrain.objectives.next_token import next_token
from polylepis.pretrain.optim import OptimConfig, build_optimizer
from ranks import run_ranks
from toys import ALL_ROUTED, flop_costs, toy

MESHES = {
    "one": MeshConfig(dp_shard=1),
    "dp2-tp2": MeshConfig(dp_shard=2, tp=2),
    "hsdp2": MeshConfig(dp_replicate=2, dp_shard=1),
    "cp2-tp2": MeshConfig(dp_shard=1, cp=2, tp=2),
    "tp2": MeshConfig(dp_shard=1, tp=2),
    "dp2": MeshConfig(dp_shard=2),
    "cp2": MeshConfig(dp_shard=1, cp=2),
    "dp4": MeshConfig(dp_shard=4),
    "hsdp2-dp2": MeshConfig(dp_replicate=2, dp_shard=2),
    "pp2": MeshConfig(dp_shard=1, pp=2),
    "ep2": MeshConfig(dp_shard=2, ep=2),
    "pp2-ep2-tp2": MeshConfig(dp_shard=2, ep=2, tp=2, pp=2),
    "pp2-hsdp2-tp2": MeshConfig(dp_replicate=2, dp_shard=1, tp=2, pp=2),
    "dp2-cp2-tp2": MeshConfig(dp_shard=2, cp=2, tp=2),
}
CHAIN = ("one", "dp2-tp2", "pp2", "ep2", "cp2-tp2", "hsdp2", "one")
CONFIG = toy("M*-E", ALL_ROUTED, moe=MoEConfig(n_experts=4, top_k=2, d_ff=16, d_ff_shared=12))


# The second engine: every ZeRO stage, alone and under tensor and context parallelism.
ZERO = {
    "zero1-dp2": (MeshConfig(dp_shard=2), 1),
    "zero2-dp2-tp2": (MeshConfig(dp_shard=2, tp=2), 2),
    "zero3-dp4": (MeshConfig(dp_shard=4), 3),
    "zero3-tp2-cp2": (MeshConfig(dp_shard=1, cp=2, tp=2), 3),
}


def world(mesh: MeshConfig) -> int:
    return mesh.dp_replicate * mesh.dp_shard * mesh.cp * mesh.tp * mesh.pp


def build(config: MeshConfig, seed: int) -> tuple[Sequence[HybridModel], torch.optim.Optimizer]:
    mesh = build_mesh(config, "cpu")
    if mesh.pp_size == 1:
        models: Sequence[HybridModel] = (build_model(CONFIG, mesh, seed=seed),)
    else:
        pipeline = PipelineConfig()
        stages = cut_stages(CONFIG, pipeline, mesh.pp_size, flop_costs(CONFIG, 8.0))
        models = build_stages(CONFIG, mesh, pipeline, stages, seed=seed)
    return models, build_optimizer(OptimConfig(), *models)


def build_zero(config: MeshConfig, stage: Any, seed: int) -> tuple[Sequence[HybridModel], Elsewhere]:
    """As `build`, by DeepSpeed; its parameters lie elsewhere, and are read and written through the optimizer."""
    from polylepis.parallel.engines.deepspeed import DeepSpeedConfig, DeepSpeedEngine

    zero = DeepSpeedConfig(stage=stage, persistent=100)
    adam: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    engine = DeepSpeedEngine(CONFIG, build_mesh(config, "cpu"), next_token, zero, seed=seed, **adam)
    return engine.models, engine.optimizer


def logical_value(name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Values that depend on the name alone; every parameter has taken seven steps, as DeepSpeed counts them once."""
    if name.startswith(f"{OPTIMIZER}step."):
        return torch.full(shape, 7, dtype=dtype)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator).to(dtype)


def save_on(mesh: MeshConfig, folder: Path) -> None:
    models, optimizer = build(mesh, seed=1)
    for name, tensor in state_tensors(models, optimizer).items():
        block = logical_value(name, tensor.shape, tensor.dtype)
        if not isinstance(tensor, DTensor):
            tensor.detach().copy_(block)
            continue
        shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        for dim, (length, start) in enumerate(zip(shape, offset, strict=True)):
            block = block.narrow(dim, min(start, block.shape[dim]), length)
        tensor.to_local().detach().copy_(block)
    save_checkpoint(folder, models, optimizer, {"step": 1, "data": {}})


def wrong_after_load(mesh: MeshConfig, folders: list[Path]) -> list[str]:
    """Load each folder's checkpoint over wrong values; see `wrong_tensors`."""
    models, optimizer = build(mesh, seed=2)
    wrong = []
    for folder in folders:
        for tensor in state_tensors(models, optimizer).values():
            (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().fill_(-1)
        load_checkpoint(folder / "step-00000001", models, optimizer)
        wrong += [f"{folder.name}: {name}" for name in wrong_tensors(models, optimizer)]
    return wrong


def wrong_tensors(models: Sequence[HybridModel], optimizer: Optimizer) -> list[str]:
    """Names of tensors that, gathered from all ranks, are not what their name says."""
    wrong = []
    for name, tensor in state_tensors(models, optimizer).items():
        value = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if not torch.equal(value, logical_value(name, tensor.shape, tensor.dtype)):
            wrong.append(name)
    return wrong


def pass_on(mesh: MeshConfig, source: Path, target: Path) -> list[str]:
    """Load what another mesh saved (its wrong tensors are the answer), and save it from here."""
    models, optimizer = build(mesh, seed=3)
    load_checkpoint(source / "step-00000001", models, optimizer)
    save_checkpoint(target, models, optimizer, {"step": 1, "data": {}})
    return wrong_tensors(models, optimizer)


def through_zero(mesh: MeshConfig, stage: int, source: Path, target: Path) -> list[str]:
    """`pass_on` by DeepSpeed."""
    models, optimizer = build_zero(mesh, stage, seed=4)
    load_checkpoint(source / "step-00000001", models, optimizer)
    save_checkpoint(target, models, optimizer, {"step": 1, "data": {}})
    return wrong_tensors(models, optimizer)


def check_hashes(checkpoints: list[Path]) -> None:
    manifests = [read_manifest(path / "step-00000001")["tensors"] for path in checkpoints]
    hashes = [{n: t["hash"] for n, t in m.items() if not n.startswith("random.")} for m in manifests]
    assert all(found == hashes[0] for found in hashes)  # the content's hash knows no mesh
    placements = {m["layers.1.mixer.q_proj.weight"]["placement"] for m in manifests}
    assert len(placements) >= 3, placements  # they did lie differently


def test_a_checkpoint_wanders_from_mesh_to_mesh(tmp_path: Path) -> None:
    """Every mesh of the chain opens the one before it and saves for the next; in the end nothing has changed."""
    folders = [tmp_path / f"{number}-{name}" for number, name in enumerate(CHAIN)]
    run_ranks(world(MESHES[CHAIN[0]]), save_on, MESHES[CHAIN[0]], folders[0])
    for name, source, target in zip(CHAIN[1:], folders[:-1], folders[1:], strict=True):
        for wrong in run_ranks(world(MESHES[name]), pass_on, MESHES[name], source, target):
            assert wrong == [], name
    check_hashes(folders)


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_every_mesh_opens_the_checkpoints_of_every_mesh(tmp_path: Path) -> None:
    """14 × 14."""
    folders = [tmp_path / name for name in MESHES]
    for mesh, folder in zip(MESHES.values(), folders, strict=True):
        run_ranks(world(mesh), save_on, mesh, folder)
    check_hashes(folders)
    for name, mesh in MESHES.items():
        for wrong in run_ranks(world(mesh), wrong_after_load, mesh, folders, timeout=600):
            assert wrong == [], name


def check_engines(tmp_path: Path, meshes: Sequence[str], zeros: Sequence[str]) -> None:
    """FSDP2 on each mesh → DeepSpeed on each of its plans → FSDP2 on another mesh, to the bit."""
    written = []
    for name in meshes:
        written.append(tmp_path / name)
        run_ranks(world(MESHES[name]), save_on, MESHES[name], written[-1])
    handed = []
    for name in zeros:
        mesh, stage = ZERO[name]
        for source in written:
            handed.append(tmp_path / f"{source.name}-{name}")
            for wrong in run_ranks(world(mesh), through_zero, mesh, stage, source, handed[-1], timeout=600):
                assert wrong == [], handed[-1].name
    for name in meshes:
        for wrong in run_ranks(world(MESHES[name]), wrong_after_load, MESHES[name], handed, timeout=600):
            assert wrong == [], name


@pytest.mark.full
def test_a_checkpoint_wanders_to_deepspeed_and_back(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    check_engines(tmp_path, ("tp2", "pp2"), ("zero2-dp2-tp2",))


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_every_zero_stage_opens_the_checkpoints_of_fsdp_and_back(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    check_engines(tmp_path, ("one", "dp2-tp2", "pp2-ep2-tp2", "cp2"), tuple(ZERO))
