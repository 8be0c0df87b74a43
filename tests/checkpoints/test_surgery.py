"""Surgery keeps the function where it can, exactly: upcycling, one modality, experts, a larger vocabulary."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from polylepis.checkpoints.errors import CheckpointError
from polylepis.checkpoints.hf.reference import fill
from polylepis.checkpoints.sharded import model_tensors
from polylepis.checkpoints.surgery import (
    cast,
    extend_vocabulary,
    grow_experts,
    route_modalities,
    select_modality,
)
from polylepis.checkpoints.transforms import Rule, Tensors, Transformed, in_memory, invert
from polylepis.parallel.engines.fsdp import build_model
from polylepis.parallel.kinds.mlp import MLPConfig
from polylepis.parallel.kinds.moe import MoEConfig
from polylepis.parallel.layout import Layout
from polylepis.parallel.mesh import MeshConfig, build_mesh
from polylepis.parallel.model import HybridModel, ModelConfig
from toys import ALL_ROUTED, toy, toy_batch


def build(config: ModelConfig, seed: int = 1) -> HybridModel:
    return build_model(config, build_mesh(MeshConfig(), "cpu"), seed=seed, dtype=torch.float64)


def tensors_of(model: HybridModel) -> dict[str, Tensor]:
    return {n: t.to_local() if isinstance(t, DTensor) else t for n, t in model_tensors(model).items()}


def changed(tensors: dict[str, Tensor], rules: list[Rule]) -> dict[str, Tensor]:
    return in_memory(Transformed(Tensors(tensors), rules))


def rebuilt(config: ModelConfig, tensors: dict[str, Tensor]) -> HybridModel:
    model = build(config, seed=2)
    fill(model, tensors)
    return model


def losses(model: HybridModel, text_only: bool = False, batch: dict[str, Tensor] | None = None) -> Tensor:
    batch = batch or toy_batch([[13, 1, 9], [20]], 24)
    if text_only:
        batch["modality_ids"].zero_()
    layout = Layout.from_batch(batch, len(model.config.modalities), model.mesh)
    return model(batch["tokens"].reshape(-1), layout, batch["labels"].reshape(-1))


def assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("routed", [ALL_ROUTED, ("z", "dt_bias"), ("out",)], ids=str)
def test_upcycling_keeps_the_function_and_is_undone(routed: tuple[str, ...]) -> None:
    dense = build(toy("M*-EM", modalities=("text",)))
    config, rules = route_modalities(dense.config, ("text", "image", "voice"), routed)
    expected, upcycled = tensors_of(dense), changed(tensors_of(dense), rules)
    assert_equal(losses(rebuilt(config, upcycled)), losses(dense, text_only=True))
    back, select = select_modality(config, "text")
    assert back == dense.config
    for undone in (changed(upcycled, select), changed(upcycled, invert(rules))):
        assert undone.keys() == expected.keys()
        assert all(torch.equal(undone[name], expected[name]) for name in expected)
    upcycled[
        "layers.0.mixer.out_proj.weight.image" if "out" in routed else "layers.0.mixer.in_proj.z.weight.image"
    ] += 1
    with pytest.raises(CheckpointError, match=r"layers\.0\.mixer.*should be copies"):
        changed(upcycled, invert(rules))


def test_selecting_text_equals_the_routed_model_on_text() -> None:
    routed = build(toy("M-*M", ALL_ROUTED, layers={3: {"routed": ("x", "out"), "d_state": 10}}))
    config, rules = select_modality(routed.config, "text")
    assert config.layers == {3: {"d_state": 10}} and config.modalities == ("text",)
    alone = rebuilt(config, changed(tensors_of(routed), rules))
    assert_equal(losses(alone, True), losses(routed, True))


@pytest.mark.parametrize(
    ("scale", "layers", "activation"), [(1.0, None, "relu2"), (1.5, [3], "relu2"), (1.5, None, "swiglu")]
)
def test_experts_grown_from_mlps_compute_what_the_mlps_did(
    layers: list[int] | None, scale: float, activation: str
) -> None:
    mlp = MLPConfig(20, activation)
    dense = build(toy("M-|*-", layers={3: {"d_ff": 24}}, mlp=mlp, moe=MoEConfig(scale=scale)))
    config, rules = grow_experts(dense.config, n_experts=5, top_k=2, d_ff_shared=8, layers=layers, seed=3)
    assert config.pattern == ("ME|*E" if layers is None else "M-|*E")
    grown = rebuilt(config, changed(tensors_of(dense), rules))
    assert_equal(losses(grown), losses(dense))
    router = grown.layers["3"].mixer.router.weight.to_local()
    assert 0 < router.std() and config.layer(3)[1].d_ff == 16
    losses(grown).sum().backward()
    assert grown.layers["3"].mixer.router.weight.grad is not None


def test_noise_makes_experts_differ_and_the_shared_one_stays() -> None:
    dense = build(toy("M-"))
    _, rules = grow_experts(dense.config, 3, 1, 8, noise=0.1)
    tensors = changed(tensors_of(dense), rules)
    experts = [tensors[f"layers.1.mixer.up_proj.weight.experts.{j}"] for j in range(3)]
    original = tensors_of(dense)["layers.1.mixer.up_proj.weight"]
    assert not torch.equal(experts[0], experts[1]) and torch.equal(
        tensors["layers.1.mixer.shared.up_proj.weight"], original[:8]
    )
    relative = (experts[0] - original[8:]).std() / original[8:].std()
    assert 0.07 < relative < 0.13
    same = changed(tensors_of(dense), grow_experts(dense.config, 3, 1, 8, noise=0.1)[1])
    assert all(torch.equal(tensors[name], same[name]) for name in tensors)


OLD = {"modalities": ["text", "image"], "sizes": [9, 4], "specials": 32, "vocab_multiple": 16}
NEW = {"modalities": ["text", "image", "voice"], "sizes": [12, 4, 20], "specials": 32, "vocab_multiple": 16}


def test_a_larger_vocabulary_keeps_every_codes_row() -> None:
    model = build(toy("M*", modalities=("text", "image"), vocab_size=45))
    config, rules = extend_vocabulary(model.config, OLD, NEW, seed=5)
    assert config.vocab_size == 68 and config.padded_vocab == 80
    tensors, before = changed(tensors_of(model), rules), tensors_of(model)
    for name in ("embed.weight", "lm_head.weight"):
        old, new = before[name], tensors[name]
        assert torch.equal(new[:41], old[:41]) and torch.equal(new[44:48], old[41:45])
        fresh = torch.cat((new[41:44], new[48:68]))
        used = old[:45]
        assert ((fresh - used.mean(0)).abs() < 0.1 * used.std(0)).all() and len(fresh.unique(dim=0)) == 23
    batch = toy_batch([[13, 1, 9], [20]], 24)
    tokens = batch["tokens"]
    moved = torch.where(tokens >= 41, tokens + 3, tokens)

    def logits(m: HybridModel, ids: Tensor) -> Tensor:
        return m(ids.reshape(-1), Layout.from_batch(batch, 3, m.mesh))

    ours, theirs = logits(model, tokens), logits(rebuilt(config, tensors), moved)
    assert_equal(torch.cat((theirs[:, :41], theirs[:, 44:48]), 1), ours[:, :45])


def test_cast_keeps_what_is_sensitive() -> None:
    tensors = changed(tensors_of(build(toy("ME", ALL_ROUTED))), cast(torch.bfloat16))
    kept = {name.split("mixer.")[-1] for name, tensor in tensors.items() if tensor.dtype != torch.bfloat16}
    assert kept == {"A_log", "D", "dt_bias.text", "dt_bias.image", "dt_bias.voice", "selection_bias"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: route_modalities(toy("M", ALL_ROUTED), ("text", "image")), "routed by modality already"),
        (lambda: route_modalities(toy("M", modalities=("text",)), ("image", "text")), "do not extend the model's"),
        (
            lambda: select_modality(toy("M", ALL_ROUTED), "video"),
            "no modality 'video' in the model; it has text, image",
        ),
        (lambda: grow_experts(toy("M*"), 4, 2, 4), "need layers that are MLPs"),
        (lambda: grow_experts(toy("M-*"), 4, 2, 4, layers=[2]), r"layers \[2\] of M-\*"),
        (lambda: grow_experts(toy("M-"), 4, 5, 4), "top_k 5 must lie between 1 and n_experts 4"),
        (lambda: grow_experts(toy("M-"), 4, 2, 20), r"d_ff_shared 20 must lie between 1 and 19 \(layer 1\)"),
        (
            lambda: grow_experts(toy("M-", mlp=MLPConfig(20, "gelu")), 4, 2, 4),
            "layer 1 is a gelu MLP, but experts are relu2 or swiglu",
        ),
        (lambda: grow_experts(toy("M-", moe=MoEConfig(renormalise=False)), 4, 2, 4), "must sum to scale"),
        (lambda: grow_experts(toy("M-E"), 4, 2, 4), "M-E has experts already"),
        (lambda: extend_vocabulary(toy("M"), OLD, OLD | {"sizes": [8, 4]}), "text: 9 → 8"),
        (
            lambda: extend_vocabulary(toy("M"), OLD, NEW | {"modalities": ["voice", "text", "image"]}),
            "smaller|do not extend",
        ),
        (lambda: extend_vocabulary(toy("M", vocab_size=44), OLD, NEW), "has 45 ids, but the model knows 44"),
    ],
)
def test_refusals(call: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        call()
