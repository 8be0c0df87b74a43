"""Tensor + sequence + data parallel equal one process: loss, gradient norm and every gradient, against two oracles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from polylepis.checkpoints.sharded import model_tensors
from polylepis.parallel.engines.fsdp import build_model, gradient_norm
from polylepis.parallel.kinds.attention import AttentionConfig
from polylepis.parallel.kinds.mlp import MLPConfig
from polylepis.parallel.layout import Layout
from polylepis.parallel.mesh import MeshConfig, build_mesh, init_process_group
from polylepis.parallel.model import ModelConfig
from polylepis.parallel.parts import named_parts, split_bank
from ranks import run_ranks
from reference import reference_loss
from toys import ALL_ROUTED, toy, toy_batch

DOCUMENTS = [[[13, 1, 9], [20]], [[24], [5, 18]], [[2, 2, 2, 2], [11, 12]], [[7], [23, 1]]]
SEQ_LEN = 24


def batches(absent: tuple[int, ...] = ()) -> list[dict[str, Tensor]]:
    """Four micro-batches; `absent` modalities are missing from the second and third."""
    return [toy_batch(docs, SEQ_LEN, seed, absent if seed in (1, 2) else ()) for seed, docs in enumerate(DOCUMENTS)]


def gradients(
    config: ModelConfig, mesh_config: MeshConfig, dtype: torch.dtype, absent: tuple[int, ...]
) -> tuple[float, float, dict[str, Tensor]]:
    """Loss, gradient norm and whole gradients of one step over all micro-batches, split over data-parallel ranks."""
    mesh = build_mesh(mesh_config, "cpu")
    model = build_model(config, mesh, seed=3, dtype=dtype)
    mine = batches(absent)[mesh.dp_rank :: mesh.dp_size]
    total = sum(float(b["loss_weight"].double().sum()) for b in batches(absent))
    loss = torch.zeros((), dtype=torch.float64)
    for batch in mine:
        layout = Layout.from_batch(batch, 3, mesh.device)
        ce = model(batch["tokens"].reshape(-1), layout, batch["labels"].reshape(-1))
        part = (ce * batch["loss_weight"].reshape(-1).to(ce.dtype)).sum() / total
        part.backward()
        loss += part.detach().double()
    dist.all_reduce(loss)
    grads: dict[str, Tensor] = {}
    for name, parameter, spec in named_parts(model):
        assert isinstance(parameter.grad, DTensor), name
        for key, entry in split_bank(parameter.grad, spec, name).items():
            assert isinstance(entry, DTensor)
            grads[key] = entry.full_tensor()
    return float(loss) / mesh.tp_size, gradient_norm(model.parameters()), grads


def oracle(config: ModelConfig, absent: tuple[int, ...]) -> tuple[float, float, dict[str, Tensor]]:
    init_process_group("cpu")
    model = build_model(config, build_mesh(MeshConfig(), "cpu"), seed=3, dtype=torch.float64)
    tensors = {
        name: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for name, t in model_tensors(model).items()
    }
    leaves = {n: t.requires_grad_() for n, t in tensors.items() if not n.endswith("selection_bias")}
    total = sum(float(b["loss_weight"].double().sum()) for b in batches(absent))
    loss = torch.stack([reference_loss(config, tensors, b, total) for b in batches(absent)]).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    full = {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(leaves.items(), grads, strict=True)}
    norm = torch.stack([g.square().sum() for g in full.values()]).sum().sqrt()
    return loss.item(), norm.item(), full


def assert_equal_gradients(actual: Any, expected: Any, tolerance: float) -> None:
    loss, norm, grads = actual
    expected_loss, expected_norm, expected_grads = expected
    assert abs(loss - expected_loss) <= tolerance * abs(expected_loss)
    assert abs(norm - expected_norm) <= tolerance * expected_norm
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        scale = float(expected_grads[name].norm())
        difference = float((grad.double() - expected_grads[name].double()).norm())
        if scale == 0:
            assert difference == 0, name
        else:
            assert difference / scale <= tolerance, f"{name}: {difference / scale:.1e}"


CASES = {
    "M": toy("MM"),
    "M routed": toy("MM", ALL_ROUTED),
    "M partly routed": toy("MM", ("x", "dt", "out")),
    "*": toy("**"),
    "* rope": toy("**", attention=AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=6, rope_base=100.0)),
    "-": toy("--"),
    "- gelu": toy("--", mlp=MLPConfig(d_ff=20, activation="gelu")),
    "- swiglu": toy("--", mlp=MLPConfig(d_ff=20, activation="swiglu")),
    "E": toy("EE"),
    "hybrid routed": toy("M*-EM", ALL_ROUTED),
    "overridden layers": toy("M|M-", ALL_ROUTED, layers={1: {"routed": (), "d_state": 10}, 2: {"d_ff": 8}}),
}


@pytest.mark.parametrize("name", CASES)
def test_one_process_equals_naive_model(name: str) -> None:
    actual = gradients_alone(CASES[name], torch.float64)
    assert_equal_gradients(actual, oracle(CASES[name], ()), 1e-9)


def gradients_alone(config: ModelConfig, dtype: torch.dtype, absent: tuple[int, ...] = ()) -> Any:
    init_process_group("cpu")
    return gradients(config, MeshConfig(), dtype, absent)


@pytest.mark.parametrize("name", CASES)
def test_tp2_equals_one_process(name: str) -> None:
    expected = gradients_alone(CASES[name], torch.float64)
    for result in run_ranks(2, gradients, CASES[name], MeshConfig(tp=2), torch.float64, ()):
        assert_equal_gradients(result, expected, 1e-9)


def test_tp2_fp32() -> None:
    config = CASES["hybrid routed"]
    expected = gradients_alone(config, torch.float64)
    for result in run_ranks(2, gradients, config, MeshConfig(tp=2), torch.float32, ()):
        assert_equal_gradients(result, expected, 2e-5)


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(dp_shard=2),
        MeshConfig(dp_replicate=2, dp_shard=1),
        MeshConfig(dp_shard=2, tp=2),
        MeshConfig(dp_replicate=2, dp_shard=1, tp=2),
        MeshConfig(dp_replicate=2, dp_shard=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("absent", [(), (1,), (0, 2)], ids=["all present", "image absent", "only image"])
def test_data_parallel(mesh: MeshConfig, absent: tuple[int, ...]) -> None:
    config = toy("M*-E", ALL_ROUTED)
    expected = gradients_alone(config, torch.float64, absent)
    world = mesh.dp_replicate * mesh.dp_shard * mesh.tp
    for result in run_ranks(world, gradients, config, mesh, torch.float64, absent):
        assert_equal_gradients(result, expected, 1e-9)
