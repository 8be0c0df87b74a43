"""Correctness on the device: every kernel against float64 on fresh random inputs, twice for bitwise equality."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from polylepis.kernels.conv import causal_conv1d, causal_conv1d_step
from polylepis.kernels.norm import gated_rms_norm, rms_norm, rms_norm_residual
from polylepis.kernels.ssd import combine, enter, ssd, ssd_core, ssd_mixer, ssd_reference, ssd_step, summarise

ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
Function = Callable[[str, dict[str, Tensor]], Any]


def check_all(device: torch.device, skip: int, until: float, keep: Callable[[list[dict[str, Any]]], None]) -> None:
    """One row per check and dtype but the first ``skip``, kept before and after each; a failure is a row, too."""
    rows: list[dict[str, Any]] = []
    # the interpreter cannot multiply bfloat16
    plan = [(name, dtype) for dtype in ALLOWED for name in CASES if device.type != "cpu" or dtype == torch.float32]
    for name, dtype in plan[skip:]:
        allowed = ALLOWED[dtype]
        rows.append(_row(name, dtype, float("nan"), "the process ended here", allowed, False))
        keep(rows)
        try:
            if time.time() > until:
                raise TimeoutError("no time left")
            rows[-1] = compare(name, *CASES[name](device), device, dtype, allowed)
        except Exception as error:
            what = f"{type(error).__name__}: {error}"[:300].replace("\n", " ")
            rows[-1] = _row(name, dtype, float("nan"), what, allowed, False)
        keep(rows)


def _row(name: str, dtype: torch.dtype, worst: float, tensor: str, allowed: float, equal: bool) -> dict[str, Any]:
    row = {
        "check": name,
        "dtype": str(dtype)[6:],
        "worst": f"{worst:.1e}",
        "tensor": tensor,
        "allowed": f"{allowed:.0e}",
    }
    return row | {"bitwise_equal": equal, "passed": equal and worst <= allowed}


def compare(
    name: str,
    function: Function,
    shapes: dict[str, tuple[int, ...]],
    grads: bool,
    device: torch.device,
    dtype: torch.dtype,
    allowed: float,
) -> dict[str, Any]:
    """The worst relative error over outputs and gradients."""
    exact = {k: torch.randn(s, device=device).to(dtype).double() for k, s in shapes.items()}
    if "A" in exact:
        exact["A"] = (-exact["A"].abs() - 0.1).to(dtype).double()
    low = {k: v.to(dtype) for k, v in exact.items()}
    want = _results(function, "exact", exact, grads)
    with poisoned_memory():
        first, second = (_results(function, "triton", low, grads) for _ in range(2))
    errors = _errors(first, want)
    if max(errors.values()) > allowed:
        # a sum that cancels shows the dtype's rounding: four times torch's in the same dtype, tenfold at most
        plain = _errors(_results(function, "exact", low, grads), want)
        limits = {key: max(allowed, min(4 * plain[key], 10 * allowed)) for key in errors}
    else:
        limits = dict.fromkeys(errors, allowed)
    tensor = max(errors, key=lambda key: errors[key] / limits[key])
    return _row(
        name, dtype, errors[tensor], tensor, limits[tensor], all(torch.equal(first[k], second[k]) for k in first)
    )


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """What is allocated inside holds NaN until it is written."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of operators without a deterministic variant, which are not what is tested
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def _errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    """Relative error of each tensor; infinite where it is not finite."""
    errors = {}
    for key, expected in want.items():
        error = (got[key].double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-6)
        errors[key] = error.item() if torch.isfinite(error) else float("inf")
    return errors


