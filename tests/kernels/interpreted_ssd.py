"""The Triton scan in Triton's interpreter against the sequential recurrence in float64. Run by test_interpreter.py."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from bfloat16_shim import bfloat16  # noqa: F401
from segment_cases import DOCUMENTS
from segment_cases import results as segments
from test_ssd import LAYOUTS, assert_close, draw, packed, run

from polylepis.kernels.ssd import enter, ssd, ssd_core, ssd_reference, summarise, triton_scan
from polylepis.kernels.ssd.triton_config import INTERPRETER

F32 = torch.float32
TOLERANCE = 1e-5


def triton(**kw: Any) -> Any:
    return ssd(**{"chunk_size": 32, "backend": "triton", **kw})


def exact(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().double().requires_grad_() for name, t in tensors.items()}


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Replace fields of the interpreter's configuration."""

    def change(**fields: Any) -> None:
        monkeypatch.setattr(triton_scan, "INTERPRETER", INTERPRETER._replace(**fields))

    yield change


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1, 1), (2, 37, 4, 5, 2, 19), (1, 20, 3, 21, 3, 3)], ids=str)
def test_against_reference(shape: tuple[int, ...], save: bool) -> None:
    t = draw(*shape, F32)
    # one token has no decay gradient beyond the initial state's
    assert_close(run(triton, t, save_states=save), run(ssd_reference, exact(t)), TOLERANCE)


def test_chunk_of_several_row_tiles_and_split_heads(config: Any) -> None:
    """Row tiles below the chunk, states cut into blocks, and heads of a group in several programs."""
    t = draw(1, 45, 4, 24, 1, 8, F32)
    want = run(ssd_reference, exact(t))
    for slots in (1, 12, 1000):
        config(slots=slots)
        assert_close(run(triton, t, chunk_size=32), want, TOLERANCE)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_documents_against_reference(layout: str) -> None:
    ids = LAYOUTS[layout]
    t = draw(1, ids.shape[1], 2, 3, 1, 2, F32)
    got = run(triton, t, seq_idx=ids)
    assert_close(got, run(ssd_reference, exact(t), seq_idx=ids), TOLERANCE)
    assert (got[0][ids < 0] == 0).all()


def test_core_and_either_output_alone() -> None:
    t = draw(1, 21, 2, 3, 1, 2, F32)
    t["log_decay"] = (-t["dt"].abs()).detach().requires_grad_()
    names = ("x", "log_decay", "dt", "B", "C", "D", "initial_states")
    for index in (0, 1):
        grads = []
        for tensors, backend in ((t, "triton"), (exact(t), "torch")):
            x, decay, scale, B, C, D, initial = (tensors[name] for name in names)
            out = ssd_core(
                *(x, decay, scale, B, C),
                D=D,
                initial_states=initial,
                chunk_size=16,
                return_final_states=True,
                backend=backend,
            )[index]
            weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
            used = [tensors[n] for n in names if index == 0 or n not in ("C", "D")]
            grads.append((out.detach(), *torch.autograd.grad((out * weight).sum(), used)))
        assert_close(grads[0], grads[1], TOLERANCE)


@settings(max_examples=4, deadline=None, derandomize=True)
@given(st.integers(2, 40), st.integers(1, 39), st.booleans(), st.integers(0, 1000))
def test_split_invariance(l: int, cut: int, with_documents: bool, seed: int) -> None:
    k = min(cut, l - 1)
    t = draw(1, l, 2, 3, 1, 2, F32, seed=seed)
    ids = (torch.rand(1, l, generator=torch.Generator().manual_seed(seed)) < 0.2).cumsum(1) if with_documents else None
    if ids is not None:
        ids[:, k] = ids[:, k - 1]
        ids[:, k:] = ids[:, k:].cummax(1).values

    def in_two(**kw: Any) -> tuple[Tensor, Tensor]:
        names = ("x", "dt", "B", "C", "z")
        first = {n: v[:, :k] if n in names else v for n, v in kw.items()}
        second = {n: v[:, k:] if n in names else v for n, v in kw.items()}
        left, right = (None, None) if ids is None else (ids[:, :k], ids[:, k:])
        y1, state = triton(**first, seq_idx=left)
        y2, final = triton(**{**second, "initial_states": state}, seq_idx=right)
        return torch.cat([y1, y2], dim=1), final

    assert_close(run(in_two, t), run(triton, t, seq_idx=ids), TOLERANCE)


