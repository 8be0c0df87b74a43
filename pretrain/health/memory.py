"""When memory runs out: what the allocator had measured, beside what the model and its optimizer state should need."""

from __future__ import annotations

import json
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ...parallel.engines.base import Engine
from .events import FOLDER, write_aside

GIB = 1024**3
HISTORY = 100_000  # allocations that `act` keeps


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA's own error, Python's, or the CPU allocator's, which is a plain RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def state_bytes(engine: Engine) -> dict[str, int]:
    """Bytes of this rank's parameters, gradients and optimizer state, counted from their shards."""

    def size(value: Any) -> int:
        local = value.to_local() if isinstance(value, DTensor) else value
        return local.numel() * local.element_size() if isinstance(local, torch.Tensor) else 0

    parameters = [p for model in engine.models for p in model.parameters()]
    kept = engine.optimizer.state if isinstance(engine.optimizer, torch.optim.Optimizer) else {}  # else: elsewhere
    states = [kept.get(p, {}) for p in parameters]
    return {
        "parameters": sum(map(size, parameters)),
        "gradients": sum(size(p.grad) for p in parameters if p.grad is not None),
        "optimizer": sum(size(value) for state in states for value in state.values()),
    }


def measured(device: torch.device) -> dict[str, Any]:
    """What the allocator and the system measured, in bytes."""
    values: dict[str, Any] = {"host_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        stats = torch.cuda.memory_stats(device)
        values |= {
            "device_total": total,
            "device_free": free,
            "allocated": stats.get("allocated_bytes.all.current", 0),
            "allocated_peak": stats.get("allocated_bytes.all.peak", 0),
            "reserved": stats.get("reserved_bytes.all.current", 0),
            "reserved_peak": stats.get("reserved_bytes.all.peak", 0),
            "retries": stats.get("num_alloc_retries", 0),
        }
    return values


def keep_history(device: torch.device) -> None:
    """From now on CUDA's allocator remembers who asked for what (`memory: act`)."""
    if device.type == "cuda":
        torch.cuda.memory._record_memory_history(max_entries=HISTORY)


def report(
    run: Path,
    rank: int,
    step: int,
    phase: str,
    error: BaseException,
    engine: Engine,
    planned: Mapping[str, float] | None,
) -> tuple[Path, str]:
    """Write `health/memory-rank-R.json`; the file and a line for people.

    Args:
        planned: the planner's expectation for this rank in bytes by part, None where there is none.
    """
    state, seen = state_bytes(engine), measured(engine.mesh.device)
    values = {
        "rank": rank,
        "step": step,
        "phase": phase,
        "error": " ".join(str(error).split()),
        "measured": seen,
        "state": state,
        "planned": dict(planned) if planned else None,
    }
    path = run / FOLDER / f"memory-rank-{rank:05d}.json"
    write_aside(path, json.dumps(values, indent=1) + "\n")
    peak = seen.get("allocated_peak", seen["host_peak"])
    line = f"out of memory in phase {phase}: peak {peak / GIB:.2f} GiB"
    if "device_total" in seen:
        line += f" allocated of {seen['device_total'] / GIB:.2f}"
    line += f", of which parameters, gradients and optimizer state {sum(state.values()) / GIB:.2f} GiB"
    if planned:
        line += f"; planned {sum(planned.values()) / GIB:.2f} GiB in all"
    return path, f"{line}; smaller data.micro_batch or more recompute would help (details: {path})"


def dump_history(run: Path, rank: int, device: torch.device) -> None:
    """The allocation history for pytorch.org/memory_viz."""
    if device.type == "cuda":
        torch.cuda.memory._dump_snapshot(str(run / FOLDER / f"memory-rank-{rank:05d}.pickle"))
