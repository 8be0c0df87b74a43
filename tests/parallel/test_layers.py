"""Laws of the layers: isolation of documents, decoding equals training, initial weights know no mesh, refusals."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import DTensor

from polylepis.checkpoints.sharded import model_tensors
from polylepis.parallel.engines.fsdp import build_model
from polylepis.parallel.errors import PlanError
from polylepis.parallel.kinds.attention import AttentionConfig
from polylepis.parallel.kinds.base import NewTokens
from polylepis.parallel.kinds.mamba import MambaConfig
from polylepis.parallel.kinds.moe import MoE
from polylepis.parallel.layout import Layout
from polylepis.parallel.mesh import ContextConfig, MeshConfig, build_mesh
from polylepis.parallel.model import HybridModel, ModelConfig, config_from_mapping
from polylepis.parallel.parts import Init, Part, initial_values, named_parts
from polylepis.parallel.routing import linear_by_entry, route
from ranks import run_ranks
from toys import ALL_ROUTED, toy, toy_batch


def alone(config: ModelConfig, dtype: torch.dtype = torch.float64, seed: int = 3) -> HybridModel:
    return build_model(config, build_mesh(MeshConfig(), "cpu"), seed=seed, dtype=dtype)


@pytest.mark.parametrize("routed", [(), ALL_ROUTED], ids=["shared", "routed"])
@pytest.mark.parametrize("symbol", ["M", "*", "-", "E"])
@settings(max_examples=5, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=2, max_size=5), seed=st.integers(0, 99))
def test_documents_never_see_each_other(symbol: str, routed: tuple[str, ...], lengths: list[int], seed: int) -> None:
    """The derivative of one document's outputs with respect to the others' inputs is exactly zero."""
    model = alone(toy(symbol, routed))
    total = sum(lengths) + 3  # three tokens of padding
    batch = toy_batch([lengths], total, seed)
    layout = Layout.from_batch(batch, 3, torch.device("cpu"))
    x = torch.randn(total, 16, dtype=torch.float64, requires_grad=True)
    y = model.layers["0"](x, layout)
    docs = batch["doc_ids"][0]
    for doc in range(len(lengths)):
        (grad,) = torch.autograd.grad(y[docs == doc].square().sum(), x, retain_graph=True)
        assert bool((grad[docs != doc] == 0).all())
        assert bool(grad[docs == doc].any())


def test_state_crosses_modalities() -> None:
    """Routing the projections leaves one shared scan: an image token moves a later text output."""
    model = alone(toy("M", ALL_ROUTED))
    batch = toy_batch([[12]], 12)
    batch["modality_ids"][0] = torch.tensor([1] * 4 + [0] * 8)
    x = torch.randn(12, 16, dtype=torch.float64, requires_grad=True)
    y = model.layers["0"](x, Layout.from_batch(batch, 3, torch.device("cpu")))
    (grad,) = torch.autograd.grad(y[11].sum(), x)
    assert bool(grad[2].any())


def test_absent_modality_gets_zero_gradient_not_none() -> None:
    model = alone(toy("M", ALL_ROUTED))
    batch = toy_batch([[9, 3]], 12, absent=(1,))
    layout = Layout.from_batch(batch, 3, torch.device("cpu"))
    model(batch["tokens"][0], layout, batch["labels"][0]).sum().backward()
    for name, parameter, part in named_parts(model):
        assert isinstance(parameter.grad, DTensor), name
        if len(part.entries) == 3:
            grad = parameter.grad.to_local()
            assert not bool(grad[1].any()), name
            assert bool(grad[0].any()), name
        if name.endswith(".image"):
            assert not bool(parameter.grad.to_local().any()), name


@pytest.mark.parametrize("part", ["z", "x", "B", "C", "dt", "dt_bias", "out"])
def test_each_part_can_be_routed_alone(part: str) -> None:
    shared, routed = toy("M"), toy("M", (part,))
    names = model_tensors(alone(routed)).keys() - model_tensors(alone(shared)).keys()
    stem = part if part == "dt_bias" else "out_proj.weight" if part == "out" else f"in_proj.{part}.weight"
    assert names == {f"layers.0.mixer.{stem}.{m}" for m in ("text", "image", "voice")}


def test_equal_banks_equal_the_dense_layer() -> None:
    """Upcycling law: a routed model whose entries are all the dense weights computes the dense function."""
    dense, routed = alone(toy("M*M")), alone(toy("M*M", ALL_ROUTED))
    source = {n: t.to_local() if isinstance(t, DTensor) else t for n, t in model_tensors(dense).items()}
    with torch.no_grad():
        for name, tensor in model_tensors(routed).items():
            assert isinstance(tensor, DTensor)
            origin = name if name in source else name.rpartition(".")[0]
            tensor.to_local().copy_(source[origin])
    batch = toy_batch([[13, 1, 9]], 24)
    layout = Layout.from_batch(batch, 3, torch.device("cpu"))
    outputs = [model(batch["tokens"][0], layout, batch["labels"][0]) for model in (dense, routed)]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-12, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(ids=st.lists(st.integers(0, 4), min_size=1, max_size=20))
def test_routed_linear_equals_a_loop(ids: list[int]) -> None:
    x, bank = torch.randn(len(ids), 3, dtype=torch.float64), torch.randn(5, 2, 3, dtype=torch.float64)
    expected = torch.stack([bank[i] @ row for i, row in zip(ids, x, strict=True)])
    torch.testing.assert_close(linear_by_entry(x, bank, route(torch.tensor(ids), 5)), expected)


@pytest.mark.parametrize(
    "config",
    [
        toy("M*-EM", ALL_ROUTED),
        toy("*M", attention=AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=6, rope_base=50.0)),
    ],
    ids=["hybrid routed", "rope"],
)
@pytest.mark.parametrize("chunks", [[11], [1] * 11, [4, 1, 6]], ids=str)
def test_decoding_equals_training(config: ModelConfig, chunks: list[int]) -> None:
    """Prefill, steps of one token and steps of several give the training forward's logits, left padding included."""
    model = alone(config).eval()
    batch = toy_batch([[11], [8]], 11)
    tokens, modality = batch["tokens"].clone(), batch["modality_ids"].clone()
    layout = Layout.from_batch(batch, 3, torch.device("cpu"))
    logits = model(batch["tokens"].reshape(-1), layout).view(2, 11, -1)
    # the second document, of 8 tokens, left-padded by 3
    tokens[1], modality[1] = tokens[1].roll(3), modality[1].roll(3)
    real = torch.ones(2, 11, dtype=torch.bool)
    real[1, :3] = False
    positions = (real.cumsum(1) - 1).clamp(min=0)
    cache, at = None, 0
    for size in chunks:
        end = at + size
        new = NewTokens(
            seq_idx=torch.where(real[:, at:end], 0, -1).to(torch.int32),
            position_ids=positions[:, at:end],
            key_mask=real[:, :end],
            modality=route(modality[:, at:end].reshape(-1), 3),
        )
        last, cache = model.extend(tokens[:, at:end], new, cache)
        at = end
        torch.testing.assert_close(last[0], logits[0, at - 1], rtol=1e-9, atol=1e-9)
        if at > 3:
            torch.testing.assert_close(last[1], logits[1, at - 4], rtol=1e-9, atol=1e-9)