@pytest.mark.parametrize("A, dt", [(-64.0, 20.0), (-64.0, -20.0), (-16.0, 20.0), (-1e4, 1e4)])
def test_extreme_decays_stay_finite(A: float, dt: float) -> None:
    t = draw(1, 40, 2, 3, 1, 2, F32)
    with torch.no_grad():
        t["A"].fill_(A)
        t["dt"].fill_(dt)
        t["dt_bias"].zero_()
        t["dt"][:, ::7] = 0.01
    ids = packed((-1, 3), (0, 15), (1, 12), (-1, 10))
    for seq_idx in (None, ids):
        want = run(ssd_reference, exact(t), seq_idx=seq_idx)
        assert_close(run(triton, t, seq_idx=seq_idx), want, 2e-4, least=1.0)


def test_isolation_is_exact() -> None:
    ids = packed((0, 11), (-1, 4), (1, 13), (-1, 3))
    t = draw(1, 31, 2, 3, 1, 2, F32)
    y, final = triton(**t, dt_softplus=True, seq_idx=ids, return_final_states=True)
    tokens = [t[k] for k in ("x", "dt", "B", "C", "z")]
    loss = y[:, 12:].square().sum() + final.square().sum()
    *grads, start = torch.autograd.grad(loss, [*tokens, t["initial_states"]], retain_graph=True)
    for grad in grads:
        assert (grad[ids != 1] == 0).all() and (grad[ids == 1] != 0).any()
    assert (start == 0).all()
    for grad in torch.autograd.grad(y[:, :12].square().sum(), tokens):
        assert (grad[ids != 0] == 0).all()


def test_two_runs_are_bitwise_equal(config: Any) -> None:
    config(slots=1000)
    t = draw(1, 33, 4, 3, 2, 2, F32)
    ids = packed((0, 20), (1, 13))
    for a, b in zip(run(triton, t, seq_idx=ids), run(triton, t, seq_idx=ids), strict=True):
        assert torch.equal(a, b)


def test_non_contiguous_slices() -> None:
    """x, B and C as slices of one projection, a transposed gradient, an expanded one, and a dt_bias per token."""
    wide = torch.randn(2, 20, 8 + 2 * 3, requires_grad=True)
    x, B, C = (part.unflatten(-1, (-1, k)) for part, k in zip(wide.split([8, 3, 3], -1), (4, 3, 3), strict=True))
    bias, dt, A = torch.randn(2, 20, 2), torch.randn(2, 2, 20).transpose(1, 2), -torch.rand(2)
    weight = torch.randn(4, 2, 20, 2).permute(3, 2, 1, 0)
    for w in (weight, torch.ones(()).expand(2, 20, 2, 4)):
        got, want = (
            torch.autograd.grad((f(x=x, dt=dt, A=A, B=B, C=C, dt_bias=bias, dt_softplus=True) * w).sum(), wide)[0]
            for f in (triton, ssd_reference)
        )
        assert_close((got,), (want,), TOLERANCE)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that nobody has written holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def guarded(t: Tensor) -> Tensor:
    """A leaf of t's values amid NaN around its tokens and channels; parameters per head as they are."""
    if t.dim() < 3:
        return t.detach().requires_grad_()
    wide = torch.full((t.shape[0], t.shape[1] + 40, *(size + 3 for size in t.shape[2:])), torch.nan)
    view = wide[:, 4 : 4 + t.shape[1]][(..., *(slice(1, 1 + size) for size in t.shape[2:]))]
    return view.copy_(t.detach()).detach().requires_grad_()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("ids", [None, packed((0, 20), (-1, 9), (1, 8))], ids=["one document", "documents"])
