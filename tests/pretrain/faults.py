"""Training with one thing broken, from outside: the engine and the stream are wrapped, production code has no hooks."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from polylepis.pretrain import train as module
from polylepis.pretrain.config import RunConfig, load_config
from polylepis.pretrain.health.config import HealthConfig
from polylepis.pretrain.health.nonfinite import local_gradients
from polylepis.pretrain.shrink import shrink


def small(folder: Path, steps: int, health: HealthConfig | None = None, *, tp: int = 1, **changes: Any) -> RunConfig:
    """The quickstart with one layer of each kind, on mock data, on two processes: tp 2, or else two shards."""
    config = replace(shrink(load_config("quickstart"), steps), folder=str(folder))
    config = replace(config, model=replace(config.model, pattern="M*-E"))
    mesh = replace(config.mesh, tp=tp, dp_shard=2 // tp)
    optim = replace(config.optim, warmup=0)
    train = replace(config.train, **changes)
    return replace(config, mesh=mesh, optim=optim, train=train, health=health or HealthConfig(straggler="off"))


@dataclass(frozen=True)
class Fault:
    """Attributes:
    kind: what breaks, see `break_` and `Faulty`.
    rank: on which rank; −1 for all.
    positions: at which data positions (from 0).
    """

    kind: str
    rank: int
    positions: tuple[int, ...]


class Faulty:
    """An engine that breaks when its fault's time has come."""

    def __init__(self, engine: Any, fault: Fault, position: Callable[[], int]) -> None:
        self._engine, self._fault, self._position = engine, fault, position
        self._fired: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def _now(self) -> bool:
        mine = self._fault.rank in (-1, dist.get_rank())
        return mine and self._position() in self._fault.positions

    def accumulate(self, batches: Sequence[Any], total_weight: float) -> torch.Tensor:
        kind = self._fault.kind if self._now() else ""
        if kind == "spike then kill":
            kind = "spike" if self._position() == self._fault.positions[0] else "kill"
        once = self._position() not in self._fired
        self._fired.add(self._position())
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif kind == "slow":
            time.sleep(0.4)
        elif kind == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        hook = None
        if kind == "nan in a layer":
            layers = self.models[0].layers
            layer = layers["2"] if "2" in layers else layers[min(layers)]
            hook = layer.register_forward_hook(lambda m, a, out: out * float("nan"))
        sums = self._engine.accumulate(batches, total_weight)
        if hook is not None:
            hook.remove()
        if kind == "nan in a gradient" and once:  # a fault of the hardware: it does not come back
            _, _, gradient = next(local_gradients(self._engine))
            gradient.view(-1)[0] = float("nan")
        if kind == "spike":
            self._engine.scale(1e4)
            return sums * 5
        return sums

    def update(self, lr: float) -> None:
        self._engine.update(lr)
        if self._now() and self._fault.kind == "drift":
            parameter = next(self.models[0].layers["1"].parameters()).detach()
            (parameter.to_local() if isinstance(parameter, DTensor) else parameter).view(-1)[3] += 1e-3


def train_with(config: RunConfig, fault: Fault | None = None) -> str:
    """Train on this rank with a fault; what it said when it stopped, empty if it did not."""
    # The recorder's buffer is made with the first process group; ours was made by the test harness.
    if fault is not None:
        where = {"position": -1}
        build, open_stream = module.build_engine, module.open_stream

        def watched(*args: Any) -> Any:
            stream = open_stream(*args)
            read = stream.next

            def told() -> Any:
                step = read()
                where["position"] = step.index
                if (fault.kind, fault.rank, step.index) == ("corrupted batch", dist.get_rank(), fault.positions[0]):
                    step.micro_batches[-1]["loss_weight"].view(-1)[1:3] = float("inf")
                return step

            stream.next = told  # type: ignore[method-assign]
            return stream

        module.open_stream = watched
        module.build_engine = lambda *args: Faulty(build(*args), fault, lambda: where["position"])  # type: ignore
    try:
        module.train(config)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def jump_clock() -> None:
    """From now on the wall clock of this process leaps by up to an hour at every look."""
    real, dice = time.time, random.Random(0)
    time.time = lambda: real() + dice.uniform(-3600, 3600)  # type: ignore[assignment]


def train_with_jumping_clock(config: RunConfig) -> str:
    jump_clock()
    return train_with(config)
