"""Seconds of each layer as measured on this machine: `polylepis bench layers`, and the timing that reads them."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...data.stream import Stream
from ...parallel.engines.fsdp import build_model, decay_groups, gradient_norm
from ...parallel.errors import PlanError
from ...parallel.kinds.base import Kind, Load
from ...parallel.mesh import Mesh, MeshConfig, build_mesh
from ...parallel.model import HybridModel, ModelConfig
from ...parallel.pipeline.cost import Roofline, Seconds
from ...parallel.pipeline.devices import DEVICES, Device
from ...parallel.pipeline.stage import Stage
from ..config import RunConfig
from ..errors import ConfigError
from ..objectives.next_token import next_token
from ..prepare import open_data

LAYERS_FILE = "layers.json"
SCHEMA = 2


@dataclass(frozen=True)
class LayerTimes:
    """A table of measurements.

    Attributes:
        machine: where it was made; a prediction for another machine is refused.
        itemsize, tokens: bytes of an activation and tokens of the micro-batch that was measured.
        seconds: `layer_key` → forward and backward of one micro-batch; `embedding` and `head` among the keys.
        update: seconds of gradient norm and optimizer per parameter.
        prepare: seconds of moving a micro-batch in and describing its documents.
        matmul, copy: FLOP/s and bytes/s that this machine reaches on one large product and copy.
        processes: how many measured at once; on a CPU they share caches and memory as the plan's processes do.
        operation, send: seconds that the pipeline's runtime adds to a stage's forward or backward, and that a stage's
            output travels to another process here, the runtime's part left out; nothing where one process measured.
    """

    machine: str
    itemsize: int
    tokens: int
    seconds: Mapping[str, tuple[float, float]]
    update: float
    prepare: float
    matmul: float
    copy: float
    processes: int = 1
    operation: float = 0.0
    send: float | None = None


def this_machine() -> str:
    """Device, processor, threads and torch: what measurements depend on."""
    if torch.cuda.is_available():
        return f"cuda {torch.cuda.get_device_name()}, torch {torch.__version__}"
    return (
        f"cpu {platform.machine()} {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )


def layer_key(kind: Kind, config: Any, model: ModelConfig) -> str:
    """What a layer's time depends on besides the micro-batch."""
    values = {"kind": kind.section, **dataclasses.asdict(config), "d_model": model.d_model}
    return json.dumps(values | {"modalities": len(model.modalities)}, sort_keys=True)


def end_key(name: str, model: ModelConfig) -> str:
    return json.dumps({"kind": name, "d_model": model.d_model, "vocab": model.padded_vocab})


@dataclass(frozen=True)
class Measured:
    """Timing by a table; what it does not hold is refused. Backwards are split, and recompute is priced, in the ratios
    of the roofline; other numbers of tokens and tensor-parallel ranks scale with the layer's matrix products."""

    device: Device
    times: LayerTimes

    def layer(self, kind: Kind, config: Any, model: ModelConfig, load: Load) -> Seconds:
        rough = Roofline(self.device).layer(kind, config, model, load)
        measured = replace(load, tokens=self.times.tokens, tp=1, cp=1)
        work = kind.work(config, model.shape, load).forward / kind.work(config, model.shape, measured).forward
        return self._scaled(layer_key(kind, config, model), kind.title, rough, work)

    def embedding(self, model: ModelConfig, load: Load) -> Seconds:
        rough = Roofline(self.device).embedding(model, load)
        return self._scaled(end_key("embedding", model), "embedding", rough, load.tokens / self.times.tokens)

    def head(self, model: ModelConfig, load: Load) -> Seconds:
        rough = Roofline(self.device).head(model, load)
        return self._scaled(
            end_key("head", model), "output projection", rough, load.tokens / load.tp / self.times.tokens
        )

    def update(self, n_parameters: float) -> float:
        return self.times.update * n_parameters

    def _scaled(self, key: str, title: str, rough: Seconds, work: float) -> Seconds:
        if key not in self.times.seconds:
            raise PlanError(
                f"{title}: the table of measured layers has none of these sizes; run `polylepis bench layers`"
            )
        forward, backward = (work * seconds for seconds in self.times.seconds[key])
        share = rough.weights / (rough.inputs + rough.weights)
        again = forward / rough.forward
        return Seconds(forward, (1 - share) * backward, share * backward, again * rough.repeated, again * rough.partly)


def measured_timing(times: LayerTimes) -> Measured:
    """Timing on the machine of the table: a known GPU's links and memory, or this host's."""
    for name, device in DEVICES.items():
        if times.machine.startswith("cuda") and name.upper() in times.machine.upper():
            return Measured(device, times)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # Processes of one host talk through its memory; where no send was measured, gloo's few system calls.
    latency = 3e-4 if times.send is None else times.send
    rates = (times.matmul, memory, times.copy, times.copy, times.copy)
    return Measured(Device("cpu", *rates, 64, 1.0, 1.0, 1.0, 1.0, latency, times.operation), times)


