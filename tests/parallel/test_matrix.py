"""The equivalence matrix: pairs and triples of axes against one process, in fp64 (where no near-tie of experts flips).

A modality and whole documents are absent on some ranks. `make test` runs one representative of each combination,
`make test-full` all of them.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from equivalence import assert_equal_gradients, gradients, gradients_alone
from polylepis.parallel.kinds.mamba import MambaConfig
from polylepis.parallel.mesh import ContextConfig, MeshConfig
from ranks import run_ranks
from toys import ALL_ROUTED, toy

CONFIG = toy("M*-E", ALL_ROUTED)
# More groups: two context ranks times two tensor ranks must still find whole ones.
GROUPS = toy("M*-E", ALL_ROUTED, mamba=MambaConfig(d_state=6, head_dim=4, n_groups=4, chunk_size=8, routed=ALL_ROUTED))

AXES: dict[str, dict[str, int]] = {
    "tp": {"tp": 2},
    "cp state": {"cp": 2},
    "cp heads": {"cp": 2},
    "dp_shard": {"dp_shard": 2},
    "dp_replicate": {"dp_replicate": 2},
}
CONTEXT = {
    "cp state": ContextConfig("zigzag", "state", "gather"),
    "cp heads": ContextConfig("contiguous", "heads", "heads"),
}


def combinations(sizes: tuple[int, ...]) -> list[tuple[str, ...]]:
    """Of the axes, all but those with both ways of context parallelism."""
    every = [names for size in sizes for names in itertools.combinations(AXES, size)]
    return [names for names in every if not {"cp state", "cp heads"} <= set(names)]


def check(names: tuple[str, ...], dtype: torch.dtype = torch.float64, tolerance: float = 1e-9) -> None:
    values: dict[str, Any] = {"dp_shard": 1}
    for name in names:
        values |= AXES[name]
    mesh = MeshConfig(**values)
    context = next((CONTEXT[name] for name in names if name in CONTEXT), None)
    world = mesh.dp_replicate * mesh.dp_shard * mesh.cp * mesh.tp
    config = GROUPS if "cp heads" in names else CONFIG
    expected = gradients_alone(config, torch.float64, (1,))
    for result in run_ranks(world, gradients, config, mesh, dtype, (1,), context, timeout=240):
        assert_equal_gradients(result, expected, tolerance)
        if dtype == torch.float64:  # the stricter gates of scalars
            assert abs(result[0] - expected[0]) <= 1e-12 * abs(expected[0])
            assert abs(result[1] - expected[1]) <= 1e-11 * expected[1]


@pytest.mark.parametrize("names", combinations((2,)), ids=" × ".join)
def test_pairs(names: tuple[str, ...]) -> None:
    check(names)


@pytest.mark.parametrize("names", [("tp", "cp state", "dp_shard")], ids=" × ".join)
def test_a_triple(names: tuple[str, ...]) -> None:
    check(names)


@pytest.mark.full
@pytest.mark.parametrize("names", combinations((3,)), ids=" × ".join)
def test_triples(names: tuple[str, ...]) -> None:
    check(names)


@pytest.mark.parametrize("names", [("tp", "cp state"), ("cp heads", "dp_shard")], ids=" × ".join)
def test_pairs_fp32(names: tuple[str, ...]) -> None:
    check(names, torch.float32, 2e-5)


@pytest.mark.full
def test_four_context_ranks() -> None:
    for context in (ContextConfig("zigzag", "state", "gather"), ContextConfig("contiguous", "heads", "auto")):
        expected = gradients_alone(GROUPS, torch.float64, ())
        for result in run_ranks(4, gradients, GROUPS, MeshConfig(dp_shard=1, cp=4), torch.float64, (), context):
            assert_equal_gradients(result, expected, 1e-9)


@pytest.mark.parametrize(("groups", "tp"), [(1, 2), (2, 4), (1, 4)])
def test_more_tensor_ranks_than_groups(groups: int, tp: int) -> None:
    """B and C replicated within a group's ranks, the norm of a group spanning them."""
    mamba = MambaConfig(d_state=6, head_dim=4, n_groups=groups, chunk_size=8, routed=ALL_ROUTED)
    config = toy("MM", ALL_ROUTED, mamba=mamba)
    expected = gradients_alone(config, torch.float64)
    for result in run_ranks(tp, gradients, config, MeshConfig(dp_shard=1, tp=tp), torch.float64, ()):
        assert_equal_gradients(result, expected, 1e-9)


def test_more_tensor_ranks_than_groups_with_context_and_shards() -> None:
    mamba = MambaConfig(d_state=6, head_dim=4, n_groups=1, chunk_size=8, routed=("z", "B", "dt_bias"))
    config = toy("M-", mamba=mamba)
    expected = gradients_alone(config, torch.float64)
    for context in (ContextConfig(mamba="state"), ContextConfig(mamba="heads")):
        results = run_ranks(4, gradients, config, MeshConfig(dp_shard=1, cp=2, tp=2), torch.float64, (), context)
        for result in results:
            assert_equal_gradients(result, expected, 1e-9)
