"""Compile what the launchers would launch for sm_90, without a GPU, and read registers, spills and shared memory.

The launchers run on meta tensors with their kernels replaced by recorders, so that the gate sees the shipped
configurations, argument types and specialisations. ``python tests/kernels/static_gate.py`` prints the table.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
OPTIONS = ("num_warps", "num_stages")


class Use(NamedTuple):
    kernel: str
    options: dict[str, int]
    registers: int
    stack: int
    inner: int  # loads and stores of spilled registers inside loops, where they cost
    shared: int
    wgmma: int  # instructions of Hopper's matrix units, which take operands of a whole warpgroup
    mma: int  # of the older ones, at half the rate
    wide: int  # copies and loads of 16 bytes

    @property
    def programs(self) -> int:
        """That an SM of sm_90 holds at once: 64 Ki registers, 2,048 threads, 227 KB of shared memory."""
        threads = 32 * self.options["num_warps"]
        registers = -(-self.registers // 8) * 8
        return min(65536 // (threads * registers), 2048 // threads, 227 * 1024 // (self.shared + 1024), 32)


class Recorder:
    """Stands in for a kernel: ``kernel[grid](...)`` compiles instead of launching."""

    def __init__(self, kernel: Any, out: list[Use], label: str, arch: int) -> None:
        self.kernel, self.out, self.label, self.arch = kernel, out, label, arch

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self.compile

    def compile(self, *args: Any, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        names = self.kernel.arg_names
        given = dict(zip(names, args, strict=False)) | kwargs
        constants = {p.name for p in self.kernel.params if p.is_constexpr}
        signature, constexprs, attributes = {}, {}, {}
        for index, name in enumerate(names):
            value = given[name]
            if name in constants or value is None or (isinstance(value, int) and value == 1):
                signature[name], constexprs[(index,)] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name], attributes[(index,)] = TYPES[value.dtype], [["tt.divisibility", 16]]
            elif isinstance(value, int):
                signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if value % 16 == 0:
                    attributes[(index,)] = [["tt.divisibility", 16]]
            else:
                signature[name] = "fp32"
        source = ASTSource(self.kernel, signature, constexprs, attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", self.arch, 32), options=options)
        registers, stack, inner = resources(compiled.asm["cubin"])
        name = f"{self.kernel.fn.__name__}{self.label}"
        name += "".join(f" {key.lower()}" for key in ("REVERSE", "HAS_ENTRY", "HAS_REACH") if given.get(key))
        ptx = compiled.asm["ptx"]
        kinds = (r"wgmma\.mma_async", r"\bmma\.sync", r"ld\.global[\w.:]*\.v4\.b32|cp\.async\.cg[\w.:]* [^;]*, 0x10")
        found = (len(re.findall(kind, ptx)) for kind in kinds)
        self.out.append(Use(name, options, registers, stack, inner, compiled.metadata.shared, *found))


def resources(cubin: bytes) -> tuple[int, int, int]:
    """(registers per thread, bytes of stack per thread, spills inside loops) of a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "-res-usage", "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert usage, text
    return int(usage.group(1)), int(usage.group(2)), inner_spills(text)


def inner_spills(sass: str) -> int:
    """LDL and STL between the target of a backward jump and the jump."""
    code = [(int(m[1], 16), m[2]) for m in re.finditer(r"/\*([0-9a-f]{4,})\*/ +([^;]*);", sass)]
    jumps = [(place, re.search(r"\bBRA\b.* (0x[0-9a-f]+)", text)) for place, text in code]
    loops = [(int(to[1], 16), place) for place, to in jumps if to and int(to[1], 16) < place]
    spills = [place for place, text in code if re.search(r"\b(LDL|STL)\b", text)]
    return sum(any(first <= place <= last for first, last in loops) for place in spills)


@contextlib.contextmanager
def recording(modules: list[ModuleType], label: str = "", arch: int = 90) -> Iterator[list[Use]]:
    """Replace every kernel in ``modules`` for a while; yields the list that the compiled launches land in."""
    out: list[Use] = []
    kernels = [
        (module, name, value)
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, triton.JITFunction) and name.endswith("_kernel")
    ]
    for module, name, kernel in kernels:
        setattr(module, name, Recorder(kernel, out, label, arch))
    try:
        yield out
    finally:
        for module, name, kernel in kernels:
            setattr(module, name, kernel)


