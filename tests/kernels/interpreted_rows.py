"""The Triton convolution, norms and decode steps in Triton's interpreter. Run by test_interpreter.py."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from bfloat16_shim import bfloat16  # noqa: F401
from test_conv import DOCUMENTS
from test_conv import draw as draw_conv
from test_ssd import assert_close, packed
from test_ssd import draw as draw_scan

from polylepis.kernels import triton_conv
from polylepis.kernels.conv import causal_conv1d, causal_conv1d_step
from polylepis.kernels.norm import gated_rms_norm, rms_norm, rms_norm_residual
from polylepis.kernels.ssd import ssd_step

F32 = torch.float32
TOLERANCE = 1e-5


def results(f: Callable[..., Any], tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """Outputs of f and the gradients of a random projection of them."""
    out = f(*tensors)
    out = out if isinstance(out, tuple) else (out,)
    rng = torch.Generator().manual_seed(5)
    loss = sum((o * torch.randn(o.shape, generator=rng).to(o.dtype)).sum() for o in out)
    return (*(o.detach() for o in out), *torch.autograd.grad(loss, tensors))


def compare(f: Callable[..., Any], tensors: list[Tensor]) -> None:
    """f(backend, *tensors) by Triton in float32 against torch in float64."""
    exact = [t.detach().double().requires_grad_() for t in tensors]
    want = results(lambda *t: f("torch", *t), exact)
    assert_close(results(lambda *t: f("triton", *t), tensors), want, TOLERANCE)


@pytest.mark.parametrize("ids", [None, DOCUMENTS], ids=["one document", "documents"])
@pytest.mark.parametrize("width, start, bias, activation", [
    (1, False, True, "silu"), (2, True, False, None), (3, True, True, "silu"), (4, True, True, "silu"),
    (4, False, True, None),
])  # fmt: skip
def test_convolution(width: int, start: bool, bias: bool, activation: str | None, ids: Tensor | None) -> None:
    t = draw_conv(2, 12, 3, width, F32)

    def conv(backend: str, x: Tensor, weight: Tensor, *rest: Tensor) -> Any:
        rest_of = iter(rest)
        return causal_conv1d(
            x,
            weight,
            next(rest_of) if bias else None,
            activation=activation,
            seq_idx=ids,
            initial_state=next(rest_of) if start else None,
            return_final_state=True,
            backend=backend,
        )

    names = ["x", "weight", *(["bias"] if bias else []), *(["initial_state"] if start else [])]
    compare(conv, [t[name] for name in names])


LONGER = [pytest.param(l, marks=pytest.mark.full) for l in (63, 64, 65, 127, 128, 129, 256, 257)]


@pytest.mark.parametrize("l", [1, 2, 31, 32, 33, 70, *LONGER])
def test_convolution_lengths(l: int) -> None:
    """Around the tile, and slices of a wider projection with 130 channels."""
    t = draw_conv(1, l, 130, 4, F32)
    wide = torch.randn(1, l, 150, requires_grad=True)

    def conv(backend: str, x: Tensor, weight: Tensor, bias: Tensor, start: Tensor) -> Any:
        return causal_conv1d(x[..., 7:137], weight, bias, initial_state=start, backend=backend)

    compare(conv, [wide, t["weight"], t["bias"], t["initial_state"]])


@pytest.fixture
def short_walks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of 16 tokens and 4 channels, which take 4 rows at a time, and partial sums of 2 parts at a time."""
    sizes = {"TOKENS": 16, "CHANNELS": 1, "WALKED": 4, "LEAST": 16, "PARTS": 64, "SUMMED_PARTS": 2, "SUMMED": 4}
    for name, size in sizes.items():
        monkeypatch.setattr(triton_conv, name, size)


# Where a step of 4 may not be taken for one document: runs begin 2 before a step or at its last token (11, 19; 2, 30),
# and 0 or 1 before it for widths 2 and 3 (52, 59), at the start of a program of 16 and within; padding everywhere
RUNS = ((-1, 2), (0, 9), (3, 8), (1, 11), (2, 9), (5, 1), (6, 1), (-1, 1), (-2, 3), (4, 6), (-1, 1), (7, 7), (8, 6))


@pytest.mark.usefixtures("short_walks")
@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("ids", [None, packed(*RUNS)], ids=["one document", "documents"])
def test_convolution_around_steps_and_programs(width: int, ids: Tensor | None) -> None:
    """Lengths of a step of 4, of a program of 16 and of several ± 1; with an initial state and without."""
    for l in {1: (65,), 2: (65,), 3: (65,), 4: (1, 3, 4, 5, 15, 16, 17, 65)}[width]:
        t = draw_conv(1, l, 5, width, F32)

        def conv(backend: str, x: Tensor, weight: Tensor, bias: Tensor, *initial: Tensor, l: int = l) -> Any:
            seq_idx, before = None if ids is None else ids[:, :l], initial[0] if initial else None
            return causal_conv1d(x, weight, bias, initial_state=before, seq_idx=seq_idx, backend=backend)

        if width > 1:
            compare(conv, list(t.values()))
        if width == 1 or (width == 4 and l == 65):
            compare(conv, list(t.values())[:3])


