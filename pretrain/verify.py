"""`polylepis verify`: the user's own parallel plan, shrunk but with its axes intact, against one process on the CPU.

Composed parallelism goes wrong silently: a gradient that is a partial sum, an averaged reduction, a halo off by one
leave a loss curve that looks well. So the proof ships with the product: loss, gradient norm, every gradient and one
optimizer step of the plan equal those of one process, in fp64; in fp32 the gradients of the first step do.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..data.stream import Stream
from ..parallel.kinds.moe import MoE
from ..parallel.mesh import Mesh, MeshConfig, build_mesh
from ..parallel.model import HybridModel
from ..parallel.parts import named_parts, whole_entries
from ..parallel.recompute import RecomputeConfig
from .config import RunConfig, load_config, to_yaml
from .errors import ConfigError
from .prepare import check_run, open_data
from .shrink import shrink
from .spawn import run_workers
from .train import build_engine
from .witness import Choices, Witness

MAX_PROCESSES = 16
TOLERANCE = {
    torch.float64: {"loss": 1e-12, "gradient norm": 1e-11, "gradients": 1e-9, "optimizer step": 1e-6},
    torch.float32: {"loss": 2e-5, "gradient norm": 2e-5, "gradients": 2e-5},
}
# How far a score may lie from the reference's: a replayed choice that this does not explain is a fault, not a tie.
MARGIN = {torch.float64: 1e-11, torch.float32: 1e-4}


@dataclass
class Measurement:
    """One optimizer step, seen whole.

    Attributes:
        loss, norm: of the global batch.
        gradients, updates: by logical name, whole tensors on the CPU.
        choices: by expert layer, the experts of all tokens of each global micro-batch.
        flips: tokens that chose otherwise, where choices were replayed, by more than `MARGIN` of a score can explain.
    """

    loss: float
    norm: float
    gradients: dict[str, Tensor]
    updates: dict[str, Tensor]
    choices: Choices
    flips: int = 0


@dataclass(frozen=True)
class Line:
    """One line of the certificate: the worst relative difference of a quantity, and where it is."""

    precision: str
    quantity: str
    worst: float
    tolerance: float
    where: str

    @property
    def passed(self) -> bool:
        return self.worst <= self.tolerance


def measure(config: RunConfig, mesh: Mesh, dtype: torch.dtype, choices: Choices | None = None) -> Measurement:
    """Run one step of `config` on `mesh`; all ranks call it and get the same answer.

    Args:
        choices: expert choices to replay, by layer and global micro-batch.
    """
    stream = Stream(open_data(config), config.data, dp_rank=mesh.dp_rank, dp_size=mesh.dp_size)
    data = stream.next()
    witness = Witness(choices, mesh.dp_rank * len(data.micro_batches), MARGIN[dtype])
    engine = build_engine(config, mesh, witness, dtype)
    for layer in (module for model in engine.models for module in model.modules() if isinstance(module, MoE)):
        # The global balancing term looks at the loads of the step before.
        layer.expert_load.copy_(torch.arange(1.0, 1 + layer.expert_load.numel()).view_as(layer.expert_load))
    witness.watch(engine.models)
    engine.accumulate(data.micro_batches, data.total_weight)
    loss = witness.loss(torch.zeros((), dtype=dtype, device=mesh.device))
    flips = torch.tensor(witness.flips, device=mesh.device)
    dist.all_reduce(loss)
    dist.all_reduce(flips)
    norm = engine.gradient_norm()
    gradients = whole_tensors(engine.models, gradient=True)
    before = whole_tensors(engine.models, gradient=False)
    assert isinstance(engine.optimizer, torch.optim.Optimizer)
    engine.optimizer.step()
    updates = {name: value - before[name] for name, value in whole_tensors(engine.models, gradient=False).items()}
    return Measurement(float(loss) / mesh.tp_size, norm, gradients, updates, witness.made, int(flips))


def whole_tensors(models: Sequence[HybridModel], gradient: bool) -> dict[str, Tensor]:
    """Every logical parameter of all stages, or its gradient, gathered: by name, on the CPU."""
    # It advises flattened meshes for speed; this gathers once, for a comparison.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    tensors: dict[str, Tensor] = {}
    for name, parameter, part in (entry for model in models for entry in named_parts(model)):
        value = parameter.grad if gradient else parameter.detach()
        if not isinstance(value, DTensor):
            raise ConfigError(f"verify: {name} has no gradient on rank {dist.get_rank()}: it took no part in the step")
        tensors.update({key: entry.cpu().clone() for key, entry in whole_entries(value, part, name).items()})
    mesh = models[0].mesh
    stages: list[dict[str, Tensor]] = [tensors] * mesh.pp_size
    if mesh.pp_size > 1:
        dist.all_gather_object(stages, tensors, group=mesh.pp_group)
    return {name: tensor for stage in stages for name, tensor in stage.items()}


def compare(actual: Measurement, expected: Measurement, dtype: torch.dtype) -> list[Line]:
    """The certificate's lines for one precision; a missing or extra tensor is an infinite difference."""
    tolerance, precision = TOLERANCE[dtype], str(dtype).removeprefix("torch.")
    lines = [
        Line(precision, "loss", _relative(actual.loss, expected.loss), tolerance["loss"], ""),
        Line(precision, "gradient norm", _relative(actual.norm, expected.norm), tolerance["gradient norm"], ""),
    ]
    pairs = {"gradients": (actual.gradients, expected.gradients), "optimizer step": (actual.updates, expected.updates)}
    for quantity, (ours, theirs) in pairs.items():
        if quantity in tolerance:
            worst, where = _worst(ours, theirs, precision)
            lines.append(Line(precision, quantity, worst, tolerance[quantity], where))
    if expected.choices:
        lines.append(Line(precision, "expert choices", actual.flips, 0.0, ""))
    return lines


