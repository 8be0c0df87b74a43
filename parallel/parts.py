"""Logical parameters: declared once per layer kind, created as honest shards, named as the checkpoint names them.

A *part* is one logical matrix or vector (`in_proj.z.weight`). It is a `DTensor` whose placement is the truth: nothing
is packed, so any mesh can re-shard it. A routed part has one entry per modality (or expert); its matrices are stacked
`[entries, out, in]` at run time (a *bank*) and carry one name per entry in checkpoints, `in_proj.z.weight.image`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from .errors import PlanError
from .megatron import sum_gradient
from .mesh import Mesh
from .placement import primaries

ROWS_PER_BLOCK = 4096
EXPERTS = "experts."


@dataclass(frozen=True)
class Init:
    """How a part starts: `kind` and its two numbers.

    Kinds: `normal` (std a), `constant` (a), `log_uniform` (log of U(a, b), for A_log), `inverse_softplus` (softplus⁻¹
    of exp U(log a, log b), for dt_bias), `uniform` (U(−a, a)).
    """

    kind: str
    a: float = 0.0
    b: float = 0.0


@dataclass(frozen=True)
class Part:
    """One logical parameter of a layer.

    Attributes:
        shape: logical shape of one entry, `(out, in)` for matrices.
        init: the initial distribution.
        tp_dim: the dimension sharded over tensor-parallel ranks, None for a replicated part.
        decay: whether weight decay applies.
        entries: names of the bank's entries, () for a part that is not routed. On an expert-parallel mesh with spare
            slots an expert may have several.
        suffix: what stands between the part's name and the entry's in a checkpoint key: `experts.` for a bank of
            experts, whose entries expert parallelism deals out, else nothing.
    """

    shape: tuple[int, ...]
    init: Init
    tp_dim: int | None = None
    decay: bool = True
    entries: tuple[str, ...] = ()
    suffix: str = ""

    @property
    def numel(self) -> int:
        return math.prod(self.shape) * max(1, len(self.entries))

    @property
    def expert(self) -> bool:
        return self.suffix == EXPERTS

    def entry_names(self, name: str) -> list[str]:
        """The checkpoint keys of this part, one per entry."""
        return [f"{name}.{self.suffix}{entry}" for entry in self.entries] or [name]

    def own_entries(self, name: str, mesh: Mesh) -> list[str]:
        """Of these, the keys that lie on this rank (before FSDP): a run of the experts under expert parallelism."""
        names = self.entry_names(name)
        if not self.expert:
            return names
        share = len(names) // mesh.ep_size
        return names[mesh.ep_rank * share : (mesh.ep_rank + 1) * share]


class PartModule(nn.Module):
    """A module whose parameters are attached under names that are data; reads of them are typed `Any`."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


def check_divides(part: Part, name: str, tp: int) -> None:
    """Refuse a part that tensor parallelism cannot cut into equal shards."""
    if part.tp_dim is not None and part.shape[part.tp_dim] % tp:
        raise PlanError(
            f"{name}: dimension {part.tp_dim} of {part.shape} is {part.shape[part.tp_dim]}, not divisible by tp {tp}"
        )


def initial_values(part: Part, name: str, seed: int, tp_rank: int = 0, tp_size: int = 1) -> Tensor:
    """The float32 initial values of one entry's shard; they depend on (seed, name, position) only, never on the mesh.

    Rows are drawn in blocks of `ROWS_PER_BLOCK`, each from its own counter-based stream, so a rank draws only the
    blocks that its rows touch.
    """
    shape = part.shape
    rows = range(shape[0])
    if part.tp_dim == 0:
        local = shape[0] // tp_size
        rows = range(tp_rank * local, (tp_rank + 1) * local)
    blocks = []
    for block in range(rows.start // ROWS_PER_BLOCK, math.ceil(rows.stop / ROWS_PER_BLOCK)):
        first = block * ROWS_PER_BLOCK
        count = min(ROWS_PER_BLOCK, shape[0] - first)
        values = _draw(part.init, (count, *shape[1:]), f"{seed}/{name}/{block}")
        blocks.append(values[max(rows.start - first, 0) : rows.stop - first])
    values = np.concatenate(blocks)
    if part.tp_dim is not None and part.tp_dim > 0:
        values = np.split(values, tp_size, axis=part.tp_dim)[tp_rank]
    return torch.from_numpy(np.ascontiguousarray(values))


def _draw(init: Init, shape: tuple[int, ...], stream: str) -> np.ndarray:
    if init.kind == "constant":
        return np.full(shape, init.a, dtype=np.float32)
    key = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:16], "little")
    generator = np.random.Generator(np.random.Philox(key=key))
    if init.kind == "normal":
        return generator.standard_normal(shape, dtype=np.float32) * np.float32(init.a)
    if init.kind == "uniform":
        return generator.uniform(-init.a, init.a, shape).astype(np.float32)
    if init.kind == "log_uniform":
        return np.log(generator.uniform(init.a, init.b, shape)).astype(np.float32)
    if init.kind == "inverse_softplus":
        dt = np.exp(generator.uniform(math.log(init.a), math.log(init.b), shape))
        return (dt + np.log(-np.expm1(-dt))).astype(np.float32)
    raise AssertionError(f"unknown init kind {init.kind!r}")


def add_part(module: nn.Module, name: str, part: Part, mesh: Mesh) -> None:
    """Create `part` on the meta device under the dotted `name` of `module`.

    A routed vector becomes one parameter per entry; a routed matrix one stacked bank (see the module's docstring).
    """
    check_divides(part, name, mesh.tp_size)
    if part.entries and len(part.shape) == 1:
        for key in part.entry_names(name):
            _attach(module, key, _empty(part, mesh, banked=False), replace(part, entries=()))
    else:
        _attach(module, name, _empty(part, mesh, banked=bool(part.entries)), part)


