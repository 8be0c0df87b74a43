"""No kernel reads or writes beside its tensors: each lies between pages that nobody may touch, so that a stray access
kills the process. Run by test_interpreter.py, which sees that.

On a GPU such a read is often harmless, until a tensor lies at the end of what the process owns.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

if sys.platform != "linux":
    pytest.skip("mprotect is called as Linux has it", allow_module_level=True)
sys.path.insert(0, str(Path(__file__).parent))
from test_ssd import packed

from polylepis.kernels import triton_conv, triton_norm
from polylepis.kernels.conv import document_runs, run_code
from polylepis.kernels.ssd import triton_mixer, triton_scan, triton_step
from polylepis.kernels.ssd.operators import segment_code

PAGE = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)
aten = torch.ops.aten
# what the launches allocate with
FACTORIES = (aten.empty.memory_format, aten.new_empty.default, aten.empty_like.default)


def fenced(shape: tuple[int, ...], dtype: torch.dtype, at_end: bool) -> Tensor:
    """Memory of NaN or −1 whose end (or start) borders on a page without any rights, its other side on one as well."""
    size = dtype.itemsize
    for length in shape:
        size *= length
    if size == 0:
        return torch.zeros(shape, dtype=dtype)
    pages = -(-size // PAGE)
    region = mmap.mmap(-1, (pages + 2) * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(region))
    for guard in (start, start + (pages + 1) * PAGE):
        if libc.mprotect(ctypes.c_void_p(guard), PAGE, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = PAGE + (pages * PAGE - size if at_end else 0)
    flat = torch.frombuffer(region, dtype=dtype, count=size // dtype.itemsize, offset=offset)
    return flat.fill_(torch.nan if dtype.is_floating_point else -1).view(shape)


class Fence(TorchDispatchMode):
    """Every tensor that is allocated inside lies between guard pages."""

    def __init__(self, at_end: bool) -> None:
        super().__init__()
        self.at_end = at_end

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return fenced(tuple(out.shape), out.dtype, self.at_end) if func in FACTORIES else out


@pytest.fixture(params=[True, False], ids=["end", "start"])
def fence(request: pytest.FixtureRequest) -> Iterator[Fence]:
    with Fence(request.param) as mode:
        yield mode


def draw(fence: Fence, *shape: int) -> Tensor:
    return fenced(shape, torch.float32, fence.at_end).copy_(torch.randn(shape))


def ids_of(fence: Fence, l: int, documents: bool) -> Tensor | None:
    """Two documents and padding, or none."""
    if not documents:
        return None
    cut = l // 3
    return packed((0, l - cut), (-1, cut // 2), (1, cut - cut // 2)).expand(2, -1)


def inside(fence: Fence, t: Tensor | None) -> Tensor | None:
    return None if t is None else fenced(tuple(t.shape), t.dtype, fence.at_end).copy_(t)


def lengths(few: tuple[int, ...], more: tuple[int, ...]) -> list[Any]:
    """(tokens, documents): a few always, the others in `make test-full`."""
    full = [(l, documents) for l in (*few, *more) for documents in (False, True) if l in more or not documents]
    return [(l, True) for l in few] + [pytest.param(*case, marks=pytest.mark.full) for case in full]


# chunks of 32 in tiles of 16: the last one ends inside its first tile, inside its second, or with it
@pytest.mark.parametrize(("l", "documents"), lengths((37, 49), (1, 5, 16, 21, 32)))
def test_scan(l: int, documents: bool, fence: Fence) -> None:
    b, h, p, g, n = 2, 2, 5, 1, 3
    x, dt, B, C, dy = (draw(fence, b, l, *rest) for rest in ((h, p), (h,), (g, n), (g, n), (h, p)))
    A, bias, D, start, dfinal = draw(fence, h), draw(fence, h), draw(fence, h), *(draw(fence, b, h, p, n) for _ in "ab")
    code = inside(fence, segment_code(ids_of(fence, l, documents)))
    how = triton_scan.Discretisation(True, True, 0.0, float("inf"))
    scan = triton_scan.plan(x, dt, -A.abs(), bias, B, C, D, code, how, 32)
    cs, scale = triton_scan.decays(scan)
    states, _ = triton_scan.pass_states(scan, cs, scale, start)
    y = triton_scan.outputs(scan, cs, scale, states)
    grads = triton_scan.gradients(scan, cs, scale, states, dy, dfinal)
    assert all(t is not None and t.isfinite().all() for t in (y, *grads))
    core = triton_scan.plan(x, -dt.abs(), dt, None, B, C, D, code, how._replace(on=False, softplus=False), 32)
    cs, scale = triton_scan.decays(core)
    reach = cs.new_empty(b, h, core.chunks)
    states, _ = triton_scan.pass_states(core, cs, scale, None, reach=reach)
    y = triton_scan.outputs(core, cs, scale, states, reach, start)
    grads = triton_scan.entry_gradients(core, cs, scale, reach, start, dy)
    assert all(t.isfinite().all() for t in (y, *grads))


@pytest.mark.parametrize(("l", "documents"), lengths((3, 34), (1, 5, 16, 31, 32, 65)))
def test_convolutions(l: int, documents: bool, fence: Fence) -> None:
    inner, state, heads = 6, 4, 2
    channels, ids = inner + 2 * state, ids_of(fence, l, documents)
    runs = (None, None) if ids is None else document_runs(ids)
    code = inside(fence, run_code(*runs))
    xBC, dy = draw(fence, 2, l, channels), draw(fence, 2, l, channels)
    weight, bias, start = draw(fence, channels, 4), draw(fence, channels), draw(fence, 2, channels, 3)
    for first in (start,) if documents else (None, start):
        y = triton_conv.conv_forward(xBC, weight, bias, first, code, True)
        grads = triton_conv.conv_backward(dy, xBC, weight, bias, first, code, True)
        assert all(t is None or t.isfinite().all() for t in (y, *grads))
        parts = [draw(fence, 2, l, width) for width in (inner, state, state)]
        conv = triton_mixer.Convolution.of((*parts,), weight, bias, first, code, True)
        how = triton_scan.Discretisation(True, True, 0.0, float("inf"))
        per_head = [draw(fence, heads) for _ in range(3)]
        scans = inside(fence, segment_code(ids))
        decays = triton_mixer.Decays(draw(fence, 2, l, heads), -per_head[0].abs(), *per_head[1:], scans, how, 1)
        convolved, _, cs, scale = triton_mixer.prepare(conv, decays, 16)
        out = fenced((2, l, channels), torch.float32, fence.at_end)
        grads = triton_mixer.conv_gradients(conv, *(torch.ones_like(t) for t in parts), out)
        assert all(t is None or t.isfinite().all() for t in (convolved, cs, scale, out, *grads))
    triton_conv.conv_step(xBC[:, 0].contiguous(), start, weight, bias, True)


@pytest.mark.parametrize(("rows", "d", "group"), [(1, 5, 5), (3, 12, 4), (9, 40, 20), (17, 6, 6)])
def test_norms(rows: int, d: int, group: int, fence: Fence) -> None:
    x, z, dy = (draw(fence, rows, d) for _ in range(3))
    weight = draw(fence, d)
    for gate, residual in ((z, None), (None, None), (None, z)):
        y, summed, rstd = triton_norm.norm_forward(x, gate, residual, weight, group, 1e-5)
        given = x if residual is None else summed
        grads = triton_norm.norm_backward(dy, residual, given, gate, weight, rstd, group)
        assert all(t.isfinite().all() for t in (y, *grads))


@pytest.mark.parametrize("b", [1, 3])
def test_decode_step(b: int, fence: Fence) -> None:
    h, p, g, n = 2, 5, 1, 3
    state, x, z = draw(fence, b, h, p, n), draw(fence, b, h, p), draw(fence, b, h, p)
    A, D, bias, dt = draw(fence, h), draw(fence, h), draw(fence, h), draw(fence, b, h)
    B, C = draw(fence, b, g, n), draw(fence, b, g, n)
    y, new = triton_step.scan_step(state, x, dt, -A.abs(), B, C, D, z, bias, True, 0.0, float("inf"))
    assert y.isfinite().all() and new.isfinite().all()
