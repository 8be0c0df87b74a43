"""Launches of the SSD kernels: shapes, strides and buffers around triton_forward, triton_backward and triton_decay."""

from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import triton_backward as backward
from . import triton_decay as decay
from . import triton_forward as forward
from .triton_config import INTERPRETER, Launch, ScanConfig
from .triton_table import lookup

PARTS = 64  # partial sums of a parameter that one program loads at a time
LARGEST_STRIDE = 1 << 24  # 128 tokens of it stay below 2³¹, the range of an offset inside a chunk


class Discretisation(NamedTuple):
    """What turns (dt, A, dt_bias) into (log_decay, scale); ``on`` is False where the op is given the latter."""

    on: bool
    softplus: bool
    low: float
    high: float

    @property
    def flags(self) -> dict[str, Any]:
        clamp = not (self.softplus and self.low == 0.0 and self.high == float("inf"))
        return {"DISCRETISE": self.on, "SOFTPLUS": self.softplus, "CLAMP": clamp}


class Scan(NamedTuple):
    """The arguments of one scan and everything the launches derive from them."""

    x: Tensor
    first: Tensor
    second: Tensor
    bias: Tensor | None
    B: Tensor
    C: Tensor
    D: Tensor | None
    code: Tensor | None
    how: Discretisation
    chunk: int
    config: ScanConfig

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """b, l, h, p, g, n."""
        (b, l, h, p), (g, n) = self.x.shape, self.B.shape[2:]
        return b, l, h, p, g, n

    @property
    def chunks(self) -> int:
        return -(-self.x.shape[1] // self.chunk)

    @property
    def padded(self) -> int:
        return self.chunks * self.chunk

    @property
    def dot(self) -> torch.dtype:
        return torch.promote_types(torch.promote_types(self.x.dtype, self.B.dtype), self.C.dtype)

    @property
    def shape_flags(self) -> dict[str, Any]:
        _, _, _, p, _, n = self.sizes
        return {"Q": self.chunk, "BP": block_of(p), "BN": block_of(n), "DOT": triton_dtype(self.dot)}

    @property
    def ints(self) -> tuple[int, ...]:
        """L, H, R, P, N, C, Lp."""
        _, l, h, p, g, n = self.sizes
        return (l, h, h // g, p, n, self.chunks, self.padded)

    def rows(self, launch: Launch) -> int:
        """Tokens of one program: a chunk or half of it, whatever the configuration says."""
        return min(max(launch.rows, self.chunk // 2), self.chunk)

    def heads(self, rows: int) -> int:
        """Heads per program: the whole group, or a part of it where that fills the device better.

        Programs run in rounds of ``slots``; each costs its heads, and about one and a half for what it does once.
        """
        b, _, h, _, g, _ = self.sizes
        programs, group = b * g * self.chunks * (self.chunk // rows), h // g
        parts = [parts for parts in range(1, group + 1) if group % parts == 0]
        return group // min(parts, key=lambda s: -(-s * programs // self.config.slots) * (group / s + 1.5))


def is_interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter (TRITON_INTERPRET=1 when Triton was first imported)."""
    return bool(triton.knobs.runtime.interpret)


def block_of(size: int) -> int:
    """The power of two, at least 16, that holds ``size``."""
    return max(16, triton.next_power_of_2(size))


def triton_dtype(dtype: torch.dtype) -> Any:
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


@cache
def _target() -> tuple[int, int]:
    """(architecture, Triton minor version) of the current device; 0 without one, for fake tensors, −1 where it has no
    number."""
    minor = int(triton.__version__.split(".")[1])
    if not torch.cuda.is_available():
        return 0, minor
    arch = triton.runtime.driver.active.get_current_target().arch
    return (int(arch) if str(arch).isdigit() else -1), minor


def configuration(x: Tensor, B: Tensor, C: Tensor) -> ScanConfig:
    """The launches for tensors of these sizes and dtypes on this device."""
    if is_interpreted():
        return INTERPRETER
    arch, minor = _target()
    half = torch.promote_types(torch.promote_types(x.dtype, B.dtype), C.dtype) != torch.float32
    return lookup((arch, block_of(x.shape[3]), block_of(B.shape[3]), "half" if half else "float", minor))


def plan(
    x: Tensor,
    first: Tensor,
    second: Tensor,
    bias: Tensor | None,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    code: Tensor | None,
    how: Discretisation,
    chunk: int,
) -> Scan:
    """Make the strides usable and look the configuration up; a ``chunk`` of 0 is the configuration's.

    Raises:
        ValueError: a token of x or B is wider than the offsets inside a chunk can hold.
    """
    x, B, C = (by_token(t) for t in (x, B, C))
    for name, tensor in (("x", x), ("B", B)):
        if tensor.shape[1] > 1 and tensor.stride(1) >= LARGEST_STRIDE:
            raise ValueError(f"{name} has {tensor.stride(1)} elements per token, expected less than {LARGEST_STRIDE}")
    bias, D = (None if t is None else t.contiguous() for t in (bias, D))
    second = second.contiguous() if how.on else second
    config = configuration(x, B, C)
    return Scan(x, first, second, bias, B, C, D, code, how, chunk or config.chunk, config)


def by_token(t: Tensor) -> Tensor:
    """``t`` with contiguous channels and offsets inside a chunk that fit 32 bits; a copy only where it has neither."""
    return t if t.stride(-1) == 1 and 0 <= t.stride(1) < LARGEST_STRIDE else t.contiguous()


def decays(scan: Scan) -> tuple[Tensor, Tensor]:
    """cs and scale, (b, h, padded length) float32."""
    b, l, h, *_ = scan.sizes
    cs = scan.x.new_empty(b, h, scan.padded, dtype=torch.float32)
    scale = torch.empty_like(cs)
    launch, how = scan.config.prep, scan.how
    strides = (0, 0, scan.second.stride(0)) if how.on else scan.second.stride()
    forward.prep_kernel[(scan.chunks, triton.cdiv(h, launch.rows), b)](
        *(scan.first, scan.second, scan.bias, scan.code, cs, scale, l, h, scan.padded),
        *(*scan.first.stride(), *strides, how.low, how.high),
        **how.flags,
        HAS_BIAS=scan.bias is not None,
        HAS_CODE=scan.code is not None,
        Q=scan.chunk,
        BH=launch.rows,
        num_warps=launch.warps,
    )
    return cs, scale


def pass_states(
    scan: Scan,
    cs: Tensor,
    scale: Tensor,
    initial: Tensor | None,
    *,
    write: bool = True,
    reach: Tensor | None = None,
    dy: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The states that enter each chunk and the final state; with dy, backwards, the gradients of those that leave each
    chunk and of the initial state.

    Args:
        initial: (b, h, p, n), the state before the first chunk; with dy the gradient of the final state.
        write: return the states (empty otherwise). reach: receives the decay from the start of the row to each chunk.
    """
    b, _, h, p, _, n = scan.sizes
    reverse = dy is not None
    launch = scan.config.dstate if reverse else scan.config.state
    flags = scan.shape_flags
    flags["BP"] = min(flags["BP"], launch.rows)
    u, v = (scan.x, scan.B) if dy is None else (dy, scan.C)
    states = scan.x.new_empty((b, scan.chunks, h, p, n) if write else (0,), dtype=scan.dot)
    final = scan.x.new_empty(b, h, p, n, dtype=torch.float32)
    forward.state_pass_kernel[(triton.cdiv(p, flags["BP"]), h, b)](
        *(u, v, cs, scale, scan.code, initial, states, final, reach, *scan.ints),
        *(*u.stride()[:3], *v.stride()[:3]),
        REVERSE=reverse,
        HAS_INITIAL=initial is not None,
        HAS_CODE=scan.code is not None,
        HAS_REACH=reach is not None,
        WRITE=write,
        **flags,
        num_warps=launch.warps,
        num_stages=launch.stages,
        STAGES=launch.stages,
    )
    return states, final


def outputs(
    scan: Scan, cs: Tensor, scale: Tensor, states: Tensor, reach: Tensor | None = None, entry: Tensor | None = None
) -> Tensor:
    """y (b, l, h, p) in x's dtype; with ``entry`` the state reach·entry joins every chunk's."""
    b, _, h, *_ = scan.sizes
    y = torch.empty(scan.x.shape, dtype=scan.x.dtype, device=scan.x.device)
    launch = scan.config.output
    rows = scan.rows(launch)
    heads = scan.heads(rows)
    forward.output_kernel[(scan.chunks * (scan.chunk // rows), h // heads, b)](
        *(scan.x, scan.B, scan.C, scan.D, cs, scale, scan.code, states, reach, entry, y, *scan.ints),
        *(*scan.x.stride()[:3], *scan.B.stride()[:3], *scan.C.stride()[:3], heads),
        HAS_D=scan.D is not None,
        HAS_CODE=scan.code is not None,
        HAS_ENTRY=entry is not None,
        ROWS=rows,
        **scan.shape_flags,
        num_warps=launch.warps,
        num_stages=launch.stages,
        STAGES=launch.stages,
    )
    return y


class Gradients(NamedTuple):
    """Those that do not apply are None."""

    x: Tensor
    first: Tensor
    second: Tensor
    bias: Tensor | None
    B: Tensor
    C: Tensor
    D: Tensor | None
    initial: Tensor


def gradients(
    scan: Scan,
    cs: Tensor,
    scale: Tensor,
    states: Tensor,
    dy: Tensor,
    dfinal: Tensor | None,
    dfirst: Tensor | None = None,
) -> Gradients:
    """Every gradient of the scan.

    Args:
        states: enter each chunk. dy: (b, l, h, p). dfinal: (b, h, p, n) or None.
        dfirst: (b, l, h) with contiguous heads, where the gradient of ``first`` goes; a new tensor otherwise.
    """
    dy = by_token(dy)
    dleft, dinitial = pass_states(scan, cs, scale, dfinal, dy=dy)
    dx, dsim, tiles = _token_gradients(scan, cs, scale, dleft, dy)
    dB, dC, links = _group_gradients(scan, cs, scale, states, dleft, dsim, dy)
    dfirst, dsecond, dbias, dD = _decay_gradients(scan, scale, tiles, links, dfirst)
    return Gradients(dx, dfirst, dsecond, dbias, dB, dC, dD, dinitial)


def _token_gradients(
    scan: Scan, cs: Tensor, scale: Tensor, dleft: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """dx, the gradient of C·Bᵀ and (drow, dfar, dcol, dscale, dskip), the last of them None without D."""
    b, _, h, _, g, _ = scan.sizes
    launch = scan.config.dx
    rows = scan.rows(launch)
    tiles, heads = scan.chunk // rows, scan.heads(rows)
    dx = torch.empty(scan.x.shape, dtype=scan.x.dtype, device=scan.x.device)
    dsim = cs.new_empty(h // g // heads, b, g, scan.padded, scan.chunk, dtype=scan.dot)
    drow, dfar, dcol, dscale = (torch.empty_like(cs) for _ in range(4))
    dskip = None if scan.D is None else torch.empty_like(cs)
    backward.dx_kernel[(scan.chunks * tiles, h // heads, b)](
        *(scan.x, scan.B, scan.C, scan.D, dy, cs, scale, scan.code, dleft),
        *(dx, dsim, drow, dfar, dcol, dscale, dskip, *scan.ints),
        *(*scan.x.stride()[:3], *scan.B.stride()[:3], *scan.C.stride()[:3], *dy.stride()[:3], heads),
        HAS_D=scan.D is not None,
        HAS_CODE=scan.code is not None,
        ROWS=rows,
        **scan.shape_flags,
        num_warps=launch.warps,
        num_stages=launch.stages,
        STAGES=launch.stages,
    )
    return dx, dsim, (drow, dfar, dcol, dscale, dskip)


def entry_gradients(
    scan: Scan, cs: Tensor, scale: Tensor, reach: Tensor, entry: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of first, C and entry, of what the state ``entry`` gave to the outputs; the scan's own are not in it.

    Args:
        reach: (b, h, chunks). entry: (b, h, p, n) float32, contiguous. dy: (b, l, h, p).
    """
    dy = by_token(dy)
    _, dentry = pass_states(scan, cs, scale, None, write=False, dy=dy)
    _, dC, (dopen, _, _) = _group_gradients(scan, cs, scale, entry, None, None, dy, reach)
    # all that entry gave to later chunks passed this one
    from_here = dopen.unflatten(-1, (scan.chunks, scan.chunk)).sum(dim=-1).flip(-1).cumsum(dim=-1).flip(-1)
    dots = F.pad(from_here[..., 1:], (0, 1))
    dfirst, *_ = _decay_gradients(scan, scale, None, (dopen, None, dots), None)
    return dfirst, dC, dentry


def _group_gradients(
    scan: Scan,
    cs: Tensor,
    scale: Tensor,
    states: Tensor,
    dleft: Tensor | None,
    dsim: Tensor | None,
    dy: Tensor,
    reach: Tensor | None = None,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor | None, Tensor | None]]:
    """dB, dC and what the links of tokens and chunks to the states gave to their exponents, (dopen, dgiven, dots); with
    ``reach`` only dC and dopen, of reach·states, one state per row and head."""
    b, l, h, _, g, n = scan.sizes
    launch = scan.config.dbc
    rows = scan.rows(launch)
    splits = h // g // scan.heads(rows) if dsim is None else dsim.shape[0]
    dB, dC = (
        cs.new_empty((splits, *((b, l, g, n) if wanted else (0,))), dtype=t.dtype if splits == 1 else torch.float32)
        for t, wanted in ((scan.B, reach is None), (scan.C, True))
    )
    dopen = torch.empty_like(cs)
    dgiven, dots = (None, None) if reach is not None else (torch.empty_like(cs), cs.new_empty(b, h, scan.chunks))
    tiles = scan.chunks * (scan.chunk // rows)
    backward.dbc_kernel[(tiles if reach is not None else 2 * tiles, g * splits, b)](
        *(scan.x, dy, scan.B, scan.C, states, dleft, reach, cs, scale, scan.code, dsim, dB, dC, dopen, dgiven, dots),
        *(*scan.ints, *scan.x.stride()[:3], *dy.stride()[:3], *scan.B.stride()[:3], *scan.C.stride()[:3]),
        h // g // splits,
        HAS_CODE=scan.code is not None,
        HAS_REACH=reach is not None,
        ROWS=rows,
        **scan.shape_flags,
        num_warps=launch.warps,
        num_stages=launch.stages,
        STAGES=launch.stages,
    )
    whole_B, whole_C = (
        grad[0] if splits == 1 else grad.sum(dim=0).to(t.dtype) for grad, t in ((dB, scan.B), (dC, scan.C))
    )
    return whole_B, whole_C, (dopen, dgiven, dots)


def _decay_gradients(
    scan: Scan,
    scale: Tensor,
    tiles: tuple[Tensor | None, ...] | None,
    links: tuple[Tensor, Tensor | None, Tensor | None],
    dfirst: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of first, second, bias and D; without ``tiles`` only of first, from dopen and dots."""
    b, l, h, *_ = scan.sizes
    drow, dfar, dcol, dscale, dskip = (None,) * 5 if tiles is None else tiles
    how, launch = scan.how, scan.config.decay
    new = scale.new_empty
    dfirst = new(b, l, h, dtype=scan.first.dtype) if dfirst is None else dfirst
    dsecond = new(0) if how.on or tiles is None else new(b, l, h, dtype=scan.second.dtype)
    wanted = (how.on, how.on and scan.bias is not None, dskip is not None)
    parts = [new(b, scan.chunks, h) if given else None for given in wanted]
    decay.decay_kernel[(scan.chunks, triton.cdiv(h, launch.rows), b)](
        *(drow, dfar, dcol, *links, dscale, dskip, scan.code, scan.first, scan.second, scan.bias, scale),
        *(dfirst, dsecond, *parts, l, h, scan.chunks, scan.padded, *scan.first.stride()),
        *(dfirst.stride(0), dfirst.stride(1), how.low, how.high),
        HAS_TILE=tiles is not None,
        **how.flags,
        HAS_BIAS=wanted[1],
        HAS_D=wanted[2],
        HAS_CODE=scan.code is not None,
        Q=scan.chunk,
        ROWS=scan.rows(scan.config.dx),
        BH=launch.rows,
        num_warps=launch.warps,
    )
    sums = _parameter_gradients(scan, parts)
    return dfirst, sums[0] if sums[0] is not None else dsecond, sums[1], sums[2]


def _parameter_gradients(scan: Scan, parts: list[Tensor | None]) -> list[Tensor | None]:
    """Gradients of A, bias and D from their partial sums (b, chunks, h); None where there are none."""
    b, _, h, *_ = scan.sizes
    like = (scan.second, scan.bias, scan.D)
    sums = [None if p is None or t is None else t.new_empty(h) for p, t in zip(parts, like, strict=True)]
    flags = {name: t is not None for name, t in zip(("HAS_A", "HAS_BIAS", "HAS_D"), sums, strict=True)}
    if any(flags.values()):
        decay.parameter_kernel[(triton.cdiv(h, 16), len(parts))](
            *(*parts, *sums, b * scan.chunks, h), **flags, BP=PARTS, BH=16, num_warps=4
        )
    return sums
