"""RMSNorm and gated RMSNorm against their formulas and finite differences."""

import pytest
import torch
from torch import Tensor

from polylepis.kernels.norm import gated_rms_norm, rms_norm


def formula(x: Tensor, z: Tensor | None, weight: Tensor, group: int, eps: float) -> Tensor:
    v = x if z is None else x * z * torch.sigmoid(z)
    parts = [part / (part.square().mean(-1, keepdim=True) + eps).sqrt() for part in v.split(group, dim=-1)]
    return torch.cat(parts, dim=-1) * weight


@pytest.mark.parametrize("group", [12, 4, 1])
def test_forward_and_gradients(group: int) -> None:
    x, z = (torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(12, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(
        gated_rms_norm(x, z, weight, group_size=group, eps=1e-3), formula(x, z, weight, group, 1e-3)
    )
    torch.testing.assert_close(rms_norm(x, weight, 1e-3), formula(x, None, weight, 12, 1e-3))
    assert torch.autograd.gradcheck(lambda *t: gated_rms_norm(*t, group_size=group, eps=1e-3), (x, z, weight))
    assert torch.autograd.gradcheck(lambda *t: rms_norm(*t, 1e-3), (x, weight))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_low_precision(dtype: torch.dtype, tolerance: float) -> None:
    low = [torch.randn(s).to(dtype).requires_grad_() for s in ((7, 64), (7, 64), (64,))]
    exact = [t.detach().double().requires_grad_() for t in low]
    y = gated_rms_norm(*low, group_size=16)
    want = formula(*exact, 16, 1e-5)
    results = (y, *torch.autograd.grad(y.sum(), low)), (want, *torch.autograd.grad(want.sum(), exact))
    for got, expected in zip(*results, strict=True):
        assert got.dtype == dtype
        assert (got.double() - expected).norm() <= tolerance * expected.norm()


def test_slices_and_no_rows() -> None:
    """Inputs as slices of one projection; zero rows give a zero weight gradient, not None."""
    wide = torch.randn(3, 24, dtype=torch.float64, requires_grad=True)
    weight = torch.ones(12, dtype=torch.float64, requires_grad=True)
    got = gated_rms_norm(wide[:, :12], wide[:, 12:], weight, group_size=6)
    torch.testing.assert_close(got, formula(wide[:, :12], wide[:, 12:], weight, 6, 1e-5))
    torch.autograd.grad(got.sum(), wide)  # an expanded gradient
    empty = rms_norm(wide[:0, :12], weight)
    assert empty.shape == (0, 12)
    assert (torch.autograd.grad(empty.sum(), weight)[0] == 0).all()


def test_refusals() -> None:
    x = torch.ones(2, 12)
    with pytest.raises(ValueError, match=r"weight has shape \(6,\)"):
        rms_norm(x, torch.ones(6))
    with pytest.raises(ValueError, match="z has shape"):
        gated_rms_norm(x, x[:1], torch.ones(12), group_size=4)
    with pytest.raises(ValueError, match="group_size 5 does not divide the 12 channels"):
        gated_rms_norm(x, x, torch.ones(12), group_size=5)