def test_nothing_unwritten_or_outside_is_read(ids: Tensor | None, save: bool) -> None:
    """The last chunk ends inside its first tile, and channels, heads and states are no powers of two."""
    assert torch.empty(3).isnan().all()
    t = {name: tensor for name, tensor in draw(2, 37, 6, 5, 2, 19, F32).items() if name != "z"}
    ids = None if ids is None else ids.expand(2, -1)
    results = []
    for tensors, function in (({k: guarded(v) for k, v in t.items()}, triton), (exact(t), ssd_reference)):
        options = {"save_states": save} if function is triton else {}
        out = function(**tensors, dt_softplus=True, seq_idx=ids, return_final_states=True, **options)
        rng = torch.Generator().manual_seed(1)
        weights = [torch.randn(o.shape, generator=rng) for o in out]
        grads = [guarded(weights[0]) if function is triton else weights[0].double(), weights[1].to(out[1].dtype)]
        results.append([*(o.detach() for o in out), *torch.autograd.grad(out, list(tensors.values()), grads)])
    assert_close(*results, TOLERANCE)


def test_dt_limit_clamps() -> None:
    t = draw(1, 20, 2, 3, 1, 2, F32)
    want = run(ssd_reference, exact(t), dt_limit=(0.3, 0.9))
    assert_close(run(triton, t, dt_limit=(0.3, 0.9)), want, TOLERANCE)