def _relative(actual: float, expected: float) -> float:
    return abs(actual - expected) / max(abs(expected), 1e-300)


def _worst(actual: dict[str, Tensor], expected: dict[str, Tensor], precision: str) -> tuple[float, str]:
    if actual.keys() != expected.keys():
        return float("inf"), min(actual.keys() ^ expected.keys())
    # In fp32 a tensor whose gradient is tiny beside the others' is rounding noise; the floor says what counts as tiny.
    norms = torch.stack([value.double().norm() for value in expected.values()])
    floor = float(norms.norm()) / len(norms) * (1e-2 if precision == "float32" else 0.0)
    worst, where = 0.0, ""
    for name, value in expected.items():
        difference = float((actual[name].double() - value.double()).norm())
        scale = max(float(value.double().norm()), floor)
        relative = difference / scale if scale else (0.0 if difference == 0 else float("inf"))
        if not relative <= worst:  # a NaN is worse than anything
            worst, where = (relative if relative == relative else float("inf")), name
    return worst, where


def verification(config: RunConfig, world_size: int) -> RunConfig:
    """The plan to verify: structure and axes as they are, widths tiny, data-parallel axes capped at two.

    Raises:
        ConfigError: more processes than `MAX_PROCESSES` even so, or an engine without fp64.
        PlanError: the plan itself cannot be built.
    """
    if config.engine == "deepspeed":
        raise ConfigError("verify: DeepSpeed has no float64, in which a plan is proven; verify it with engine=fsdp2")
    config.model.check(config.mesh.tp)
    config.model.check_experts(config.mesh)
    given = config.mesh
    asked = world_size if given.dp_shard == -1 else given.n_processes
    mesh = cap_data_axes(given.resolve(asked))
    if mesh.n_processes > MAX_PROCESSES:
        stages = f"pp {mesh.pp} × " if mesh.pp > 1 else ""
        raise ConfigError(
            f"verify: {stages}cp {mesh.cp} × tp {mesh.tp} with dp_replicate {mesh.dp_replicate} × dp_shard "
            f"{mesh.dp_shard} needs {mesh.n_processes} processes on this machine, more than {MAX_PROCESSES}; override "
            f"an axis, such as mesh.cp=2"
        )
    small = shrink(config, steps=1, mesh=mesh)
    # Three rows to a micro-batch: context ranks are then cut inside rows, and hold starts of others. Twice as many
    # micro-batches as pipeline ranks suit every schedule.
    rows = 2 * mesh.pp * 3 * mesh.dp_replicate * mesh.dp_shard
    seq_len = 8 * mesh.cp * mesh.tp * -(-64 // (8 * mesh.cp * mesh.tp))
    data = replace(small.data, seq_len=seq_len, global_batch=rows, micro_batch=3)
    # A wider start than training's, so that every part of every layer matters to the loss.
    train = replace(small.train, overlap_dispatch=config.train.overlap_dispatch)
    return replace(small, data=data, train=train, model=replace(small.model, init_std=0.1))


def cap_data_axes(mesh: MeshConfig) -> MeshConfig:
    """Data-parallel axes of at most two (replicas, ep ranks, ranks with the same experts); at most one spare slot."""
    ranks = mesh.dp_shard * mesh.cp
    ep = next(n for n in range(min(2, mesh.ep), mesh.ep + 1) if mesh.ep % n == 0)
    sharing = min(2, ranks // mesh.ep)
    fitting = [
        shard
        for shard in range(min(2, mesh.dp_shard), mesh.dp_shard + 1)
        if shard * mesh.cp % ep == 0 and shard * mesh.cp // ep >= sharing
    ]
    return replace(
        mesh, dp_replicate=min(2, mesh.dp_replicate), dp_shard=fitting[0], ep=ep, ep_spare=min(1, mesh.ep_spare)
    )


def verify_config(config: RunConfig, world_size: int) -> tuple[RunConfig, list[Line]]:
    """Run both sides, in processes of their own; the verified plan and its certificate."""
    plan = verification(config, world_size)
    mesh = plan.mesh
    processes = mesh.n_processes
    check_run(plan, processes)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        plainly = replace(plan.train, overlap_dispatch=False)
        alone = replace(plan, mesh=MeshConfig(dp_shard=1), recompute=RecomputeConfig(), train=plainly)
        for name, side in (("one", alone), ("plan", plan)):
            (folder / f"{name}.yaml").write_text(to_yaml(side))
        module = "polylepis.pretrain.verify"
        run_workers(1, [str(folder / "one.yaml"), str(folder / "one.pt")], module)
        run_workers(processes, [str(folder / "plan.yaml"), str(folder / "plan.pt"), str(folder / "one.pt")], module)
        one, parallel = (
            torch.load(folder / f"{name}.pt", weights_only=False)  # written by our own workers a moment ago
            for name in ("one", "plan")
        )
    lines = [line for dtype in TOLERANCE for line in compare(parallel[dtype], one[dtype], dtype)]
    return plan, lines


def certificate(plan: RunConfig, lines: Sequence[Line]) -> str:
    """The certificate as a person reads it."""
    mesh = plan.mesh
    axes = f"dp_replicate {mesh.dp_replicate} × dp_shard {mesh.dp_shard} × cp {mesh.cp} × tp {mesh.tp}"
    axes = f"pp {mesh.pp} ({plan.pipeline.schedule}) × {axes}" if mesh.pp > 1 else axes
    axes += f", of which ep {mesh.ep}" if mesh.ep > 1 else ""
    axes += f" with {mesh.ep_spare} spare slot each" if mesh.ep_spare else ""
    axes += ", dispatch overlapped" if plan.train.overlap_dispatch else ""
    head = [
        f"plan: {axes} (+ sequence parallelism) against one process, gloo on the CPU",
        f"model: {plan.model.pattern}, d_model {plan.model.d_model}, {', '.join(plan.model.modalities)}",
        f"{'precision':<10} {'quantity':<16} {'worst':>9} {'allowed':>9}",
    ]
    body = [
        f"{line.precision:<10} {line.quantity:<16} {line.worst:>9.1e} {line.tolerance:>9.0e}  "
        f"{'ok' if line.passed else 'EXCEEDED'}  {line.where}"
        for line in lines
    ]
    verdict = "equal" if all(line.passed for line in lines) else "NOT EQUAL: do not train on this plan"
    return "\n".join([*head, *(line.rstrip() for line in body), f"verdict: {verdict}"])


def main(arguments: Sequence[str]) -> int:
    """The worker: CONFIG OUT [REFERENCE]; measures in each precision, replaying the reference's expert choices."""
    torch.set_num_threads(1)
    config = load_config(arguments[0])
    mesh = build_mesh(config.mesh, "cpu", config.context)
    reference = torch.load(arguments[2], weights_only=False) if len(arguments) > 2 else None
    results: dict[torch.dtype, Measurement] = {}
    for dtype in TOLERANCE:
        source = reference or results
        choices = source[torch.float64].choices if source else None
        results[dtype] = measure(config, mesh, dtype, choices)
    if dist.get_rank() == 0:
        torch.save(results, arguments[1])
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Loaded by name, so that what it saves unpickles in the process that started it.
    from polylepis.pretrain.verify import main as worker

    sys.exit(worker(sys.argv[1:]))
