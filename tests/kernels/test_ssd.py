"""SSD against the sequential recurrence in float64, and the recurrence against plain loops."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from polylepis.kernels.ssd import ssd, ssd_core, ssd_matrix, ssd_reference, ssd_step

Tensors = dict[str, Tensor]


def draw(b: int, l: int, h: int, p: int, g: int, n: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensors:
    """Every tensor argument of ssd(), with gradients; the values are float32's, so all precisions see the same."""
    rng = torch.Generator().manual_seed(seed)
    shapes = {
        "x": (b, l, h, p),
        "dt": (b, l, h),
        "A": (h,),
        "B": (b, l, g, n),
        "C": (b, l, g, n),
        "D": (h,),
        "z": (b, l, h, p),
        "dt_bias": (h,),
        "initial_states": (b, h, p, n),
    }
    tensors = {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}
    tensors["A"] = -tensors["A"].abs() - 0.1
    return {name: tensor.to(dtype).requires_grad_() for name, tensor in tensors.items()}


def run(function: Any, tensors: Tensors, **options: Any) -> tuple[Tensor, ...]:
    """(y, final states, the gradient of every tensor) of a random projection of both outputs."""
    y, final = function(**tensors, dt_softplus=True, return_final_states=True, **options)
    rng = torch.Generator().manual_seed(1)
    weights = [torch.randn(out.shape, generator=rng).to(out.dtype) for out in (y, final)]
    loss = (y * weights[0]).sum() + (final * weights[1]).sum()
    return y.detach(), final.detach(), *torch.autograd.grad(loss, list(tensors.values()))


def assert_close(got: tuple[Tensor, ...], want: tuple[Tensor, ...], tolerance: float, least: float = 1e-6) -> None:
    """‖got − want‖ <= tolerance·max(‖want‖, least) for each tensor."""
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        assert torch.isfinite(a).all(), index
        error = (a.double() - b.double()).norm().item()
        assert error <= tolerance * max(b.double().norm().item(), least), (index, error)


def packed(*documents: tuple[int, int]) -> Tensor:
    """(1, l) ids from (id, length) pairs; id −1 is padding."""
    return torch.tensor([[name for name, length in documents for _ in range(length)]])


LAYOUTS = {
    "boundaries inside chunks": packed((0, 19), (1, 30), (2, 1), (3, 1), (4, 16)),
    "ids not monotone": packed((5, 20), (2, 20), (5, 27)),
    "leading padding": packed((-1, 11), (0, 20), (1, 36)),
    "middle padding": packed((3, 20), (-1, 9), (1, 20), (-1, 2), (7, 16)),
    "padding inside a document": packed((3, 20), (-1, 9), (3, 38)),
    "trailing padding": packed((0, 30), (1, 8), (-1, 29)),
    "one token each": torch.arange(67)[None],
    "only padding": packed((-1, 67)),
}


