"""What PyTorch's flight recorder knows of this rank's collectives; it records gloo's as well as NCCL's."""

from __future__ import annotations

import pickle
from typing import Any

import torch

LAST = 20  # collectives of a dump


def collectives() -> dict[str, Any]:
    """The last collectives of this rank, and the last one enqueued in each group; empty where nothing is recorded.

    Returns:
        `groups`: name → number of the last enqueued collective; `entries`: the last ones, oldest
        first, with group, name, number, sizes, whether it has `ended`, and who called it (file:line in function).
    """
    dump = getattr(torch._C._distributed_c10d, "_dump_fr_trace", None)
    if dump is None:
        return {"groups": {}, "entries": []}
    # The recorder answers with a pickle that it has just made in this process.
    trace = pickle.loads(dump(includeCollectives=True, includeStackTraces=True, onlyActive=False))
    groups = {name: status["last_enqueued_collective"] for name, status in trace["pg_status"].items()}
    return {"groups": groups, "entries": [_entry(entry) for entry in trace.get("entries", [])[-LAST:]]}


def _entry(entry: dict[str, Any]) -> dict[str, Any]:
    # The caller is the first frame outside torch: the room that asked for it.
    frames = [f"{f['filename']}:{f['line']} in {f['name']}" for f in entry.get("frames", [])]
    outside = [frame for frame in frames if "/torch/" not in frame and "typing_extensions" not in frame]
    return {
        "group": entry["process_group"][1] or entry["process_group"][0],
        "name": entry["profiling_name"],
        "number": entry["collective_seq_id"],
        "sizes": entry["input_sizes"],
        "ended": bool(entry["retired"]),
        "caller": (outside or frames or ["unknown"])[0],
    }
