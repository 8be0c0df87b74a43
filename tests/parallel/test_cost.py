"""The cost model against what torch really does: FLOPs by its counter, bytes by the hooks of its autograd."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from polylepis.parallel import recompute
from polylepis.parallel.engines.fsdp import build_model
from polylepis.parallel.errors import PlanError
from polylepis.parallel.kinds.attention import AttentionConfig
from polylepis.parallel.kinds.mamba import ROUTABLE, MambaConfig
from polylepis.parallel.kinds.mlp import MLPConfig
from polylepis.parallel.kinds.moe import MoEConfig
from polylepis.parallel.layout import Layout
from polylepis.parallel.mesh import MeshConfig, build_mesh
from polylepis.parallel.model import HybridModel, ModelConfig
from polylepis.parallel.parts import materialise
from polylepis.parallel.pipeline.cost import (
    Roofline,
    Setting,
    end_cost,
    end_parts,
    layer_cost,
    layer_parts,
    layer_seconds,
    sharded_numel,
)
from polylepis.parallel.pipeline.devices import collective_seconds, find_device
from polylepis.parallel.pipeline.partition import equal_counts, part_sums, partition
from polylepis.parallel.pipeline.stage import Stage, whole_model
from polylepis.parallel.recompute import RecomputeConfig
from ranks import run_ranks

MAMBA = MambaConfig(d_state=16, head_dim=8, n_groups=2, chunk_size=32)
MODALITIES = ("text", "image", "voice")


def model_of(pattern: str, **changes: Any) -> ModelConfig:
    values: dict[str, Any] = {
        "pattern": pattern,
        "d_model": 64,
        "vocab_size": 500,
        "vocab_multiple": 512,
        "modalities": MODALITIES,
        "mamba": MAMBA,
        "attention": AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=16),
        "mlp": MLPConfig(d_ff=192),
        "moe": MoEConfig(n_experts=8, top_k=2, d_ff=64, d_ff_shared=96),
    }
    return ModelConfig(**(values | changes))


def batch_of(lengths: list[int], rows: int = 1, modalities: int = 3) -> dict[str, Tensor]:
    total = sum(lengths)
    doc_ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).expand(rows, total)
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(rows, total)
    modality = (torch.arange(total) // 5 % modalities).expand(rows, total)
    return {"doc_ids": doc_ids, "position_ids": positions, "modality_ids": modality}


def mean_keys(lengths: list[int]) -> float:
    return sum(n * (n + 1) / 2 for n in lengths) / sum(lengths)


def measured(
    config: ModelConfig, lengths: list[int], tp: int, dtype: torch.dtype, choices: RecomputeConfig, rows: int = 1
) -> float:
    """Bytes that a forward of all layers (no ends) keeps for backward on this rank, parameters left out."""
    mesh = build_mesh(MeshConfig(dp_shard=1, tp=tp), "cpu")
    model = HybridModel(config, mesh, Stage(1, 3, 0, len(config.symbols)), choices)
    materialise(model, "", mesh, 0, dtype)
    layout = Layout.from_batch(batch_of(lengths, rows, len(config.modalities)), len(config.modalities), mesh)
    tokens = rows * sum(lengths)
    x = torch.randn(tokens // tp, config.d_model, dtype=dtype, requires_grad=True)
    mine = [p.to_local() for p in model.parameters()]  # type: ignore[operator]
    known = {p.untyped_storage().data_ptr() for p in mine}
    known |= {t.untyped_storage().data_ptr() for t in (layout.seq_idx, layout.modality.order, layout.modality.inverse)}
    known |= {t.untyped_storage().data_ptr() for t in (layout.modality.ids, layout.position_ids)}
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = tensor
        return tensor

    caches: list[Any] = []
    create = recompute.create_selective_checkpoint_contexts

    def watched(policy: Any) -> Any:
        contexts = create(policy)
        caches.append(contexts[0])
        return contexts

    recompute.create_selective_checkpoint_contexts = watched  # type: ignore[assignment]
    try:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            out = model(x, layout)
    finally:
        recompute.create_selective_checkpoint_contexts = create
    for context in caches:
        for results in context.storage.values():
            for result in torch.utils._pytree.tree_leaves(list(results.values())):
                value = getattr(result, "val", result)
                if isinstance(value, Tensor):
                    note(value)
    assert out.requires_grad
    return float(sum(t.untyped_storage().nbytes() for t in kept.values()))


def predicted(
    config: ModelConfig,
    lengths: list[int],
    tp: int,
    dtype: torch.dtype,
    choices: RecomputeConfig,
    rows: int = 1,
    *,
    kernels: Literal["torch", "triton"] = "torch",
) -> float:
    setting = Setting(
        MeshConfig(dp_shard=1, tp=tp),
        rows * sum(lengths),
        mean_keys(lengths),
        torch.empty((), dtype=dtype).element_size(),
        kernels,
        recompute=choices,
        modalities=len(config.modalities),
    )
    timing = Roofline(find_device("h100"))
    return sum(layer_cost(config, i, setting, timing).saved for i in range(len(config.symbols)))


ROUTED = replace(MAMBA, routed=ROUTABLE)
PARTLY = replace(MAMBA, routed=("x", "B", "dt"))
NONE, FULL = RecomputeConfig(), RecomputeConfig("full", "full", "full", "full")
SELECTIVE = RecomputeConfig("selective", "selective", "selective", "selective")
ONE, PACKED = [256], [100, 1, 90, 65]
GATED_EXPERTS = MoEConfig(n_experts=4, top_k=1, d_ff=64, d_ff_shared=96, activation="swiglu")
GATED = {"mlp": MLPConfig(192, "swiglu"), "moe": GATED_EXPERTS}
CASES: list[tuple[str, dict[str, Any], list[int], RecomputeConfig, torch.dtype]] = [
    ("M", {}, ONE, NONE, torch.float32),
    ("M", {}, PACKED, NONE, torch.bfloat16),
    ("M", {"mamba": ROUTED}, PACKED, NONE, torch.float32),
    ("M", {"mamba": PARTLY}, PACKED, NONE, torch.float32),
    ("M", {}, [101, 51], NONE, torch.float32),
    ("*", {}, ONE, NONE, torch.float32),
    ("*", {}, PACKED, NONE, torch.bfloat16),
    ("*", {"attention": AttentionConfig(4, 2, 16, 10000.0)}, PACKED, NONE, torch.float32),
    ("-", {}, PACKED, NONE, torch.float32),
    ("-", {"mlp": MLPConfig(192, "gelu")}, PACKED, NONE, torch.bfloat16),
    ("-", GATED, PACKED, NONE, torch.float32),
    ("E", {}, PACKED, NONE, torch.float32),
    ("E", GATED, PACKED, NONE, torch.bfloat16),
    ("M*-E", {}, PACKED, NONE, torch.float32),
    ("M*-E", {}, PACKED, FULL, torch.float32),
    ("M*-E", {}, PACKED, SELECTIVE, torch.float32),
    ("M*-E", {}, PACKED, RecomputeConfig("selective", "none", "full", "none"), torch.bfloat16),
    ("M", {}, ONE, SELECTIVE, torch.bfloat16),
    ("*", {}, PACKED, SELECTIVE, torch.float32),
    ("-", GATED, PACKED, SELECTIVE, torch.float32),
    ("E", {}, PACKED, SELECTIVE, torch.float32),
]


@pytest.mark.parametrize(("pattern", "changes", "lengths", "choices", "dtype"), CASES)
def test_saved_bytes(
    pattern: str, changes: dict[str, Any], lengths: list[int], choices: RecomputeConfig, dtype: torch.dtype
) -> None:
    arguments = (model_of(pattern, **changes), lengths, 1, dtype, choices)
    assert predicted(*arguments) == pytest.approx(measured(*arguments), rel=0.05)


def on_ranks() -> list[tuple[float, float]]:
    """Inside a group of two: (measured, predicted) on this rank for what depends on tp."""
    results = []
    for pattern, changes, choices in (
        ("M*-E", {}, NONE),
        ("M", {"mamba": ROUTED}, NONE),
        ("M*-E", {}, FULL),
        ("M*-E", {}, SELECTIVE),
        ("M", {"mamba": replace(MAMBA, n_groups=1)}, NONE),
    ):
        arguments = (model_of(pattern, **changes), PACKED, dist.get_world_size(), torch.float32, choices)
        results.append((measured(*arguments), predicted(*arguments)))
    return results


def test_saved_bytes_under_tensor_parallelism() -> None:
    for results in run_ranks(2, on_ranks):
        for real, expected in results:
            assert expected == pytest.approx(real, rel=0.05)


def counted(config: ModelConfig, lengths: list[int]) -> tuple[float, float]:
    """Forward and backward FLOPs of all layers by torch's counter."""
    mesh = build_mesh(MeshConfig(dp_shard=1), "cpu")
    model = HybridModel(config, mesh, Stage(1, 3, 0, len(config.symbols)))
    materialise(model, "", mesh, 0)
    layout = Layout.from_batch(batch_of(lengths), 3, mesh)
    x = torch.randn(sum(lengths), config.d_model, requires_grad=True)
    aten = torch.ops.aten
    # The counter does not know the CPU's fused attention (what it says of CUDA's holds) and products added in place.
    custom = {
        aten.baddbmm_: lambda into, a, b, *_, out_shape=None, **__: 2 * a[0] * a[1] * a[2] * b[2],
        aten._scaled_dot_product_flash_attention_for_cpu: (
            lambda q, k, v, *_, out_shape=None, **__: sdpa_flop_count(q, k, v)
        ),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda grad, q, k, v, *_, out_shape=None, **__: sdpa_backward_flop_count(grad, q, k, v)
        ),
    }
    with FlopCounterMode(display=False, custom_mapping=custom) as forward:
        out = model(x, layout)
    with FlopCounterMode(display=False, custom_mapping=custom) as backward:
        out.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("lengths", [ONE, PACKED])
