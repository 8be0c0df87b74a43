"""Sharded checkpoints: any mesh, both moments, refusals, nothing half-written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from keeping import model_and_optimizer, step
from polylepis.checkpoints.errors import CheckpointError
from polylepis.checkpoints.manifest import complete_checkpoints, damages, newest_checkpoint, read_manifest, superfluous
from polylepis.checkpoints.sharded import (
    load_checkpoint,
    model_tensors,
    optimizer_tensors,
    read_tensors,
    save_checkpoint,
)
from polylepis.launch.cli import main
from polylepis.parallel.engines.fsdp import build_model
from polylepis.parallel.mesh import MeshConfig, build_mesh
from polylepis.parallel.model import HybridModel
from ranks import run_ranks
from toys import toy


def whole(model: HybridModel, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors = model_tensors(model) | optimizer_tensors(model, optimizer)
    return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in tensors.items()}


def train_and_save(mesh: MeshConfig, folder: Path, steps: tuple[int, ...], keep: int) -> dict[str, torch.Tensor]:
    model, optimizer = model_and_optimizer(mesh, seed=1)
    for number in steps:
        step(model, optimizer)
        save_checkpoint(folder, model, optimizer, {"step": number, "data": {"n": number}}, keep=keep)
    return whole(model, optimizer)


def load_on(mesh: MeshConfig, folder: Path) -> dict[str, torch.Tensor]:
    model, optimizer = model_and_optimizer(mesh, seed=2)  # other initial weights
    checkpoint = newest_checkpoint(folder)
    assert checkpoint is not None
    manifest = load_checkpoint(checkpoint, model, optimizer)
    assert manifest["data"] == {"n": manifest["step"]}
    return whole(model, optimizer)


MESHES = [MeshConfig(dp_shard=1), MeshConfig(dp_shard=1, tp=2), MeshConfig(dp_shard=2), MeshConfig(dp_shard=2, tp=2)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """Two steps on dp_shard 2 × tp 2."""
    folder = tmp_path_factory.mktemp("saved")
    return folder, run_ranks(4, train_and_save, MESHES[3], folder, (1, 2), 0)[0]


@pytest.mark.parametrize("mesh", MESHES[1:2], ids=str)
def test_opens_on_another_mesh_bit_for_bit(mesh: MeshConfig, saved: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, expected = saved
    for actual in run_ranks(mesh.dp_shard * mesh.tp, load_on, mesh, folder):
        assert actual.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []
    assert bool(expected["optimizer.exp_avg_sq.layers.0.norm.weight"].all())
    assert bool(expected["optimizer.exp_avg_sq.layers.0.mixer.in_proj.z.weight.voice"].any())


def test_reads_without_a_process_group(saved: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, expected = saved
    checkpoint = complete_checkpoints(folder)[-1]
    tensors = read_tensors(checkpoint)
    assert tensors.keys() == {n for n in expected if not n.startswith("optimizer.")}
    assert all(torch.equal(tensors[name], expected[name]) for name in tensors)
    assert read_tensors(checkpoint, "optimizer.exp_avg.").keys() <= expected.keys()
    assert "layers.0.mixer.in_proj.z.weight.image" in tensors
    assert "layers.3.mixer.up_proj.weight.experts.2" in tensors
    assert "layers.3.mixer.selection_bias" in tensors


def test_keeps_the_newest(tmp_path: Path) -> None:
    run_ranks(1, train_and_save, MESHES[0], tmp_path, (1, 2, 3), 2)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]


def test_unfinished_checkpoints_do_not_exist(saved: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    """A crash before the rename leaves a hidden folder, which nobody finds and which the next save clears."""
    run_ranks(1, train_and_save, MESHES[0], tmp_path, (1,), 0)
    (tmp_path / ".step-00000002.part").mkdir()
    (tmp_path / ".step-00000002.part" / "junk").touch()
    (tmp_path / "step-00000009").mkdir()
    assert newest_checkpoint(tmp_path) == tmp_path / "step-00000001"
    with pytest.raises(CheckpointError, match=r"no manifest\.json in it, so this is not a finished checkpoint"):
        read_manifest(tmp_path / "step-00000009")
    run_ranks(1, train_and_save, MESHES[0], tmp_path, (2,), 0)
    assert not (tmp_path / ".step-00000002.part").exists()
    assert not (tmp_path / "step-00000002" / "junk").exists()


LISTED = (
    r"holds another model: 28 tensors differ: layers\.0\.mixer\.dt_bias is absent in it and \(8,\) here; "
    r"layers\.0\.mixer\.dt_bias\.image is \(8,\) in it and absent here; ([^;]*; ){8}and 18 more$"
)


def test_refuses_another_model(saved: tuple[Path, dict[str, torch.Tensor]]) -> None:
    checkpoint = newest_checkpoint(saved[0])
    assert checkpoint is not None
    other = build_model(toy("M*-E"), build_mesh(MeshConfig(), "cpu"))
    with pytest.raises(CheckpointError, match=LISTED):
        load_checkpoint(checkpoint, other)


def test_refuses_a_newer_format(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"format": 99, "polylepis": "7.0"}')
    with pytest.raises(CheckpointError, match=r"format 99, which polylepis 7\.0 wrote and reads; this"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 1}')
    with pytest.raises(CheckpointError, match=r"format 1, which a development version before 0\.1\.0 wrote and reads"):
        read_manifest(tmp_path)


def test_a_flipped_bit_is_found(
    saved: tuple[Path, dict[str, torch.Tensor]], capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = newest_checkpoint(saved[0])
    assert checkpoint is not None
    assert list(damages(checkpoint)) == []
    assert main(["checkpoint", "verify", str(checkpoint)]) == 0
    assert set(read_manifest(checkpoint)["files"]) == {".metadata", *(f"__{rank}_0.distcp" for rank in range(4))}
    victim = checkpoint / "__2_0.distcp"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    try:
        victim.write_bytes(data)
        assert main(["checkpoint", "verify", str(checkpoint)]) == 1
        assert "__2_0.distcp: its content has changed since it was written" in capsys.readouterr().err
        victim.write_bytes(data[:-1])
        assert [line.split(":")[0] for line in damages(checkpoint)] == ["__2_0.distcp"]
        victim.unlink()
        assert list(damages(checkpoint)) == ["__2_0.distcp: is missing"]
    finally:
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)


def test_what_is_superfluous(tmp_path: Path) -> None:
    for number in (10, 15, 20, 25, 30):
        (tmp_path / f"step-{number:08d}").mkdir()
        (tmp_path / f"step-{number:08d}" / "manifest.json").touch()
    assert [int(p.name[5:]) for p in superfluous(tmp_path, keep=2, keep_every=0)] == [10, 15, 20]
    assert [int(p.name[5:]) for p in superfluous(tmp_path, keep=2, keep_every=10)] == [15]
    assert superfluous(tmp_path, keep=0, keep_every=0) == []


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_ranks(1, train_and_save, MESHES[0], tmp_path / "checkpoints", (1, 2, 3), 0)
    assert main(["checkpoint", "inspect", str(tmp_path), "--tensors"]) == 0
    text = capsys.readouterr().out
    assert "step        3" in text and "layers.3.mixer.up_proj.weight.experts.2" in text
    first, last = (str(tmp_path / "checkpoints" / f"step-0000000{n}") for n in (1, 3))
    assert main(["checkpoint", "diff", last, str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("0 of ")
    assert main(["checkpoint", "diff", first, last]) == 1
    assert "of its norm" in capsys.readouterr().out
    assert main(["checkpoint", "prune", str(tmp_path), "--keep", "1"]) == 0
    assert capsys.readouterr().out.count("would remove") == 2
    assert main(["checkpoint", "prune", str(tmp_path), "--keep", "1", "--yes"]) == 0
    assert [path.name for path in complete_checkpoints(tmp_path / "checkpoints")] == ["step-00000003"]
    assert main(["checkpoint", "prune", str(tmp_path), "--keep", "0"]) == 2
    assert main(["checkpoint", "inspect", str(tmp_path / "nothing")]) == 2
    assert "neither a finished checkpoint nor a run folder" in capsys.readouterr().err