def test_offsets_beyond_32_bits() -> None:
    """Rows of a batch, or heads of dt, so far apart that offsets need 64 bits; what lies between is never touched."""
    far = 2**31 + 64
    store = torch.empty(far + 4096, dtype=torch.float16)
    t = {k: v.detach() for k, v in draw(2, 20, 3, 4, 1, 3, F32).items() if k in ("x", "dt", "A", "B", "C")}
    t["x"] = t["x"].half()
    for name, strides in (("x", (far, 12, 4, 1)), ("dt", (20, 1, far // 2))):
        distant = store.as_strided(t[name].shape, strides)
        distant.copy_(t[name])
        results = []
        for tensor in (distant, distant.clone()):
            leaves = {k: v.detach().requires_grad_() for k, v in (t | {name: tensor}).items()}
            y = triton(**leaves, dt_softplus=True)
            results.append((y, *torch.autograd.grad(y.float().square().sum(), list(leaves.values()))))
        for got, want in zip(*results, strict=True):
            assert torch.equal(got, want) and got.abs().sum() > 0


def test_one_token_by_a_meaningless_stride() -> None:
    t = {k: v.detach() for k, v in draw(2, 1, 2, 4, 1, 3, F32).items() if k in ("x", "dt", "A", "B", "C")}
    strange = t | {"x": t["x"].as_strided((2, 1, 2, 4), (8, 1 << 25, 4, 1))}
    assert torch.equal(triton(**strange), triton(**t))


@pytest.mark.parametrize(
    "token, reader, size, scale, behind",
    [(15, 17, 4.0, 1e4, -torch.inf), (15, 17, 4.0, 1e4, -20.0), (3, 20, 226.0, 1e-3, 0.0)],
)
def test_float16_between_tiles(token: int, reader: int, size: float, scale: float, behind: float) -> None:
    """Where one of the two factors between tiles overflows and their product does not: forward, then backward."""
    t = {k: torch.full((1, 32, 1, n), 0.1) for k, n in (("x", 4), ("B", 2), ("C", 2))}
    t |= {"decay": torch.full((1, 32, 1), -0.01), "scale": torch.full((1, 32, 1), 0.01)}
    t["B"][:, token], t["C"][:, reader] = size, size
    t["scale"][:, token], t["decay"][:, 16] = scale, behind
    outputs = []
    for dtype, backend in ((torch.float16, "triton"), (torch.float64, "torch")):
        x, B, C, decay, steps = (t[k].half().to(dtype) for k in ("x", "B", "C", "decay", "scale"))
        x.requires_grad_()
        y = ssd_core(x, decay, steps, B, C, chunk_size=32, backend=backend)
        assert isinstance(y, Tensor)
        outputs.append((y.detach(), *torch.autograd.grad(y[:, reader].sum(), x)))
    assert all(out.isfinite().all() for out in outputs[0])
    assert_close(*outputs, 5e-3)


@pytest.mark.usefixtures("bfloat16")
def test_bfloat16() -> None:
    names = [k for k in draw(1, 1, 1, 1, 1, 1) if k != "z"]
    t = {k: v for k, v in draw(2, 37, 4, 5, 2, 19).items() if k in names}
    rounded = {k: v.detach().bfloat16().double().requires_grad_() for k, v in t.items()}
    low = {k: v.detach().bfloat16().requires_grad_() for k, v in rounded.items()}
    got = run(triton, low)
    assert got[0].dtype == torch.bfloat16 and got[1].dtype == F32 and all(g.dtype == torch.bfloat16 for g in got[2:])
    assert_close(got, run(ssd_reference, rounded), 2e-2)


def test_compiles_into_one_graph() -> None:
    t = draw(1, 18, 2, 3, 1, 2, F32)
    compiled = torch.compile(triton, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, t), run(triton, t), strict=True):
        torch.testing.assert_close(a, b)


def test_refusals() -> None:
    t = {k: v.detach() for k, v in draw(1, 6, 2, 3, 1, 2, F32).items() if k != "z"}
    wide = torch.zeros(1, 6, 2, 200)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"x": t["x"].double()}, "x is torch.float64, expected float32, bfloat16 or float16"),
        ({"A": t["A"].double()}, "A is torch.float64"),
        ({"B": t["B"].to("meta")}, "B is on meta, expected cpu as x"),
        ({"x": wide, "initial_states": None}, "head_dim 200"),
        ({"D": torch.ones(3)}, "D has shape"),
        ({"dt_bias": torch.ones(3)}, "dt_bias has shape"),
        ({"chunk_size": 0}, "chunk_size is 0"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            triton(**{**t, **change})


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("layout", DOCUMENTS)
def test_segments_equal_the_whole(layout: str, save: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three segments pay three backwards of a segment, and compute states again only where they were not saved."""
    ids, calls = DOCUMENTS[layout], []
    want = segments(ids, "torch", torch.float64, False)
    for name in ("gradients", "decays"):
        original = getattr(triton_scan, name)
        monkeypatch.setattr(triton_scan, name, lambda *a, n=name, f=original, **k: (calls.append(n), f(*a, **k))[1])
    assert_close(segments(ids, "triton", F32, True, save_states=save), want, TOLERANCE)
    assert calls.count("gradients") == 3 and calls.count("decays") == (3 if save else 6)


def test_a_segment_entered_twice_or_never() -> None:
    """Gradients add up: autograd's graph holds nothing but derivatives."""
    t = draw(2, 21, 4, 5, 2, 3, F32)
    grads = []
    for tensors, backend in ((t, "triton"), (exact(t), "torch")):
        x, dt, B, C, D, start = (tensors[n] for n in ("x", "dt", "B", "C", "D", "initial_states"))
        decay = -dt.abs()
        segment, kept = summarise(x, decay, dt, B, C, D=D, chunk_size=16, backend=backend)
        both = enter(kept, start) * 0.5 + enter(kept, 2 * start).square()
        used = [x, dt, B, C, D, start]
        twice = torch.autograd.grad(both.sum() + segment.state.square().sum(), used, retain_graph=True)
        never = torch.autograd.grad(segment.state.square().sum(), [x, dt, B], retain_graph=True)
        grads.append((both.detach(), *twice, *never, *torch.autograd.grad(both.sum(), used)))
    assert_close(grads[0], grads[1], TOLERANCE)


def test_expanded_parameters_and_transposed_ids() -> None:
    """A, D and dt_bias with stride 0 (one value for all heads), ids as a transposed view."""
    t = {k: v.detach() for k, v in draw(2, 20, 4, 3, 2, 2, F32).items()}
    for name in ("A", "D", "dt_bias"):
        t[name] = t[name][:1].expand(4)
    ids = torch.tensor([[0] * 9 + [1] * 11, [0] * 15 + [2] * 5]).T.contiguous().T
    one = {k: t[k][:1].clone().requires_grad_() for k in ("A", "D", "dt_bias")}
    grads = []
    for function, dtype in ((triton, F32), (ssd_reference, torch.float64)):
        leaves = {k: v.detach().to(dtype).requires_grad_() for k, v in one.items()}
        args = {k: v.to(dtype) for k, v in t.items()} | {k: v.expand(4) for k, v in leaves.items()}
        y = function(**args, dt_softplus=True, seq_idx=ids)
        grads.append((y.detach(), *torch.autograd.grad(y.square().sum(), list(leaves.values()))))
    assert_close(grads[0], grads[1], TOLERANCE)
