"""The suites that run in Triton's interpreter start with the first test of this folder, beside the others."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

Running = dict[tuple[Path, str], Future[subprocess.CompletedProcess[str]]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Who waits for the suites comes last in this folder."""
    here = [index for index, item in enumerate(items) if item.path.parent == Path(__file__).parent]
    waiting = sorted((items[index] for index in here), key=lambda item: item.path.name == "test_interpreter.py")
    for index, item in zip(here, waiting, strict=True):
        items[index] = item


@pytest.fixture(scope="session", autouse=True)
def running(request: pytest.FixtureRequest) -> Iterator[Running]:
    """The chosen suites by (suite, cases), each in a process of its own, as many at a time as there are cores."""
    chosen = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    pairs = [(given["suite"], given["cases"]) for given in chosen if {"suite", "cases"} <= given.keys()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {pair: pool.submit(_run, *pair) for pair in pairs}
        pool.shutdown(cancel_futures=True)


def _run(suite: Path, cases: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", cases, "--durations=5", str(suite)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=suite.parents[2], env=environment, capture_output=True, text=True)