@pytest.mark.parametrize("seq_idx", [None, [0, 0, 1, 1], [-1, 0, -1, 2]])
def test_reference_against_a_loop(seq_idx: list[int] | None) -> None:
    l, h, p, g, n = 4, 4, 2, 2, 3
    t = draw(1, l, h, p, g, n)
    v = {name: tensor.detach().numpy() for name, tensor in t.items()}
    want = np.zeros((l, h, p))
    final = v["initial_states"][0].copy()
    for head in range(h):
        state, last = final[head], None
        for i in range(l):
            if seq_idx is not None and seq_idx[i] < 0:
                continue
            if seq_idx is not None:
                if last is not None and seq_idx[i] != last:
                    state[:] = 0.0
                last = seq_idx[i]
            step = math.log1p(math.exp(v["dt"][0, i, head] + v["dt_bias"][head]))
            for a in range(p):
                for c in range(n):
                    state[a, c] *= math.exp(step * v["A"][head])
                    state[a, c] += step * v["x"][0, i, head, a] * v["B"][0, i, head * g // h, c]
                y = float(state[a] @ v["C"][0, i, head * g // h]) + v["D"][head] * v["x"][0, i, head, a]
                gate = v["z"][0, i, head, a]
                want[i, head, a] = y * gate / (1.0 + math.exp(-gate))
    ids = None if seq_idx is None else torch.tensor([seq_idx])
    y, state_out = ssd_reference(**t, dt_softplus=True, seq_idx=ids, return_final_states=True)
    np.testing.assert_allclose(y[0].detach().numpy(), want, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(state_out[0].detach().numpy(), final, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 8, 64, 100])
@pytest.mark.parametrize(
    "shape", [(2, 1, 4, 5, 2, 3), (1, 29, 4, 5, 1, 7), (2, 67, 4, 5, 2, 3), (1, 130, 3, 5, 3, 4)], ids=str
)
def test_chunked_against_reference(shape: tuple[int, ...], chunk: int) -> None:
    tensors = draw(*shape)
    assert_close(run(ssd, tensors, chunk_size=chunk), run(ssd_reference, tensors), 1e-11)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("chunk", [8, 64])
def test_documents_against_reference(layout: str, chunk: int) -> None:
    ids = LAYOUTS[layout]
    ids = torch.cat([ids, ids.flip(1)])
    tensors = draw(2, ids.shape[1], 4, 5, 2, 3)
    got = run(ssd, tensors, chunk_size=chunk, seq_idx=ids)
    assert_close(got, run(ssd_reference, tensors, seq_idx=ids), 1e-11)
    assert (got[0][ids < 0] == 0).all()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 3e-6), (torch.bfloat16, 2e-2)])
def test_low_precision(dtype: torch.dtype, tolerance: float) -> None:
    rounded = {k: v.detach().to(dtype).double().requires_grad_() for k, v in draw(2, 130, 4, 8, 2, 8).items()}
    want = run(ssd_reference, rounded)
    low = {k: v.detach().to(dtype).requires_grad_() for k, v in rounded.items()}
    got = run(ssd, low, chunk_size=64)
    assert got[0].dtype == dtype and got[1].dtype == torch.float32
    assert all(grad.dtype == dtype for grad in got[2:])
    assert_close(got, want, tolerance)


def test_many_heads_go_through_several_blocks() -> None:
    tensors = draw(2, 192, 24, 4, 3, 4)
    assert_close(run(ssd, tensors, chunk_size=64), run(ssd_reference, tensors), 1e-11)


def test_packed_equals_separate() -> None:
    lengths = [19, 1, 30, 17]
    t = draw(1, sum(lengths), 4, 5, 2, 3)
    ids = packed(*enumerate(lengths))
    cut = ("x", "dt", "B", "C", "z")
    start = {k: v for k, v in t.items() if k != "initial_states"}
    together = ssd(**start, dt_softplus=True, seq_idx=ids)
    begin = 0
    for length in lengths:
        part = {k: v[:, begin : begin + length] if k in cut else v for k, v in start.items()}
        torch.testing.assert_close(together[:, begin : begin + length], ssd(**part, dt_softplus=True))
        begin += length


def test_cu_seqlens_is_seq_idx() -> None:
    t = draw(1, 67, 4, 5, 2, 3)
    bounds = [0, 0, 19, 49, 49, 50, 67, 67]
    ids = torch.bucketize(torch.arange(67), torch.tensor(bounds[1:]), right=True)[None]
    want = run(ssd, t, seq_idx=ids)
    for given_as in (bounds, torch.tensor(bounds, dtype=torch.int32)):
        for a, b in zip(run(ssd, t, cu_seqlens=given_as), want, strict=True):
            assert torch.equal(a, b)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(2, 40), st.integers(1, 39), st.integers(1, 20), st.booleans(), st.integers(0, 1000))
def test_split_invariance(l: int, cut: int, chunk: int, with_documents: bool, seed: int) -> None:
    k = min(cut, l - 1)
    t = draw(1, l, 2, 3, 1, 2, seed=seed)
    ids = (torch.rand(1, l, generator=torch.Generator().manual_seed(seed)) < 0.2).cumsum(1) if with_documents else None
    if ids is not None:
        ids[:, k] = ids[:, k - 1]  # the document at the cut goes on, so that its state does
        ids[:, k:] = ids[:, k:].cummax(1).values

    def in_two(**kw: Any) -> tuple[Tensor, Tensor]:
        cut_names = ("x", "dt", "B", "C", "z")
        first = {n: v[:, :k] if n in cut_names else v for n, v in kw.items()}
        second = {n: v[:, k:] if n in cut_names else v for n, v in kw.items()}
        left, right = (None, None) if ids is None else (ids[:, :k], ids[:, k:])
        y1, state = ssd(**first, chunk_size=chunk, seq_idx=left)
        y2, final = ssd(**{**second, "initial_states": state}, chunk_size=chunk, seq_idx=right)
        return torch.cat([y1, y2], dim=1), final

    assert_close(run(in_two, t), run(ssd, t, chunk_size=chunk, seq_idx=ids), 1e-10)


