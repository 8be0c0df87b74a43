"""What a checkpoint claims is checked: content by hashes, its index without executing it. The docs' snippets run."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata

from keeping import model_and_optimizer, step
from polylepis.checkpoints.content import hash_tensor
from polylepis.checkpoints.errors import CheckpointError
from polylepis.checkpoints.manifest import INDEX, MANIFEST, damages, hash_file, read_manifest
from polylepis.checkpoints.reader import Reader
from polylepis.checkpoints.restricted import read_index
from polylepis.checkpoints.sharded import content_damages, load_checkpoint, read_tensors, save_checkpoint
from polylepis.launch.cli import cli, main
from polylepis.parallel.mesh import MeshConfig
from ranks import run_ranks

DOCS = (Path(__file__).parent.parent.parent / "docs" / "checkpoints.md").read_text()


def save(folder: Path, mesh: MeshConfig, steps: int) -> None:
    model, optimizer = model_and_optimizer(mesh, seed=1)
    for _ in range(steps):
        step(model, optimizer)
    save_checkpoint(folder, model, optimizer, {"step": 1, "data": {}})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`a` and `b`: untrained on one rank and on two; `c`: trained."""
    folder = tmp_path_factory.mktemp("saved")
    save(folder / "a", MeshConfig(dp_shard=1), 0)
    run_ranks(2, save, folder / "b", MeshConfig(dp_shard=1, tp=2), 0)
    save(folder / "c", MeshConfig(dp_shard=1), 1)
    return folder


def rewrite(checkpoint: Path, change: Any = lambda manifest: None) -> None:
    """Make the manifest agree with the files again, as someone who tampers would."""
    manifest = read_manifest(checkpoint)
    manifest["files"] = {name: hash_file(checkpoint / name) for name in manifest["files"]}
    change(manifest)
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))


def test_hashes_are_those_of_the_tensors_on_any_mesh(saved: Path) -> None:
    a, b = (read_manifest(saved / name / "step-00000001")["tensors"] for name in "ab")
    tensors = read_tensors(saved / "b" / "step-00000001")
    assert tensors
    for name, tensor in tensors.items():
        assert a[name]["hash"] == b[name]["hash"] == hash_tensor(tensor)


def test_content_that_is_not_what_was_saved(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The files are whole and their hashes right, yet they hold other weights: only the tensors' hashes tell."""
    forged = tmp_path / "step-00000001"
    shutil.copytree(saved / "a" / "step-00000001", forged)
    for name in ("__0_0.distcp", INDEX):
        shutil.copy(saved / "c" / "step-00000001" / name, forged / name)
    rewrite(forged)
    assert list(damages(forged)) == [] and main(["checkpoint", "verify", "--quick", str(forged)]) == 0
    a, c = (read_manifest(saved / name / "step-00000001")["tensors"] for name in "ac")
    changed = sorted(name for name in a if a[name]["hash"] != c[name]["hash"])
    assert len(changed) > 100
    assert sorted(line.split(":")[0] for line in content_damages(forged)) == changed
    capsys.readouterr()
    assert main(["checkpoint", "verify", str(forged)]) == 1
    assert "final_norm.weight: is not what the ranks held when they saved" in capsys.readouterr().err
    model, optimizer = model_and_optimizer(MeshConfig(dp_shard=1), seed=2)
    with pytest.raises(CheckpointError, match=r"tensors are not what was saved: embed\.weight, .* …"):
        load_checkpoint(forged, model, optimizer)


def test_diff_goes_by_hashes(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, c = (str(saved / name / "step-00000001") for name in "abc")
    assert main(["checkpoint", "diff", a, b]) == 0
    assert capsys.readouterr().out.startswith("0 of ")
    assert main(["checkpoint", "diff", a, c, "--most", "500"]) == 1
    slow = capsys.readouterr().out.splitlines()
    assert main(["checkpoint", "diff", a, c, "--most", "500", "--quick"]) == 1
    quick = capsys.readouterr().out.splitlines()
    assert sorted(line.split(":")[0] for line in slow) == sorted(line.split(":")[0] for line in quick)
    assert all(float(re.search(r"differs by (\S+) of its norm", line)[1]) > 0 for line in slow[:-1])  # type: ignore[index]
    assert re.fullmatch(r"\d+ of \d+ tensors differ", slow[-1])
    assert main(["checkpoint", "inspect", b, "--tensors"]) == 0
    text = capsys.readouterr().out
    assert "polylepis " in text and "tp2=S(0)" in text and f"torch {torch.__version__}, format 2" in text


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


def test_no_pickle_is_executed(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    evil = tmp_path / "step-00000001"
    shutil.copytree(saved / "a" / "step-00000001", evil)
    assert isinstance(read_index(evil), Metadata)
    (evil / INDEX).write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match=r"\.metadata: has .* bytes, but was written with"):
        Reader(evil)
    rewrite(evil)
    for payload, reason in ((Evil(), r"it asks for posix\.mkdir"), ({"a": 1}, "holds a dict, not the index")):
        (evil / INDEX).write_bytes(pickle.dumps(payload))
        rewrite(evil)
        with pytest.raises(CheckpointError, match=reason):
            read_tensors(evil)
    assert not (tmp_path / "executed").exists()


def test_a_changed_index_is_refused_before_it_is_opened(saved: Path, tmp_path: Path) -> None:
    copy = tmp_path / "step-00000001"
    shutil.copytree(saved / "a" / "step-00000001", copy)
    data = bytearray((copy / INDEX).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / INDEX).write_bytes(data)
    with pytest.raises(CheckpointError, match=r"\.metadata: its content has changed since it was written"):
        Reader(copy)


def test_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", DOCS, flags=re.DOTALL)
    assert snippets
    for code in snippets:
        exec(code, {})
    lines = [line.split("  #")[0].split()[1:] for line in DOCS.splitlines() if line.startswith("polylepis checkpoint")]
    assert len(lines) >= 4
    group = cli.get_command(click.Context(cli), "checkpoint")
    assert isinstance(group, click.Group)
    for words in lines:
        command = group.get_command(click.Context(group), words[1])
        assert command is not None and command.make_context(words[1], words[2:], resilient_parsing=True)
