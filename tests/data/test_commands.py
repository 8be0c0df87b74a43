from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from polylepis.data.commands import data
from polylepis.data.errors import DataError


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(data, [str(a) for a in arguments])


def test_help_lists_the_commands() -> None:
    out = run("--help").output
    assert all(name in out for name in ("build", "index", "validate", "inspect"))
    assert "runs/quickstart/shards" in run("build", "--help").output


def test_build_says_when_there_is_nothing_to_do(small: Path) -> None:
    result = run("build", "quickstart", "--out", small)
    assert result.exit_code == 0
    assert f"{small} is up to date" in result.output and "vocabulary 1024" in result.output


def test_mistakes_are_data_errors_for_the_command_line_to_print(small: Path, tmp_path: Path) -> None:
    result = run("build", "quickstart", "--out", small, "--seed", "5")
    assert isinstance(result.exception, DataError) and "choose another --out" in str(result.exception)
    assert isinstance(run("inspect", tmp_path).exception, DataError)
    assert isinstance(run("index", tmp_path / "absent.tar").exception, DataError)


def test_validate_and_inspect(small: Path) -> None:
    result = run("validate", small)
    assert result.exit_code == 0 and "samples are good" in result.output
    result = run("inspect", small, "--samples", "8")
    assert result.exit_code == 0
    for part in ("train", "heldout", "packs of 256 per epoch, fill 0.9", "shuffle quality", "synthetic voice", "@@"):
        assert part in result.output
    assert "do not fit into seq_len 64" in run("inspect", small, "--seq-len", "64").output


@pytest.mark.parametrize("listed", [True, False])
def test_index(damaged: Callable[..., Path], write_shard: Callable[..., Path], listed: bool) -> None:
    tar = damaged() / "heldout-00000.tar" if listed else write_shard()
    index = tar.with_name(tar.name + ".idx.safetensors")
    before = index.read_bytes()
    index.unlink()
    result = run("index", tar)
    assert result.exit_code == 0 and f"{index}: " in result.output
    assert index.read_bytes() == before
