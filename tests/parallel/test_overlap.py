"""Two micro-batches in one pass: rows of one travel while layers of the other compute; gradients are the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from equivalence import assert_equal_gradients, batches, start_experts, whole_gradients
from polylepis.parallel.engines.fsdp import FSDPEngine, build_model
from polylepis.parallel.kinds.mamba import Mamba
from polylepis.parallel.kinds.moe import MoE, MoEConfig
from polylepis.parallel.mesh import ContextConfig, MeshConfig, build_mesh
from polylepis.parallel.model import ModelConfig
from polylepis.parallel.overlap import Turn, interleave
from polylepis.parallel.pipeline.lanes import simulate_lanes
from polylepis.parallel.recompute import RecomputeConfig
from polylepis.parallel.routing import Journey
from polylepis.pretrain.objectives.next_token import next_token
from polylepis.pretrain.optim import OptimConfig, build_optimizer
from ranks import run_ranks
from toys import ALL_ROUTED, toy

MOE = MoEConfig(n_experts=4, top_k=2, d_ff=16, d_ff_shared=12, aux_sequence=0.7, aux_global=0.4, z_loss=0.3)
CONFIG = toy("ME*MEE-", ALL_ROUTED, moe=MOE)


def build(config: ModelConfig, mesh: MeshConfig, in_pairs: bool, **options: Any) -> FSDPEngine:
    context = options.pop("context", None)
    model = build_model(config, build_mesh(mesh, "cpu", context), seed=3, dtype=torch.float64, **options)
    start_experts(model)
    return FSDPEngine(model, build_optimizer(OptimConfig(), model), next_token, in_pairs)


def gradients(mesh: MeshConfig, in_pairs: bool, count: int, options: dict[str, Any]) -> Any:
    engine = build(CONFIG, mesh, in_pairs, **options)
    data = batches((1,), count)
    total = sum(float(b["loss_weight"].double().sum()) for b in data)
    sums = engine.accumulate(data[engine.mesh.dp_rank :: engine.mesh.dp_size], total)
    return float(sums.sum()), engine.gradient_norm(), whole_gradients(engine.models)


MESHES: dict[str, tuple[MeshConfig, int, dict[str, Any]]] = {
    "ep": (MeshConfig(dp_shard=2, ep=2), 4, {}),
    "an odd number": (MeshConfig(dp_shard=2, ep=2), 6, {}),
    "ep × edp, replicas of experts": (MeshConfig(dp_shard=4, ep=2, ep_spare=1), 8, {}),
    "ep × tp": (MeshConfig(dp_shard=2, tp=2, ep=2), 4, {}),
    "ep × cp": (MeshConfig(dp_shard=1, cp=2, ep=2), 4, {"context": ContextConfig("zigzag", "state", "gather")}),
    "the others recomputed": (
        MeshConfig(dp_shard=2, ep=2),
        4,
        {"recompute": RecomputeConfig(mamba="full", attention="selective", mlp="full")},
    ),
}
QUICK = ("ep", "ep × tp")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.full) for n in MESHES])
def test_gradients_are_the_same(name: str) -> None:
    """As one process, and as the same mesh without overlap, to 1e-9 in fp64."""
    mesh, count, options = MESHES[name]
    alone = run_ranks(1, gradients, MeshConfig(), False, count, {})[0]
    for in_pairs in (True, False) if name == "ep" else (True,):
        found = run_ranks(mesh.n_processes, gradients, mesh, in_pairs, count, options, timeout=300)
        sums = sum(result[0] for result in found) / mesh.tp
        for _, norm, grads in found:
            assert sums == pytest.approx(alone[0], rel=1e-6)  # they are counted in float32
            assert_equal_gradients((alone[0], norm, grads), alone, 1e-9)


def order_of_events(config: ModelConfig) -> list[str]:
    """Departures and arrivals of rows, and Mamba layers, of two micro-batches; of the forward, then of the backward."""
    engine = build(config, MeshConfig(dp_shard=2, ep=2), True)
    events: list[str] = []
    start, wait, names = Journey.start, Journey.wait, {}

    def of(layout: object) -> str:
        return names.setdefault(id(layout), "ABCD"[len(names)])

    def watch(name: str) -> Any:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            who = of(args[1])
            events.append(f"{name}({who})")
            output.register_hook(lambda grad: events.append(f"{name}({who})"))

        return hook

    def traced_start(self: Journey, *args: Any) -> Tensor:
        events.append("departs")
        return start(self, *args)

    def traced_wait(self: Journey) -> Tensor:
        events.append("arrives")
        return wait(self)

    Journey.start, Journey.wait = traced_start, traced_wait  # type: ignore[method-assign]
    for index, block in engine.models[0].layers.items():
        if isinstance(block.mixer, Mamba):
            block.mixer.register_forward_hook(watch(f"M{index}"))
        elif isinstance(block.mixer, MoE):
            block.mixer.router.register_forward_pre_hook(lambda *_, i=index: events.append(f"E{i}"))
    data = batches()
    backward = torch.Tensor.backward

    def traced_backward(self: Tensor) -> None:
        events.append("backward")
        backward(self)

    torch.Tensor.backward = traced_backward  # type: ignore[method-assign, assignment]
    engine.accumulate(data[engine.mesh.dp_rank :: engine.mesh.dp_size], 100.0)
    return events


def test_the_scan_of_one_is_computed_while_rows_of_the_other_travel() -> None:
    """M E M M: of both micro-batches the dispatch encloses a Mamba layer of the other, in both directions; a hook in
    the backward fires just before the layer's own."""
    events = run_ranks(2, order_of_events, toy("MEMM", moe=MOE))[0]
    forward = ["M0(A)", "E1", "departs", "M0(B)", "arrives", "departs", "arrives"]
    forward += ["E1", "departs", "M2(A)", "arrives", "departs", "M3(A)", "arrives", "M2(B)", "M3(B)"]
    back = ["M3(B)", "M2(B)", "departs", "M3(A)", "arrives", "departs", "M2(A)", "arrives"]
    back += ["departs", "arrives", "departs", "M0(B)", "arrives", "M0(A)"]
    assert events == [*forward, "backward", *back]


