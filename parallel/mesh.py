"""The device mesh: named axes, one object, passed explicitly."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Literal

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
        cp: context-parallel ranks, which share the tokens of one micro-batch. They hold different tokens of the same
            parameters, so parameters are sharded over dp_shard × cp.
        tp: tensor-parallel ranks; their activations between layers are sharded along the sequence.
        pp: pipeline ranks, the outermost axis: each holds one stage of layers, or several (`PipelineConfig.chunks`).
    """

    dp_replicate: int = 1
    dp_shard: int = -1
    cp: int = 1
    tp: int = 1
    pp: int = 1

    __pydantic_config__ = {"extra": "forbid"}

    def resolve(self, world_size: int) -> MeshConfig:
        """The same mesh with `dp_shard` filled in.

        Raises:
            PlanError: an axis < 1, or a product that is not the world size.
        """
        if min(self.dp_replicate, self.cp, self.tp, self.pp) < 1 or (self.dp_shard < 1 and self.dp_shard != -1):
            raise PlanError(
                f"mesh: every axis is ≥ 1 (dp_shard may be -1): dp_replicate={self.dp_replicate}, "
                f"dp_shard={self.dp_shard}, cp={self.cp}, tp={self.tp}, pp={self.pp}"
            )
        others = self.pp * self.dp_replicate * self.cp * self.tp
        shard = max(1, world_size // others) if self.dp_shard == -1 else self.dp_shard
        if others * shard != world_size:
            fits = others * max(1, round(world_size / others))
            nearest = f"; the nearest that fits is {fits}" if self.dp_shard == -1 else ""
            raise PlanError(
                f"mesh: pp {self.pp} × dp_replicate {self.dp_replicate} × dp_shard {shard} × cp {self.cp} × "
                f"tp {self.tp} = {others * shard} processes, but the world size is {world_size}{nearest}"
            )
        return replace(self, dp_shard=shard)

    @property
    def n_processes(self) -> int:
        """The product of the axes; `dp_shard: -1` counts as 1."""
        return self.pp * self.dp_replicate * max(1, self.dp_shard) * self.cp * self.tp


@dataclass(frozen=True)
class ContextConfig:
    """How layers compute over context-parallel ranks. Batches do not depend on any of it.

    Attributes:
        order: `contiguous` gives each rank one run of tokens; `zigzag` gives rank r the r-th run from either end, which
            balances causal attention.
        mamba: `state` passes affine summaries of the scan between ranks; `heads` exchanges sequence for heads
            (all-to-all); `auto` is `state`, whose volume does not grow with the sequence.
        attention: `heads` as above; `gather` collects keys and values on every rank; `auto` is `heads` where the
            heads of a rank divide, else `gather`.
    """

    order: Literal["contiguous", "zigzag"] = "contiguous"
    mamba: Literal["auto", "state", "heads"] = "auto"
    attention: Literal["auto", "heads", "gather"] = "auto"

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True)
class Mesh:
    """The process mesh and what the layers ask of it.

    Attributes:
        device_mesh: axes `pp, dp_replicate, fsdp, tp`, where fsdp = dp_shard × cp: what parameters lie on.
        tokens: axes `pp, dp_replicate, dp_shard, cp, tp` over the same ranks: what tokens lie on.
    """

    device_mesh: DeviceMesh
    tokens: DeviceMesh
    device: torch.device
    context: ContextConfig = field(default_factory=ContextConfig)

    @property
    def pp_group(self) -> dist.ProcessGroup:
        return self.device_mesh.get_group("pp")

    @property
    def pp_size(self) -> int:
        return self.device_mesh["pp"].size()

    @property
    def pp_rank(self) -> int:
        return self.device_mesh.get_local_rank("pp")

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
    def cp_group(self) -> dist.ProcessGroup:
        return self.tokens.get_group("cp")

    @property
    def cp_size(self) -> int:
        return self.tokens["cp"].size()

    @property
    def cp_rank(self) -> int:
        return self.tokens.get_local_rank("cp")

    @property
    def dp_size(self) -> int:
        """Ranks that read different data: pipeline, context- and tensor-parallel ranks share theirs."""
        return self.tokens.size() // (self.pp_size * self.tp_size * self.cp_size)

    @property
    def dp_rank(self) -> int:
        """Rank along both data-parallel axes, replicas outermost."""
        shard = self.tokens["dp_shard"].size()
        return self.tokens.get_local_rank("dp_replicate") * shard + self.tokens.get_local_rank("dp_shard")

    @property
    def fsdp(self) -> DeviceMesh:
        """The mesh that `fully_shard` takes: 1-D, or 2-D (replicate, shard) with replicas."""
        if self.device_mesh["dp_replicate"].size() > 1:
            return self.device_mesh["dp_replicate", "fsdp"]
        return self.device_mesh["fsdp"]


def init_process_group(device_type: str, timeout: float = 600.0) -> None:
    """Join the group that torchrun describes, or form a group of one where there is no launcher.

    Args:
        timeout: seconds after which a collective that some rank never joined fails on the others.
    """
    if dist.is_initialized():
        return
    backend = "nccl" if device_type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def build_mesh(
    config: MeshConfig, device_type: str | None = None, context: ContextConfig | None = None, timeout: float = 600.0
) -> Mesh:
    """The mesh over all processes; joins the process group if that has not happened yet."""
    kind = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    init_process_group(kind, timeout)
    sizes = config.resolve(dist.get_world_size())
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    pp, replicate, shard, cp, tp = sizes.pp, sizes.dp_replicate, sizes.dp_shard, sizes.cp, sizes.tp
    names = ("pp", "dp_replicate", "fsdp", "tp")
    parameters = init_device_mesh(kind, (pp, replicate, shard * cp, tp), mesh_dim_names=names)
    axes = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
    tokens = init_device_mesh(kind, (pp, replicate, shard, cp, tp), mesh_dim_names=axes)
    return Mesh(parameters, tokens, device, context or ContextConfig())