def test_four_forms_agree() -> None:
    t = draw(2, 29, 4, 5, 2, 3)
    t.pop("initial_states")
    want, final = ssd_reference(**t, dt_softplus=True, return_final_states=True)
    torch.testing.assert_close(ssd(**t, dt_softplus=True, chunk_size=8), want)
    state, steps = torch.zeros(2, 4, 5, 3, dtype=torch.float64), []
    for i in range(29):
        token = {k: v[:, i] if k in ("x", "dt", "B", "C", "z") else v for k, v in t.items()}
        y, state = ssd_step(state, **token, dt_softplus=True)
        steps.append(y)
    torch.testing.assert_close(torch.stack(steps, dim=1), want)
    torch.testing.assert_close(state, final)
    x, z = t.pop("x"), t.pop("z")
    y = torch.einsum("bhij,bjhp->bihp", ssd_matrix(**t, dt_softplus=True), x)
    torch.testing.assert_close(y * torch.nn.functional.silu(z), want)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_matrix_honours_documents(layout: str) -> None:
    ids = LAYOUTS[layout]
    t = {k: v for k, v in draw(1, ids.shape[1], 4, 5, 2, 3).items() if k not in ("initial_states", "z")}
    want = ssd_reference(**t, dt_softplus=True, seq_idx=ids)
    x = t.pop("x")
    matrix = ssd_matrix(**t, dt_softplus=True, seq_idx=ids)
    torch.testing.assert_close(torch.einsum("bhij,bjhp->bihp", matrix, x), want)
    assert (matrix.triu(1) == 0).all()


