"""The launch table: entries are written, replaced and read back; without a GPU tuning refuses in one line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from polylepis.kernels.ssd import tune
from polylepis.kernels.ssd.triton_config import HALF, HALVES


def read(table: Path) -> dict[tuple[int, int, int, str, int], object]:
    text = table.read_text().replace("from .triton_config", "from polylepis.kernels.ssd.triton_config")
    names: dict[str, dict[tuple[int, int, int, str, int], object]] = {}
    exec(text, names)
    return names["TABLE"]


def test_entries_are_written_replaced_and_kept(tmp_path: Path) -> None:
    table = tmp_path / "triton_table.py"
    shutil.copy(tune.TABLE, table)
    before = read(table)
    one, two = (90, 64, 128, "half", 7), (100, 64, 128, "half", 8)
    other = HALF._replace(dx=HALVES["dx"][1], slots=132)
    tune.write(one, HALF, table)
    tune.write(two, HALF, table)
    tune.write(one, other, table)
    assert read(table) == before | {one: other, two: HALF}


@pytest.mark.skipif(torch.cuda.is_available(), reason="refuses only without a GPU")
def test_refuses_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    from polylepis.launch.cli import main

    kept = tune.TABLE.read_text()
    assert main(["bench", "tune"]) == 2
    assert capsys.readouterr().err == (
        "polylepis: bench tune: 0 CUDA devices here, expected one: run it on the machine that will train\n"
    )
    assert tune.TABLE.read_text() == kept
