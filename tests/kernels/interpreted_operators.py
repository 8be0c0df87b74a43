"""Every operator of ours: opcheck, and what a checkpoint policy does with it. Run by test_interpreter.py.

The operators are found in torch's registry, so that a new one without a case fails.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

sys.path.insert(0, str(Path(__file__).parent))
import mixer_cases
from test_conv import draw as draw_conv
from test_ssd import draw

from polylepis.kernels import operators  # noqa: F401
from polylepis.kernels.ssd import chunked, mixer_operators, segments  # noqa: F401

OPS = torch.ops.polylepis
ALL = {
    name.removeprefix("polylepis::").partition(".")[0]
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("polylepis::")
}
Arguments = tuple[Any, ...]
INFINITE = float("inf")


def code(l: int = 18) -> Tensor:
    ids = torch.zeros(1, l, dtype=torch.int32)
    ids[:, 7:] = 2
    return ids


def scan(save: bool = False) -> Arguments:
    t = draw(1, 18, 2, 3, 1, 2, torch.float32)
    names = ("x", "dt", "A", "dt_bias", "B", "C", "D", "initial_states")
    return (*(t[n] for n in names), code(), True, True, 0.0, INFINITE, 16, save)


def mixer(save: bool = True, left_out: tuple[str, ...] = ("z", "norm_weight", "conv_bias", "D")) -> Arguments:
    t = mixer_cases.draw(1, 18, 2, 3, 1, 2)
    order = "x B C dt z conv_weight conv_bias conv_state code A dt_bias D initial_states code norm_weight".split()
    tensors = [code() if name == "code" else None if name in left_out else t[name] for name in order]
    return (*tensors, 1, 3, 1e-5, True, True, 0.0, INFINITE, 16, save)


def chunk() -> Arguments:
    t = draw(1, 16, 2, 3, 1, 2)
    return (*(t[n] for n in ("x", "dt", "dt", "B", "C", "initial_states")), code(16).long() // 2, 8)


def segment(save: bool = False) -> Arguments:
    t = draw(1, 18, 2, 3, 1, 2, torch.float32)
    return (*(t[n] for n in ("x", "dt", "dt", "B", "C", "D")), code(), 16, save)


def entered() -> Arguments:
    t, given = draw(1, 18, 2, 3, 1, 2, torch.float32), segment()
    stand_in, *kept = (k.detach() for k in OPS.ssd_segment(*given)[1:])
    return stand_in, *given[:6], t["initial_states"], given[6], *kept, 16


def conv() -> Arguments:
    t = draw_conv(1, 9, 3, 4, torch.float32)
    return t["x"], t["weight"], t["bias"], t["initial_state"], code(9), True


def norm(residual: bool = False) -> Arguments:
    rng = torch.Generator().manual_seed(2)
    x, other, weight = (torch.randn(s, generator=rng).requires_grad_() for s in ((2, 3, 8), (2, 3, 8), (8,)))
    pair = (None, other) if residual else (other, None)
    return x, *pair, weight, 8 if residual else 4, 1e-5


def detached(values: Any) -> list[Any]:
    return [v.detach() if isinstance(v, Tensor) else v for v in values]


def scan_backward() -> Arguments:
    given = detached(scan())
    y, final, *kept = OPS.ssd_forward(*given)
    return y, final, *given[:9], *kept, *given[9:13], 16


def mixer_backward() -> Arguments:
    given = detached(mixer(False, ()))
    out, final, *kept = OPS.mixer_forward(*given)
    return out, final, *given[:15], *kept, *given[15:17], *given[18:22], 16


def chunk_backward() -> Arguments:
    *tensors, size = detached(chunk())
    y, final, states = OPS.chunked_forward(*tensors, size)
    return y, final, *tensors, states, size


def entered_backward() -> Arguments:
    _, x, decay, scale, B, C, _, entry, ids, _, reach, cs, steps, size = detached(entered())
    return torch.randn_like(x), x, decay, scale, B, C, entry, ids, reach, cs, steps, size


def conv_backward() -> Arguments:
    given = detached(conv())
    return OPS.conv_forward(*given), *given


def norm_backward() -> Arguments:
    x, z, _, weight, size, eps = detached(norm())
    y, _, rstd = OPS.norm_forward(x, z, None, weight, size, eps)
    return y, None, x, z, weight, rstd, size


def step() -> Arguments:
    s = {k: v.detach() for k, v in draw(1, 1, 2, 3, 1, 4, torch.float32).items()}
    x, dt, B, C = (s[k][:, 0] for k in ("x", "dt", "B", "C"))
    return s["initial_states"], x, dt, s["A"], B, C, s["D"], None, s["dt_bias"], True, 0.0, 1.0


def step_in_place() -> Arguments:
    state, *rest = step()
    return state.repeat(3, 1, 1, 1), torch.tensor([2]), *rest


def conv_step() -> Arguments:
    c = {k: v.detach() for k, v in draw_conv(2, 1, 3, 4, torch.float32).items()}
    return c["x"][:, 0], c["initial_state"], c["weight"], None, True


DIFFERENTIABLE: dict[str, Callable[[], Arguments]] = {
    **{"ssd_forward": scan, "mixer_forward": mixer, "chunked_forward": chunk, "ssd_segment": segment},
    **{"ssd_entered": entered, "conv_forward": conv, "norm_forward": norm},
}
OTHERS: dict[str, Callable[[], Arguments]] = {
    **{"ssd_backward": scan_backward, "mixer_backward": mixer_backward, "chunked_backward": chunk_backward},
    **{"ssd_entered_backward": entered_backward, "conv_backward": conv_backward, "norm_backward": norm_backward},
    **{"ssd_step": step, "ssd_step_in_place": step_in_place, "conv_step": conv_step},
}
VARIANTS = {
    "saved states": ("ssd_forward", lambda: scan(True)),
    "a saved segment": ("ssd_segment", lambda: segment(True)),
    "a norm of a sum": ("norm_forward", lambda: norm(True)),
    "a bare convolution": ("conv_forward", lambda: (*conv()[:2], None, None, None, False)),
}


def test_every_operator_has_a_case() -> None:
    assert DIFFERENTIABLE.keys() | OTHERS.keys() == ALL


@pytest.mark.parametrize("name", sorted(DIFFERENTIABLE) + sorted(OTHERS))
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(OPS, name).default, (DIFFERENTIABLE | OTHERS)[name]())


@pytest.mark.parametrize("variant", [*VARIANTS, pytest.param("all of a layer", marks=pytest.mark.full)])
def test_opcheck_of_variants(variant: str) -> None:
    name, arguments = VARIANTS.get(variant, ("mixer_forward", lambda: mixer(False, ())))
    torch.library.opcheck(getattr(OPS, name).default, arguments())


class Calls(TorchDispatchMode):
    """Counts what reaches the kernels of one operator."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.op, self.count = getattr(OPS, name).default, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is self.op
        return func(*args, **(kwargs or {}))