def _empty(part: Part, mesh: Mesh, banked: bool) -> nn.Parameter:
    shape, placement = list(part.shape), Replicate() if part.tp_dim is None else Shard(part.tp_dim)
    placements: list[Placement] = [placement]
    if part.tp_dim is not None:
        shape[part.tp_dim] //= mesh.tp_size
    if banked:
        shape.insert(0, len(part.entries))
        placements = [Shard(part.tp_dim + 1)] if part.tp_dim is not None else [Replicate()]
    place = mesh.tp
    if part.expert and mesh.experts is not None:
        shape[0] //= mesh.ep_size
        place, placements = mesh.experts["ep", "tp"], [Shard(0), *placements]
    local = torch.empty(shape, device="meta")
    return nn.Parameter(DTensor.from_local(local, place, placements, run_check=False))


def _attach(module: nn.Module, name: str, parameter: nn.Parameter, part: Part) -> None:
    *path, leaf = name.split(".")
    for step in path:
        if not hasattr(module, step):
            module.add_module(step, nn.Module())
        module = getattr(module, step)
    module.register_parameter(leaf, parameter)
    parts: dict[str, Part] = module.__dict__.setdefault("leaf_parts", {})
    parts[leaf] = part


def named_parts(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, Part]]:
    """Every parameter under `module` with its dotted name and its declaration."""
    for path, owner in module.named_modules():
        for leaf, part in owner.__dict__.get("leaf_parts", {}).items():
            yield f"{path}.{leaf}" if path else leaf, getattr(owner, leaf), part


def materialise(module: nn.Module, prefix: str, mesh: Mesh, seed: int, dtype: torch.dtype = torch.float32) -> None:
    """Replace the meta parameters of `module` (not yet under FSDP) by initial values on the mesh's device."""
    for name, parameter, part in list(named_parts(module)):
        assert isinstance(parameter, DTensor)
        local = initial_shard(part, prefix + name, mesh, seed).to(dtype)
        owner, leaf = _owner(module, name)
        value = DTensor.from_local(local, parameter.device_mesh, parameter.placements, run_check=False)
        setattr(owner, leaf, nn.Parameter(value))


def initial_shard(part: Part, name: str, mesh: Mesh, seed: int) -> Tensor:
    """This rank's tensor- and expert-parallel shard of a whole part, banks stacked, on the mesh's device."""
    entries = [initial_values(part, key, seed, mesh.tp_rank, mesh.tp_size) for key in part.own_entries(name, mesh)]
    return (torch.stack(entries) if part.entries else entries[0]).to(mesh.device)


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf


def local(parameter: Tensor, partial: bool = False) -> Tensor:
    """This rank's tensor of a parameter.

    Args:
        partial: the parameter is replicated over tp but each rank sees only its own tokens (sequence parallelism), so
            its gradient is a partial sum. Forgetting this is silently wrong.
    """
    if not isinstance(parameter, DTensor):  # an engine that shards by itself (DeepSpeed) took it out of its DTensor
        group = getattr(parameter, "sum_group", None)
        return parameter if group is None or not partial else sum_gradient(parameter, group)
    if partial:
        return parameter.to_local(grad_placements=[Partial() if p.is_replicate() else p for p in parameter.placements])
    return parameter.to_local()


def fsdp_placement(module: nn.Module) -> dict[nn.Parameter, Shard | None]:
    """Where FSDP cuts each parameter: a bank along the matrix dimension that tp leaves whole, the rest along dim 0.

    FSDP pads dim 0 to the number of ranks, so cutting a bank of three modalities over 64 ranks there would store it
    21 times over.
    """
    return {
        parameter: Shard(2 if part.tp_dim == 0 else 1) if part.entries else None
        for _, parameter, part in named_parts(module)
    }


def split_bank(value: Tensor, part: Part, name: str) -> dict[str, Tensor]:
    """The entries of a bank (or of its optimizer state) as tensors of their own that share its memory.

    Under expert parallelism only this rank's experts: each is a tensor on the ranks that hold it. Of an expert with
    several slots only the primary one: replicas hold the same.
    """
    if not part.entries or value.dim() != len(part.shape) + 1:
        return {name: value}
    keys, kept = part.entry_names(name), primaries(part.entries)
    if not isinstance(value, DTensor):
        return {key: entry for key, entry, keep in zip(keys, value.unbind(0), kept, strict=True) if keep}
    names, mesh = value.device_mesh.mesh_dim_names or (), value.device_mesh
    placements: list[Placement] = []
    for axis, placement in zip(names, value.placements, strict=True):
        if isinstance(placement, Shard) and placement.dim == 0:
            if axis != "ep":
                raise PlanError(f"{name}: a bank sharded over its entries cannot be split into them")
            share = len(keys) // mesh["ep"].size()
            first = mesh.get_local_rank("ep") * share
            keys, kept = keys[first : first + share], kept[first : first + share]
            mesh = mesh[tuple(other for other in names if other != "ep")]
        else:
            placements.append(Shard(placement.dim - 1) if isinstance(placement, Shard) else placement)
    shape = torch.Size(value.shape[1:])
    stride = torch.empty(shape, device="meta").stride()
    return {
        key: DTensor.from_local(entry, mesh, placements, run_check=False, shape=shape, stride=stride)
        for key, entry, keep in zip(keys, value.to_local().unbind(0), kept, strict=True)
        if keep
    }


def whole_entries(value: DTensor, part: Part, name: str) -> dict[str, Tensor]:
    """Every entry of a parameter (or of its gradient), gathered: all ranks of its mesh call it and get all of them."""
    return split_bank(value.full_tensor(), part, name)