def _median(run: Callable[[], Any], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def measure_layers(config: RunConfig, repeats: int = 7, together: Callable[[], Any] = lambda: None) -> LayerTimes:
    """Time every distinct layer of the model, and its ends, on the first micro-batch of the run's own data.

    One process; each layer is sharded over one rank as in training, so what the engine adds is in the numbers.
    `crowd.measure` runs several at once.

    Args:
        together: called before each layer; returns when every process that measures is there.

    Raises:
        ConfigError, DataError: see `open_data`.
    """
    device = None if config.train.device == "auto" else config.train.device
    mesh = build_mesh(MeshConfig(dp_shard=1), device)
    compute = torch.bfloat16 if config.train.precision == "bfloat16" else torch.float32
    alone = replace(config.data, global_batch=config.data.micro_batch)
    batch = Stream(open_data(config), alone, dp_rank=0, dp_size=1).next().micro_batches[0]
    model, n = config.model, len(config.model.symbols)
    prepared = next_token.prepare(batch, mesh, len(model.modalities), 1.0)
    tokens = prepared.tokens.numel()
    stages = {end_key("embedding", model): Stage(0, 2, 0, 0), end_key("head", model): Stage(1, 2, n, n)}
    for index in range(n):
        stages.setdefault(layer_key(*model.layer(index), model), Stage(1, 3, index, index + 1))
    seconds: dict[str, tuple[float, float]] = {}
    update = 0.0
    for key, stage in stages.items():
        part = build_model(model, mesh, seed=config.seed, compute_dtype=compute, stage=stage)
        x = prepared.tokens if stage.embeds else torch.randn(tokens, model.d_model, dtype=compute, device=mesh.device)
        together()
        seconds[key] = _forward_backward(part, x, prepared, repeats)
        if stage.predicts:
            update = _update(part, repeats)
    prepare = _median(lambda: next_token.prepare(batch, mesh, len(model.modalities), 1.0), repeats)
    itemsize = torch.empty((), dtype=compute).element_size()
    return LayerTimes(this_machine(), itemsize, tokens, seconds, update, prepare, *_machine_rates(mesh, compute))


def _forward_backward(part: HybridModel, x: Tensor, prepared: Any, repeats: int) -> tuple[float, float]:
    """Median seconds of forward and of backward of one stage."""
    forwards, backwards = [], []
    for _ in range(repeats + 2):
        leaf = x if part.stage.embeds else x.clone().requires_grad_()
        held: list[Tensor] = []

        def forward(leaf: Tensor = leaf, held: list[Tensor] = held) -> None:
            out = part(leaf, prepared.layout, prepared.labels if part.stage.predicts else None)
            held.append(prepared.finish(out).loss if part.stage.predicts else out)

        forwards.append(_median(forward, 1))
        (out,) = held
        gradient = torch.ones_like(out)
        backwards.append(_median(lambda out=out, gradient=gradient: out.backward(gradient), 1))  # type: ignore[misc]
    return statistics.median(forwards[2:]), statistics.median(backwards[2:])


def _update(part: HybridModel, repeats: int) -> float:
    """Seconds per parameter of gradient norm and AdamW."""
    parameters = [p for group in decay_groups(part) for p in group]
    optimizer = torch.optim.AdamW(parameters, fused=True)

    def step() -> None:
        gradient_norm(parameters)
        optimizer.step()

    step()
    return _median(step, repeats) / sum(p.numel() for p in parameters)


def _machine_rates(mesh: Mesh, dtype: torch.dtype) -> tuple[float, float]:
    """FLOP/s of a product of 1,024 rows and columns, bytes/s of a copy of 64 MiB (read and write)."""
    a = torch.randn(1024, 1024, dtype=dtype, device=mesh.device)
    source = torch.ones(1 << 24, device=mesh.device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * 1024**3 / _median(lambda: a @ a, 5), 2 * 4 * (1 << 24) / _median(lambda: target.copy_(source), 5)


def write_layers(times: LayerTimes, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part")
    aside.write_text(json.dumps({"schema": SCHEMA, **dataclasses.asdict(times)}, indent=1) + "\n")
    aside.replace(path)


def read_layers(path: Path) -> LayerTimes:
    """The table in a file.

    Raises:
        ConfigError: no such file, or not such a table.
    """
    try:
        values = json.loads(path.read_text())
        if values.pop("schema") != SCHEMA:
            raise ValueError(f"not schema {SCHEMA}")
        values["seconds"] = {key: (float(f), float(b)) for key, (f, b) in values["seconds"].items()}
        return LayerTimes(**values)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such table of measured layers; `polylepis bench layers` writes one") from None
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path}: not a table of measured layers ({error})") from None


def predicted_step(config: RunConfig, world_size: int) -> dict[str, float]:
    """What to log beside each measured step; nothing where the run folder holds no table of this machine and model."""
    from .estimate import estimate

    path = config.path / LAYERS_FILE
    if not path.is_file():
        return {}
    times = read_layers(path)
    if times.machine != this_machine():
        return {}
    config = replace(config, mesh=config.mesh.resolve(world_size))
    try:
        found = estimate(config, measured_timing(times))
    except (PlanError, ConfigError):
        return {}  # a model of other sizes than those measured, or a batch that does not divide
    handled = times.prepare * found.timeline.schedule.n_micro_batches
    return {"predicted_step_seconds": found.seconds + handled, "predicted_bubble": found.timeline.bubble}
