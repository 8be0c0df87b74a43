"""The algebra: maps undo themselves, rules stream, compose and read backwards; what does not fit is refused by name."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polylepis.checkpoints.errors import CheckpointError
from polylepis.checkpoints.maps import (
    KEEP,
    Cast,
    Fan,
    Flatten,
    LeaveZero,
    Map,
    Noise,
    Pack,
    Permute,
    Place,
    Scale,
    Squeeze,
    Stack,
    Transpose,
    Unfan,
    Unflatten,
    Unpack,
    Unsqueeze,
)
from polylepis.checkpoints.transforms import (
    Rule,
    Spec,
    Tensors,
    Transformed,
    check_tensors,
    in_memory,
    invert,
    stream,
)


def numbered(*shape: int, start: int = 0) -> torch.Tensor:
    return torch.arange(start, start + math.prod(shape), dtype=torch.float64).reshape(shape)


@st.composite
def invertible(draw: Any) -> tuple[Map, list[torch.Tensor]]:
    """A map that has an inverse, and tensors for it."""
    ranks, parts = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    sizes = tuple(ranks * draw(st.integers(0, 3)) for _ in range(parts))
    axis = draw(st.sampled_from(["out", "in"]))
    width = draw(st.integers(1, 3))
    shapes = [(size, width) if axis == "out" else (width, size) for size in sizes]
    tensors = [numbered(*shape, start=100 * k) for k, shape in enumerate(shapes)]
    pack = Pack(sizes, ranks, axis)
    kinds = ["pack", "unpack", "fan", "permute", "place", "stack", "unflatten", "flatten", "zero", "transpose", "scale"]
    kind = draw(st.sampled_from(kinds))
    one = [numbered(4, 3)]
    if kind == "pack":
        return pack, tensors
    if kind == "unpack":
        return Unpack(sizes, ranks, axis), pack(tensors)
    if kind == "fan":
        return Fan(tuple(draw(st.integers(1, 3)) for _ in tensors)), tensors
    if kind == "permute":
        return Permute(tuple(draw(st.permutations(range(4))))), one
    if kind == "place":
        cut, gap = draw(st.integers(0, 4)), draw(st.integers(0, 3))
        return Place(4, 4 + gap, ((0, 0, cut), (cut, cut + gap, 4 - cut)), draw(st.sampled_from(["zero", "mean"]))), one
    if kind == "unflatten":
        return Unflatten(draw(st.sampled_from([1, 2, 4]))), one
    if kind == "flatten":
        return Flatten(2), [numbered(2, 3, 2)]
    if kind == "zero":
        return LeaveZero(4, "a bias"), [*one, torch.zeros(4)]
    if kind == "stack":
        return Stack(), [numbered(2, 3), numbered(2, 3, start=9)]
    return (Transpose(), one) if kind == "transpose" else (Scale(2.0 ** draw(st.integers(-3, 3))), one)


@given(invertible(), st.lists(st.sampled_from([Unsqueeze(1), Transpose(), Scale(0.5)]), max_size=3))
@settings(deadline=None, max_examples=150)
def test_every_inverse_undoes_its_map_alone_and_in_chains(
    case: tuple[Map, list[torch.Tensor]], more: list[Map]
) -> None:
    map_, tensors = case
    for tail in more:
        candidate = map_.then(tail)
        try:
            candidate(tensors)
        except (CheckpointError, RuntimeError, IndexError):
            continue  # a transpose of a vector, say
        map_ = candidate
    inverse = map_.inverse()
    assert inverse is not None
    outputs = map_(tensors)
    back = inverse(outputs)
    assert len(back) == len(tensors) and all(torch.equal(a, b) for a, b in zip(back, tensors, strict=True))
    metas = map_([tensor.to("meta") for tensor in tensors])
    assert [m.shape for m in metas] == [o.shape for o in outputs]


@given(invertible())
@settings(deadline=None, max_examples=80)
def test_a_map_by_rows_gives_the_same_from_blocks(case: tuple[Map, list[torch.Tensor]]) -> None:
    map_, tensors = case
    for candidate in (map_, map_.then(Cast(torch.float32)), map_.then(Unsqueeze(1))):
        whole = candidate(tensors)
        if candidate.by_rows and len(whole) == 1:
            blocks = [candidate.rows(row) for tensor in tensors for row in tensor.split(1)]
            assert torch.equal(torch.cat(blocks), whole[0])


def test_packing_over_ranks_is_not_concatenation() -> None:
    z, x = numbered(4, 2), numbered(6, 2, start=50)
    first, second = Pack((4, 6), ranks=2)([z, x])
    assert torch.equal(first, torch.cat((z[:2], x[:3]))) and torch.equal(second, torch.cat((z[2:], x[3:])))
    assert all(torch.equal(a, b) for a, b in zip(Unpack((4, 6), 2)([first, second]), (z, x), strict=True))
    naive = torch.cat((first, second))
    assert not torch.equal(naive[:4], z) and not torch.equal(naive, torch.cat((z, x)))


def test_what_has_no_inverse_says_so() -> None:
    assert Cast(torch.bfloat16).inverse() is None and Scale(0.22).inverse() is None
    assert Noise(0.1).inverse() is None and Noise(0.0).inverse() is KEEP
    assert Place(4, 6, ((0, 0, 3),)).inverse() is None  # a row is lost
    assert Place(4, 6, ((0, 0, 3), (0, 3, 1))).inverse() is None  # one is lost, another copied
    with pytest.raises(CheckpointError, match=r"a bias is not zero \(up to 3\)"):
        LeaveZero(4, "a bias")([numbered(4, 3), numbered(4)])
    for wrong in (Unflatten(3), Flatten(3)):
        with pytest.raises(CheckpointError, match=r"\(4, 3\)"):
            wrong([numbered(4, 3)])
    with pytest.raises(CheckpointError, match=r"a → b: Cast.* has no inverse"):
        invert([Rule(("a",), ("b",), Cast(torch.float16))])
    with pytest.raises(CheckpointError, match="drops a"):
        invert([Rule(("a",), ())])
    with pytest.raises(CheckpointError, match="should be copies of each other"):
        Unfan((2,))([numbered(2), numbered(2, start=1)])
    with pytest.raises(CheckpointError, match="no dimension 1 of size 1"):
        Squeeze(1)([numbered(2, 3)])


class Counting(Tensors):
    """Notes what is read."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__(tensors)
        self.read: list[str] = []

    def load(self, name: str) -> torch.Tensor:
        self.read.append(name)
        return super().load(name)