def gradients(name: str, policy: CheckpointPolicy | None) -> tuple[int, tuple[Tensor | None, ...]]:
    """(calls of the operator in forward and backward, the gradients of its arguments)."""
    given = DIFFERENTIABLE[name]()
    used = [v for v in given if isinstance(v, Tensor) and v.requires_grad]
    op = getattr(OPS, name)

    def layer() -> Tensor:
        # the products around the operator need its inputs and outputs again
        outs = op(*(v * 1.0 if isinstance(v, Tensor) and v.requires_grad else v for v in given))
        outs = outs if isinstance(outs, tuple) else (outs,)
        return sum((out.double().square().sum() for out in outs if out.requires_grad), torch.zeros(()).double())

    def choose(ctx: Any, func: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        assert policy is not None
        return policy if func is op.default else CheckpointPolicy.PREFER_RECOMPUTE

    with Calls(name) as calls:
        if policy is None:
            loss = layer()
        else:
            context = lambda: create_selective_checkpoint_contexts(choose)  # noqa: E731
            loss = checkpoint(layer, use_reentrant=False, context_fn=context)
        grads = torch.autograd.grad(loss, used, allow_unused=True)
    return calls.count, grads


@pytest.mark.parametrize("name", sorted(DIFFERENTIABLE))
def test_a_policy_saves_or_recomputes(name: str) -> None:
    count, want = gradients(name, None)
    assert count == 1 and any(grad is not None and bool(grad.any()) for grad in want)
    for policy, expected in ((CheckpointPolicy.MUST_SAVE, 1), (CheckpointPolicy.MUST_RECOMPUTE, 2)):
        count, got = gradients(name, policy)
        assert count == expected, policy
        for a, b in zip(got, want, strict=True):
            assert (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
