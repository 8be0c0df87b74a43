"""The search for a plan: meshes, schedules and recompute per kind for a number of GPUs, the fastest that fits first."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from ...parallel.context import cut_tokens
from ...parallel.errors import PlanError
from ...parallel.kinds.moe import MoEConfig
from ...parallel.mesh import MeshConfig
from ...parallel.pipeline.config import PipelineConfig
from ...parallel.pipeline.cost import Timing
from ...parallel.recompute import RecomputeConfig
from ..config import RunConfig
from ..errors import ConfigError
from .estimate import Assumptions, Estimate, Priced, price

SCHEDULES = (("1f1b", 1), ("interleaved", 2), ("zbv", 2))
KINDS = ("mamba", "attention", "mlp", "moe")
SECTIONS = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}


@dataclass(frozen=True)
class Search:
    """What a search found.

    Attributes:
        best: plans that fit, fastest first.
        nearest: the plan that comes nearest to fitting, where none does.
        tried: plans that could be built; refused: combinations that could not, and one example of why.
    """

    best: tuple[Estimate, ...]
    nearest: Estimate | None
    tried: int
    refused: int
    example: str


def powers(limit: int) -> list[int]:
    return [1 << n for n in range(limit.bit_length()) if 1 << n <= limit]


def candidates(config: RunConfig, gpus: int, per_node: int) -> Iterator[RunConfig]:
    """Every combination worth a look: axes in powers of two (and what is left for dp), tp inside a node.

    Parameters are sharded over all of dp, or over one node's share of it, replicated beyond. Experts lie on one
    rank, on as many as the configuration says, or on as many of a node as divides them.
    """
    layers, rows = len(config.model.symbols), config.data.global_batch
    for tp, cp, pp in product(powers(min(per_node, gpus)), powers(min(64, gpus)), powers(min(layers, gpus))):
        if gpus % (tp * cp * pp):
            continue
        dp = gpus // (tp * cp * pp)
        if rows % dp or (cp > 1 and config.data.seq_len // cp < 2048 and cp > config.mesh.cp):
            continue  # short pieces make context parallelism pointless; what the user asked for is still looked at
        shards = {dp, min(dp, max(1, per_node // tp))}
        per_rank = rows // dp
        micros = [m for m in powers(min(16, per_rank)) if per_rank % m == 0]
        for shard, micro, ep in product(sorted(shards), micros, expert_ranks(config, per_node)):
            if dp % shard or shard * cp % ep:
                continue
            mesh = MeshConfig(dp // shard, shard, cp, tp, pp, ep, config.mesh.ep_spare if ep > 1 else 0)
            for name, chunks in SCHEDULES if pp > 1 else SCHEDULES[:1]:
                pipeline = PipelineConfig(schedule=name, chunks=chunks if pp > 1 else None)  # type: ignore[arg-type]
                data = replace(config.data, micro_batch=micro)
                yield replace(config, mesh=mesh, pipeline=pipeline, data=data)


def expert_ranks(config: RunConfig, per_node: int) -> list[int]:
    """The numbers of ep ranks to look at: 1, and with expert layers what is configured and what fits a node."""
    layers = (config.model.layer(index)[1] for index in range(len(config.model.symbols)))
    counts = [layer.n_experts for layer in layers if isinstance(layer, MoEConfig)]
    return sorted({1, config.mesh.ep, math.gcd(*counts, per_node)}) if counts else [1]


def search(
    config: RunConfig,
    gpus: int,
    timing: Timing,
    memory_limit: float | None = None,
    assumptions: Assumptions | None = None,
    keep: int = 5,
) -> Search:
    """Look for the fastest plans on `gpus` GPUs that fit their memory.

    Recompute is chosen for each mesh by `fit_recompute`: kind by kind, the cheapest second per byte first.

    Args:
        keep: how many plans to return.
    """
    best: list[tuple[float, int, Estimate]] = []
    nearest: Priced | None = None
    tried = refused = 0
    example = ""
    for plan in candidates(config, gpus, timing.device.per_node):
        try:
            found = fit_recompute(_checked(plan), timing, memory_limit, assumptions)
        except (PlanError, ConfigError) as error:
            refused, example = refused + 1, example or str(error)
            continue
        tried += 1
        if not found.fits:
            nearest = found if nearest is None or found.peak < nearest.peak else nearest
        elif len(best) < keep or found.seconds < -best[0][0]:  # without bubble already too slow: not simulated
            whole = found.simulated()
            heapq.heappush(best, (-whole.seconds, tried, whole))
            if len(best) > keep:
                heapq.heappop(best)
    ordered = tuple(found for _, _, found in sorted(best, key=lambda entry: -entry[0]))
    return Search(ordered, None if ordered or nearest is None else nearest.simulated(), tried, refused, example)


def _checked(plan: RunConfig) -> RunConfig:
    """Refuse what could not be built; everything but the data set."""
    plan.model.check(plan.mesh.tp)
    plan.model.check_context(plan.mesh, plan.context)
    cut_tokens(plan.data.micro_batch * plan.data.seq_len, plan.mesh.cp, plan.mesh.tp, plan.context.order)
    return plan


def fit_recompute(
    plan: RunConfig, timing: Timing, memory_limit: float | None, assumptions: Assumptions | None
) -> Priced:
    """The plan with as little recompute as lets it fit; with all of it where nothing does.

    Starts from keeping everything. As long as the plan does not fit, the change (one kind to `selective` or `full`)
    that frees the most bytes per second of recomputation is made.
    """
    present = [kind for kind in KINDS if any(SECTIONS[s] == kind for s in plan.model.symbols)]
    plan = replace(plan, recompute=RecomputeConfig())
    found = price(plan, timing, memory_limit, assumptions, recut=True)
    while not found.fits:
        steps: list[tuple[float, int, Priced]] = []
        for kind in present:
            now = getattr(plan.recompute, kind)
            for choice in {"none": ("selective", "full"), "selective": ("full",), "full": ()}[now]:
                changed: Any = {kind: choice}
                again = replace(plan, recompute=replace(plan.recompute, **changed))
                other = price(again, timing, memory_limit, assumptions, recut=True)
                freed, slower = found.peak - other.peak, max(1e-9, other.seconds - found.seconds)
                if freed > 0:
                    steps.append((freed / slower, len(steps), other))
        if not steps:
            return found
        fitting = [step for step in steps if step[2].fits]
        found = min(fitting, key=lambda step: step[2].seconds)[2] if fitting else max(steps)[2]
        plan = found.config
    return found


def why_not(found: Estimate) -> list[str]:
    """Why a plan does not fit, and what would make it fit: one line each."""
    gib = 2**30
    rank = max(range(len(found.memory)), key=lambda r: found.memory[r].total)
    memory, mesh = found.memory[rank], found.config.mesh
    parts = sorted(vars(memory).items(), key=lambda item: -item[1])
    largest = ", ".join(f"{name.replace('_', ' ')} {size / gib:.1f}" for name, size in parts[:3])
    lines = [
        f"does not fit: pipeline rank {rank} needs {memory.total / gib:.1f} GiB of {found.limit / gib:.1f} "
        f"(GiB: {largest})"
    ]
    state = memory.parameters + memory.gradients + memory.optimizer
    fixed = memory.total - memory.activations - memory.workspace - state
    if state + fixed < found.limit:
        room = found.limit - fixed - state
        needs = memory.activations + memory.workspace
        lines.append(
            f"activations and workspace have {room / gib:.1f} GiB and need {needs / gib:.1f}: a micro-batch or part of "
            f"the sequence {needs / room:.1f}× smaller (data.micro_batch {found.config.data.micro_batch}, mesh.cp "
            f"{mesh.cp}), or recompute of more kinds"
        )
    else:
        lines.append(
            f"weights, gradients and moments need {(state + fixed) / gib:.1f} GiB even without activations: raise "
            f"mesh.dp_shard (now {mesh.dp_shard}), mesh.tp ({mesh.tp}) or mesh.pp ({mesh.pp}), and with them the GPUs"
        )
    return lines


def overrides(found: Estimate) -> list[str]:
    """What to write behind `polylepis train CONFIG` to run this plan."""
    config = found.config
    mesh, lines = config.mesh, []
    for axis in ("pp", "dp_replicate", "dp_shard", "cp", "tp", *(["ep"] if "E" in config.model.symbols else [])):
        lines.append(f"mesh.{axis}={getattr(mesh, axis)}")
    if mesh.pp > 1:
        lines.append(f"pipeline.schedule={config.pipeline.schedule}")
        lines.append(f"pipeline.chunks={config.pipeline.chunks_per_rank}")
        lines.append(f"pipeline.cuts={_plain([stage.first for stage in found.stages])}")
    lines.append(f"data.micro_batch={config.data.micro_batch}")
    lines += [f"recompute.{kind}={getattr(config.recompute, kind)}" for kind in KINDS if kind in _present(config)]
    return lines


def _present(config: RunConfig) -> set[str]:
    return {SECTIONS[symbol] for symbol in config.model.symbols}


def _plain(numbers: Sequence[int]) -> str:
    return "[" + ",".join(map(str, numbers)) + "]"