def test_a_pass_alone_encloses_nothing() -> None:
    """The same observer, where nothing is to be put into the journeys' time."""
    events = run_ranks(2, order_of_events, toy("EE", moe=MOE))[0]
    assert all(events[i + 1] == "arrives" for i, event in enumerate(events) if event == "departs")


@given(st.lists(st.booleans(), min_size=1, max_size=12))
def test_turns_pass_every_layer_in_order(experts: list[bool]) -> None:
    passed: tuple[list[int], list[int]] = ([], [])
    for turn in interleave(experts):
        *plain, last = turn.layers
        assert not any(experts[layer] for layer in (*plain, *turn.out, *turn.back))
        passed[turn.batch].extend(plain)
        other = passed[1 - turn.batch]
        if turn.out or turn.back:
            assert experts[last]
        other.extend((*turn.out, *turn.back))
        passed[turn.batch].append(last)
    assert passed == (list(range(len(experts))), list(range(len(experts))))


def test_turns_of_a_small_stack() -> None:
    turns = interleave([c == "E" for c in "MEM*E"])
    assert turns == (
        Turn(0, (0, 1), (0,)),
        Turn(1, (1,), (2,), (3,)),
        Turn(0, (4,), (2,), (3,)),
        Turn(1, (4,)),
    )


@given(
    st.lists(st.tuples(st.booleans(), st.integers(1, 9), st.integers(0, 8)), min_size=1, max_size=9),
)
def test_lanes(layers: list[tuple[bool, int, int]]) -> None:
    """Nothing computes twice at once, all work is done, and a pass takes computation plus what is exposed."""
    experts = [has for has, _, _ in layers]
    compute, dispatch = [float(c) for _, c, _ in layers], [float(d) if has else 0.0 for has, _, d in layers]
    lanes = simulate_lanes(experts, compute, dispatch)
    for lane, total in (("compute", 2 * sum(compute)), ("dispatch", 2 * sum(dispatch))):
        pieces = [piece for piece in lanes.pieces if piece.lane == lane]
        assert sum(piece.end - piece.start for piece in pieces) == pytest.approx(total)
        assert all(a.end <= b.start + 1e-9 for a, b in zip(pieces, pieces[1:], strict=False))
    assert lanes.seconds == pytest.approx(2 * sum(compute) + sum(lanes.exposed))
    assert sum(lanes.exposed) <= lanes.dispatched + 1e-9


def test_lanes_hide_dispatch_behind_the_scan() -> None:
    """M E M E M: each M of 3 s hides the 2 s out (and nothing the 2 s back) of the other's E of 4 s of dispatch."""
    experts = [c == "E" for c in "MEMEM"]
    lanes = simulate_lanes(experts, [3.0, 5.0, 3.0, 5.0, 3.0], [0.0, 4.0, 0.0, 4.0, 0.0])
    assert lanes.exposed == (0.0, 4.0, 0.0, 4.0, 0.0)
    assert lanes.seconds == 38.0 + 8.0  # one after the other: 38 + 16
    mine = next(piece for piece in lanes.pieces if piece.lane == "dispatch")
    over = [p for p in lanes.pieces if p.lane == "compute" and p.start < mine.end and p.end > mine.start]
    assert [(p.batch, p.layer) for p in over] == [(1 - mine.batch, 0)]
