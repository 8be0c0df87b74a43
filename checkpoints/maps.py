"""Linear maps on a named axis, the atoms of the transform algebra.

A map takes the tensors of its source names and gives those of its target names. It has an inverse where one exists.
A new one (a rotation, a LoRA merge) is a frozen dataclass with `__call__` and `inverse`, a few lines each. Maps also
run on meta tensors, which is how shapes are known before anything is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .errors import CheckpointError

Axis = Literal["entry", "out", "in"]
"""`out` is the only axis of a vector and the first of a matrix, `in` the last of a matrix; a stack of matrices or
vectors has `entry` before them."""


def dim_of(axis: Axis, tensor: Tensor) -> int:
    """The dimension that an axis has in a tensor.

    Raises:
        CheckpointError: the tensor has no such axis.
    """
    if tensor.dim() == 0 or (axis == "in" and tensor.dim() < 2):
        raise CheckpointError(f"a tensor of shape {tuple(tensor.shape)} has no axis {axis!r}")
    return {"entry": 0, "out": max(tensor.dim() - 2, 0), "in": tensor.dim() - 1}[axis]


@dataclass(frozen=True)
class Map:
    """The base: a map that keeps its one tensor.

    Attributes:
        by_rows: the result is the sources' rows (dim 0) one after the other, each row mapped by itself, so that a
            large tensor need not be in memory at once; `rows` then maps one block.
    """

    by_rows = True

    def __call__(self, values: Sequence[Tensor]) -> list[Tensor]:
        return [self.rows(value) for value in values]

    def rows(self, block: Tensor) -> Tensor:
        return block

    def inverse(self) -> Map | None:
        """The map that undoes this one exactly, or None."""
        return self

    def then(self, other: Map) -> Map:
        return Chain((self, other))


KEEP = Map()


@dataclass(frozen=True)
class Chain(Map):
    """One map after another."""

    maps: tuple[Map, ...]

    @property
    def by_rows(self) -> bool:  # type: ignore[override]
        return all(m.by_rows for m in self.maps)

    def __call__(self, values: Sequence[Tensor]) -> list[Tensor]:
        for m in self.maps:
            values = m(values)
        return list(values)

    def rows(self, block: Tensor) -> Tensor:
        for m in self.maps:
            block = m.rows(block)
        return block

    def inverse(self) -> Map | None:
        inverses = [m.inverse() for m in reversed(self.maps)]
        return None if None in inverses else Chain(tuple(m for m in inverses if m is not None))


@dataclass(frozen=True)
class Each(Map):
    """A map of its own for each tensor."""

    maps: tuple[Map, ...]
    by_rows = False

    def __call__(self, values: Sequence[Tensor]) -> list[Tensor]:
        return [m.rows(value) for m, value in zip(self.maps, values, strict=True)]

    def inverse(self) -> Map | None:
        inverses = [m.inverse() for m in self.maps]
        return None if None in inverses else Each(tuple(m for m in inverses if m is not None))


@dataclass(frozen=True)
class Pack(Map):
    """k parts → one packed tensor per rank, each `[part 0 | part 1 | …]` along `axis` with that rank's share of each.

    With one rank this is concatenation; with one part it is tensor-parallel sharding. Concatenating what several ranks
    hold is *not* its inverse where there is more than one part: that interleaves them. `Unpack` is.

    Attributes:
        sizes: of each part along the axis, all ranks together.
        ranks: how many packed tensors.
        axis: where parts stand beside each other.
    """

    sizes: tuple[int, ...]
    ranks: int = 1
    axis: Axis = "out"

    @property
    def by_rows(self) -> bool:  # type: ignore[override]
        return self.ranks == 1 and self.axis == "out"

    def __call__(self, values: Sequence[Tensor]) -> list[Tensor]:
        dims = [dim_of(self.axis, value) for value in values]
        found = tuple(value.shape[dim] for value, dim in zip(values, dims, strict=True))
        if found != self.sizes:
            raise CheckpointError(f"parts of {found} along {self.axis!r}, but {self.sizes} are declared")
        if any(size % self.ranks for size in self.sizes):
            raise CheckpointError(f"parts of {self.sizes} along {self.axis!r} do not divide over {self.ranks} ranks")
        if len(values) == 1 and self.ranks == 1:
            return list(values)
        shares = [value.chunk(self.ranks, dim) for value, dim in zip(values, dims, strict=True)]
        return [torch.cat([share[rank] for share in shares], dims[0]) for rank in range(self.ranks)]

    def inverse(self) -> Map:
        return Unpack(self.sizes, self.ranks, self.axis)


@dataclass(frozen=True)
class Unpack(Map):
    """Packed tensors of all ranks → the k parts: the inverse of `Pack`."""

    sizes: tuple[int, ...]
    ranks: int = 1
    axis: Axis = "out"

    @property
    def by_rows(self) -> bool:  # type: ignore[override]
        return len(self.sizes) == 1 and self.axis == "out"

    def __call__(self, values: Sequence[Tensor]) -> list[Tensor]:
        local = [size // self.ranks for size in self.sizes]
        if len(values) != self.ranks:
            raise CheckpointError(f"{len(values)} tensors for {self.ranks} ranks")
        for value in values:
            width = value.shape[dim_of(self.axis, value)]
            if width != sum(local) or any(size % self.ranks for size in self.sizes):
                whole = f" (1 of {self.ranks} ranks)" if self.ranks > 1 else ""
                raise CheckpointError(
                    f"{tuple(value.shape)}{whole} along {self.axis!r} cannot be parts of {self.sizes}"
                )
        if len(self.sizes) == 1 and self.ranks == 1:
            return list(values)
        dim = dim_of(self.axis, values[0])
        pieces = [value.split(local, dim) for value in values]
        return [torch.cat([piece[k] for piece in pieces], dim) for k in range(len(self.sizes))]

    def inverse(self) -> Map:
        return Pack(self.sizes, self.ranks, self.axis)


@dataclass(frozen=True)
class Stack(Map):
    """n tensors → one with a new first axis `entry`."""

    by_rows = False

    def __call__(self, values: Sequence[Tensor]) -> list[Tensor]:
        return [torch.stack(list(values))]

    def inverse(self) -> Map:
        return Unstack()


@dataclass(frozen=True)
class Unstack(Map):
    """The entries of a stack."""

    by_rows = False

    def __call__(self, values: Sequence[Tensor]) -> list[Tensor]:
        return list(values[0].unbind(0))

    def inverse(self) -> Map:
        return Stack()


@dataclass(frozen=True)
class Unsqueeze(Map):
    """A dimension of size 1 more, as depthwise convolutions have it."""

    dim: int

    @property
    def by_rows(self) -> bool:  # type: ignore[override]
        return self.dim > 0

    def rows(self, block: Tensor) -> Tensor:
        return block.unsqueeze(self.dim)

    def inverse(self) -> Map:
        return Squeeze(self.dim)


@dataclass(frozen=True)
class Squeeze(Map):
    """A dimension of size 1 less."""

    dim: int

    @property
    def by_rows(self) -> bool:  # type: ignore[override]
        return self.dim > 0

    def rows(self, block: Tensor) -> Tensor:
        if block.dim() <= self.dim or block.shape[self.dim] != 1:
            raise CheckpointError(f"shape {tuple(block.shape)} has no dimension {self.dim} of size 1")
        return block.squeeze(self.dim)

    def inverse(self) -> Map:
        return Unsqueeze(self.dim)


@dataclass(frozen=True)
class Unflatten(Map):
    """The first axis in `count` equal runs: a new first axis `entry`."""

    count: int
    by_rows = False

    def rows(self, block: Tensor) -> Tensor:
        if block.dim() == 0 or block.shape[0] % self.count:
            raise CheckpointError(f"{tuple(block.shape)} does not divide into {self.count} entries")
        return block.unflatten(0, (self.count, block.shape[0] // self.count))

    def inverse(self) -> Map:
        return Flatten(self.count)


@dataclass(frozen=True)
class Flatten(Map):
    """The entries of a stack one after the other along their first axis."""

    count: int
    by_rows = False

    def rows(self, block: Tensor) -> Tensor:
        if block.dim() < 2 or block.shape[0] != self.count:
            raise CheckpointError(f"{tuple(block.shape)} is no stack of {self.count} entries")
        return block.flatten(0, 1)

    def inverse(self) -> Map:
        return Unflatten(self.count)


@dataclass(frozen=True)
class LeaveZero(Map):
    """A tensor, and a vector beside it that must be zero → the tensor alone: what the other side has no place for.

    Attributes:
        size: of the vector.
        what: its name, for the message.
    """

    size: int
    what: str
    by_rows = False

    def __call__(self, values: Sequence[Tensor]) -> list[Tensor]:
        kept, zero = values
        if not zero.is_meta and zero.any():
            raise CheckpointError(
                f"{self.what} is not zero (up to {zero.abs().max():.2g}), and the target has no place for it"
            )
        return [kept]

    def inverse(self) -> Map:
        return JoinZero(self.size, self.what)


@dataclass(frozen=True)
class JoinZero(Map):
    """The inverse of `LeaveZero`: the vector is made."""

    size: int
    what: str
    by_rows = False

    def __call__(self, values: Sequence[Tensor]) -> list[Tensor]:
        return [values[0], torch.zeros(self.size, device=values[0].device)]

    def inverse(self) -> Map:
        return LeaveZero(self.size, self.what)


@dataclass(frozen=True)
class Transpose(Map):
    """`out` and `in` exchanged."""

    by_rows = False

    def rows(self, block: Tensor) -> Tensor:
        dim_of("in", block)
        return block.transpose(-2, -1)


@dataclass(frozen=True)
class Fan(Map):
    """Tensor k → `counts[k]` equal ones: experts and modalities that start as copies, a tied projection untied."""

    counts: tuple[int, ...]
    by_rows = False

    def __call__(self, values: Sequence[Tensor]) -> list[Tensor]:
        return [
            value if k == 0 else value.clone() for value, n in zip(values, self.counts, strict=True) for k in range(n)
        ]

    def inverse(self) -> Map:
        return Unfan(self.counts)


@dataclass(frozen=True)
class Unfan(Map):
    """Copies taken back: the tensors of each group must be equal."""

    counts: tuple[int, ...]
    by_rows = False

    def __call__(self, values: Sequence[Tensor]) -> list[Tensor]:
        result, rest = [], list(values)
        for count in self.counts:
            group, rest = rest[:count], rest[count:]
            for value in group[1:]:
                if value.shape != group[0].shape or not (value.is_meta or torch.equal(value, group[0])):
                    raise CheckpointError(f"{count} tensors should be copies of each other, and are not any more")
            result.append(group[0])
        return result

    def inverse(self) -> Map:
        return Fan(self.counts)


@dataclass(frozen=True)
class Scale(Map):
    """Times a constant (a multiplier folded into a weight)."""

    factor: float

    def rows(self, block: Tensor) -> Tensor:
        return block * self.factor

    def inverse(self) -> Map | None:
        """Exact for powers of two only, so only those have one."""
        mantissa = abs(torch.tensor(self.factor, dtype=torch.float64).frexp().mantissa.item())
        return Scale(1 / self.factor) if mantissa == 0.5 else None


@dataclass(frozen=True)
class Permute(Map):
    """Rows (or columns) in another order: `result[k] = value[order[k]]` along `axis`."""

    order: tuple[int, ...]
    axis: Axis = "out"
    by_rows = False

    def rows(self, block: Tensor) -> Tensor:
        dim = dim_of(self.axis, block)
        if sorted(self.order) != list(range(block.shape[dim])):
            raise CheckpointError(f"an order of {len(self.order)} for {tuple(block.shape)} along {self.axis!r}")
        return block.index_select(dim, torch.tensor(self.order, device=block.device))

    def inverse(self) -> Map:
        position = {old: new for new, old in enumerate(self.order)}
        return Permute(tuple(position[old] for old in range(len(self.order))), self.axis)


@dataclass(frozen=True)
class Place(Map):
    """Runs of rows moved to other places in a larger tensor; `new` says what the other rows hold.

    Attributes:
        before, after: sizes along the axis.
        runs: (first row before, first row after, how many).
        new: `zero`; or `mean` of the moved rows plus noise of `noise` times their standard deviation (Hewitt 2021:
            each new token then starts as likely as the average one).
        seed: of the noise.
    """

    before: int
    after: int
    runs: tuple[tuple[int, int, int], ...]
    new: Literal["zero", "mean"] = "zero"
    noise: float = 0.0
    seed: int = 0
    axis: Axis = "out"
    by_rows = False

    def rows(self, block: Tensor) -> Tensor:
        dim = dim_of(self.axis, block)
        if block.shape[dim] != self.before:
            raise CheckpointError(f"{tuple(block.shape)} along {self.axis!r}, but {self.before} is declared")
        shape = list(block.shape)
        shape[dim] = self.after
        result = block.new_zeros(shape)
        if block.is_meta:
            return result
        if self.new == "mean":
            wide = torch.cat([block.narrow(dim, old, n) for old, _, n in self.runs], dim)
            wide = wide.to(torch.promote_types(block.dtype, torch.float32))
            generator = torch.Generator().manual_seed(self.seed)
            noise = torch.randn(shape, generator=generator, dtype=wide.dtype) * self.noise
            result.copy_(wide.mean(dim, keepdim=True) + noise * wide.std(dim, keepdim=True))
        for old, new, n in self.runs:
            result.narrow(dim, new, n).copy_(block.narrow(dim, old, n))
        return result

    def inverse(self) -> Map | None:
        """Takes the rows back, if none was left out or copied twice."""
        last = 0
        for first, _, n in sorted(self.runs):
            if first != last:
                return None
            last += n
        if last != self.before:
            return None
        back = tuple((new, old, n) for old, new, n in self.runs)
        return Place(self.after, self.before, back, axis=self.axis)


@dataclass(frozen=True)
class Cast(Map):
    """Another dtype."""

    dtype: torch.dtype

    def rows(self, block: Tensor) -> Tensor:
        return block.to(self.dtype)

    def inverse(self) -> Map | None:
        return None  # what was rounded away is gone


@dataclass(frozen=True)
class Noise(Map):
    """Normal noise of `relative` times the tensor's standard deviation."""

    relative: float
    seed: int = 0
    by_rows = False

    def rows(self, block: Tensor) -> Tensor:
        if block.is_meta or not self.relative:
            return block
        generator = torch.Generator().manual_seed(self.seed)
        wide = block.to(torch.promote_types(block.dtype, torch.float32))
        noise = torch.randn(wide.shape, generator=generator, dtype=wide.dtype)
        return (wide + noise * wide.std() * self.relative).to(block.dtype)

    def inverse(self) -> Map | None:
        return None if self.relative else KEEP


@dataclass(frozen=True)
class Fresh(Map):
    """Tensors from nothing: `make` gives them, as an initialisation would."""

    make: Callable[[], Sequence[Tensor]]
    by_rows = False

    def __call__(self, values: Sequence[Tensor]) -> list[Tensor]:
        return list(self.make())

    def inverse(self) -> Map | None:
        return None
