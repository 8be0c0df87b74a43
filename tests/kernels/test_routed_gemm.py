"""The routed matrix product against one product per row."""

import pytest
import torch
from torch import Tensor

from polylepis.kernels.routed_gemm import grouped_outer, grouped_rows, routed_linear


def per_row(x: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    entries = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return torch.einsum("ti,toi->to", x, weight[entries])


@pytest.mark.parametrize("counts", [[3, 0, 4], [0, 0, 7], [7, 0, 0], [0, 0, 0], [2, 4, 1]])
def test_forward_and_gradients(counts: list[int]) -> None:
    x = torch.randn(sum(counts), 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 6, 5, dtype=torch.float64, requires_grad=True)
    y = routed_linear(x, weight, counts)
    torch.testing.assert_close(y, per_row(x, weight, counts))
    if sum(counts):
        assert torch.autograd.gradcheck(lambda x, w: routed_linear(x, w, counts), (x, weight))
    _, dweight = torch.autograd.grad(y.sum(), (x, weight))  # an expanded gradient
    for entry, count in enumerate(counts):
        assert (dweight[entry] == 0).all() == (count == 0)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_low_precision_and_determinism(dtype: torch.dtype, tolerance: float) -> None:
    x, weight = (torch.randn(s).to(dtype).requires_grad_() for s in ((30, 50), (3, 30, 50)))
    y = routed_linear(x, weight, [11, 0, 19])
    assert y.dtype == dtype and torch.equal(y, routed_linear(x, weight, [11, 0, 19]))
    want = per_row(x.detach().double(), weight.detach().double(), [11, 0, 19])
    assert (y.double() - want).norm() <= tolerance * want.norm()


def test_strided_views() -> None:
    bank = torch.randn(5, 3, 6, dtype=torch.float64, requires_grad=True)
    weight = bank.permute(1, 2, 0)  # (3, 6, 5), no stride of it is contiguous
    x = torch.randn(5, 14, dtype=torch.float64, requires_grad=True).t()[::2]
    counts = [3, 0, 4]
    got, want = (f(x, weight, counts) for f in (routed_linear, per_row))
    torch.testing.assert_close(got, want)
    weights = torch.randn(6, 7, dtype=torch.float64).t()
    grads = [torch.autograd.grad((y * weights).sum(), bank)[0] for y in (got, want)]
    torch.testing.assert_close(*grads)


def test_only_what_is_needed_is_computed() -> None:
    x, weight = torch.randn(4, 5), torch.randn(2, 3, 5, requires_grad=True)
    routed_linear(x, weight, [2, 2]).sum().backward()
    assert weight.grad is not None and x.grad is None


def test_refusals() -> None:
    x, weight = torch.randn(4, 5), torch.randn(2, 3, 5)
    with pytest.raises(ValueError, match=r"counts \(2, 1\) \(sum 3\) do not fit 2 bank entries and 4 rows"):
        routed_linear(x, weight, [2, 1])
    with pytest.raises(ValueError, match="do not fit 2 bank entries"):
        routed_linear(x, weight, [4])
    with pytest.raises(ValueError, match="do not fit 2 bank entries"):
        routed_linear(x, weight, [5, -1])
    with pytest.raises(ValueError, match="do not fit"):
        routed_linear(x[:, :4], weight, [2, 2])
    with pytest.raises(ValueError, match="expected one dtype"):
        routed_linear(x.double(), weight, [2, 2])


@pytest.mark.skipif(not hasattr(torch.nn.functional, "grouped_mm"), reason="this torch has no grouped_mm")
@pytest.mark.parametrize("counts", [(5, 0, 3, 8), (0, 0, 16, 0), (1, 1, 1, 13), (16, 0, 0, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_grouped_products_equal_the_loop(counts: tuple[int, ...], dtype: torch.dtype) -> None:
    """What runs on CUDA, its three products on the CPU: output, gradient of the rows, gradient of the bank."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(16, width, generator=generator).to(dtype) for width in (24, 40))
    weight = torch.randn(4, 40, 24, generator=generator).to(dtype)
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = routed_linear(*leaves, counts)
    y.backward(dy)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(grouped_rows(x, weight.transpose(1, 2), ends), y.detach(), **tolerance)
    torch.testing.assert_close(grouped_rows(dy, weight, ends), leaves[0].grad, **tolerance)
    outer = grouped_outer(dy, x, ends, counts)
    torch.testing.assert_close(outer, leaves[1].grad, **tolerance)
    assert not any(bool(outer[entry].any()) for entry, count in enumerate(counts) if count == 0)
