"""The README's snippets run, its commands exist, its example of a mistake is what is printed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import torch

from polylepis.checkpoints.hf.export import export
from polylepis.checkpoints.transforms import Tensors
from polylepis.launch.cli import cli, main
from polylepis.parallel.kinds.mamba import ROUTABLE, MambaConfig
from polylepis.parallel.model import ModelConfig
from polylepis.parallel.parts import initial_values

README = (Path(__file__).parent.parent / "README.md").read_text()


LAUNCH = (Path(__file__).parent.parent / "docs" / "launch.md").read_text()


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def tiny_export(out: Path) -> None:
    mamba = MambaConfig(d_state=4, head_dim=4, n_groups=1, chunk_size=8, routed=ROUTABLE)
    config = ModelConfig("M", 8, 40, ("text", "image"), vocab_multiple=8, mamba=mamba)
    tensors = {
        key: initial_values(part, key, 0) for name, part in config.parts().items() for key in part.entry_names(name)
    }
    out.parent.mkdir(parents=True)
    export(config, Tensors(tensors), out)


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.splitlines()[0][:40])
def test_python_snippets_run(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if "runs/quickstart/hf" in code:
        tiny_export(tmp_path / "runs/quickstart/hf")
    names: dict[str, Any] = {}
    exec(code, names)
    if "model" in names:
        assert isinstance(names["model"], torch.nn.Module)


def commands() -> list[str]:
    lines = [line for block in blocks("console", README + LAUNCH) for line in block.splitlines()]
    return sorted({line.split("  #")[0].strip() for line in lines if line.startswith("polylepis ")})


@pytest.mark.parametrize("line", commands())
def test_commands_and_options_exist(line: str) -> None:
    words = shlex.split(line)[1:]
    context, command = click.Context(cli, info_name="polylepis"), cli
    while isinstance(command, click.Group):
        name, found, words = command.resolve_command(context, words)
        assert found is not None, line
        context, command = click.Context(found, parent=context, info_name=name), found  # type: ignore[assignment]
    command.make_context(str(context.info_name), words, parent=context.parent)  # parses, runs nothing


def test_the_mistake_is_told_as_shown(capsys: pytest.CaptureFixture[str]) -> None:
    command, answer = re.search(
        r"^(polylepis train .*stepz.*)\n# (polylepis: .*)$", README, flags=re.MULTILINE
    ).groups()  # type: ignore[union-attr]
    assert main(shlex.split(command)[1:]) == 2
    assert capsys.readouterr().err.strip() == answer


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#]+)\)", README))
def test_links_exist(target: str) -> None:
    assert (Path(__file__).parent.parent / target).exists()
