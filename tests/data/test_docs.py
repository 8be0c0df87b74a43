"""The five commands of docs/data.md, from a folder of files to a training mix, run as they are written."""

from __future__ import annotations

import gzip
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from polylepis.data.dataset import Dataset
from polylepis.launch.cli import main

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
ONE_STEP = ["train.steps=1", "train.checkpoint_every=1", "optim.warmup=0"]  # in place of the recipe's run


@pytest.fixture
def commands(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The page's commands, in a folder where they can run."""
    monkeypatch.chdir(tmp_path)
    shards = tmp_path / "runs" / "quickstart" / "shards"
    shards.parent.mkdir(parents=True)
    shards.symlink_to(small)
    files, rng = tmp_path / "my-files", np.random.default_rng(0)
    files.mkdir()
    for i in range(24):
        (files / f"note-{i}.txt").write_text(f"Note number {i} of a reader, about the lake and the weather. " * 8)
        Image.fromarray(rng.integers(0, 256, (40, 30), dtype=np.uint8)).save(files / f"picture-{i}.png")
        (files / f"picture-{i}.txt").write_text(f"picture number {i}")
    soundfile.write(files / "voice.flac", rng.uniform(-0.1, 0.1, (44100, 2)), 44100)
    with gzip.open(files / "web.jsonl.gz", "wt") as lines:
        lines.writelines(json.dumps({"text": f"Page {i} of the web."}) + "\n" for i in range(50))
    block = re.search(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)
    assert block is not None
    found = [shlex.split(line) for line in block.group(1).replace("\\\n", " ").splitlines()]
    assert len(found) == 5 and all(words[0] == "polylepis" for words in found)
    return [words[1:] for words in found]


def test_four_commands_lead_from_files_to_an_audited_mix(
    commands: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in commands[:4]:
        assert main(words) == 0, (words, capsys.readouterr().err)
    assert "each exactly once in each" in capsys.readouterr().out
    mine = Dataset.open(tmp_path / "shards" / "mine")
    totals = {name: int(split.modality_lengths.sum(axis=0).min()) for name, split in mine.splits.items()}
    assert totals["train"] > 0, "text, pictures and sound of the folder are all there"
    assert mine.manifest["fingerprints"] == Dataset.open("runs/quickstart/shards").manifest["fingerprints"]
    assert "<div class=pack>" in (tmp_path / "preview.html").read_text()
    assert (Path(__file__).parents[2] / "docs" / "data-preview.png").stat().st_size > 10_000


@pytest.mark.full
def test_the_fifth_command_trains_on_the_mix(commands: list[list[str]], tmp_path: Path) -> None:
    assert main(commands[0]) == 0
    assert main([*commands[4], *ONE_STEP]) == 0
    steps = [json.loads(line) for line in (tmp_path / "runs" / "mix" / "metrics.jsonl").read_text().splitlines()]
    assert any("loss" in key for step in steps for key in step)