RULES = [
    Rule(("l.{i}.z", "l.{i}.x"), ("m.{i}.in",), Pack((2, 3))),
    Rule(("l.{i}.rest.{more*}",), ()),
    Rule(("e",), ("e0", "e1"), Fan((2,))),
]


def layers() -> dict[str, torch.Tensor]:
    result = {"e": numbered(2)}
    for i in range(3):
        result |= {
            f"l.{i}.z": numbered(2, 1, start=i),
            f"l.{i}.x": numbered(3, 1, start=9 * i),
            f"l.{i}.rest.a.b": numbered(1),
        }
    return result | {"other": numbered(4)}


def test_rules_stream_group_by_group_and_read_nothing_twice() -> None:
    source = Counting(layers())
    seen = Transformed(source, RULES)
    assert not source.read  # shapes are known before anything is read
    assert {n: s.shape for n, s in seen.specs().items()} == {
        **{"e0": (2,), "e1": (2,), "other": (4,)},
        **{f"m.{i}.in": (5, 1) for i in range(3)},
    }
    out = stream(seen)
    assert next(out)[0] == "e0" and source.read == ["e"]
    rest = dict(out)
    assert source.read == ["e", "l.0.z", "l.0.x", "l.1.z", "l.1.x", "l.2.z", "l.2.x", "other"]
    assert torch.equal(rest["m.1.in"], torch.cat((source.load("l.1.z"), source.load("l.1.x"))))
    assert torch.equal(torch.cat(list(seen.pieces("m.1.in"))), rest["m.1.in"])


def test_rules_compose_and_read_backwards() -> None:
    rules = [RULES[0], RULES[2]]
    source = {name: tensor for name, tensor in layers().items() if "rest" not in name}
    there = Transformed(Tensors(source), rules)
    doubled = Transformed(there, [Rule(("m.{i}.in",), ("m.{i}.in",), Scale(2.0))])
    back = in_memory(Transformed(Transformed(doubled, [Rule(("m.{i}.in",), ("m.{i}.in",), Scale(0.5))]), invert(rules)))
    assert back.keys() == source.keys() and all(torch.equal(back[name], source[name]) for name in source)


def test_new_tensors_come_from_rules_without_sources() -> None:
    from polylepis.checkpoints.maps import Fresh

    made = Transformed(Tensors({"a": numbered(2)}), [Rule((), ("b", "c"), Fresh(lambda: [numbered(1), numbered(3)]))])
    assert list(made.specs()) == ["a", "b", "c"] and torch.equal(in_memory(made)["c"], numbered(3))


def test_what_does_not_fit_is_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match=r"l\.1\.z needs l\.1\.x beside it"):
        Transformed(Tensors({name: t for name, t in layers().items() if name != "l.1.x"}), RULES)
    with pytest.raises(CheckpointError, match=r"l\.2\.z: parts of \(7, 3\) along 'out', but \(2, 3\) are declared"):
        Transformed(Tensors(layers() | {"l.2.z": numbered(7, 1)}), RULES)
    with pytest.raises(CheckpointError, match="other would be made twice"):
        Transformed(Tensors(layers()), [Rule(("e",), ("other",))])
    with pytest.raises(CheckpointError, match="makes 1 tensors for 2 names"):
        Transformed(Tensors(layers()), [Rule(("e",), ("a", "b"))])
    with pytest.raises(CheckpointError, match="no axis 'in'"):
        Transformed(Tensors(layers()), [Rule(("e",), ("a",), Transpose())])


def test_mistakes_are_listed_ten_at_a_time() -> None:
    expected = {f"t{k}": (2,) for k in range(13)}
    check_tensors("here", {name: Spec((2,), torch.float32) for name in expected}, expected)
    found = {f"t{k}": Spec((k,), torch.float32) for k in range(2, 13)} | {"stranger": Spec((1,), torch.float32)}
    with pytest.raises(CheckpointError) as caught:
        check_tensors("here", found, expected)
    line = str(caught.value)
    assert line.startswith(
        "here: 13 tensors do not fit (nothing was written): t0 is missing; t1 is missing; stranger is not"
    )
    assert line.endswith("t9 is (9,), the model needs (2,); …") and line.count(";") == 10 and "\n" not in line
