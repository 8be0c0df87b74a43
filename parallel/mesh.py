"""The device mesh: named axes, one object, passed explicitly."""

from __future__ import annotations

import math
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
        ep: expert-parallel ranks, over which the experts of a layer are dealt out. They are ranks of dp_shard × cp,
            whatever tp and cp do to attention: ep divides that product and adds no processes.
        ep_spare: slots that each expert-parallel rank has besides its share of a layer's experts, for second copies of
            experts with many tokens.
    """

    dp_replicate: int = 1
    dp_shard: int = -1
    cp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1
    ep_spare: int = 0

    __pydantic_config__ = {"extra": "forbid"}

    def resolve(self, world_size: int) -> MeshConfig:
        """The same mesh with `dp_shard` filled in.

        Raises:
            PlanError: an axis < 1, a product that is not the world size, an ep that does not divide dp_shard × cp, or
                spare slots without expert parallelism.
        """
        if min(self.dp_replicate, self.cp, self.tp, self.pp, self.ep) < 1 or (
            self.dp_shard < 1 and self.dp_shard != -1
        ):
            raise PlanError(
                f"mesh: every axis is ≥ 1 (dp_shard may be -1): dp_replicate={self.dp_replicate}, "
                f"dp_shard={self.dp_shard}, cp={self.cp}, tp={self.tp}, pp={self.pp}, ep={self.ep}"
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
        if shard * self.cp % self.ep:
            fitting = [n for n in range(1, shard * self.cp + 1) if shard * self.cp % n == 0]
            raise PlanError(
                f"mesh: ep {self.ep} does not divide dp_shard {shard} × cp {self.cp} = {shard * self.cp}, whose "
                f"ranks it takes; accepted: {', '.join(map(str, fitting))}"
            )
        if self.ep_spare < 0 or (self.ep_spare and self.ep == 1):
            raise PlanError(
                f"mesh: ep_spare {self.ep_spare} with ep {self.ep}; accepted: 0, or a number ≥ 1 where ep is ≥ 2: one "
                "rank that holds all experts has no use for second copies"
            )
        return replace(self, dp_shard=shard)

    @property
    def n_processes(self) -> int:
        """The product of the axes; `dp_shard: -1` counts as the fewest that ep allows."""
        shard = self.ep // math.gcd(self.ep, self.cp) if self.dp_shard == -1 else self.dp_shard
        return self.pp * self.dp_replicate * shard * self.cp * self.tp


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
        experts: axes `pp, dp_replicate, edp, ep, tp` over the same ranks, where edp × ep = fsdp: what experts lie on;
            None without expert parallelism, where they lie on `device_mesh` like everything else.
        ep_spare: see `MeshConfig`.
    """

    device_mesh: DeviceMesh
    tokens: DeviceMesh
    device: torch.device
    context: ContextConfig = field(default_factory=ContextConfig)
    experts: DeviceMesh | None = None
    ep_spare: int = 0

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
    def ep_group(self) -> dist.ProcessGroup | None:
        """The ranks that share a layer's experts; None where every rank has them all."""
        return None if self.experts is None else self.experts.get_group("ep")

    @property
    def ep_size(self) -> int:
        return 1 if self.experts is None else self.experts["ep"].size()

    @property
    def ep_rank(self) -> int:
        return 0 if self.experts is None else self.experts.get_local_rank("ep")

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

    @property
    def expert_fsdp(self) -> DeviceMesh:
        """The same for experts: only the ranks that hold the same experts share them."""
        if self.experts is None:
            return self.fsdp
        if self.experts["dp_replicate"].size() > 1:
            return self.experts["dp_replicate", "edp"]
        return self.experts["edp"]


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
    experts = None
    if sizes.ep > 1:
        shape = (pp, replicate, shard * cp // sizes.ep, sizes.ep, tp)
        experts = init_device_mesh(kind, shape, mesh_dim_names=("pp", "dp_replicate", "edp", "ep", "tp"))
    return Mesh(parameters, tokens, device, context or ContextConfig(), experts, sizes.ep_spare)
