"""The one Triton operator of a Mamba-2 layer in Triton's interpreter, against float64. Run by test_interpreter.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from bfloat16_shim import bfloat16  # noqa: F401
from mixer_cases import LAYOUTS, draw, mixer, oracle, results
from test_ssd import assert_close

from polylepis.kernels import triton_conv
from polylepis.kernels.ssd import triton_mixer

F32 = torch.float32
TOLERANCE = 1e-5
Tensors = dict[str, Tensor]


def exact(tensors: Tensors) -> Tensors:
    return {name: t.detach().double().requires_grad_() for name, t in tensors.items()}


def compare(tensors: Tensors, groups: int, tolerance: float = TOLERANCE, **options: Any) -> tuple[Tensor, ...]:
    """Outputs, states and every gradient by Triton against the sequential recurrence in float64."""
    got = results(mixer, tensors, groups, backend="triton", **options)
    known = {name: value for name, value in options.items() if name != "save_states"}
    assert_close(got, results(oracle, exact(tensors), groups, **known), tolerance)
    return got


@pytest.mark.parametrize(
    "shape, width, save",
    [
        ((1, 1, 1, 1, 1, 1), 4, False),
        ((2, 18, 4, 5, 2, 19), 4, False),
        pytest.param((2, 37, 4, 5, 2, 19), 4, False, marks=pytest.mark.full),
        ((1, 20, 3, 21, 3, 3), 2, True),
        pytest.param((2, 37, 4, 5, 2, 19), 4, True, marks=pytest.mark.full),
        pytest.param((1, 20, 3, 21, 3, 3), 2, False, marks=pytest.mark.full),
    ],
    ids=str,
)
def test_against_the_recurrence(shape: tuple[int, ...], width: int, save: bool) -> None:
    t = draw(*shape, width=width)
    if shape[1] == 1:  # a norm of one channel leaves only its sign: the gradients would be rounding errors
        t = {name: value for name, value in t.items() if name not in ("z", "norm_weight")}
    compare(t, shape[4], save_states=save)


def test_where_a_group_of_the_norm_almost_vanishes() -> None:
    """One token of row 1 does: the norm magnifies the rounding of y there, for the separate kernels just as much.

    Both are 1.6e-5 off in the gradient of C; torch, which rounds y a third as much, 4.8e-7.
    """
    compare(draw(2, 21, 4, 5, 2, 3), 2, tolerance=3e-5)


MARKS = {"mixed rows": (), "padding everywhere": ()}  # they hold what the others do


@pytest.mark.parametrize("layout", [pytest.param(n, marks=MARKS.get(n, pytest.mark.full)) for n in LAYOUTS])
def test_documents(layout: str) -> None:
    """Resets, one-token documents and padding, beside initial states of scan and convolution; padding gives zeros."""
    ids = LAYOUTS[layout]
    got = compare(draw(*ids.shape, 2, 3, 1, 2), 1, seq_idx=ids)
    assert (got[0][ids < 0] == 0).all()


@pytest.mark.parametrize(
    "absent",
    [
        ("z", "norm_weight"),
        ("conv_bias", "dt_bias", "D", "conv_state", "initial_states"),
        ("z", "norm_weight", "D", "initial_states"),
    ],
    ids="-".join,
)
def test_without_optional_arguments(absent: tuple[str, ...]) -> None:
    tensors = {name: t for name, t in draw(1, 21, 2, 3, 1, 2).items() if name not in absent}
    compare(tensors, 1, activation=None if "D" in absent else "silu")


def test_a_bias_per_token_and_limits() -> None:
    """dt then is float32 of its own beside the buffer."""
    t = draw(2, 20, 4, 3, 2, 2)
    t["dt_bias"] = torch.randn(2, 20, 4, generator=torch.Generator().manual_seed(3)).requires_grad_()
    compare(t, 2, dt_limit=(0.3, 0.9))


@pytest.mark.parametrize("ids", [None, LAYOUTS["padding everywhere"]], ids=["one document", "documents"])
def test_blocks_of_channels_and_several_walks(ids: Tensor | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """More channels than a block holds in x and in B, and more than one program along the row."""
    for name, size in {"TOKENS": 8, "CHANNELS": 16, "WALKED": 16, "SUMMED": 16, "SUMMED_PARTS": 2}.items():
        monkeypatch.setattr(triton_mixer, name, size)
    monkeypatch.setattr(triton_conv, "LEAST", 8)
    compare(draw(1, 37 if ids is None else ids.shape[1], 2, 9, 1, 17), 1, **({} if ids is None else {"seq_idx": ids}))


@pytest.mark.parametrize("loss_of", [0, 1, 2])
def test_one_output_alone(loss_of: int) -> None:
    t = draw(1, 18, 2, 3, 1, 2)
    used = {0: list(t), 1: ["x", "dt", "A", "B", "conv_weight", "dt_bias", "initial_states"], 2: ["x", "B", "C"]}
    grads = []
    for function, tensors, options in ((mixer, t, {"backend": "triton"}), (oracle, exact(t), {})):
        out = function(tensors, 1, **options)[loss_of]
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
        grads.append(torch.autograd.grad((out * weight).sum(), [tensors[name] for name in used[loss_of]]))
    assert_close(grads[0], grads[1], TOLERANCE)


def test_views_of_one_projection_and_one_gradient_buffer() -> None:
    """z, x, B, C and dt as views of one tensor; its gradient is the operator's buffer, not a copy."""
    from polylepis.kernels.columns import split_columns

    t = draw(2, 20, 2, 4, 1, 3)
    widths = [8, 8, 3, 3, 2]
    packed = torch.randn(2, 20, sum(widths), generator=torch.Generator().manual_seed(1)).requires_grad_()
    rest = {k: v for k, v in t.items() if k not in ("z", "x", "B", "C", "dt")}

    def layer(packed: Tensor, split: Any, function: Any, rest: Tensors, **options: Any) -> Tensor:
        z, x, B, C, dt = split(packed, widths)
        return function({**rest, "z": z, "x": x, "B": B, "C": C, "dt": dt}, 1, **options)[0]

    out = layer(packed, split_columns, mixer, rest, backend="triton")
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(4))
    (got,) = torch.autograd.grad((out * weight).sum(), packed)
    wide = packed.detach().double().requires_grad_()
    want = layer(wide, lambda v, w: v.split(w, dim=-1), oracle, exact(rest))
    assert_close((out.detach(), got), (want.detach(), *torch.autograd.grad((want * weight).sum(), wide)), TOLERANCE)

    made: list[Tensor] = []
    original = triton_mixer.conv_gradients
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_mixer, "conv_gradients", lambda *a: (made.append(a[-1]), original(*a))[1])
        out = layer(packed, split_columns, mixer, rest, backend="triton")
        (got,) = torch.autograd.grad(out.sum(), packed)
    assert got.untyped_storage().data_ptr() == made[0].untyped_storage().data_ptr() and got.is_contiguous()


