"""Routers against a naive layer in fp64, token by token: outputs, gradients, balancing terms, drops; refusals."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.tensor import DTensor

from polylepis.checkpoints.sharded import model_tensors
from polylepis.parallel.engines.fsdp import build_model
from polylepis.parallel.errors import PlanError
from polylepis.parallel.kinds.moe import MoE, MoEConfig
from polylepis.parallel.kinds.moe_router import join, within_capacity
from polylepis.parallel.layout import Layout
from polylepis.parallel.mesh import MeshConfig, build_mesh
from polylepis.parallel.model import HybridModel
from polylepis.parallel.parts import named_parts, whole_entries
from toys import toy, toy_batch

BASE = MoEConfig(n_experts=8, top_k=3, d_ff=6, d_ff_shared=10, scale=1.5)
PARTITION = {"text": 3, "image": 1, "voice": 2, "shared": 2}
ALL_TERMS: dict[str, Any] = {"aux_sequence": 0.7, "aux_global": 0.4, "z_loss": 0.3}
CASES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "softmax": {"router": "softmax"},
    "softmax as it is": {"router": "softmax", "renormalise": False},
    "groups": {"n_groups": 4, "top_groups": 2},
    "swiglu": {"activation": "swiglu"},
    "partition": {"partition": PARTITION, "top_k": 2},
    "partition softmax": {"partition": PARTITION, "router": "softmax"},
    "partition in groups": {
        "partition": {"text": 2, "image": 2, "voice": 2, "shared": 2},
        "n_groups": 4,
        "top_groups": 2,
        "top_k": 2,
    },
    "terms": ALL_TERMS,
    "terms softmax": {"router": "softmax", **ALL_TERMS},
    "terms partition": {"partition": PARTITION, "router": "softmax", **ALL_TERMS},
    "capacity": {"capacity_factor": 0.8},
    "capacity, partition, terms": {"capacity_factor": 0.6, "partition": PARTITION, **ALL_TERMS},
}
DOCUMENTS, LENGTH, W = [[13, 1, 5], [16]], 21, 17.0


def config_of(name: str) -> MoEConfig:
    return dataclasses.replace(BASE, **CASES[name])


def one_layer(config: MoEConfig) -> HybridModel:
    mesh = build_mesh(MeshConfig(), "cpu")
    model = build_model(toy("E", moe=config), mesh, seed=3, dtype=torch.float64)
    layer = model.layers["0"].mixer
    assert isinstance(layer, MoE)
    generator = torch.Generator().manual_seed(5)
    layer.selection_bias.copy_(0.05 * torch.randn(config.n_experts, generator=generator))
    layer.expert_load.copy_(torch.randint(0, 9, layer.expert_load.shape, generator=generator))
    layer.expert_load[2] = 0  # a modality that the step before did not see
    return model


def open_to(config: MoEConfig, modality: int) -> list[int]:
    if not config.partition:
        return list(range(config.n_experts))
    first = sum(list(config.partition.values())[:modality])
    own = range(first, first + list(config.partition.values())[modality])
    return [*own, *range(config.n_experts - config.partition["shared"], config.n_experts)]


def choose(config: MoEConfig, biased: dict[int, float]) -> list[int]:
    candidates = sorted(biased)
    if config.n_groups > 1:
        size = config.n_experts // config.n_groups
        groups = sorted({e // size for e in candidates})
        best = sorted(groups, key=lambda g: -sum(sorted(biased[e] for e in candidates if e // size == g)[-2:]))
        candidates = [e for e in candidates if e // size in best[: config.top_groups]]
    return sorted(candidates, key=lambda e: -biased[e])[: config.top_k]


def naive(config: MoEConfig, own: dict[str, Tensor], h: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Any]:
    """The layer on all tokens [T, D], one after another: outputs, Σ of the coefficients' terms, choices per cell."""
    modality, real = batch["modality_ids"].reshape(-1).tolist(), (batch["doc_ids"].reshape(-1) >= 0).tolist()
    row = [t // LENGTH for t in range(len(real))]
    logits, scores, chosen = {}, {}, {}
    for t in range(len(real)):
        mine = open_to(config, modality[t])
        logits[t] = {e: own["router.weight"][e] @ h[t] for e in mine}
        total = sum(x.exp() for x in logits[t].values())
        scores[t] = {
            e: 1 / (1 + (-x).exp()) if config.router == "sigmoid" else x.exp() / total for e, x in logits[t].items()
        }
        chosen[t] = choose(config, {e: s.item() + own["selection_bias"][e].item() for e, s in scores[t].items()})
    tokens = [t for t in range(len(real)) if real[t]]
    pool = [m if config.partition else 0 for m in modality]
    dropped = set()
    if config.capacity_factor:
        for r in set(row):
            for e in range(config.n_experts):
                share = 0.0
                for g in set(pool):
                    n = sum(1 for t in tokens if row[t] == r and pool[t] == g)
                    mine = open_to(config, g)
                    share += config.top_k * n / len(mine) if e in mine else 0.0
                wanting = [t for t in tokens if row[t] == r and e in chosen[t]]
                wanting.sort(key=lambda t: (-scores[t][e].item(), t))
                dropped |= {(t, e) for t in wanting[math.ceil(config.capacity_factor * share - 1e-9) :]}
    rows = []
    for t in range(len(real)):
        sum_ = sum(scores[t][e] for e in chosen[t]) if config.renormalise else 1.0
        y = mlp(config, own, "shared.{}.weight", h[t])
        for e in chosen[t]:
            if (t, e) not in dropped and (real[t] or not config.capacity_factor):
                y = y + config.scale * scores[t][e] / sum_ * mlp(config, own, f"{{}}.weight.experts.{e}", h[t])
        rows.append(y)
    terms = torch.zeros((), dtype=torch.float64)
    for t in tokens:
        mine, total = open_to(config, modality[t]), sum(scores[t].values())
        alike = [u for u in tokens if row[u] == row[t] and pool[u] == pool[t]]
        before = own["expert_load"].double()
        before = before[pool[t]] if config.partition else before.sum(0)
        for e in mine:
            f = len(mine) / config.top_k * sum(1 for u in alike if e in chosen[u]) / len(alike)
            terms = terms + config.aux_sequence * f * scores[t][e] / total
            f = len(mine) * before[e] / before.sum() if before.sum() else 1.0
            terms = terms + config.aux_global * f * scores[t][e] / total
        terms = terms + config.z_loss * sum(x.exp() for x in logits[t].values()).log() ** 2
    counts = torch.zeros(3, config.n_experts)
    for t in tokens:
        for e in chosen[t]:
            counts[modality[t], e] += 1
    return torch.stack(rows), terms, (counts, dropped)


def mlp(config: MoEConfig, own: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    up = own[name.format("up_proj")] @ x
    if config.activation == "swiglu":
        gate = own[name.format("gate_proj")] @ x
        return own[name.format("down_proj")] @ (gate / (1 + (-gate).exp()) * up)
    return own[name.format("down_proj")] @ up.clamp(min=0) ** 2


@pytest.mark.parametrize("name", CASES)
def test_layer_equals_the_naive_one(name: str) -> None:
    config, model = config_of(name), one_layer(config_of(name))
    layer, batch = model.layers["0"].mixer, toy_batch(DOCUMENTS, LENGTH)
    assert isinstance(layer, MoE)
    layout = Layout.from_batch(batch, 3, torch.device("cpu"), W)
    generator = torch.Generator().manual_seed(1)
    h = torch.randn(2 * LENGTH, 16, dtype=torch.float64, generator=generator)
    ours, theirs = h.clone().requires_grad_(), h.clone().requires_grad_()
    cotangent = torch.randn(h.shape, dtype=torch.float64, generator=generator) * (layout.seq_idx[0] >= 0)[:, None]
    tensors = {
        n.removeprefix("layers.0.mixer."): (t.full_tensor() if isinstance(t, DTensor) else t).clone()
        for n, t in model_tensors(model).items()
    }
    tensors |= {n: b.clone() for n, b in layer.named_buffers() if n == "expert_load"}
    own = {n: t.requires_grad_() if t.dtype == torch.float64 else t for n, t in tensors.items()}
    model.unshard()
    model.layers["0"].unshard()
    out = layer(ours, layout)
    expected, terms, (counts, dropped) = naive(config, own, theirs, batch)
    real = layout.seq_idx[0] >= 0
    torch.testing.assert_close(out[real], expected[real], rtol=1e-10, atol=1e-10)
    assert bool(config.capacity_factor) == bool(dropped)
    ((out * cotangent).sum() / W).backward()
    (((expected * cotangent).sum() + terms) / W).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-11)
    for path, parameter, part in named_parts(layer):
        assert isinstance(parameter.grad, DTensor), path
        for key, grad in whole_entries(parameter.grad, part, path).items():
            reference = own[key].grad
            torch.testing.assert_close(
                grad, torch.zeros_like(grad) if reference is None else reference, rtol=1e-9, atol=1e-11
            )
    torch.testing.assert_close(layer.load, counts)


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "top-k": ({"top_k": 9}, r"top_k 9 must lie between 1 and n_experts 8"),
    "partition sum": (
        {"partition": {"text": 4, "image": 1, "voice": 1, "shared": 1}},
        r"sums to 7, not to n_experts 8",
    ),
    "partition names": (
        {"partition": {"text": 4, "picture": 4}},
        r"names \['picture', 'text'\].*\['text', 'image', 'voice'\]",
    ),
    "top-k above a partition": (
        {"partition": {"text": 4, "image": 1, "voice": 2, "shared": 1}},
        r"image has 1 experts of its own and 1 common ones, fewer than top_k 3",
    ),
    "uneven groups": ({"n_groups": 3, "top_groups": 2}, r"8 experts do not divide into n_groups 3"),
    "groups of one": ({"n_groups": 8, "top_groups": 4}, r"leaves 1 expert in a group.*n_groups may be 4 at most"),
    "too few groups": ({"n_groups": 4, "top_groups": 1}, r"top_groups 1 of 2 experts each must hold top_k 3"),
    "groups across a partition": (
        {"n_groups": 2, "top_groups": 1, "partition": {"text": 4, "image": 1, "voice": 0, "shared": 3}},
        r"image 1, shared 3 not divisible by the 4 experts of a group",
    ),
    "more groups than open": (
        {"n_groups": 4, "top_groups": 3, "partition": {"text": 2, "image": 2, "voice": 2, "shared": 2}},
        r"no more than the 2 groups that a token may choose from",
    ),
    "negative": ({"z_loss": -0.1}, r"model.moe.z_loss: -0.1 must not be negative"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    changes, message = REFUSALS[name]
    with pytest.raises(PlanError, match=message):
        toy("E", moe=dataclasses.replace(BASE, **changes)).check(1)


@settings(max_examples=60, deadline=None)
@given(
    cells=st.lists(st.tuples(st.integers(0, 1), st.booleans()), min_size=1, max_size=24),
    seed=st.integers(0, 999),
    limit=st.integers(0, 4),
)
def test_capacity_takes_the_best_and_no_more(cells: list[tuple[int, bool]], seed: int, limit: int) -> None:
    """Per row and expert: at most the limit, all of them if fewer want it, never a worse one before a better one."""
    generator = torch.Generator().manual_seed(seed)
    rows, real = torch.tensor([r for r, _ in cells]), torch.tensor([float(x) for _, x in cells])
    chosen = torch.rand(len(cells), 3, generator=generator).argsort(dim=1)[:, :2]
    scores = torch.randint(0, 4, chosen.shape, generator=generator).double()  # many ties
    limits = torch.full((2, 3), limit)
    taken = within_capacity(chosen, scores, rows, real, limits)
    assert not bool(taken[real == 0].any())
    for row in range(2):
        for expert in range(3):
            wants = [
                (t, k)
                for t in range(len(cells))
                for k in range(2)
                if cells[t] == (row, True) and chosen[t, k] == expert
            ]
            got = [place for place in wants if taken[place]]
            assert len(got) == min(limit, len(wants))
            ranked = sorted(wants, key=lambda place: (-float(scores[place]), place))
            assert sorted(got) == sorted(ranked[: len(got)])


def test_a_term_joins_whatever_loss_follows() -> None:
    """Without a way to the last stage, and once: the callback runs in the backward, not in the forward."""
    x, w = torch.tensor([2.0, 3.0], requires_grad=True), torch.tensor(5.0, requires_grad=True)
    calls: list[int] = []
    y = join(x * w, w**2, 0.25, lambda: calls.append(1))
    assert calls == [] and torch.equal(y.detach(), torch.tensor([10.0, 15.0]))
    y.sum().backward()
    assert calls == [1]
    assert float(w.grad) == 5.0 + 0.25 * 10.0  # type: ignore[arg-type]


def flips(margin: float, moved: float) -> int:
    """Tokens whose replayed choice does not follow from scores within the margin, after moving a bias by `moved`."""
    model = one_layer(BASE)
    layer, batch = model.layers["0"].mixer, toy_batch(DOCUMENTS, LENGTH)
    assert isinstance(layer, MoE)
    layout = Layout.from_batch(batch, 3, torch.device("cpu"), W)
    h = torch.randn(2 * LENGTH, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model.unshard()
    model.layers["0"].unshard()
    layer(h, layout)
    assert layer.chosen is not None
    layer.replay, layer.replay_margin = layer.chosen, margin
    layer.selection_bias[0] += moved
    layer(h, layout)
    return layer.flips


def test_choice_flips_outside_the_margin_are_counted() -> None:
    """As `verify` counts them: near-ties are forgiven, other choices are not."""
    assert flips(0.0, 0.0) == 0
    assert flips(0.0, 0.2) > 0
    assert flips(0.11, 0.2) == 0  # each side may move by the margin


def bfloat16_router() -> tuple[str, str]:
    """The dtypes in which router and experts see their weights, in a layer that computes in bfloat16."""
    model = build_model(toy("E", moe=BASE), build_mesh(MeshConfig(), "cpu"), compute_dtype=torch.bfloat16)
    seen: dict[str, str] = {}

    def watch(name: str) -> None:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            seen[name] = str(module.weight.dtype)

        model.layers["0"].mixer.get_submodule(name).register_forward_hook(hook)

    watch("router")
    watch("up_proj")
    batch = toy_batch(DOCUMENTS, LENGTH)
    layout = Layout.from_batch(batch, 3, torch.device("cpu"), W)
    model(batch["tokens"].reshape(-1), layout, batch["labels"].reshape(-1)).sum().backward()
    return seen["router"], seen["up_proj"]


def test_the_router_is_never_rounded() -> None:
    assert bfloat16_router() == ("torch.float32", "torch.bfloat16")
