"""Every shipped configuration compiles for sm_90 without a GPU, spills nothing and fits the shared memory of an SM.

Exceptions are written down here with their reason; a larger spill fails.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if sys.platform != "linux":
    pytest.skip("Triton compiles on Linux only", allow_module_level=True)
sys.path.insert(0, str(Path(__file__).parent))
from static_gate import Use, mixer_uses, row_uses, scan_uses

from polylepis.kernels.ssd.triton_config import CHUNKS, HALF, HALVES

SHARED = 227 * 1024
# (bytes of stack per thread, loads and stores of them inside loops; the others are paid once per program, not per head)
# dx holds two tiles of B·Cᵀ and two sums of their gradients over all heads of a group, 128 registers of 255, where its
# tile is a chunk's first half; halves of tiles and compile-time strides brought it from 120 to 42, a second program for
# the far tile would cost more. The half tile of `output` and the two warpgroups of `dbc` spill in their preludes; tiles
# of 64 tokens in `dbc` are a candidate only. float32 is the path that checks the others: three tensor-core passes per
# product (tf32x3) hold every operand twice.
ALLOWED = {
    "dx_kernel float32": (192, 48),
    "output_kernel float32": (16, 2),
    "dx_kernel bfloat16": (320, 60),
    "output_kernel bfloat16": (192, 16),
    "dbc_kernel bfloat16": (192, 32),
}


def check(uses: list[Use]) -> None:
    assert uses
    for use in uses:
        stack, inner = next((most for name, most in ALLOWED.items() if use.kernel.startswith(name)), (0, 0))
        assert use.stack <= stack, f"{use.kernel} spills {use.stack} bytes per thread, allowed are {stack}"
        assert use.inner <= inner, f"{use.kernel} spills {use.inner} times per round of a loop, allowed are {inner}"
        assert use.shared <= SHARED, f"{use.kernel} takes {use.shared} bytes of shared memory, at most {SHARED} exist"


@pytest.mark.parametrize("dtype, packed", [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, True)])
def test_scan(dtype: torch.dtype, packed: bool) -> None:
    uses = scan_uses(dtype, packed, segments=packed and dtype == torch.bfloat16)
    assert len({use.kernel.split()[0] for use in uses}) == 7
    check(uses)
    if dtype == torch.bfloat16:
        check_matrix_units(uses)


def check_matrix_units(uses: list[Use]) -> None:
    """A tile or a number of warps that falls back to the older instructions costs half the rate, silently."""
    products = [use for use in uses if use.kernel.split("_")[0] not in ("prep", "decay", "parameter")]
    names = {use.kernel.split()[0] for use in products}
    assert names == {"state_pass_kernel", "output_kernel", "dx_kernel", "dbc_kernel"}
    for use in products:
        assert use.wgmma and not use.mma, use
        assert use.wide >= 16, f"{use.kernel} loads its tiles in pieces of less than 16 bytes: {use}"
    # two stages are one buffer, whose copies wait for the products: then another program has to fetch meanwhile
    assert all(use.programs >= 2 or use.options["num_stages"] >= 3 for use in products)


@pytest.mark.parametrize("dtype, packed", [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, True)])
def test_layer(dtype: torch.dtype, packed: bool) -> None:
    uses = mixer_uses(dtype, packed)
    assert len({use.kernel.split()[0] for use in uses}) == 3
    check(uses)
    if dtype == torch.bfloat16:  # enough warps to hide the latency of the memory behind each other
        assert all(use.programs * use.options["num_warps"] >= 12 for use in uses), uses


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_convolution_norms_and_steps(dtype: torch.dtype) -> None:
    uses = row_uses(dtype)
    assert len({use.kernel.split()[0] for use in uses}) == 7
    check(uses)
    for use in uses:
        if use.kernel.startswith("norm"):  # 16-byte loads, and enough warps on an SM to wait for memory together
            assert use.wide >= 8 and use.programs * use.options["num_warps"] >= 16, use


def test_candidates() -> None:
    """What the tuning chooses from."""
    for chunk, index in ((CHUNKS[0], 1), (CHUNKS[0], 2), (CHUNKS[1], 0)):
        config = HALF._replace(**{name: listed[index] for name, listed in HALVES.items() if index < len(listed)})
        check(scan_uses(torch.bfloat16, False, config=config._replace(chunk=chunk)))


@pytest.mark.full
@pytest.mark.parametrize("p, n", [(32, 16), (128, 64), (128, 128), (64, 256), (128, 256)])
def test_other_shapes_compile(p: int, n: int) -> None:
    """With Hopper's matrix instruction where a head fills it, except the largest, whose tiles would not fit."""
    for use in scan_uses(torch.bfloat16, True, p=p, n=n):
        assert use.shared <= SHARED, use
        assert use.mma == 0 or p < 64 or p * n > 128 * 128, use


@pytest.mark.full
@pytest.mark.parametrize("arch", [80, 89, 100])
def test_other_architectures_compile(arch: int) -> None:
    """In the shared memory of the smallest of them, without spills at the 8B shape (documents: one value per head)."""
    for p, n in ((64, 128), (128, 256)):
        for use in scan_uses(torch.bfloat16, True, p=p, n=n, arch=arch):
            assert use.shared <= 99 * 1024, use
            assert use.inner <= 1 or (p, n) != (64, 128), use


@pytest.mark.full
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 100, 3, 3), (1, 129, 6, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_small_and_odd_sizes_compile(sizes: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """An argument of 1 is a constant to the compiler, and a loop over it no loop."""
    for p, n in ((64, 128), (5, 3)):
        assert scan_uses(dtype, True, p=p, n=n, sizes=sizes, segments=True)


@pytest.mark.full
@pytest.mark.skipif("TRITON_36" not in os.environ, reason="TRITON_36 names no `pip install --target DIR triton==3.6.0`")
def test_under_triton_3_6() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not full", __file__]
    environment = os.environ | {"PYTHONPATH": os.environ["TRITON_36"]}
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
