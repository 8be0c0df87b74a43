"""Tensor + sequence + data parallel equal one process: loss, gradient norm and every gradient, against two oracles."""

from __future__ import annotations

import pytest
import torch

from equivalence import assert_equal_gradients, gradients, gradients_alone, oracle
from polylepis.parallel.kinds.attention import AttentionConfig
from polylepis.parallel.kinds.mlp import MLPConfig
from polylepis.parallel.mesh import ContextConfig, MeshConfig
from ranks import run_ranks
from toys import ALL_ROUTED, toy

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


STATE = ContextConfig(mamba="state", attention="heads")
ZIGZAG = ContextConfig(order="zigzag", mamba="state", attention="gather")
HEADS = ContextConfig(mamba="heads", attention="heads")
HEADS_ZIGZAG = ContextConfig(order="zigzag", mamba="heads", attention="gather")


@pytest.mark.parametrize("context", [STATE, ZIGZAG, HEADS, HEADS_ZIGZAG], ids=["state", "zigzag", "heads", "heads-zz"])
@pytest.mark.parametrize("pattern", ["MM", "**", "M*-EM"])
def test_context_parallel(pattern: str, context: ContextConfig) -> None:
    config = toy(pattern, ALL_ROUTED)
    expected = gradients_alone(config, torch.float64, (1,))
    for result in run_ranks(2, gradients, config, MeshConfig(dp_shard=1, cp=2), torch.float64, (1,), context):
        assert_equal_gradients(result, expected, 1e-9)
