"""A prediction as a person reads it, and as a program does."""

from __future__ import annotations

from typing import Any

from .estimate import Estimate
from .search import Search, overrides, why_not

GIB = 2**30
COMMUNICATION = ("tensor parallel", "context parallel", "expert parallel", "data parallel")
SHORT = {
    "parameters": "params",
    "gradients": "grads",
    "optimizer": "optim",
    "gathered": "gathered",
    "unsharded_gradients": "whole grads",
    "activations": "activations",
    "received": "received",
    "workspace": "workspace",
    "reserve": "reserve",
}


def title(found: Estimate) -> str:
    """One line that tells a plan from others."""
    mesh, config = found.config.mesh, found.config
    axes = {"pp": mesh.pp, "dp": mesh.dp_replicate * mesh.dp_shard, "cp": mesh.cp, "tp": mesh.tp, "ep": mesh.ep}
    text = " × ".join(f"{name} {size}" for name, size in axes.items() if size > 1) or "1 GPU"
    if mesh.dp_replicate > 1:
        text += f" (sharded over {mesh.dp_shard})"
    if mesh.pp > 1:
        text += f", {config.pipeline.schedule}"
        text += f" × {config.pipeline.chunks_per_rank}" if config.pipeline.chunks_per_rank > 1 else ""
    text += f", micro-batch {config.data.micro_batch}"
    again = {k: v for k, v in vars(config.recompute).items() if v != "none"}
    return text + (", recompute " + " ".join(f"{k}:{v}" for k, v in again.items()) if again else "")


def table(found: Estimate, name: str, source: str) -> str:
    """The whole prediction of one plan.

    Args:
        name: of the device.
        source: where the seconds come from.
    """
    config, seconds = found.config, found.seconds
    lines = [
        f"{config.name} on {config.mesh.n_processes} × {name}: {title(found)}",
        f"seconds from {source}; {found.tokens:,} tokens a step, "
        f"{found.timeline.schedule.n_micro_batches} micro-batches per rank",
        "",
        f"{'GiB per rank':<14}"
        + "".join(f"{short:>12}" for short in SHORT.values())
        + f"{'total':>9} of {found.limit / GIB:.0f}",
    ]
    for rank, memory in enumerate(found.memory):
        cells = "".join(f"{getattr(memory, field) / GIB:>12.2f}" for field in SHORT)
        mark = "" if memory.total <= found.limit else "  too much"
        lines.append(f"{f'pipeline {rank}':<14}{cells}{memory.total / GIB:>9.2f}{mark}")
    lines += ["", f"step {seconds:.3f} s = " + " + ".join(f"{v:.3f} {k}" for k, v in found.parts.items() if v)]
    rate = found.tokens / seconds
    lines.append(
        f"{rate:,.0f} tokens/s ({rate / config.mesh.n_processes:,.0f} per GPU), MFU {found.mfu:.1%}, pipeline idle "
        f"{found.timeline.bubble:.1%} of all ranks' time, exposed communication "
        f"{sum(found.parts[k] for k in COMMUNICATION) / seconds:.1%}"
    )
    if config.mesh.pp > 1:
        cuts = ", ".join(
            f"{stage.first}–{stage.stop - 1} {config.model.symbols[stage.first : stage.stop]}" for stage in found.stages
        )
        lines.append(f"stages: {cuts}")
    if not found.fits:
        lines += ["", *why_not(found)]
    return "\n".join(lines)


def search_table(result: Search, limit: float) -> str:
    """The plans of a search, best first."""
    lines = [f"{result.tried} plans priced, {result.refused} combinations refused", ""]
    lines.append(f"{'step s':>8} {'tok/s/GPU':>10} {'MFU':>6} {'idle':>6} {'GiB':>7}  plan")
    for found in result.best or ((result.nearest,) if result.nearest else ()):
        rate = found.tokens / found.seconds / found.config.mesh.n_processes
        lines.append(
            f"{found.seconds:>8.3f} {rate:>10,.0f} {found.mfu:>6.1%} {found.timeline.bubble:>6.1%} "
            f"{found.peak / GIB:>7.1f}  {title(found)}"
        )
    if not result.best:
        lines += ["", f"no plan fits into {limit / GIB:.1f} GiB; the nearest:"]
        lines += why_not(result.nearest) if result.nearest else [f"nothing could be built: {result.example}"]
    return "\n".join(lines)


def as_json(found: Estimate, name: str, source: str) -> dict[str, Any]:
    """The prediction as plain values; bytes and seconds."""
    return {
        "config": found.config.name,
        "gpu": name,
        "seconds_from": source,
        "gpus": found.config.mesh.n_processes,
        "overrides": overrides(found),
        "fits": found.fits,
        "memory_limit": found.limit,
        "memory": [{**vars(memory), "total": memory.total} for memory in found.memory],
        "step_seconds": found.seconds,
        "parts": dict(found.parts),
        "bubble": found.timeline.bubble,
        "tokens": found.tokens,
        "mfu": found.mfu,
        "stages": [[stage.first, stage.stop] for stage in found.stages],
        "why_not": [] if found.fits else why_not(found),
    }
