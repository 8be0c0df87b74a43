"""Sizes that other projects' tests and users found to break kernels; each against an oracle of ours in float64.

Shapes from state-spaces/mamba (many short sequences, the determinism grid, the norm's criterion), vLLM (odd heads and
chunks), causal-conv1d and its open pull requests (lengths around tiles).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from polylepis.kernels.conv import causal_conv1d
from polylepis.kernels.norm import gated_rms_norm
from polylepis.kernels.ssd import ssd, ssd_reference

from .test_norm import formula
from .test_ssd import assert_close, draw, run


@pytest.mark.parametrize("groups, chunk", [(1, 64), (2, 128), (8, 64)])
def test_three_hundred_sequences(groups: int, chunk: int) -> None:
    """Packed, of 1 to 20 tokens, many in a chunk and some across chunks; outputs and every gradient."""
    lengths = torch.randint(1, 21, (300,), generator=torch.Generator().manual_seed(groups))
    tensors = draw(1, int(lengths.sum()), 8, 3, groups, 4, seed=chunk)
    ids = torch.repeat_interleave(torch.arange(300), lengths)[None]
    assert_close(run(ssd, tensors, chunk_size=chunk, seq_idx=ids), run(ssd_reference, tensors, seq_idx=ids), 1e-11)


@pytest.mark.parametrize("h", [3, 11, 13])
@pytest.mark.parametrize("p", [5, 19, 21])
@pytest.mark.parametrize("chunk", [29, 256])
def test_odd_heads_and_chunks(h: int, p: int, chunk: int) -> None:
    tensors = draw(2, 61, h, p, 1, 7, seed=h)
    ids = torch.tensor([[0] * 17 + [1] * 13 + [2] * 31, [-1] * 5 + [3] * 55 + [-1]])
    assert_close(run(ssd, tensors, chunk_size=chunk, seq_idx=ids), run(ssd_reference, tensors, seq_idx=ids), 1e-11)


@pytest.mark.parametrize("p", [32, 64, 128])
@pytest.mark.parametrize("n", [16, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_backward_repeat_bitwise(p: int, n: int, dtype: torch.dtype) -> None:
    tensors = draw(1, 130, 2, p, 1, n, dtype)
    for first, second in zip(run(ssd, tensors), run(ssd, tensors), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("l", [63, 64, 65, 127, 128, 129, 256, 257])
@pytest.mark.parametrize("width", [2, 3, 4])
def test_convolution_around_tiles(l: int, width: int) -> None:
    """seq_idx and an initial state together, against the sum written out, in float64; gradients too."""
    rng = torch.Generator().manual_seed(l)
    shapes = {"x": (2, l, 6), "weight": (6, width), "bias": (6,), "start": (2, 6, width - 1)}
    t = {k: torch.randn(s, generator=rng, dtype=torch.float64, requires_grad=True) for k, s in shapes.items()}
    ids = torch.stack([(torch.arange(l) >= cut).long() for cut in (1, l // 2)])

    def written_out(x: Tensor, weight: Tensor, bias: Tensor, start: Tensor) -> Tensor:
        before = torch.cat([start.transpose(1, 2), x], dim=1)
        names = torch.cat([ids[:, :1].expand(-1, width - 1), ids], dim=1)
        shown = [(before[:, s : s + l] * (names[:, s : s + l] == ids)[..., None] * weight[:, s]) for s in range(width)]
        return torch.nn.functional.silu(torch.stack(shown).sum(0) + bias)

    got = causal_conv1d(t["x"], t["weight"], t["bias"], seq_idx=ids, initial_state=t["start"])
    want = written_out(*t.values())
    probe = torch.randn(want.shape, generator=rng, dtype=torch.float64)
    gradients = [torch.autograd.grad((out * probe).sum(), list(t.values())) for out in (got, want)]
    for a, b in zip((got, *gradients[0]), (want, *gradients[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("d, group", [(2048, 2048), (4096, 512)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norm_errs_at_most_twice_as_much_as_torch(d: int, group: int, dtype: torch.dtype) -> None:
    """The formula evaluated by torch in the same dtype is what may be wrong by so much."""
    rng = torch.Generator().manual_seed(0)
    low = [torch.randn(s, generator=rng).to(dtype).requires_grad_() for s in ((5, d), (5, d), (d,))]
    exact = [t.detach().double().requires_grad_() for t in low]
    probe = torch.randn(5, d, generator=rng, dtype=torch.float64)

    def outcome(y: Tensor, inputs: list[Tensor]) -> list[Tensor]:
        return [y.detach(), *torch.autograd.grad(y, inputs, probe.to(y.dtype))]

    ours = outcome(gated_rms_norm(*low, group_size=group), low)
    torchs = outcome(formula(*low, group, 1e-5), low)
    want = outcome(formula(*exact, group, 1e-5), exact)
    for a, b, true in zip(ours, torchs, want, strict=True):
        assert (a.double() - true).abs().max() <= 2 * (b.double() - true).abs().max() + 1e-5


def test_minimal_layer_of_the_paper() -> None:
    """The SSD listing's own size (1 x 2,048 tokens, heads of 64, one group, state 64), float32 against float64."""
    tensors = draw(1, 2048, 2, 64, 1, 64, torch.float32)
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}
    assert_close(run(ssd, tensors, chunk_size=64), run(ssd_reference, exact), 1e-5)
