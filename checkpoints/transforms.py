"""The transform algebra: rules (source names → destination names, a linear map on a named axis), streamed and lazy.

A `Source` is anything that knows the specs of its tensors and loads one at a time: a checkpoint, a foreign file, or
another source seen through rules (`Transformed`). So transforms compose by nesting and hold one group of tensors at a
time, and `invert` reads the same rules in the other direction wherever their maps have inverses: import is export read
backwards. Resharding, export, import, upcycling, vocabulary extension and dtype policies are all lists of rules.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from .errors import CheckpointError
from .maps import KEEP, Map

PIECE_BYTES = 64 << 20


@dataclass(frozen=True)
class Spec:
    """Shape and dtype of a tensor that is somewhere else."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, tensor: Tensor) -> Spec:
        return cls(tuple(tensor.shape), tensor.dtype)

    def meta(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


class Source(Protocol):
    """Named tensors that are loaded when they are asked for."""

    def specs(self) -> Mapping[str, Spec]:
        """Every tensor, in the order in which streaming is cheapest."""

    def load(self, name: str) -> Tensor:
        """One whole tensor, on the CPU."""

    def pieces(self, name: str) -> Iterator[Tensor]:
        """The same tensor as consecutive blocks of rows of about `PIECE_BYTES`, for memory's sake."""


class Tensors:
    """Tensors in memory as a source."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def specs(self) -> Mapping[str, Spec]:
        return {name: Spec.of(tensor) for name, tensor in self._tensors.items()}

    def load(self, name: str) -> Tensor:
        return self._tensors[name].detach()

    def pieces(self, name: str) -> Iterator[Tensor]:
        return row_blocks(self.load(name))


def row_blocks(tensor: Tensor, limit: int = PIECE_BYTES) -> Iterator[Tensor]:
    """Views of consecutive rows, at least one row each; a scalar or an empty tensor is one block."""
    if tensor.dim() == 0 or tensor.numel() == 0:
        return iter((tensor,))
    return iter(tensor.split(rows_per_block(Spec.of(tensor), limit)))


def rows_per_block(spec: Spec, limit: int = PIECE_BYTES) -> int:
    row = spec.nbytes // spec.shape[0]
    return max(1, limit // max(row, 1))


def stream(source: Source) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in turn; none is kept."""
    for name in source.specs():
        yield name, source.load(name)


def in_memory(source: Source) -> dict[str, Tensor]:
    return dict(stream(source))


@dataclass(frozen=True)
class Rule:
    """What becomes of the tensors whose names match.

    A name may hold placeholders: `{i}` stands for one dotted component, `{rest*}` for several; what a placeholder of
    the first source name stands for is put into the other names. `()` as targets drops the tensors, `()` as sources
    makes new ones.

    Attributes:
        sources, targets: names before and after.
        map: the linear map from the sources' tensors to the targets'.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    map: Map = KEEP


def invert(rules: Iterable[Rule]) -> list[Rule]:
    """The rules read backwards.

    Raises:
        CheckpointError: a rule drops something or its map has no inverse; names it.
    """
    result = []
    for rule in rules:
        if not rule.targets or not rule.sources:
            verb, name = ("drops", rule.sources[0]) if rule.sources else ("makes", rule.targets[0])
            raise CheckpointError(f"a rule {verb} {name}, so the rules cannot be read backwards")
        inverse = rule.map.inverse()
        if inverse is None:
            raise CheckpointError(f"{rule.sources[0]} → {rule.targets[0]}: {rule.map} has no inverse")
        result.append(Rule(rule.targets, rule.sources, inverse))
    return result


@dataclass(frozen=True)
class _Group:
    """A rule whose placeholders are filled in."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    map: Map


@dataclass
class Transformed:
    """`source` seen through `rules`: the first rule that matches a name takes it; the others pass unchanged.

    Attributes:
        source: where the tensors come from.
        rules: in order of precedence.

    Raises:
        CheckpointError: tensors that a matching rule also needs are absent, shapes do not fit the map, or two rules
            make the same name.
    """

    source: Source
    rules: Sequence[Rule]
    _groups: dict[str, tuple[_Group, int]] = field(init=False, repr=False)
    _specs: dict[str, Spec] = field(init=False, repr=False)
    _made: tuple[_Group, dict[str, Tensor]] | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        before = self.source.specs()
        self._groups, self._specs = {}, {}
        for group in _bind(self.rules, before):
            inputs = [before[name].meta() for name in group.sources]
            outputs = apply(group.map, inputs, group.sources, group.targets) if group.targets else []
            for position, (name, output) in enumerate(zip(group.targets, outputs, strict=True)):
                if name in self._groups:
                    raise CheckpointError(f"{name} would be made twice, the second time of {group.sources}")
                self._groups[name] = group, position
                self._specs[name] = Spec.of(output)

    def in_order(self, names: Iterable[str]) -> Transformed:
        """The same, its tensors listed in the order of `names` instead of the source's."""
        self._specs = {name: self._specs[name] for name in names}
        return self

    def specs(self) -> Mapping[str, Spec]:
        return self._specs

    def load(self, name: str) -> Tensor:
        """The tensor; siblings that the same map made are kept until they, or another group's, are asked for."""
        group, _ = self._groups[name]
        if self._made is None or self._made[0] is not group or name not in self._made[1]:
            self._made = None
            inputs = [self.source.load(source) for source in group.sources]
            outputs = apply(group.map, inputs, group.sources, group.targets)
            self._made = group, dict(zip(group.targets, outputs, strict=True))
        return self._made[1].pop(name)

    def pieces(self, name: str) -> Iterator[Tensor]:
        """Straight from the source's pieces where the map works row by row."""
        group, _ = self._groups[name]
        if not group.map.by_rows or len(group.targets) != 1 or not group.sources:
            yield from row_blocks(self.load(name))
            return
        for source in group.sources:
            for piece in self.source.pieces(source):
                yield group.map.rows(piece)


def apply(map_: Map, inputs: Sequence[Tensor], sources: Sequence[str], targets: Sequence[str]) -> list[Tensor]:
    """The map's outputs; an error of torch becomes one line that names the tensors.

    Raises:
        CheckpointError: shapes do not fit.
    """
    first = sources[0] if sources else targets[0]
    try:
        outputs = map_(inputs)
    except (RuntimeError, IndexError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise CheckpointError(f"{first}: {error}") from error
        shapes = ", ".join(f"{n} {tuple(t.shape)}" for n, t in zip(sources[:4], inputs, strict=False))
        raise CheckpointError(f"{shapes}: {map_} does not fit: {' '.join(str(error).split())[:200]}") from error
    if len(outputs) != len(targets):
        raise CheckpointError(f"{first}: {map_} makes {len(outputs)} tensors for {len(targets)} names")
    return outputs


def _bind(rules: Sequence[Rule], names: Mapping[str, Spec]) -> Iterator[_Group]:
    """Concrete groups in the order of `names`; those without a rule are kept as they are."""
    exact: dict[str, Rule] = {}
    patterns: list[tuple[re.Pattern[str], Rule, int]] = []
    for order, each in enumerate(rules):
        if not each.sources:
            continue
        if "{" in each.sources[0]:
            patterns.append((_pattern(each.sources[0]), each, order))
        else:
            exact.setdefault(each.sources[0], each)
    orders = {id(each): order for order, each in reversed(list(enumerate(rules)))}
    groups: dict[str, _Group] = {}
    taken: set[str] = set()
    for name in names:
        rule: Rule | None = exact.get(name)
        values: dict[str, str] = {}
        limit = math.inf if rule is None else orders[id(rule)]
        for pattern, candidate, order in patterns:
            if order < limit and (match := pattern.fullmatch(name)):
                rule, values = candidate, match.groupdict()
                break
        if rule is None:
            continue
        sources = tuple(_fill(source, values) for source in rule.sources)
        absent = [source for source in sources if source not in names]
        if absent:
            raise CheckpointError(f"{name} needs {absent[0]} beside it, which is absent{_more(absent)}")
        groups[name] = _Group(sources, tuple(_fill(target, values) for target in rule.targets), rule.map)
        taken.update(sources)
    for name in names:
        if name in groups:
            yield groups[name]
        elif name not in taken:
            yield _Group((name,), (name,), KEEP)
    yield from (_Group((), each.targets, each.map) for each in rules if not each.sources)


def _more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


_PLACEHOLDER = re.compile(r"\{(\w+)(\*?)\}")


def _pattern(name: str) -> re.Pattern[str]:
    """`layers.{i}.{rest*}` as a regular expression."""
    result, position = "", 0
    for match in _PLACEHOLDER.finditer(name):
        result += re.escape(name[position : match.start()])
        result += f"(?P<{match[1]}>{'.+' if match[2] else r'[^.]+'})"
        position = match.end()
    return re.compile(result + re.escape(name[position:]))


def _fill(name: str, values: Mapping[str, str]) -> str:
    return _PLACEHOLDER.sub(lambda match: values[match[1]], name)


def check_tensors(where: object, found: Mapping[str, Spec], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse tensors that are not the model's, before anything is written.

    Raises:
        CheckpointError: missing, extra or mis-shaped tensors: the first ten of them and how many there are.
    """
    wrong = [f"{name} is missing" for name in expected if name not in found]
    wrong += [f"{name} is not of this model" for name in found if name not in expected]
    wrong += [
        f"{name} is {found[name].shape}, the model needs {shape}"
        for name, shape in expected.items()
        if name in found and found[name].shape != tuple(shape)
    ]
    if wrong:
        count = f"{len(wrong)} tensors do not fit" if len(wrong) > 1 else "one tensor does not fit"
        more = "; …" if len(wrong) > 10 else ""
        raise CheckpointError(f"{where}: {count} (nothing was written): {'; '.join(wrong[:10])}{more}")
