"""Run a function on several gloo ranks, forked from one process that has imported everything.

Importing torch and megatron-core costs seconds of CPU per process; the fork server pays it once per session, and each
case then gets fresh ranks in milliseconds. A case that hangs is killed, and the next one starts clean.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import multiprocessing as mp
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
PRELOAD = ["ranks", "ranks_preload"]
# The fork server of Python < 3.13 forgets our sys.path, and then silently preloads nothing.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]).rstrip(":")


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
    """Call `function(*args)` on `world_size` ranks with the launcher's environment set; results in rank order.

    Raises:
        AssertionError: a rank failed (its traceback), or the case took longer than `timeout` seconds.
    """
    with Ranks(world_size, function, *args) as ranks:
        return ranks.results(timeout)


def forked_workers(n_processes: int, arguments: Sequence[str], module: str = "polylepis.pretrain.train") -> None:
    """`pretrain.spawn.run_workers` on forked ranks: without the four seconds that each process of torchrun imports."""
    codes = run_ranks(n_processes, run_main, module, list(arguments))
    assert codes == [0] * n_processes, f"{module} {' '.join(arguments)} ended with {codes}"


def run_main(module: str, arguments: list[str]) -> int:
    """The exit code of a worker module on this rank."""
    code: int = importlib.import_module(module).main(arguments)
    return code


class Ranks:
    """Ranks that are running; leaving the context kills what is left of them. `run_ranks` is the plain case."""

    def __init__(self, world_size: int, function: Callable[..., Any], *args: Any) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        installed = function.__module__.startswith("polylepis.")
        file, name = function.__module__ if installed else function.__code__.co_filename, function.__name__
        self._store = tempfile.TemporaryDirectory()
        self._pipes: list[Connection] = []
        self.processes: list[Any] = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            values = (rank, world_size, self._store.name, file, name, args, theirs)
            process = context.Process(target=_rank, args=values)
            process.start()
            theirs.close()
            self._pipes.append(ours)  # type: ignore[arg-type]
            self.processes.append(process)

    def results(self, timeout: float = 120) -> list[Any]:
        """What the ranks return; see `run_ranks`."""
        return _collect(self._pipes, timeout)

    def kill(self) -> None:
        """SIGKILL to every rank, as a node that loses power."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._store.cleanup()


def _collect(pipes: list[Connection], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        ready = wait([pipe for rank, pipe in enumerate(pipes) if rank not in results], timeout)
        if not ready:
            missing = sorted(set(range(len(pipes))) - results.keys())
            raise AssertionError(f"ranks {missing} gave no answer within {timeout} s")
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                ok, value = _unpack(pipe.recv_bytes())  # type: ignore[union-attr]
            except (EOFError, ConnectionResetError):
                raise AssertionError(f"rank {rank} died without an answer") from None
            if not ok:
                raise AssertionError(f"rank {rank} failed:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _rank(
    rank: int, world_size: int, store: str, file: str, name: str, args: tuple[Any, ...], pipe: Connection
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    try:
        path = Path(store) / "store"
        dist.init_process_group("gloo", store=dist.FileStore(str(path), world_size), rank=rank, world_size=world_size)
        function = getattr(_load(file), name)
        pipe.send_bytes(_pack((True, function(*args))))
    except BaseException:
        pipe.send_bytes(_pack((False, traceback.format_exc())))
    finally:
        pipe.close()
        os._exit(0)  # no teardown: the other ranks may be gone already


def _pack(value: Any) -> bytes:
    """By value: torch would otherwise send handles to shared memory that dies with the rank."""
    import torch

    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpack(data: bytes) -> Any:
    import torch

    return torch.load(io.BytesIO(data), weights_only=False)  # our own ranks' answer


def _load(file: str) -> Any:
    """A module of the package by name, a test module by its file."""
    if not file.endswith(".py"):
        return importlib.import_module(file)
    module_name = f"case_{Path(file).stem}"
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        spec.loader.exec_module(module)
    return sys.modules[module_name]
