"""Routers against a naive layer in fp64, token by token: outputs, gradients, balancing terms, drops; refusals."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from polylepis.checkpoints.sharded import model_tensors
from polylepis.parallel.engines.fsdp import build_model
from polylepis.parallel.kinds.moe import MoE, MoEConfig
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
