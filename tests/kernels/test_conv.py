"""The causal convolution against a plain loop, torch's conv1d and finite differences."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polylepis.kernels.conv import causal_conv1d, causal_conv1d_step

DOCUMENTS = torch.tensor([[-1, -1, 0, 0, 0, 1, 2, 2, -1, 3, 3, 3], [4, 4, 4, 4, 2, 4, 4, 4, 4, -1, -1, -1]])


def draw(b: int, l: int, c: int, k: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(l)
    shapes = {"x": (b, l, c), "weight": (c, k), "bias": (c,), "initial_state": (b, c, k - 1)}
    return {name: torch.randn(s, generator=rng).to(dtype).requires_grad_() for name, s in shapes.items()}


def loop(
    x: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor | None, start: Tensor | None
) -> tuple[np.ndarray, np.ndarray]:
    """(values before the activation, final state), one scalar at a time."""
    (b, l, c), k = x.shape, weight.shape[1]
    y, final = np.zeros((b, l, c)), np.zeros((b, c, k - 1))
    for r in range(b):
        row = [0] * l if ids is None else ids[r].tolist()

        def value(t: int, reader: int, r: int = r, row: list[int] = row) -> np.ndarray:
            """What position ``reader`` sees at position t."""
            if any(row[u] != row[reader] for u in range(max(t, 0), reader)):
                return np.zeros(c)
            if t >= 0:
                return x[r, t].detach().numpy()
            return np.zeros(c) if start is None else start[r, :, k - 1 + t].detach().numpy()

        for t in range(l):
            if row[t] >= 0:
                y[r, t] = 0.0 if bias is None else bias.detach().numpy()
                for s in range(k):
                    y[r, t] += weight[:, k - 1 - s].detach().numpy() * value(t - s, t)
        last = max((t for t in range(l) if row[t] >= 0), default=-1)
        for j in range(k - 1):
            t = last - (k - 2) + j
            final[r, :, j] = value(t, last) if last >= 0 else value(t, 0)
    return y, final


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_against_a_loop(width: int, start: bool, documents: bool) -> None:
    for ids in DOCUMENTS[:, None] if documents else [None]:
        t = draw(1, 12, 3, width)
        state = t["initial_state"] if start else None
        y, final = causal_conv1d(
            t["x"], t["weight"], t["bias"], activation=None, seq_idx=ids, initial_state=state, return_final_state=True
        )
        want, want_final = loop(t["x"], t["weight"], t["bias"], ids, state)
        np.testing.assert_allclose(y.detach().numpy(), want, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(final.detach().numpy(), want_final, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("l", [1, 2, 3, 63, 65])
def test_against_torch(l: int) -> None:
    t = draw(2, l, 5, 4)
    padded = torch.nn.functional.pad(t["x"].transpose(1, 2), (3, 0))
    want = torch.nn.functional.conv1d(padded, t["weight"][:, None], t["bias"], groups=5).transpose(1, 2)
    y = causal_conv1d(t["x"], t["weight"], t["bias"])
    torch.testing.assert_close(y, torch.nn.functional.silu(want))


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("ids", [None, DOCUMENTS])
@pytest.mark.parametrize("with_bias", [True, False])
def test_gradcheck(activation: str | None, ids: Tensor | None, with_bias: bool) -> None:
    t = draw(2, 12, 2, 4)

    def f(x: Tensor, weight: Tensor, bias: Tensor | None, start: Tensor) -> Any:
        options = {"activation": activation, "seq_idx": ids, "initial_state": start, "return_final_state": True}
        return causal_conv1d(x, weight, bias, **options)

    assert torch.autograd.gradcheck(f, (t["x"], t["weight"], t["bias"] if with_bias else None, t["initial_state"]))


@pytest.mark.parametrize("l", [1, 2])
def test_gradcheck_shorter_than_the_width(l: int) -> None:
    t = draw(2, l, 2, 4)
    ids = torch.tensor([[0], [3]]).expand(2, l)
    for seq_idx in (None, ids):

        def f(x: Tensor, w: Tensor, b: Tensor, s: Tensor, seq_idx: Tensor | None = seq_idx) -> Any:
            return causal_conv1d(x, w, b, seq_idx=seq_idx, initial_state=s, return_final_state=True)

        assert torch.autograd.gradcheck(f, tuple(t.values()))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(2, 20), st.integers(1, 19), st.integers(1, 4), st.booleans(), st.integers(0, 99))
def test_split_invariance(l: int, cut: int, width: int, documents: bool, seed: int) -> None:
    """Also when the first document of the second half is new: there the carried state must be zero."""
    k = min(cut, l - 1)
    t = {name: tensor.detach() for name, tensor in draw(1, l, 2, width).items()}
    changes = torch.rand(1, l, generator=torch.Generator().manual_seed(seed)) < 0.3
    ids = changes.cumsum(1) if documents else None
    want, final = causal_conv1d(**t, seq_idx=ids, return_final_state=True)
    left, right = (None, None) if ids is None else (ids[:, :k], ids[:, k:])
    first = {**t, "x": t["x"][:, :k]}
    y1, state = causal_conv1d(**first, seq_idx=left, return_final_state=True)
    if ids is not None and ids[0, k] != ids[0, k - 1]:
        state = torch.zeros_like(state)
    second = {**t, "x": t["x"][:, k:], "initial_state": state}
    y2, final2 = causal_conv1d(**second, seq_idx=right, return_final_state=True)
    torch.testing.assert_close(torch.cat([y1, y2], dim=1), want)
    torch.testing.assert_close(final2, final)


@pytest.mark.parametrize("width", [1, 4])
def test_step_continues(width: int) -> None:
    t = {name: tensor.detach() for name, tensor in draw(2, 9, 3, width).items()}
    want, final = causal_conv1d(**t, return_final_state=True)
    state = t["initial_state"]
    for i in range(9):
        y, state = causal_conv1d_step(t["x"][:, i], state, t["weight"], t["bias"])
        torch.testing.assert_close(y, want[:, i])
    torch.testing.assert_close(state, final)


def test_isolation_is_exact() -> None:
    t = draw(2, 12, 3, 4)
    y = causal_conv1d(**t, seq_idx=DOCUMENTS)
    assert (y[DOCUMENTS < 0] == 0).all()
    for name in (0, 1, 2, 3):
        here = torch.zeros_like(DOCUMENTS, dtype=torch.bool)
        here[0] = DOCUMENTS[0] == name
        (grad,) = torch.autograd.grad(y[here].square().sum(), t["x"], retain_graph=True)
        assert (grad[~here] == 0).all() and (grad[here] != 0).any()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_low_precision_and_determinism(dtype: torch.dtype, tolerance: float) -> None:
    exact = {k: v.detach().to(dtype).double().requires_grad_() for k, v in draw(2, 70, 8, 4).items()}
    low = {k: v.detach().to(dtype).requires_grad_() for k, v in exact.items()}
    results = []
    for t in (exact, low, low):
        y = causal_conv1d(**t)
        results.append((y, *torch.autograd.grad((y * y).sum(), list(t.values()))))
    for want, got, again in zip(*results, strict=True):
        assert got.dtype == dtype and torch.equal(got, again)
        assert (got.double() - want).norm() <= tolerance * want.norm()


def test_refusals() -> None:
    t = {name: tensor.detach() for name, tensor in draw(2, 5, 3, 4).items()}
    for change, message in [
        ({"x": t["x"][:, :0]}, "length >= 1"),
        ({"weight": t["weight"][:2]}, "weight has shape"),
        ({"bias": t["bias"][:2]}, "bias has shape"),
        ({"activation": "gelu"}, "activation='gelu' is unknown"),
        (
            {"seq_idx": torch.zeros(2, 4, dtype=torch.int64)},
            r"\(2, 4\), expected integers \(2, 5\)",
        ),
        ({"initial_state": torch.zeros(2, 3, 4)}, "initial_state has shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            causal_conv1d(**{**t, **change})
    with pytest.raises(ValueError, match="state has shape"):
        causal_conv1d_step(t["x"][:, 0], torch.zeros(2, 3, 4), t["weight"], t["bias"])
