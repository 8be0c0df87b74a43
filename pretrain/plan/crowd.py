"""Layers measured on a CPU as a plan runs them: in several processes at once, and with what passes between them.

Processes on one CPU share its caches, its memory and its cores with the threads that carry messages. A layer timed
alone, or a send between idle processes, would be faster than in the run.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import threading
import time
from dataclasses import replace
from datetime import timedelta
from functools import partial
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

from ..config import RunConfig
from ..errors import ConfigError
from .measure import LayerTimes, measure_layers

# Enough for a layer of a large model on a slow machine; a process that died is noticed when it ends.
PATIENCE = 600.0


def processes_here(config: RunConfig) -> int:
    """How many processes of the plan compute at once on this machine: on a CPU as many as its cores carry."""
    if config.train.device == "cuda" or (config.train.device == "auto" and torch.cuda.is_available()):
        return 1
    room = max(1, (os.cpu_count() or 1) // torch.get_num_threads())
    return min(room, config.mesh.n_processes) if config.mesh.dp_shard > 0 else room


def measure(config: RunConfig, repeats: int = 7) -> LayerTimes:
    """`measure_layers` in `processes_here` processes at once, and, in more than one, the pipeline's own costs.

    Raises:
        ConfigError, DataError: see `measure_layers`; one of the processes died.
    """
    count = processes_here(config)
    if count == 1:
        return measure_layers(config, repeats)
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(count)
    beside = [context.Process(target=_beside, args=(config, repeats, barrier), daemon=True) for _ in range(count - 1)]
    for process in beside:
        process.start()
    try:
        times = measure_layers(config, repeats, partial(barrier.wait, PATIENCE))
    except threading.BrokenBarrierError:
        codes = [process.exitcode for process in beside]
        raise ConfigError(f"bench layers: a process that measured beside this one ended early, exit {codes}") from None
    finally:
        barrier.abort()  # nobody waits for a process that has failed
        for process in beside:
            process.join(PATIENCE)
            process.kill()
    operation, send = _handing_on(times.tokens, config.model.d_model, times.itemsize)
    return replace(times, processes=count, operation=operation, send=send)


def _beside(config: RunConfig, repeats: int, barrier: Barrier) -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    try:
        measure_layers(config, repeats, partial(barrier.wait, PATIENCE))
    except threading.BrokenBarrierError:
        return  # the process that is asked has ended; it says why
    except Exception as error:
        barrier.abort()
        if getattr(error, "exit_code", None) != 2:  # a user's mistake is the asked process's to tell, once
            raise


class _Pass(nn.Module):
    """A stage that computes nothing; the parameter gives the backward something to reach."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def _handing_on(tokens: int, d_model: int, itemsize: int) -> tuple[float, float]:
    """Seconds that torch's pipeline runtime keeps a rank busy per operation, and that [tokens, d_model] travels.

    Two processes, stages that compute almost nothing. Many micro-batches, all forwards before all backwards, leave
    nobody waiting: an operation's share is what the runtime takes. One there and back has two hops in it besides.
    """
    context = multiprocessing.get_context("spawn")
    queue: Any = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (str(Path(folder) / "store"), tokens, d_model, itemsize, queue)
        ranks = [context.Process(target=_pass_on, args=(rank, *arguments), daemon=True) for rank in (0, 1)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(PATIENCE)
            process.kill()
        if any(process.exitcode for process in ranks):
            codes = [process.exitcode for process in ranks]
            raise ConfigError(f"bench layers: two processes could not pass tensors to each other, exit {codes}")
    many, once = queue.get()
    return many, max(0.0, (once - 4 * many) / 2)


def _pass_on(rank: int, store: str, tokens: int, d_model: int, itemsize: int, queue: Any) -> None:
    """One of two ranks; rank 0 reports (seconds per operation, seconds there and back)."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2, timeout=timedelta(seconds=PATIENCE)
    )
    dtype = torch.bfloat16 if itemsize == 2 else torch.float32
    x = torch.zeros(tokens, d_model, dtype=dtype, requires_grad=True)
    seconds = {}
    for count in (32, 1):
        stage = PipelineStage(_Pass().to(dtype), rank, 2, torch.device("cpu"), input_args=x, output_args=x)
        schedule = ScheduleGPipe(stage, count, loss_fn=lambda output, _: output.sum(), scale_grads=False)
        inputs = (torch.zeros(count * tokens, d_model, dtype=dtype),) if rank == 0 else ()
        target = torch.zeros(count) if rank else None
        found = []
        for _ in range(12):
            dist.barrier()
            started = time.perf_counter()
            schedule.step(*inputs, target=target, losses=[] if rank else None, return_outputs=False)
            found.append(time.perf_counter() - started)
        seconds[count] = sorted(found[2:])[5]
    dist.destroy_process_group()
    if rank == 0:
        queue.put((seconds[32] / 64, seconds[1]))