@pytest.mark.parametrize(
    ("pattern", "changes"),
    [("M", {}), ("M", {"mamba": ROUTED}), ("*", {}), ("-", {}), ("-", GATED), ("E", {}), ("E", GATED), ("MM*-E", {})],
)
def test_flops(pattern: str, changes: dict[str, Any], lengths: list[int]) -> None:
    config = model_of(pattern, **changes)
    load = Setting(MeshConfig(dp_shard=1), sum(lengths), mean_keys(lengths), 4, "torch", modalities=3).load()
    works = [kind.work(layer, config.shape, load) for kind, layer in map(config.layer, range(len(pattern)))]
    forward, backward = counted(config, lengths)
    assert sum(work.forward for work in works) == pytest.approx(forward, rel=0.01)
    assert sum(work.backward for work in works) == pytest.approx(backward, rel=0.01)


def held() -> list[tuple[int, int, int]]:
    """(parameters, optimizer elements, predicted) of this rank, stage by stage."""
    results = []
    for mesh_config in (MeshConfig(dp_shard=2, tp=1), MeshConfig(dp_shard=1, tp=2)):
        mesh = build_mesh(mesh_config, "cpu")
        config = model_of("M*-E", mamba=replace(ROUTED, n_groups=1), vocab_size=1000, vocab_multiple=64)
        for stage in (whole_model(4), Stage(0, 2, 0, 2), Stage(1, 2, 2, 4)):
            model = build_model(config, mesh, stage=stage)
            optimizer = torch.optim.AdamW(model.parameters())
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            real = sum(p.to_local().numel() for p in model.parameters())  # type: ignore[operator]
            moments = sum(
                value.to_local().numel()
                for state in optimizer.state.values()
                for value in state.values()
                if value.dim()
            )
            parts = list(end_parts(config, stage).values())
            for index in stage.layers:
                parts += layer_parts(*config.layer(index), config, mesh_config.tp).values()
            expected = sum(sharded_numel(part, mesh_config.tp, mesh_config.dp_shard) for part in parts)
            results.append((real, moments, expected))
    return results