def _results(function: Function, backend: str, tensors: dict[str, Tensor], grads: bool) -> dict[str, Tensor]:
    tensors = {k: v.detach().requires_grad_(grads) for k, v in tensors.items()}
    outputs = function(backend, tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    results = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    if grads:
        rng = torch.Generator().manual_seed(1)
        weights = [torch.randn(out.shape, generator=rng).to(out.device, torch.bfloat16) for out in outputs]
        loss = sum((out * w.to(out.dtype)).sum() for out, w in zip(outputs, weights, strict=True))
        gradients = torch.autograd.grad(loss, list(tensors.values()))
        results |= {f"d{key}": grad for key, grad in zip(tensors, gradients, strict=True)}
    return results


Built = tuple[Function, dict[str, tuple[int, ...]], bool]


def _scan_shapes(l: int, h: int, p: int, g: int, n: int, b: int = 2) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"x": (b, l, h, p), "dt": (b, l, h), "A": (h,)}
    shapes |= {"B": (b, l, g, n), "C": (b, l, g, n), "D": (h,), "dt_bias": (h,)}
    return shapes | {"initial_states": (b, h, p, n)}


def _scan(l: int, sizes: tuple[int, int, int, int], documents: bool, save: bool) -> Callable[[torch.device], Built]:
    def build(device: torch.device) -> Built:
        small = device.type == "cpu"
        length, dims = (20, (2, 8, 1, 8)) if small else (l, sizes)
        ids = (torch.rand(2, length, device=device) < 0.02).cumsum(1) if documents else None
        if ids is not None:
            ids[:, length // 3 : length // 3 + 5] = -1

        def scan(backend: str, t: dict[str, Tensor]) -> Any:
            options: dict[str, Any] = {"dt_softplus": True, "seq_idx": ids, "return_final_states": True}
            if backend == "exact":
                return ssd_reference(**t, **options)
            return ssd(**t, **options, save_states=save, backend="triton")

        return scan, _scan_shapes(length, *dims), True

    return build


def _segments(device: torch.device) -> Built:
    length, dims = (20, (2, 8, 1, 8)) if device.type == "cpu" else (600, (16, 64, 2, 128))
    half = length // 2

    def scan(backend: str, t: dict[str, Tensor]) -> Any:
        decay = -t["dt"].abs()
        if backend == "exact":
            y = ssd_core(t["x"], decay, t["dt"], t["B"], t["C"], backend="torch")
            return y
        first, second = slice(0, half), slice(half, None)
        one, kept = summarise(*(v[:, first] for v in (t["x"], decay, t["dt"], t["B"], t["C"])), backend="triton")
        two, more = summarise(*(v[:, second] for v in (t["x"], decay, t["dt"], t["B"], t["C"])), backend="triton")
        del two
        start = torch.zeros_like(one.state)
        outs = (
            enter(kept, start),
            enter(more, combine(one._replace(state=start), one).state),
        )
        return torch.cat(outs, dim=1)

    shapes = {k: v for k, v in _scan_shapes(length, *dims).items() if k in ("x", "dt", "B", "C")}
    return scan, shapes, True


def _conv(device: torch.device) -> Built:
    b, l, c = (1, 20, 8) if device.type == "cpu" else (2, 1000, 1300)
    ids = (torch.rand(b, l, device=device) < 0.05).cumsum(1)

    def conv(backend: str, t: dict[str, Tensor]) -> Any:
        return causal_conv1d(
            *(t["x"], t["weight"], t["bias"]),
            initial_state=t["initial"],
            seq_idx=ids,
            backend="torch" if backend == "exact" else backend,
        )

    return conv, {"x": (b, l, c), "weight": (c, 4), "bias": (c,), "initial": (b, c, 3)}, True


def _mixer(device: torch.device) -> Built:
    """The operator between a layer's projections: documents, padding and both initial states."""
    small = device.type == "cpu"
    b, l, (h, p, g, n) = (1, 20, (2, 8, 1, 8)) if small else (2, 520, (16, 64, 2, 128))
    ids = (torch.rand(b, l, device=device) < 0.05).cumsum(1)
    ids[:, l // 3 : l // 3 + 5] = -1
    inner, state = h * p, g * n

    def mixer(backend: str, t: dict[str, Tensor]) -> Any:
        z, x, B, C, dt = t["zxBCdt"].split((inner, inner, state, state, h), dim=-1)
        starts = {"conv_state": t["conv_state"], "initial_states": t["initial_states"], "seq_idx": ids}
        if backend != "exact":
            tensors = (x, dt, t["A"], B, C, t["weight"], t["bias"])
            rest = {"z": z, "norm_weight": t["norm"], "norm_group_size": inner // g, "D": t["D"]}
            bias = {"dt_bias": t["dt_bias"], "return_final_states": True, "backend": backend}
            return ssd_mixer(*tensors, n_groups=g, **rest, **bias, **starts)[:2]
        convolved = causal_conv1d(
            *(torch.cat((x, B, C), dim=-1), t["weight"], t["bias"]),
            initial_state=starts["conv_state"],
            seq_idx=ids,
            backend="torch",
        )
        x, B, C = convolved.split((inner, state, state), dim=-1)
        y, final = ssd_reference(
            *(x.unflatten(-1, (h, p)), dt, t["A"], B.unflatten(-1, (g, n)), C.unflatten(-1, (g, n))),
            D=t["D"],
            dt_bias=t["dt_bias"],
            dt_softplus=True,
            initial_states=t["initial_states"],
            seq_idx=ids,
            return_final_states=True,
        )
        return gated_rms_norm(y.flatten(-2), z, t["norm"], group_size=inner // g, backend="torch"), final

    shapes: dict[str, tuple[int, ...]] = {"zxBCdt": (b, l, 2 * inner + 2 * state + h), "A": (h,), "D": (h,)}
    shapes |= {"dt_bias": (h,), "weight": (inner + 2 * state, 4), "bias": (inner + 2 * state,), "norm": (inner,)}
    return mixer, shapes | {"conv_state": (b, inner + 2 * state, 3), "initial_states": (b, h, p, n)}, True


def _gated_norm(device: torch.device) -> Built:
    rows, d, group = (5, 16, 4) if device.type == "cpu" else (1000, 8192, 1024)

    def norm(backend: str, t: dict[str, Tensor]) -> Any:
        return gated_rms_norm(**t, group_size=group, backend="torch" if backend == "exact" else backend)

    return norm, {"x": (rows, d), "z": (rows, d), "weight": (d,)}, True


def _norms(device: torch.device) -> Built:
    rows, d = (5, 12) if device.type == "cpu" else (1000, 4096)

    def norm(backend: str, t: dict[str, Tensor]) -> Any:
        backend = "torch" if backend == "exact" else backend
        plain = rms_norm(t["x"], t["weight"], backend=backend)
        return plain, *rms_norm_residual(t["x"], t["residual"], t["weight"], backend=backend)

    return norm, {"x": (rows, d), "residual": (rows, d), "weight": (d,)}, True


def _decode(device: torch.device) -> Built:
    b, h, p, g, n = (2, 2, 8, 1, 8) if device.type == "cpu" else (5, 128, 64, 8, 128)

    def step(backend: str, t: dict[str, Tensor]) -> Any:
        backend = "torch" if backend == "exact" else backend
        token = [t[k] for k in ("state", "x", "dt", "A", "B", "C")]
        y, state = ssd_step(*token, D=t["D"], dt_softplus=True, backend=backend)
        flat = t["x"].flatten(1)
        out, window = causal_conv1d_step(flat, t["window"], t["weight"], backend=backend)
        return y, state, out, window

    shapes: dict[str, tuple[int, ...]] = {"state": (b, h, p, n), "x": (b, h, p), "dt": (b, h), "A": (h,)}
    shapes |= {"B": (b, g, n), "C": (b, g, n), "D": (h,), "window": (b, h * p, 3), "weight": (h * p, 4)}
    return step, shapes, False


CASES: dict[str, Callable[[torch.device], Built]] = {
    "scan": _scan(520, (16, 64, 2, 128), False, False),
    "scan, states saved": _scan(300, (16, 64, 2, 128), False, True),
    "scan, documents": _scan(520, (16, 64, 2, 128), True, False),
    "scan, odd sizes": _scan(333, (6, 21, 3, 19), True, False),
    "scan, one group": _scan(260, (16, 64, 1, 128), False, False),
    "segments": _segments,
    "convolution": _conv,
    "layer between projections": _mixer,
    "gated norm": _gated_norm,
    "norms": _norms,
    "decode steps": _decode,
}