def test_one_launch_precedes_the_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[str] = []

    class Counted:
        def __init__(self, name: str, kernel: Any) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: Any) -> Any:
            launches.append(self.name)
            return self.kernel[grid]

    from polylepis.kernels import triton_norm
    from polylepis.kernels.ssd import triton_backward, triton_forward

    for module in (triton_mixer, triton_forward, triton_backward, triton_conv, triton_norm):
        for name, kernel in list(vars(module).items()):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Counted(name, kernel))
    t = {name: v.detach() for name, v in draw(1, 18, 2, 3, 1, 2).items()}
    mixer(t, 1, backend="triton")
    assert launches == ["mixer_prep_kernel", "state_pass_kernel", "output_kernel", "norm_kernel"]


def test_two_runs_are_bitwise_equal() -> None:
    t = draw(1, 37, 2, 3, 1, 2)
    first, second = (results(mixer, t, 1, backend="triton", seq_idx=LAYOUTS["padding everywhere"]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_extreme_decays_stay_finite() -> None:
    t = draw(1, 40, 2, 3, 1, 2)
    with torch.no_grad():
        t["A"].fill_(-64.0)
        t["dt"].fill_(20.0)
        t["dt"][:, ::7] = -20.0
    assert all(torch.isfinite(v).all() for v in results(mixer, t, 1, backend="triton"))


def test_compiles_into_one_graph() -> None:
    t = draw(1, 18, 2, 3, 1, 2)
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    got = results(lambda *a, **k: compiled(*a, **k), t, 1, backend="triton")
    assert_close(got, results(mixer, t, 1, backend="triton"), TOLERANCE)


def test_refusals() -> None:
    t = {name: v.detach() for name, v in draw(1, 6, 2, 3, 1, 2).items()}
    cases: list[tuple[Tensors, str]] = [
        ({"B": t["B"].bfloat16()}, "B is torch.bfloat16, expected torch.float32 as x"),
        ({"x": t["x"].double()}, "x is torch.float64, expected float32, bfloat16 or float16"),
        ({"conv_weight": torch.zeros(10, 8), "conv_state": torch.zeros(1, 10, 7)}, "weight has width 8"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            mixer({**t, **change}, 1, backend="triton")


@pytest.mark.usefixtures("bfloat16")
def test_bfloat16() -> None:
    t = draw(1, 21, 4, 4, 2, 5, torch.float64)
    rounded = {k: v.detach().bfloat16().double().requires_grad_() for k, v in t.items()}
    low = {k: v.detach().bfloat16().requires_grad_() for k, v in rounded.items()}
    got = results(mixer, low, 2, backend="triton")
    assert got[0].dtype == torch.bfloat16 and got[1].dtype == F32 and all(g.dtype == torch.bfloat16 for g in got[3:])
    assert_close(got, results(oracle, rounded, 2), 2e-2)  # worst 0.9 %, the gradient of C


def test_compiled_gradients_stay_in_one_buffer() -> None:
    """The backward graph hands the operator's buffer on: nothing is put together again, and the gradient is eager's."""
    from torch._dynamo.backends.common import aot_autograd

    from polylepis.kernels.columns import split_columns

    t = draw(1, 18, 2, 4, 1, 3)
    rest = {k: v for k, v in t.items() if k not in ("z", "x", "B", "C", "dt")}
    packed = torch.randn(1, 18, 24, generator=torch.Generator().manual_seed(1)).requires_grad_()
    seen: list[str] = []

    def layer(packed: Tensor) -> Tensor:
        z, x, B, C, dt = split_columns(packed * 2.0, (8, 8, 3, 3, 2))
        return mixer({**rest, "z": z, "x": x, "B": B, "C": C, "dt": dt}, 1, backend="triton")[0]

    def note(graph: Any, _: Any) -> Any:
        seen.append(" ".join(str(node.target) for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    compiled = torch.compile(layer, fullgraph=True, backend=aot_autograd(fw_compiler=note, bw_compiler=note))
    grads = [torch.autograd.grad(f(packed).square().sum(), packed)[0] for f in (compiled, layer)]
    assert_close(grads[:1], grads[1:], TOLERANCE)
    assert "mixer_backward" in seen[-1] and "aten.cat" not in seen[-1]