def test_pad_logits_are_minus_infinity() -> None:
    model = alone(toy("-"))
    batch = toy_batch([[5]], 5)
    logits = model(batch["tokens"][0], Layout.from_batch(batch, 3, torch.device("cpu")))
    assert logits.shape == (5, 48)
    assert bool(logits[:, 45:].isneginf().all())
    assert bool(logits[:, :45].isfinite().all())


def whole_weights(config: ModelConfig, mesh: MeshConfig) -> dict[str, torch.Tensor]:
    model = build_model(config, build_mesh(mesh, "cpu"), seed=3)
    return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in model_tensors(model).items()}


@pytest.mark.parametrize("mesh", [MeshConfig(tp=2), MeshConfig(dp_shard=2), MeshConfig(dp_shard=2, tp=2)], ids=str)
def test_initial_weights_are_the_same_bits_on_every_mesh(mesh: MeshConfig) -> None:
    config = toy("M*-E", ALL_ROUTED)
    expected = whole_weights(config, MeshConfig())
    for actual in run_ranks(mesh.dp_shard * mesh.tp if mesh.dp_shard > 0 else mesh.tp, whole_weights, config, mesh):
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_initial_values_by_rows() -> None:
    """A shard equals the slice of the whole, also where blocks of rows are cut."""
    for tp_dim in (0, 1):
        part = Part((10_000, 4), Init("normal", 0.02), tp_dim)
        whole = initial_values(part, "name", 7)
        shards = [initial_values(part, "name", 7, rank, 4) for rank in range(4)]
        assert torch.equal(torch.cat(shards, dim=tp_dim), whole)
    assert abs(float(whole.std()) - 0.02) < 5e-4
    assert not torch.equal(whole, initial_values(part, "other name", 7))


def test_initial_distributions() -> None:
    heads = Part((4096,), Init("log_uniform", 1.0, 16.0))
    a = initial_values(heads, "A_log", 0).exp()
    assert float(a.min()) >= 0.999 and float(a.max()) <= 16.01 and abs(float(a.mean()) - 8.5) < 0.3
    dt = torch.nn.functional.softplus(initial_values(Part((4096,), Init("inverse_softplus", 1e-3, 1e-1)), "dt", 0))
    assert float(dt.min()) >= 0.99e-3 and float(dt.max()) <= 1.01e-1
    assert abs(float(dt.log().mean()) - (-4.6)) < 0.1  # log-uniform: the mean of logs is the middle