def test_core_takes_any_parameterisation() -> None:
    """Discrete Mamba-2, a negative scale, linear attention and a hard reset by log_decay = −inf."""
    t = draw(1, 30, 2, 5, 1, 3)
    x, B, C, scale = t["x"], t["B"], t["C"], t["dt"]
    log_decay = -scale.detach().abs()
    want = torch.zeros(30, 2, 5, dtype=torch.float64)
    state = torch.zeros(2, 5, 3, dtype=torch.float64)
    for i in range(30):
        state = log_decay[0, i].exp()[:, None, None] * state
        state = state + torch.einsum("h,hp,n->hpn", scale[0, i], x[0, i], B[0, i, 0])
        want[i] = torch.einsum("hpn,n->hp", state, C[0, i, 0])
    torch.testing.assert_close(ssd_core(x, log_decay, scale, B, C, chunk_size=8)[0], want)
    ones = torch.ones_like(scale)
    linear = torch.einsum("ihp,ij->jhp", x[0], (C[0, :, 0] @ B[0, :, 0].T).tril().T)
    torch.testing.assert_close(ssd_core(x, 0 * ones, ones, B, C, chunk_size=8)[0], linear)
    reset = log_decay.clone()
    reset[:, 13] = -torch.inf
    y = ssd_core(x, reset, scale, B, C, chunk_size=8)
    torch.testing.assert_close(y[:, 13:], ssd_core(x[:, 13:], log_decay[:, 13:], scale[:, 13:], B[:, 13:], C[:, 13:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("A, dt", [(-64.0, 20.0), (-64.0, -20.0), (-16.0, 20.0), (-1e-4, 20.0), (-1e4, 1e4)])
def test_extreme_decays_stay_finite(A: float, dt: float, dtype: torch.dtype) -> None:
    t = draw(1, 130, 2, 4, 1, 4, dtype)
    with torch.no_grad():
        t["A"].fill_(A)
        t["dt"].fill_(dt)
        t["dt_bias"].zero_()
        t["dt"][:, ::7] = 0.01  # strong and weak decays side by side
    ids = packed((-1, 3), (0, 60), (1, 40), (-1, 27))
    exact = {k: v.detach().double().requires_grad_() for k, v in t.items()}
    for seq_idx in (None, ids):
        # dA may be tiny where everything decays at once, beside gradients of order 100
        assert_close(run(ssd, t, seq_idx=seq_idx), run(ssd_reference, exact, seq_idx=seq_idx), 2e-4, least=1.0)


@pytest.mark.parametrize("chunk", [8, 64])
def test_isolation_is_exact(chunk: int) -> None:
    """No input of document A, not even its dt, has any influence on document B's outputs or on the final state."""
    ids = packed((0, 21), (-1, 4), (1, 29), (-1, 3))
    t = draw(1, 57, 4, 5, 2, 3)
    y, final = ssd(**t, dt_softplus=True, chunk_size=chunk, seq_idx=ids, return_final_states=True)
    tokens = [t[k] for k in ("x", "dt", "B", "C", "z")]
    loss = y[:, 21:].square().sum() + final.square().sum()
    *grads, start = torch.autograd.grad(loss, [*tokens, t["initial_states"]], retain_graph=True)
    for grad in grads:
        assert (grad[ids != 1] == 0).all() and (grad[ids == 1] != 0).any()
    assert (start == 0).all()
    for grad in torch.autograd.grad(y[:, :25].square().sum(), tokens):
        assert (grad[ids != 0] == 0).all()


def test_gradients_of_either_output_alone() -> None:
    t = draw(1, 19, 2, 3, 1, 2)
    for index in (0, 1):
        got, want = (
            torch.autograd.grad(f(**t, return_final_states=True)[index].sum(), t["x"])[0] for f in (ssd, ssd_reference)
        )
        torch.testing.assert_close(got, want)


def test_non_contiguous_slices() -> None:
    """x, B and C as slices of one projection, a transposed gradient, and a per-token dt_bias."""
    wide = torch.randn(2, 33, 8 + 2 * 3, dtype=torch.float64, requires_grad=True)
    x, B, C = (part.unflatten(-1, (-1, k)) for part, k in zip(wide.split([8, 3, 3], -1), (4, 3, 3), strict=True))
    bias = torch.randn(2, 33, 2, dtype=torch.float64)
    args = (x, torch.randn(2, 33, 2, dtype=torch.float64), -torch.rand(2, dtype=torch.float64), B, C)
    weight = torch.randn(4, 2, 33, 2, dtype=torch.float64).permute(3, 2, 1, 0)
    got, want = (
        torch.autograd.grad((f(*args, dt_bias=bias, dt_softplus=True) * weight).sum(), wide)[0]
        for f in (ssd, ssd_reference)
    )
    torch.testing.assert_close(got, want)
    expanded = torch.autograd.grad(ssd(*args, dt_bias=bias, dt_softplus=True).sum(), wide)[0]
    torch.testing.assert_close(
        expanded, torch.autograd.grad(ssd_reference(*args, dt_bias=bias, dt_softplus=True).sum(), wide)[0]
    )


def test_dt_limit_clamps() -> None:
    t = draw(1, 12, 2, 3, 1, 2)
    limit = (0.3, 0.9)
    got = run(ssd, t, dt_limit=limit)
    assert_close(got, run(ssd_reference, t, dt_limit=limit), 1e-11)
    clamped = torch.nn.functional.softplus(t["dt"] + t["dt_bias"]).clamp(*limit)
    rest = {k: v for k, v in t.items() if k not in ("dt", "dt_bias")}
    torch.testing.assert_close(got[0], ssd(dt=clamped, **rest))


def test_two_runs_are_bitwise_equal() -> None:
    t = draw(2, 130, 4, 8, 2, 8, torch.float32)
    ids = packed((0, 50), (1, 80)).expand(2, -1)
    for a, b in zip(run(ssd, t, seq_idx=ids), run(ssd, t, seq_idx=ids), strict=True):
        assert torch.equal(a, b)


def test_autocast_does_not_lower_the_accumulation() -> None:
    t = draw(1, 67, 4, 8, 2, 8, torch.float32)
    want = run(ssd, t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(ssd, t)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_compiles_into_one_graph() -> None:
    t = draw(2, 37, 4, 5, 2, 3, torch.float32)
    ids = packed((0, 20), (-1, 2), (1, 15)).expand(2, -1)
    compiled = torch.compile(ssd, fullgraph=True, backend="aot_eager")
    for seq_idx in (None, ids):
        got = run(compiled, t, chunk_size=16, seq_idx=seq_idx)
        assert_close(got, run(ssd, t, chunk_size=16, seq_idx=seq_idx), 1e-6)


def test_recomputed_under_a_checkpoint() -> None:
    t = draw(1, 37, 4, 5, 2, 3)

    def recomputed(**kw: Any) -> Any:
        return checkpoint(ssd, use_reentrant=False, **kw)

    for a, b in zip(run(recomputed, t), run(ssd, t), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    t = draw(2, 32, 4, 5, 2, 3, dtype)
    segments = (torch.arange(32) > 19).long().expand(2, -1)
    operator = torch.ops.polylepis.chunked_forward.default
    for rest in ((t["initial_states"], segments), (None, None)):
        torch.library.opcheck(operator, (t["x"], t["dt"], t["dt"], t["B"], t["C"], *rest, 16))


def test_step_keeps_the_states_dtype() -> None:
    t = draw(3, 1, 4, 5, 2, 3, torch.bfloat16)
    state = t.pop("initial_states").detach().float()
    token = {k: v[:, 0] if v.dim() > 1 else v for k, v in t.items()}
    before = state.clone()
    y, after = ssd_step(state, **token, dt_softplus=True)
    assert y.dtype == torch.bfloat16 and after.dtype == torch.float32 and torch.equal(state, before)


def test_refusals() -> None:
    t = {k: v.detach() for k, v in draw(1, 6, 4, 2, 2, 3).items()}
    x, dt, A, B, C = (t[k] for k in ("x", "dt", "A", "B", "C"))
    ids = torch.zeros(1, 6, dtype=torch.int64)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"backend": "triton"}, "backend='triton': x is on cpu, expected a CUDA tensor"),
        ({"backend": "cuda"}, "backend='cuda' is unknown"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"x": x[:, :0]}, "length 0"),
        ({"x": x[0]}, "expected 4 dimensions"),
        ({"dt": dt[:, :5]}, r"dt has shape \(1, 5, 4\), expected \(1, 6, 4\)"),
        ({"A": A[:3]}, r"A has shape \(3,\), expected \(4,\)"),
        ({"B": B[:, :5]}, "B has shape"),
        ({"C": C[..., :2]}, "C has shape"),
        ({"B": B[:, :, [0, 0, 0]], "C": C[:, :, [0, 0, 0]]}, "3 groups of B and C do not divide 4 heads"),
        ({"D": torch.ones(3)}, "D has shape"),
        ({"z": x[:, :5]}, "z has shape"),
        ({"dt_bias": torch.ones(1, 4)}, "dt_bias has shape"),
        ({"dt_limit": (-1.0, 1.0)}, "dt_limit is"),
        ({"initial_states": torch.zeros(1, 4, 3, 2)}, "initial_states has shape"),
        ({"seq_idx": ids[:, :5]}, "seq_idx has shape"),
        ({"seq_idx": ids.float()}, "expected integers"),
        ({"seq_idx": ids, "cu_seqlens": [0, 6]}, "both given"),
        ({"cu_seqlens": [0, 5]}, "cu_seqlens runs from 0 to 5, expected 0 to 6"),
        ({"cu_seqlens": [0, 4, 3, 6]}, "without decrease"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            ssd(**{"x": x, "dt": dt, "A": A, "B": B, "C": C, **change})
    two = {k: v.expand(2, *v.shape[1:]) for k, v in {"x": x, "dt": dt, "B": B, "C": C}.items()}
    with pytest.raises(ValueError, match="packed batch of 1 row, got 2 rows"):
        ssd(**two, A=A, cu_seqlens=[0, 6])
    with pytest.raises(ValueError, match="state has shape"):
        ssd_step(torch.zeros(1, 4, 3, 3), x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0])
