"""What a step did, measured without a synchronisation of its own.

Everything that ranks must add up travels in one vector, in the all-reduce that has always added up the losses; it is
started before the gradient norm, whose reading synchronises, and read after it, when it has long arrived.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ...data.stream import Step
from ...parallel.engines.base import Elsewhere, Engine
from ...parallel.kinds.base import Load
from ...parallel.model import ModelConfig
from ...parallel.parts import named_parts
from ...parallel.recompute import RecomputeConfig
from .flops import step_flops
from .pulse import Pulse
from .sampler import Sampler
from .window import ProfileWindow


@dataclass(frozen=True)
class Totals:
    """Sums over the global batch, the same on all ranks.

    Attributes:
        losses: unweighted Σ ℓ per modality.
        norms: 2-norm of the gradient of the parameters that each modality has for itself; nothing where there are none.
    """

    losses: list[float]
    norms: dict[str, float]

    @property
    def loss(self) -> float:
        return sum(self.losses)


@dataclass(frozen=True)
class Timing:
    """Seconds of one step on this rank; `own` is its work without waiting in collectives."""

    step: float
    data: float
    communication: float
    own: float
    lost: dict[str, float]


class Meter:
    """Measures steps. `reduce` and `read` are called by all ranks in every step.

    Args:
        config: the model.
        engine: what trains it.
        pulse: whose phases are summed up.
        window: the profiler's window on this job.
        row_tokens: tokens of a step's rows, padding included.
        peak_flops: of one device, FLOP/s, None where it is not known.
        recompute, load: what the backward repeats, and with which kernels and item size; for HFU.
    """

    def __init__(
        self,
        config: ModelConfig,
        engine: Engine,
        pulse: Pulse,
        window: ProfileWindow,
        row_tokens: int,
        peak_flops: float | None,
        recompute: RecomputeConfig | None = None,
        load: Load | None = None,
    ) -> None:
        self.config, self.engine, self.pulse, self.window = config, engine, pulse, window
        self.row_tokens, self.peak_flops = row_tokens, peak_flops
        self.recompute, self.load = recompute or RecomputeConfig(), load or Load(0, 0.0)
        self.sampler = Sampler()
        self._norms = ModalityNorms(engine, config.modalities)

    def __enter__(self) -> Meter:
        self.sampler.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.sampler.close()
        self.window.close()

    def reduce(self, sums: Tensor) -> Tensor:
        """Start adding up over all ranks; hand the result to `read`.

        Args:
            sums: what `engine.accumulate` returned, [modalities].
        """
        tp = self.engine.mesh.tp_size  # every tp rank has counted the same tokens
        pieces = [sums / tp, self._norms.squares(sums)]
        wanted = torch.tensor([float(self.window.wanted())], device=sums.device)
        vector = torch.cat([*(piece.to(sums.dtype) for piece in pieces), wanted.to(sums.dtype)])
        dist.all_reduce(vector)
        return vector

    def read(self, vector: Tensor) -> Totals:
        """The sums; opens the profiler's window where one was asked for."""
        count = len(self.config.modalities)
        values = vector.tolist()
        self.window.agree(round(values[-1]))
        losses, squares = values[:count], values[count : 2 * count]
        norms = {m: square**0.5 for m, square in zip(self.config.modalities, squares, strict=True)}
        return Totals(losses, norms if self._norms.any else {})

    def time(self) -> Timing:
        """Seconds of the step that ends now."""
        seconds, waited = self.pulse.take(), self.sampler.take()
        step = sum(seconds.get(phase, 0.0) for phase in ("data", "compute", "update"))
        waited = min(waited, step)
        lost = {phase: seconds.get(phase, 0.0) for phase in ("checkpoint", "snapshot", "between")}
        return Timing(step, seconds.get("data", 0.0), waited, step - waited, lost)

    def metrics(self, data: Step, totals: Totals, timing: Timing) -> dict[str, float]:
        """What goes into `metrics.jsonl` beside losses; docs/health.md says what each is."""
        values = {f"grad_norm/{name}": norm for name, norm in totals.norms.items()}
        tokens = sum(data.tokens.values())
        flops = step_flops(self.config, self.recompute, tokens, self.row_tokens, data.attended, self.load)
        per_device = max(timing.step, 1e-9) * dist.get_world_size()
        values["model_tflops_per_device"] = flops.useful / per_device / 1e12
        if self.peak_flops:
            values["mfu"] = flops.useful / per_device / self.peak_flops
            values["hfu"] = flops.done / per_device / self.peak_flops
        values["padding"] = 1 - tokens / self.row_tokens
        values["seconds/data"] = timing.data
        if self.engine.mesh.device.type == "cpu":  # elsewhere the thread waits for the device, not for collectives
            values["seconds/communication"] = timing.communication
        values["memory_peak"] = float(measured_peak(self.engine.mesh.device))
        values["time"] = round(time.time(), 3)  # of the wall clock, for the report alone: it may jump
        return values | {f"seconds/{phase}": value for phase, value in timing.lost.items()}