def test_balancing_moves_the_bias_towards_idle_experts() -> None:
    model = alone(toy("E"))
    layer = model.layers["0"].mixer
    assert isinstance(layer, MoE)
    batch = toy_batch([[9, 3]], 16)
    model(batch["tokens"][0], Layout.from_batch(batch, 3, torch.device("cpu")), batch["labels"][0]).sum().backward()
    assert float(layer.load.sum()) == 12 * 2  # padding is nobody's load
    layer.finish_step(torch.tensor([[6.0, 0.0, 6.0], [4.0, 2.0, 0.0], [0.0, 0.0, 6.0]]))
    expected = torch.tensor([-1.0, 1.0, -1.0]) * layer.config.bias_update_rate
    torch.testing.assert_close(layer.selection_bias, expected)
    assert not bool(layer.load.any())


MOE = {"moe": dataclasses.replace(toy("E").moe, top_k=4)}
REFUSALS: list[tuple[dict[str, Any], int, str]] = [
    (
        {"mamba": MambaConfig(d_state=6, head_dim=5, n_groups=2)},
        1,
        "expand·d_model = 32 is not divisible by head_dim 5",
    ),
    ({"mamba": MambaConfig(d_state=6, head_dim=4, n_groups=3)}, 1, "8 heads are not divisible by n_groups 3"),
    ({}, 3, "8 heads and n_groups 2 must divide over tp 3; choose tp as a divisor or as a multiple of 2 that div"),
    ({"mamba": MambaConfig(head_dim=4, n_groups=2, d_conv=9)}, 1, "model.mamba.d_conv: 9 is outside 1 to 4"),
    ({"mamba": MambaConfig(head_dim=4, n_groups=2, routed=("conv",))}, 1, "conv cannot be routed; accepted: z, x"),
    ({"pattern": "*"}, 3, "n_heads 4 and n_kv_heads 2 must both be divisible by tp 3"),
    ({"pattern": "-"}, 16, "d_ff 20 is not divisible by tp 16"),
    ({"pattern": "E", **MOE}, 1, "top_k 4 must lie between 1 and n_experts 3"),
    ({"pattern": "-", "layers": {0: {"d_state": 3}}}, 1, "model.layers.0.d_state: layer 0 is MLP"),
    ({"pattern": "-", "layers": {5: {"d_ff": 3}}}, 1, "the pattern has layers 0 to 0"),
    ({"modalities": ("text", "text")}, 1, "need distinct names"),
]


@pytest.mark.parametrize(("changes", "tp", "message"), REFUSALS, ids=[message for *_, message in REFUSALS])
def test_refusals_name_the_numbers(changes: dict[str, Any], tp: int, message: str) -> None:
    config = toy(changes.pop("pattern", "M"), **changes) if changes else toy("M", vocab_multiple=64)
    with pytest.raises(PlanError) as caught:
        dataclasses.replace(config, vocab_multiple=48).check(tp)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("context", "message"),
    [
        (
            ContextConfig(mamba="heads"),
            "context.mamba: heads: 8 heads and 2 groups or key/value heads",
        ),
        (ContextConfig(attention="heads"), "context.attention: heads: 4 heads and 2 groups or key/value heads"),
    ],
    ids=["mamba", "attention"],
)
def test_context_refusals(context: ContextConfig, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        toy("M*").check_context(MeshConfig(cp=3), context)
    assert str(caught.value).startswith(message)
    assert "over cp 3; choose cp " in str(caught.value)
    toy("M*").check_context(MeshConfig(cp=3), ContextConfig())  # by states and gathered keys anything goes
    toy("M*").check_context(MeshConfig(cp=4), ContextConfig(mamba="heads"))


def test_mesh_refusals() -> None:
    with pytest.raises(PlanError, match=r"× tp 3 = 3 processes, but the world size is 4; the nearest that fits is 3"):
        MeshConfig(tp=3).resolve(4)
    with pytest.raises(PlanError, match="pp 2 × dp_replicate 1 × dp_shard 2 × cp 1 × tp 1 = 4 processes"):
        MeshConfig(pp=2, dp_shard=2).resolve(8)
    assert MeshConfig(pp=2).resolve(8) == MeshConfig(pp=2, dp_shard=4)
    with pytest.raises(PlanError, match="every axis is ≥ 1"):
        MeshConfig(tp=0).resolve(1)
    assert MeshConfig(tp=2, cp=2).resolve(8) == MeshConfig(dp_replicate=1, dp_shard=2, cp=2, tp=2)


def test_unknown_modality_in_a_batch() -> None:
    batch = toy_batch([[5]], 5)
    batch["modality_ids"][0, 2] = 3
    with pytest.raises(PlanError, match="modality id 3 in it, but the model has 3 modalities"):
        Layout.from_batch(batch, 3, torch.device("cpu"))


def test_config_survives_plain_values() -> None:
    config = toy("M*-E", ALL_ROUTED, layers={0: {"d_state": 8}})
    assert config_from_mapping(dataclasses.asdict(config)) == config