def scan_uses(
    dtype: torch.dtype,
    packed: bool,
    *,
    p: int = 64,
    n: int = 128,
    sizes: tuple[int, int, int, int] = (1, 4096, 128, 8),
    config: Any = None,
    segments: bool = False,
    arch: int = 90,
) -> list[Use]:
    """Forward and backward at ``sizes``, (b, l, h, g): one 4,096-token sequence of the 8B shape."""
    from polylepis.kernels.ssd import triton_backward, triton_decay, triton_forward, triton_scan

    b, l, h, g = sizes
    target, triton_scan._target = triton_scan._target, lambda: (arch, int(triton.__version__.split(".")[1]))

    def new(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    code = new(b, l, dtype=torch.int32) if packed else None
    how = triton_scan.Discretisation(True, True, 0.0, float("inf"))
    parameters = [new(h, dtype=torch.float32) for _ in range(3)]
    x, dt, B, C = new(b, l, h, p), new(b, l, h), new(b, l, g, n), new(b, l, g, n)
    initial = new(b, h, p, n, dtype=torch.float32)
    try:
        scan = triton_scan.plan(x, dt, parameters[0], parameters[1], B, C, parameters[2], code, how, 0)
        if config is not None:
            scan = scan._replace(config=config, chunk=config.chunk)
        label = f" {str(dtype)[6:]} P{p} N{n} Q{scan.chunk}{' packed' if packed else ''}"
        with recording([triton_forward, triton_backward, triton_decay], label, arch) as out:
            cs, scale = triton_scan.decays(scan)
            states, final = triton_scan.pass_states(scan, cs, scale, initial)
            y = triton_scan.outputs(scan, cs, scale, states)
            triton_scan.gradients(scan, cs, scale, states, y, final)
            if segments:
                core = triton_scan.Discretisation(False, False, 0.0, float("inf"))
                scan = scan._replace(second=new(b, l, h), bias=None, how=core)
                reach = new(b, h, scan.chunks, dtype=torch.float32)
                states, _ = triton_scan.pass_states(scan, cs, scale, None, reach=reach)
                triton_scan.outputs(scan, cs, scale, states, reach, initial)
                triton_scan.entry_gradients(scan, cs, scale, reach, initial, y)
    finally:
        triton_scan._target = target
    return out


def row_uses(dtype: torch.dtype) -> list[Use]:
    """Convolution, norms and decode steps at the 8B shape, forward and backward."""
    from polylepis.kernels import triton_conv, triton_norm
    from polylepis.kernels.ssd import triton_step

    def new(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    with recording([triton_conv, triton_norm, triton_step], f" {str(dtype)[6:]}") as out:
        x, weight, bias, start = new(1, 4096, 10240), new(10240, 4), new(10240), new(1, 10240, 3)
        code = new(1, 4096, dtype=torch.int32)
        triton_conv.conv_forward(x, weight, bias, start, code, True)
        triton_conv.conv_backward(x, x, weight, bias, start, code, True)
        triton_conv.conv_step(x[:, 0], start, weight, bias, True)
        y, z, scale = new(1, 4096, 8192), new(1, 4096, 18560)[..., :8192], new(8192)
        for gate, residual, group in ((z, None, 1024), (None, None, 8192), (None, y, 8192)):
            _, _, rstd = triton_norm.norm_forward(y, gate, residual, scale, group, 1e-5)
            triton_norm.norm_backward(y, residual, y, gate, scale, rstd, group)
        state, per_head = new(1, 128, 64, 128, dtype=torch.float32), new(128, dtype=torch.float32)
        head, group = new(1, 128, 64), new(1, 8, 128)
        triton_step.scan_step(
            state, head, new(1, 128), per_head, group, group, per_head, head, per_head, True, 0.0, float("inf")
        )
    return out


def mixer_uses(dtype: torch.dtype, packed: bool) -> list[Use]:
    """What the layer's operator launches beside the scan's kernels: its prep, and the backward of the convolution."""
    from polylepis.kernels.ssd import triton_mixer, triton_scan

    b, l, h, g, inner, state = 1, 4096, 128, 8, 8192, 1024
    target, triton_scan._target = triton_scan._target, lambda: (90, int(triton.__version__.split(".")[1]))

    def new(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    code = new(b, l, dtype=torch.int32) if packed else None
    # views of one projection, as the layer has them
    _, x, B, C, dt = new(b, l, 2 * inner + 2 * state + h).split((inner, inner, state, state, h), dim=-1)
    start = new(b, inner + 2 * state, 3) if packed else None
    weight, bias = new(inner + 2 * state, 4), new(inner + 2 * state)
    per_head = [new(h, dtype=torch.float32) for _ in range(3)]
    how = triton_scan.Discretisation(True, True, 0.0, float("inf"))
    try:
        conv = triton_mixer.Convolution.of((x, B, C), weight, bias, start, code, True)
        decays = triton_mixer.Decays(dt, per_head[0], per_head[1], per_head[2], code, how, g)
        with recording([triton_mixer], f" {str(dtype)[6:]}{' packed' if packed else ''}") as out:
            triton_mixer.prepare(conv, decays, 0)
            dx, dB, dC = new(b, l, inner), new(b, l, state), new(b, l, state)
            triton_mixer.conv_gradients(conv, dx, dB, dC, new(b, l, 18560)[..., inner:-h])
    finally:
        triton_scan._target = target
    return out


def table(uses: list[Use]) -> str:
    lines = [
        "| kernel | warps, stages | registers | stack B | spills in loops | shared KB | programs per SM |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {u.kernel} | {u.options.get('num_warps')}, {u.options.get('num_stages', '–')} | {u.registers} | {u.stack}"
        f" | {u.inner} | {u.shared / 1024:.0f} | {u.programs} |"
        for u in uses
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    every: list[Use] = []
    for kind, documents in ((torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, True)):
        every += scan_uses(kind, documents) + mixer_uses(kind, documents)
    print(table(every + row_uses(torch.bfloat16)))
