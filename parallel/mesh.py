"""The device mesh: named axes, one object, passed explicitly."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from .errors import PlanError


@dataclass(frozen=True)
class MeshConfig:
    """How many processes lie along each axis; their product is the world size.

    Attributes:
        dp_replicate: data-parallel replicas, each with a full copy of the (sharded) state (HSDP).
        dp_shard: data-parallel ranks over which parameters and optimizer state are sharded (FSDP2); -1 takes what
            the other axes leave of the world size.
        tp: tensor-parallel ranks; their activations between layers are sharded along the sequence.
    """

    dp_replicate: int = 1
    dp_shard: int = -1
    tp: int = 1

    __pydantic_config__ = {"extra": "forbid"}

    def resolve(self, world_size: int) -> MeshConfig:
        """The same mesh with `dp_shard` filled in.

        Raises:
            PlanError: an axis < 1, or a product that is not the world size.
        """
        if min(self.dp_replicate, self.tp) < 1 or (self.dp_shard < 1 and self.dp_shard != -1):
            raise PlanError(
                f"mesh: every axis is ≥ 1 (dp_shard may be -1): dp_replicate={self.dp_replicate}, "
                f"dp_shard={self.dp_shard}, tp={self.tp}"
            )
        shard = self.dp_shard
        if shard == -1:
            shard = max(1, world_size // (self.dp_replicate * self.tp))
        if self.dp_replicate * shard * self.tp != world_size:
            raise PlanError(
                f"mesh: dp_replicate {self.dp_replicate} × dp_shard {shard} × tp {self.tp} = "
                f"{self.dp_replicate * shard * self.tp} processes, but the world size is {world_size}"
            )
        return MeshConfig(self.dp_replicate, shard, self.tp)


@dataclass(frozen=True)
class Mesh:
    """A `DeviceMesh` with the axes `dp_replicate, dp_shard, tp` and what the layers ask of it."""

    device_mesh: DeviceMesh
    device: torch.device

    @property
    def tp(self) -> DeviceMesh:
        return self.device_mesh["tp"]

    @property
    def tp_group(self) -> dist.ProcessGroup:
        return self.device_mesh.get_group("tp")

    @property
    def tp_size(self) -> int:
        return self.device_mesh["tp"].size()

    @property
    def tp_rank(self) -> int:
        return self.device_mesh.get_local_rank("tp")

    @property
    def dp_size(self) -> int:
        return self.device_mesh.size() // self.tp_size

    @property
    def dp_rank(self) -> int:
        """Rank along both data-parallel axes, replicas outermost."""
        shard = self.device_mesh["dp_shard"].size()
        return self.device_mesh.get_local_rank("dp_replicate") * shard + self.device_mesh.get_local_rank("dp_shard")

    @property
    def fsdp(self) -> DeviceMesh:
        """The mesh that `fully_shard` takes: 1-D, or 2-D (replicate, shard) with replicas."""
        if self.device_mesh["dp_replicate"].size() > 1:
            return self.device_mesh["dp_replicate", "dp_shard"]
        return self.device_mesh["dp_shard"]


def init_process_group(device_type: str) -> None:
    """Join the group that torchrun describes, or form a group of one where there is no launcher."""
    if dist.is_initialized():
        return
    backend = "nccl" if device_type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def build_mesh(config: MeshConfig, device_type: str | None = None) -> Mesh:
    """The mesh over all processes; joins the process group if that has not happened yet."""
    kind = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    init_process_group(kind)
    sizes = config.resolve(dist.get_world_size())
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    axes = ("dp_replicate", "dp_shard", "tp")
    mesh = init_device_mesh(kind, (sizes.dp_replicate, sizes.dp_shard, sizes.tp), mesh_dim_names=axes)
    return Mesh(mesh, device)