def test_parameters_and_optimizer_are_exact() -> None:
    for real, moments, expected in run_ranks(2, held)[0]:
        assert real == expected
        assert moments == 2 * expected


def test_ends_are_what_they_keep() -> None:
    """Embedding and head with loss, against the hooks."""
    config, mesh = model_of("-"), build_mesh(MeshConfig(dp_shard=1), "cpu")
    tokens, labels = torch.randint(0, 500, (256,)), torch.randint(0, 500, (256,))
    layout = Layout.from_batch(batch_of(PACKED), 3, mesh)
    setting = Setting(MeshConfig(dp_shard=1), 256, 100.0, 4, "torch")
    for stage in (Stage(0, 2, 0, 0), Stage(1, 2, 1, 1)):
        model = HybridModel(config, mesh, stage)
        materialise(model, "", mesh, 0)
        known = {p.to_local().untyped_storage().data_ptr() for p in model.parameters()}  # type: ignore[operator]
        kept: dict[int, int] = {}

        def note(tensor: Tensor, known: set[int] = known, kept: dict[int, int] = kept) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in known:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = tokens if stage.embeds else torch.randn(256, 64, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            out = model(x, layout, labels if stage.predicts else None)
            if stage.predicts:
                (out * torch.rand(256)).sum()
        expected = end_cost(config, stage, setting, Roofline(find_device("h100"))).saved
        assert expected == pytest.approx(sum(kept.values()), rel=0.05)


STRING = "M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-"


def test_cost_cuts_beat_equal_counts() -> None:
    """The 56 layers of the 8B hybrid with their ends: the dearest stage gets cheaper at PP 4 and 8."""
    config = ModelConfig(STRING, 4096, 256000, attention=AttentionConfig(32, 8, 128), mlp=MLPConfig(16384, "gelu"))
    costs = layer_seconds(config, Setting(MeshConfig(dp_shard=2), 4096, 2048.5), Roofline(find_device("h100")))
    for n_parts in (4, 8):
        ours = max(part_sums(costs, partition(costs, n_parts)))
        assert ours < 0.85 * max(part_sums(costs, equal_counts(56, n_parts)))


def test_recompute_and_load_enter_the_cost() -> None:
    config, timing = model_of("M*-E"), Roofline(find_device("h200"))
    plain = Setting(MeshConfig(dp_shard=1), 4096, 2048.5)
    for index in range(4):
        none, part, full = (
            layer_cost(config, index, replace(plain, recompute=choice), timing) for choice in (NONE, SELECTIVE, FULL)
        )
        assert none.saved > part.saved > full.saved
        assert none.total < part.total < full.total
    busy = layer_cost(config, 3, replace(plain, busiest={3: 2.0}), timing)
    assert busy.total > layer_cost(config, 3, plain, timing).total


def test_devices() -> None:
    with pytest.raises(PlanError, match=r"unknown 'h2000'; nearest is h200; known: a100, h100, h200, b200"):
        find_device("h2000")
    assert find_device("H200").memory > find_device("h100").memory
    assert collective_seconds("all_gather", 1e9, 1, 1e9, 1.0) == 0.0
    assert collective_seconds("all_reduce", 8e9, 8, 1e9, 0.0) == pytest.approx(14.0)