def measured_peak(device: torch.device) -> int:
    """Most bytes at once so far: allocated on the device, or resident on the host where that is the device."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class ModalityNorms:
    """Squares of the gradients of what each modality has for itself: its entries of banks, its own vectors."""

    def __init__(self, engine: Engine, modalities: Sequence[str]) -> None:
        self.engine, self.modalities = engine, tuple(modalities)
        self._banks: list[Tensor] = []
        self._vectors: list[tuple[int, Tensor]] = []
        for model in engine.models:
            for name, parameter, part in named_parts(model):
                if part.entries == self.modalities:
                    self._banks.append(parameter)
                elif (last := name.rpartition(".")[2]) in self.modalities:
                    self._vectors.append((self.modalities.index(last), parameter))
        found = torch.tensor([bool(self._banks or self._vectors)], dtype=torch.int64, device=engine.mesh.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)  # a pipeline stage may have none
        self.any = bool(found)

    @torch.no_grad()
    def squares(self, like: Tensor) -> Tensor:
        """[modalities], weighted so that the sum over all ranks counts every element once."""
        total = torch.zeros(len(self.modalities), device=like.device)
        if not isinstance(self.engine.optimizer, torch.optim.Optimizer):
            return self._add_pieces(total, self.engine.optimizer)
        for parameter in self._banks:
            if isinstance(parameter.grad, DTensor):
                local = parameter.grad.to_local().float()
                total += local.square().flatten(1).sum(1) * self._weight(parameter.grad)
        for index, parameter in self._vectors:
            if isinstance(parameter.grad, DTensor):
                total[index] += parameter.grad.to_local().float().square().sum() * self._weight(parameter.grad)
        return total

    def _add_pieces(self, total: Tensor, optimizer: Elsewhere) -> Tensor:
        """The same from ZeRO's pieces, which begin and end anywhere in a parameter."""
        banks, vectors = {id(p) for p in self._banks}, {id(p): index for index, p in self._vectors}
        for parameter, first, piece in optimizer.pieces():
            copies = 1 if getattr(parameter, "tensor_model_parallel", False) else self.engine.mesh.tp_size
            square = piece.view(-1).float().square().to(total.device) / copies
            if id(parameter) in vectors:
                total[vectors[id(parameter)]] += square.sum()
            elif id(parameter) in banks:
                each = getattr(parameter, "ds_numel", parameter.numel()) // len(self.modalities)
                for index in range(len(self.modalities)):
                    total[index] += square[max(0, index * each - first) : max(0, (index + 1) * each - first)].sum()
        return total

    def _weight(self, grad: DTensor) -> float:
        """One over the number of ranks that hold the same elements."""
        shards = 1
        for size, placement in zip(grad.device_mesh.shape, grad.placements, strict=True):
            shards *= 1 if placement.is_replicate() else size
        axes = self.engine.mesh.device_mesh
        stages = dict(zip(axes.mesh_dim_names or (), axes.shape, strict=False)).get("pp", 1)
        return shards * stages / dist.get_world_size()