def test_convolution_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that walk over more than the least; bitwise equal."""
    monkeypatch.setattr(triton_conv, "PARTS", 2)
    t = draw_conv(1, 150, 5, 4, F32)
    compare(lambda backend, *a: causal_conv1d(*a[:3], initial_state=a[3], backend=backend), list(t.values()))
    first, second = (
        results(lambda *a: causal_conv1d(*a[:3], initial_state=a[3], backend="triton"), list(t.values()))
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("group", [12, 4, 1])
def test_gated_norm(group: int) -> None:
    wide = torch.randn(2, 5, 30, requires_grad=True)
    weight = torch.randn(12, requires_grad=True)

    def norm(backend: str, wide: Tensor, weight: Tensor) -> Tensor:
        return gated_rms_norm(wide[..., :12], wide[..., 15:27], weight, group_size=group, backend=backend)

    compare(norm, [wide, weight])


def test_norms() -> None:
    x, residual = (torch.randn(3, 7, 20, requires_grad=True) for _ in range(2))
    weight = torch.randn(20, requires_grad=True)
    compare(lambda backend, *t: rms_norm(*t, 1e-3, backend=backend), [x, weight])
    compare(lambda backend, *t: rms_norm_residual(*t, backend=backend), [x, residual, weight])
    # either output alone
    for index in (0, 1):
        used = [x, residual, weight] if index == 0 else [x, residual]
        rest = [] if index == 0 else [weight.detach()]
        compare(lambda backend, *t, i=index, r=rest: rms_norm_residual(*t, *r, backend=backend)[i], used)  # type: ignore


# rows around the blocks of both directions and around what a program walks over: 16 channels are taken 64 rows at a
# time by the forward and 32 by the backward, 4 blocks per program of the forward
ROWS = [
    *((rows, 12, 3) for rows in (1, 31, 32, 33, 63, 64, 65, 257)),
    *((rows, 300, 2) for rows in (1, 2, 3, 9)),
    *((rows, 600, 5) for rows in (1, 4, 5)),
    (13, 1100, 1),
    (7, 2100, 1),
    (70, 1, 40),
]


@pytest.mark.parametrize("rows, size, groups", ROWS)
def test_norm_of_many_rows(rows: int, size: int, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from polylepis.kernels import triton_norm

    monkeypatch.setattr(triton_norm, "WARPS", 1)  # several rows per program, and one part or few
    d = size * groups
    wide, weight = torch.randn(rows, 2 * d + 8, requires_grad=True), torch.randn(d, requires_grad=True)

    def norm(backend: str, wide: Tensor, weight: Tensor) -> Tensor:
        return gated_rms_norm(wide[:, :d], wide[:, -d:], weight, group_size=size, backend=backend)

    compare(norm, [wide, weight])
    x, residual = wide.detach()[:, :d].clone().requires_grad_(), wide.detach()[:, d : 2 * d].clone().requires_grad_()
    monkeypatch.setattr(triton_norm, "WARPS", 6)
    compare(lambda backend, *t: rms_norm_residual(*t, backend=backend), [x, residual, weight])


def test_gradient_of_the_gate_lands_in_rows_of_a_wider_tensor() -> None:
    from polylepis.kernels.triton_norm import norm_backward, norm_forward

    x, z, dy = (torch.randn(2, 5, 12) for _ in range(3))
    weight, wide = torch.randn(12), torch.full((2, 5, 30), 7.0)
    _, _, rstd = norm_forward(x, z, None, weight, 4, 1e-5)
    want = norm_backward(dy, None, x, z, weight, rstd, 4)
    got = norm_backward(dy, None, x, z, weight, rstd, 4, wide[..., 9:21])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert torch.equal(wide[..., 9:21], want[1])
    assert (wide[..., :9] == 7).all() and (wide[..., 21:] == 7).all()


def test_norm_of_extreme_gates() -> None:
    """Where exp overflows, a gate is nothing or itself."""
    z = torch.tensor([-200.0, -89.0, -88.0, -20.0, 0.0, 20.0, 89.0, 200.0])
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    z = z.expand(4, 8).clone().requires_grad_()
    compare(lambda backend, *t: gated_rms_norm(*t, group_size=8, backend=backend), [x, z, weight])


@pytest.mark.parametrize("batch, p, many", [(1, 5, False), (3, 5, True), (1, 33, False), (2, 70, True)])
def test_decode_steps(batch: int, p: int, many: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from polylepis.kernels.ssd import triton_step

    monkeypatch.setattr(triton_step, "MANY", 1 if many else 1000)
    t = {k: v.detach() for k, v in draw_scan(batch, 1, 4, p, 2, 19, F32).items()}
    token = {k: v[:, 0] if v.dim() > 2 and k != "initial_states" else v for k, v in t.items()}
    state = token.pop("initial_states")
    for limit in ((0.0, float("inf")), (0.3, 0.9)):
        options: dict[str, Any] = {"dt_softplus": True, "dt_limit": limit}
        want = ssd_step(state, **token, **options)
        assert_close(ssd_step(state, **token, **options, backend="triton"), want, TOLERANCE)
    bare = {k: v for k, v in token.items() if k not in ("D", "z", "dt_bias")}
    bare["dt"] = bare["dt"].abs()
    assert_close(ssd_step(state, **bare, backend="triton"), ssd_step(state, **bare), TOLERANCE)
    for width in (1, 2, 4):
        c = {k: v.detach() for k, v in draw_conv(batch, 1, 130, width, F32).items()}
        args = (c["x"][:, 0], c["initial_state"], c["weight"], c["bias"])
        got, want = (causal_conv1d_step(*args, backend=backend) for backend in ("triton", "torch"))
        assert_close(got, want, TOLERANCE)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_decode_in_place(backend: str) -> None:
    """Rows of a larger state, in any order and by any strides; padding gives 0 and touches nothing."""
    t = {k: v.detach() for k, v in draw_scan(3, 1, 4, 5, 2, 7, F32).items()}
    token = {k: v[:, 0] if v.dim() > 2 and k != "initial_states" else v for k, v in t.items()}
    held = torch.randn(6, 4, 7, 5).transpose(2, 3)
    before, places = held.clone(), torch.tensor([4, -1, 0], dtype=torch.int32)
    token.pop("initial_states")
    want, moved = ssd_step(held[[4, 0, 0]], **token, dt_softplus=True, backend="torch")
    y, state = ssd_step(held, **token, dt_softplus=True, in_place=True, places=places, backend=backend)
    assert state is held
    assert_close((y[[0, 2]], held[4], held[0]), (want[[0, 2]], moved[0], moved[2]), TOLERANCE)
    assert (y[1] == 0).all() and torch.equal(held[[1, 2, 3, 5]], before[[1, 2, 3, 5]])
    whole = before[:3].clone()
    y, state = ssd_step(whole, **token, dt_softplus=True, in_place=True, backend=backend)
    assert_close((y, whole), ssd_step(before[:3], **token, dt_softplus=True, backend="torch"), TOLERANCE)
    for change, message in (
        ({"in_place": False}, "places was given without in_place"),
        ({"places": torch.zeros(2)}, "places has shape"),
        ({"x": token["x"].clone().requires_grad_()}, "in_place is True, expected no gradients"),
    ):
        options: dict[str, Any] = {**token, "in_place": True, "places": places, "backend": backend} | change
        with pytest.raises(ValueError, match=message):
            ssd_step(held, **options)


def test_compiles_into_one_graph() -> None:
    t = draw_conv(1, 9, 8, 4, F32)
    norm_weight = torch.randn(8, requires_grad=True)

    def layer(x: Tensor, weight: Tensor, bias: Tensor, start: Tensor, scale: Tensor) -> Tensor:
        y = causal_conv1d(x, weight, bias, initial_state=start, backend="triton")
        return gated_rms_norm(y, x, scale, group_size=4, backend="triton")

    tensors = [*t.values(), norm_weight]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_close(results(compiled, tensors), results(layer, tensors), TOLERANCE)


def test_refusals() -> None:
    t = {k: v.detach() for k, v in draw_conv(1, 5, 3, 4, F32).items()}
    with pytest.raises(ValueError, match=r"x is torch.float64, expected float32, bfloat16 or float16"):
        causal_conv1d(t["x"].double(), t["weight"], backend="triton")
    with pytest.raises(ValueError, match="weight has width 8, expected at most 4"):
        causal_conv1d(t["x"], torch.zeros(3, 8), backend="triton")
    with pytest.raises(ValueError, match="weight is on meta, expected cpu as x"):
        rms_norm(t["x"], torch.ones(3, device="meta"), backend="triton")
    with pytest.raises(ValueError, match="no gradients"):
        causal_conv1d_step(t["x"][:, 0], t["initial_state"].requires_grad_(), t["weight"], backend="triton")


@pytest.mark.usefixtures("bfloat16")
def test_bfloat16() -> None:
    exact = {k: v.detach().bfloat16().double().requires_grad_() for k, v in draw_conv(2, 12, 8, 4).items()}
    norm_weight = torch.randn(8).bfloat16().double().requires_grad_()

    def layer(backend: str, x: Tensor, weight: Tensor, bias: Tensor, start: Tensor, scale: Tensor) -> Tensor:
        ids = DOCUMENTS.T.contiguous().T
        y = causal_conv1d(x, weight, bias, initial_state=start, seq_idx=ids, backend=backend)
        return gated_rms_norm(y, x, scale, group_size=4, backend=backend)

    tensors = [*exact.values(), norm_weight]
    low = [t.detach().bfloat16().requires_grad_() for t in tensors]
    got = results(lambda *t: layer("triton", *t), low)
    assert all(t.dtype == torch.bfloat16 for t in got)
    assert_close(got, results(lambda *t: layer("torch", *t), tensors), 2e-2)
