"""A SLURM for the tests of this folder, started once."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from clusters import Slurm, why_no_slurm


@pytest.fixture(scope="session")
def running_slurm() -> Iterator[Slurm]:
    if reason := why_no_slurm():
        pytest.skip(f"no SLURM here: {reason}")
    with tempfile.TemporaryDirectory(prefix="slurm") as folder:
        cluster = Slurm(Path(folder))
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


@pytest.fixture
def slurm(running_slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slurm]:
    """The commands of this process, too, speak to the cluster of the tests; no job outlives its test."""
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, running_slurm.environment[name])
    yield running_slurm
    running_slurm.ask("scancel", "--full", "--user=root")
