"""The node-local tier: each rank keeps its own part on a fast disk of its machine, more often than the durable tier.

A part is useful only beside all others of the same step on the same mesh; whether that is so, all ranks agree on before
anything is read. A part is one safetensors file and one JSON file, which is written last and has the other's hash.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from .errors import CheckpointError
from .host import Snapshot, set_random_state
from .manifest import hash_file, sync_folder

KEPT = 2  # steps: while one is being written, the one before it is whole on every rank
RANDOM_STATE = "random"


class LocalTier:
    """This rank's parts, under `folder/<run id>/rank-<5 digits>/`.

    Args:
        folder: on a disk of this machine, any path that every machine has.
        run: names the run, so that parts of another one in the same folder are never taken for ours.
    """

    def __init__(self, folder: Path, run: str) -> None:
        self.folder = folder / run / f"rank-{dist.get_rank():05d}"

    def write(self, step: int, snapshot: Snapshot, live: Mapping[str, Tensor]) -> None:
        """Write this rank's part of a step, then forget all but the newest `KEPT`. No other rank is involved.

        Raises:
            OSError: the disk is full, or cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        part, note = self._paths(step)
        aside = part.with_suffix(".part")
        try:
            values = {name: tensor.contiguous() for name, tensor in snapshot.tensors.items()}
            try:
                save_file(values | {RANDOM_STATE: snapshot.random}, aside)
            except Exception as error:  # safetensors' own class hides the operating system's reason
                raise OSError(" ".join(str(error).split())) from error
            _flush(aside)
            aside.replace(part)
            text = {
                "step": step,
                "data": snapshot.state,
                "world": dist.get_world_size(),
                "layout": layout(live),
                "file": hash_file(part),
            }
            aside.write_text(json.dumps(text))
            _flush(aside)
            aside.replace(note)
            sync_folder(self.folder)
        except OSError:
            aside.unlink(missing_ok=True)
            raise
        for old in sorted(self.folder.glob("step-*.json"))[:-KEPT]:
            old.unlink()  # first what makes a part whole
            old.with_suffix(".safetensors").unlink(missing_ok=True)

    def steps(self, live: Mapping[str, Tensor]) -> set[int]:
        """Steps of which this rank has its part, for this mesh and number of ranks; contents are not read yet."""
        found = set()
        mine = layout(live)
        for path in self.folder.glob("step-*.json"):
            note = _read_note(path)
            part = path.with_suffix(".safetensors")
            fits = note.get("layout") == mine and note.get("world") == dist.get_world_size()
            if fits and part.is_file() and part.stat().st_size == note["file"]["bytes"]:
                found.add(int(note["step"]))
        return found

    def read(self, step: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """This rank's part of a step, checked against its hash: local tensors by name, and the stream's state.

        Raises:
            CheckpointError: its content has changed.
        """
        part, note = self._paths(step)
        values = _read_note(note)
        if not values or not part.is_file() or hash_file(part) != values["file"]:
            raise CheckpointError(f"{part}: is not what was written")
        return load_file(part), values["data"]

    def forget_after(self, step: int) -> None:
        """Remove this rank's parts of later steps than `step`."""
        for note in self.folder.glob("step-*.json"):
            if int(note.stem.removeprefix("step-")) > step:
                note.unlink()
                note.with_suffix(".safetensors").unlink(missing_ok=True)

    def forget(self) -> None:
        """Remove this rank's parts, of no use once the run is over."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty: other ranks of this machine are not done yet
            self.folder.parent.rmdir()

    def _paths(self, step: int) -> tuple[Path, Path]:
        stem = self.folder / f"step-{step:08d}"
        return stem.with_suffix(".safetensors"), stem.with_suffix(".json")


@torch.no_grad()
def fill(live: Mapping[str, Tensor], part: dict[str, Tensor]) -> None:
    """Copy a part into the live tensors, and put its random states back."""
    set_random_state(part.pop(RANDOM_STATE))
    for name, tensor in live.items():
        target = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        target.copy_(part[name])


def layout(live: Mapping[str, Tensor]) -> str:
    """Names this rank's place in the mesh and all that it holds, so that parts fit only where they came from."""
    lines = [f"{dist.get_rank()} of {dist.get_world_size()}"]
    for name, tensor in sorted(live.items()):
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        where = ""
        if isinstance(tensor, DTensor):
            mesh = tensor.device_mesh
            where = f"{mesh.mesh_dim_names} {mesh.mesh.flatten().tolist()} {tensor.placements}"
        lines.append(f"{name} {local.dtype} {list(local.shape)} of {list(tensor.shape)} {where}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _read_note(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
