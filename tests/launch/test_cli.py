"""The command line as a person meets it: help, one-line mistakes, exit codes; nothing is written by a refusal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from polylepis.launch.cli import ROOMS, main
from polylepis.pretrain.config import load_config
from polylepis.pretrain.train import train
from ranks import run_ranks


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "polylepis.launch", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=os.environ | {"COLUMNS": "110"})


@pytest.mark.parametrize("command", ["", *ROOMS])
def test_help_reads_well(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert "Usage: polylepis" in text
    assert "Commands:" in text or "Options:" in text
    assert all(len(line) <= 120 for line in text.splitlines())


def test_help_does_not_import_torch(tmp_path: Path) -> None:
    code = "import sys; from polylepis.launch.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, capture_output=True)


MISTAKES = [
    (("train", "quickstart", "train.stepz=3"), "polylepis: train.stepz: unknown key; nearest is steps (command line)"),
    (("train", "nonsense"), "polylepis: nonsense: no such recipe, file or run folder"),
    (("train", "quickstart", "model.pattern=MXM"), "polylepis: model.pattern: character 'X' at position 1 names no"),
    (
        ("train", "quickstart", "mesh.tp=4"),
        "polylepis: model.attention: n_heads 4 and n_kv_heads 2 must both be divisible by",
    ),
    (("train", "quickstart"), "polylepis: runs/quickstart/shards"),  # no data set here
    (("evaluate", "nowhere"), "polylepis: nowhere: no config.yaml in it"),
    (("generate", "nowhere", "--tokens", "0"), "polylepis: need --tokens ≥ 1"),
    (("convert", "nowhere", "--to", "hf"), "polylepis: nowhere: no such run folder"),
    (("recipes", "show", "nonsense"), "polylepis: nonsense: no such recipe"),
]


@pytest.mark.parametrize(("arguments", "line"), MISTAKES, ids=[" ".join(arguments) for arguments, _ in MISTAKES])
def test_mistakes_are_one_line_and_write_nothing(
    arguments: tuple[str, ...],
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(line)
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_mistake_in_a_real_process(tmp_path: Path) -> None:
    result = run("train", "quickstart", "seed=one", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == "polylepis: seed: input should be a valid integer, not 'one' (command line)\n"


def test_unknown_command_names_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "No such command 'trian'" in capsys.readouterr().err


def test_traceback_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYLEPIS_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no such recipe"):
        main(["train", "nonsense"])


def test_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "list"]) == 0
    listed = capsys.readouterr().out
    assert "mamba2-hybrid-8b               8,654,517,248" in listed
    assert main(["recipes", "show", "quickstart"]) == 0
    assert "every M routed by modality" in capsys.readouterr().out


def test_dry_run_prints_the_resolved_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "mamba2-hybrid-8b", "--shrink", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("schema: 1\nname: mamba2-hybrid-8b-shrunk\n")
    assert list(tmp_path.iterdir()) == []


def test_train_through_torchrun(tmp_path: Path) -> None:
    """The command starts two workers; called again they have nothing left to do; a worker's failure is told."""
    result = run("train", "quickstart", "--shrink", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "runs" / "quickstart-shrunk"
    assert {"checkpoints", "config.yaml", "metrics.jsonl", "loss.png"} <= {path.name for path in folder.iterdir()}
    before = (folder / "metrics.jsonl").read_text()
    run_ranks(2, train, replace(load_config(str(folder)), folder=str(folder)))
    assert (folder / "metrics.jsonl").read_text() == before
    (folder / "checkpoints" / "step-00000002" / "__0_0.distcp").write_bytes(b"")
    broken = run("train", str(folder), "train.steps=3", "mesh.tp=1", cwd=tmp_path)
    assert broken.returncode == 2
    assert "__0_0.distcp: has 0 bytes, but was written with " in broken.stderr
    assert "polylepis: train stopped: rank" in broken.stderr


def test_an_interrupted_command_saves_and_says_how_to_go_on(tmp_path: Path) -> None:
    """Ctrl-C reaches the command alone: torchrun's workers, here one, have sessions of their own."""
    script = (
        "import sys; from polylepis.pretrain import shrink as s; "
        "real = s.shrink; s.shrink = lambda c, *a: real(c, 100000); "
        "from polylepis.launch.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    metrics = tmp_path / "runs" / "quickstart-shrunk" / "metrics.jsonl"
    command = [sys.executable, "-c", script, "train", "quickstart", "--shrink", "mesh.tp=1"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not (metrics.is_file() and len(metrics.read_text().splitlines()) > 2):
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=240)
    assert process.returncode == 128 + signal.SIGINT, said
    steps = len(metrics.read_text().splitlines())
    assert f"quickstart-shrunk: stopped requeue {steps}; the same command resumes it" in said
    assert (metrics.parent / "checkpoints" / f"step-{steps:08d}" / "manifest.json").is_file()
