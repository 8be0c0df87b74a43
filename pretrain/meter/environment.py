"""What a run runs on, written down at its start: a report must not depend on the machine that makes it."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ENVIRONMENT_FILE = "environment.json"
PACKAGES = ("torch", "triton", "megatron-core", "numpy", "flash-attn", "transformers", "deepspeed")
# What changes behaviour or speed; never the whole environment, which holds secrets.
PREFIXES = ("NCCL_", "TORCH_", "CUDA_", "GLOO_", "OMP_", "SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_RESTART_COUNT")


def versions() -> dict[str, str]:
    """Of the libraries that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit of the source tree, with `+changes`, or empty outside one."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""
    try:
        ask = ["git", "-C", str(root)]
        head = subprocess.run([*ask, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=10)
        changes = subprocess.run([*ask, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "") if head.returncode == 0 else ""


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "CPU"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def environment(device: torch.device) -> dict[str, Any]:
    """Of this process's run, as JSON values; all ranks call it, for the names of their hosts."""
    hosts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    values: dict[str, Any] = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "device": device_name(device),
        "devices": dist.get_world_size(),
        "backend": dist.get_backend(),
        "hosts": sorted(set(hosts)),
        "packages": versions(),
        "commit": commit(),
        "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith(PREFIXES)},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        values["device_memory"] = properties.total_memory
        values["cuda"] = torch.version.cuda
    return values


def write_environment(run: Path, values: dict[str, Any]) -> None:
    aside = run / f".{ENVIRONMENT_FILE}.part"
    aside.write_text(json.dumps(values, indent=1) + "\n")
    aside.replace(run / ENVIRONMENT_FILE)
