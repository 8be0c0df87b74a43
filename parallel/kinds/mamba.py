"""`M`: the Mamba-2 layer (Dao & Gu 2024), its projections shared or specific to each modality (Mixture-of-Mamba).

Mixture-of-Mamba (Liang et al. 2025) decouples the projections of a Mamba-1 block by the modality of the token; this
is the same idea on Mamba-2: in-projections (z, x, B, C, dt), the dt bias and the out-projection may be routed, while
convolution, A, D, the gated norm and the scan are shared, so the state crosses modalities.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ...kernels.conv import causal_conv1d
from ...kernels.norm import gated_rms_norm
from ...kernels.ssd import ssd_core, ssd_mixer
from ..errors import PlanError
from ..layout import HALO, Layout
from ..linear import packed_linear, project
from ..megatron import sum_over_both_ways
from ..mesh import Mesh
from ..parts import Init, Part, local
from ..routing import Route
from .base import HFKey, Kind, Load, Mixer, NewTokens, Shape, Work, flat, skip
from .mamba_context import over_heads, pass_states

PROJECTIONS = ("z", "x", "B", "C", "dt")
ROUTABLE = (*PROJECTIONS, "dt_bias", "out")


@dataclass(frozen=True)
class MambaConfig:
    """Sizes of a Mamba-2 layer; the defaults are those of the 8B Mamba-2-Hybrid (Waleffe et al. 2024).

    Attributes:
        expand: inner width over d_model.
        width: the inner width where it is no multiple of d_model (some published models), None for expand·d_model.
        d_state, head_dim, n_groups: N, P and G of SSD; heads = expand · d_model / head_dim.
        d_conv: width of the causal convolution over x, B and C.
        chunk_size: tiling of SSD (no effect on the numbers).
        routed: which parameters each modality has for itself, of z, x, B, C, dt, dt_bias, out.
        a_min, a_max: A starts as −U(a_min, a_max).
        dt_min, dt_max: softplus(dt_bias) starts log-uniform in this range.
    """

    expand: int = 2
    width: int | None = None
    d_state: int = 128
    head_dim: int = 64
    n_groups: int = 8
    d_conv: int = 4
    chunk_size: int = 128
    routed: tuple[str, ...] = ()
    a_min: float = 1.0
    a_max: float = 16.0
    dt_min: float = 1e-3
    dt_max: float = 1e-1

    __pydantic_config__ = {"extra": "forbid"}

    def d_inner(self, shape: Shape) -> int:
        return self.expand * shape.d_model if self.width is None else self.width

    def n_heads(self, shape: Shape) -> int:
        return self.d_inner(shape) // self.head_dim


def check(config: MambaConfig, shape: Shape, tp: int) -> None:
    """Refuse sizes that do not divide, with the numbers."""
    d_inner, heads = config.d_inner(shape), config.n_heads(shape)
    unknown = sorted(set(config.routed) - set(ROUTABLE))
    if unknown:
        raise PlanError(f"model.mamba.routed: {', '.join(unknown)} cannot be routed; accepted: {', '.join(ROUTABLE)}")
    if d_inner % config.head_dim:
        name = "expand·d_model" if config.width is None else "width"
        raise PlanError(f"model.mamba: {name} = {d_inner} is not divisible by head_dim {config.head_dim}")
    if not 1 <= config.d_conv <= HALO + 1:
        raise PlanError(f"model.mamba.d_conv: {config.d_conv} is outside 1 to {HALO + 1}")
    if heads % config.n_groups:
        raise PlanError(f"model.mamba: {heads} heads are not divisible by n_groups {config.n_groups}")
    if heads % tp or (config.n_groups % tp and tp % config.n_groups):
        raise PlanError(
            f"model.mamba: {heads} heads and n_groups {config.n_groups} must divide over tp {tp}; choose tp "
            f"as a divisor or as a multiple of {config.n_groups} that divides {heads}"
        )


def parts(config: MambaConfig, shape: Shape) -> dict[str, Part]:
    """Logical parameters of the layer, `(out, in)` for matrices."""
    d, inner, heads = shape.d_model, config.d_inner(shape), config.n_heads(shape)
    widths = {"z": inner, "x": inner, "B": config.n_groups * config.d_state, "dt": heads}
    widths["C"] = widths["B"]
    normal, conv = Init("normal", shape.init_std), Init("uniform", config.d_conv**-0.5)

    def bank(name: str) -> tuple[str, ...]:
        return shape.modalities if name in config.routed else ()

    result = {f"in_proj.{p}.weight": Part((widths[p], d), normal, 0, entries=bank(p)) for p in PROJECTIONS}
    for p in ("x", "B", "C"):
        result[f"conv.{p}.weight"] = Part((widths[p], config.d_conv), conv, 0, decay=False)
        result[f"conv.{p}.bias"] = Part((widths[p],), conv, 0, decay=False)
    dt_bias = Init("inverse_softplus", config.dt_min, config.dt_max)
    result["dt_bias"] = Part((heads,), dt_bias, 0, decay=False, entries=bank("dt_bias"))
    result["A_log"] = Part((heads,), Init("log_uniform", config.a_min, config.a_max), 0, decay=False)
    result["D"] = Part((heads,), Init("constant", 1.0), 0, decay=False)
    result["norm.weight"] = Part((inner,), Init("constant", 1.0), 0, decay=False)
    result["out_proj.weight"] = Part((d, inner), Init("normal", shape.output_std), 1, entries=bank("out"))
    return result


def placed(config: MambaConfig, parts: Mapping[str, Part], tp: int) -> dict[str, Part]:
    """The parts as they lie over tp: those of B and C are replicated where ranks share a group."""
    if config.n_groups % tp == 0:
        return dict(parts)
    shared = ("in_proj.B.weight", "in_proj.C.weight", *(f"conv.{p}.{w}" for p in "BC" for w in ("weight", "bias")))
    return {n: replace(part, tp_dim=None) if n in shared else part for n, part in parts.items()}


class Mamba(Mixer):
    """x, B, C through a causal convolution, SSD with this rank's heads and groups, gate, grouped RMSNorm, out.

    With more tp ranks than groups, B and C are replicated: each rank takes its group's rows, so their gradients are
    partial sums, and the norm of a group spans the ranks that share it.
    """

    config: MambaConfig

    def __init__(self, config: MambaConfig, shape: Shape, mesh: Mesh, parts: Mapping[str, Part]) -> None:
        self.spans_ranks = config.n_groups % mesh.tp_size != 0
        super().__init__(config, shape, mesh, placed(config, parts, mesh.tp_size))
        self.n_heads = config.n_heads(shape) // mesh.tp_size
        self.n_groups = 1 if self.spans_ranks else config.n_groups // mesh.tp_size
        self.norm_group_size = config.d_inner(shape) // config.n_groups

        # For schedules that compute gradients of weights apart from those of inputs: an operator that takes a parameter
        # would run its whole backward twice, so A, dt_bias and D then stay outside of the scan.
        self.split_backward = False

    def forward(self, h_TD: Tensor, layout: Layout) -> Tensor:
        if layout.context is not None:
            by_heads = layout.context.mesh.context.mamba == "heads"
            return (over_heads if by_heads else pass_states)(self, h_TD, layout, layout.context)
        z, x, B, C, dt = self.project(h_TD, layout.modality, PROJECTIONS)
        if self.split_backward:
            y = self._scan_apart(torch.cat((x, B, C), dim=-1)[None], dt[None], layout.modality, layout.seq_idx)
            return self.out(y[0], z, layout.modality)
        inputs = [value[None] for value in (z, x, B, C, dt)]
        y = self._mix(inputs, layout.modality, layout.seq_idx)[0]
        return self.after_mixing(y[0], z, layout.modality)

    def extend(self, h_bsD: Tensor, new: NewTokens, cache: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        b, s, _ = h_bsD.shape
        z, x, B, C, dt = self.project(flat(h_bsD), new.modality, PROJECTIONS)
        inputs = [value.view(b, s, -1) for value in (z, x, B, C, dt)]
        y, *states = self._mix(inputs, new.modality, new.seq_idx, cache)
        out = self.after_mixing(flat(y), z, new.modality)
        return out.view(b, s, -1), {"ssm": states[0], "conv": states[1]}

    def project(self, h_TD: Tensor, plan: Route, names: Sequence[str]) -> list[Tensor]:
        """[T, D] → one [T, width] per named projection, for this rank's heads and groups."""
        weights = [self._of_group(getattr(self.in_proj, name).weight, name, -2) for name in names]
        return project(h_TD, weights, plan)

    def conv_parameters(self) -> tuple[Tensor, Tensor]:
        """Weight [channels, k] and bias [channels] of the convolution over this rank's x, B, C."""
        convs = {name: getattr(self.conv, name) for name in "xBC"}
        weights = [self._of_group(local_conv.weight, name, 0) for name, local_conv in convs.items()]
        return torch.cat(weights), torch.cat([self._of_group(c.bias, name, 0) for name, c in convs.items()])

    def _of_group(self, parameter: Tensor, name: str, dim: int) -> Tensor:
        """This rank's shard, or its group's rows of a replicated B or C part."""
        if not (self.spans_ranks and name in ("B", "C")):
            return local(parameter)
        group = self.mesh.tp_rank * self.config.n_groups // self.mesh.tp_size
        return local(parameter, partial=True).narrow(dim, group * self.config.d_state, self.config.d_state)

    def decay_rate(self, dtype: torch.dtype) -> Tensor:
        """A [H] < 0, in at least float32."""
        return -local(self.A_log).to(torch.promote_types(dtype, torch.float32)).exp()

    def split(self, xBC: Tensor, n_heads: int, n_groups: int) -> tuple[Tensor, Tensor, Tensor]:
        """[…, x|B|C] → x […, H, P], B and C […, G, N]."""
        x, B, C = xBC.split((n_heads * self.config.head_dim, *[n_groups * self.config.d_state] * 2), dim=-1)
        return x.unflatten(-1, (n_heads, -1)), B.unflatten(-1, (n_groups, -1)), C.unflatten(-1, (n_groups, -1))

    def _mix(
        self, inputs: Sequence[Tensor], plan: Route, seq_idx: Tensor, cache: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, ...]:
        """z, x, B, C, dt, each [b, l, width] → y [b, l, I], normed unless that spans ranks; both states if cached."""
        z, x, B, C, dt = inputs
        weight, bias = self.conv_parameters()
        gate, norm_weight = (None, None) if self.spans_ranks else (z, local(self.norm.weight))
        outputs = ssd_mixer(
            *(x, dt, self.decay_rate(x.dtype), B, C, weight, bias),
            z=gate,
            norm_weight=norm_weight,
            n_groups=self.n_groups,
            norm_group_size=None if self.spans_ranks else self.norm_group_size,
            norm_eps=self.shape.norm_eps,
            D=local(self.D),
            dt_bias=self.bias_of_dt(plan, dt.shape),
            conv_state=None if cache is None else cache.get("conv"),
            initial_states=None if cache is None else cache.get("ssm"),
            seq_idx=seq_idx,
            chunk_size=self.config.chunk_size,
            return_final_states=cache is not None,
        )
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def _scan_apart(self, xBC: Tensor, dt: Tensor, plan: Route, seq_idx: Tensor) -> Tensor:
        """[1, T, x|B|C] → y [1, T, I], with the convolution and every parameter of the scan outside of the operator."""
        weight, bias = self.conv_parameters()
        convolved = causal_conv1d(xBC, weight, bias, seq_idx=seq_idx)
        assert isinstance(convolved, Tensor)
        x, B, C = self.split(convolved, self.n_heads, self.n_groups)
        wide = dt.to(torch.promote_types(dt.dtype, torch.float32)) + self.bias_of_dt(plan, dt.shape)
        y, _ = self.scan_outside(x, wide, self.decay_rate(xBC.dtype), B, C, local(self.D), seq_idx)
        return y.flatten(-2)

    def scan_outside(
        self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, seq_idx: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The same scan with every parameter outside of the operator; dt has its bias already."""
        scale = nn.functional.softplus(dt.to(torch.promote_types(dt.dtype, torch.float32)))
        outputs = ssd_core(
            *(x, scale * A, scale, B, C),
            seq_idx=seq_idx,
            chunk_size=self.config.chunk_size,
            return_final_states=True,
        )
        assert isinstance(outputs, tuple)
        return skip(outputs[0], x, D), outputs[1]

    def bias_of_dt(self, plan: Route, shape: Sequence[int]) -> Tensor:
        """[H], or of the given shape [b, l, H] where each modality has its own."""
        if "dt_bias" not in self.config.routed:
            return local(self.dt_bias)
        table = torch.stack([local(getattr(self.dt_bias, m)) for m in self.shape.modalities])
        # A product with the one-hot rows, not an index: its backward is deterministic on every device.
        one_hot = nn.functional.one_hot(plan.ids, len(self.shape.modalities)).to(table.dtype)
        return (one_hot @ table).view(*shape)

    def out(self, y: Tensor, z: Tensor, plan: Route) -> Tensor:
        """Gate, norm and out-projection: y, z [T, I] → [T, D], to be summed over tp."""
        if not self.spans_ranks:
            weight, eps = local(self.norm.weight), self.shape.norm_eps
            y = gated_rms_norm(y, z, weight, group_size=self.norm_group_size, eps=eps)
        return self.after_mixing(y, z, plan)

    def after_mixing(self, y: Tensor, z: Tensor, plan: Route) -> Tensor:
        """The out-projection, and before it the gate and norm where they span ranks; otherwise y has had them."""
        if self.spans_ranks:
            y = self._norm_across_ranks(y, z, local(self.norm.weight), self.norm_group_size)
        return packed_linear(y, [self.out_proj.weight], plan)

    def _norm_across_ranks(self, y: Tensor, z: Tensor, weight: Tensor, group_size: int) -> Tensor:
        """The gated norm of a group that several tp ranks share: sums of squares meet in one [T, G] all-reduce."""
        dtype = torch.promote_types(y.dtype, torch.float32)
        gated = y.to(dtype) * nn.functional.silu(z.to(dtype))
        group = self.mesh.tp_rank * self.config.n_groups // self.mesh.tp_size
        own = nn.functional.one_hot(torch.tensor(group, device=y.device), self.config.n_groups).to(dtype)
        squares = sum_over_both_ways(gated.square().sum(-1, keepdim=True) * own, self.mesh.tp_group)
        scale = (squares[:, group : group + 1] / group_size + self.shape.norm_eps).rsqrt()
        return (gated * scale * weight.to(dtype)).to(y.dtype)


def flops(config: MambaConfig, shape: Shape, mean_keys: float) -> float:
    """Forward FLOPs per token; SSD counted as the chunked algorithm does it, causal half of a chunk's square."""
    inner, heads = config.d_inner(shape), config.n_heads(shape)
    bc = config.n_groups * config.d_state
    projections = 2 * shape.d_model * (2 * inner + 2 * bc + heads) + 2 * inner * shape.d_model
    conv = 2 * config.d_conv * (inner + 2 * bc)
    intra = config.chunk_size * (bc + inner)
    states = 2 * 2 * inner * config.d_state
    return float(projections + conv + intra + states)


def _local_widths(config: MambaConfig, shape: Shape, tp: int) -> tuple[int, int, int]:
    """Of one tp rank: inner width, width of B (and of C), heads."""
    groups = max(1, config.n_groups // tp)
    return config.d_inner(shape) // tp, groups * config.d_state, config.n_heads(shape) // tp


def work(config: MambaConfig, shape: Shape, load: Load) -> Work:
    """Projections, and the chunked scan with whole tiles (its backward forms C·Bᵀ again)."""
    inner, bc, heads = _local_widths(config, shape, load.tp)
    chunk, states = _chunk(config, load.tokens), inner * config.d_state
    weights = 2 * shape.d_model * (2 * inner + 2 * bc + heads) + 2 * inner * shape.d_model
    mixing = 2 * (chunk * (bc + inner) + 2 * states)
    backward = 2 * (chunk * (3 * bc + 2 * inner + heads) + 4 * states)
    if load.cp > 1:  # what the entering state adds to y
        mixing, backward = mixing + 2 * states, backward + 4 * states
    T = load.tokens
    return Work(T * weights, T * 2 * inner * shape.d_model, T * mixing, T * backward)


def _chunk(config: MambaConfig, tokens: int) -> int:
    """Tokens per chunk: equal chunks of at most `chunk_size`."""
    return -(-tokens // -(-tokens // config.chunk_size))


def saved(config: MambaConfig, shape: Shape, load: Load) -> float:
    """See `work` for the order: projections, convolution, scan, gated norm, out-projection."""
    inner, bc, heads = _local_widths(config, shape, load.tp)
    a, wide, T, d = load.itemsize, load.wide, load.tokens, shape.d_model
    channels, widths = inner + 2 * bc, {"z": inner, "x": inner, "B": bc, "C": bc, "dt": heads}
    routed = [p for p in PROJECTIONS if p in config.routed]
    shared = [p for p in PROJECTIONS if p not in config.routed]
    # What stays of the projections is z, a view of all that was projected with it.
    kept = sum(widths[p] for p in (routed if "z" in routed else shared))
    inputs = 2 if routed and shared and load.modalities > 1 else 1  # as it came, and sorted
    token = a * (inputs * d + 2 * inner) + wide * max(1, config.n_groups // load.tp)
    if load.kernels == "torch":
        chunk = _chunk(config, T)
        chunks = -(-T // chunk)
        token += a * (kept + 2 * channels)
        token += wide * (channels + 5 * heads) + a * bc + 18  # conv before SiLU, decays, masked C, document numbers
        token += 0 if a == wide else wide * inner  # D·x in float32
        fixed = wide * (chunks + 1) * inner * config.d_state
        if T % chunk:  # padded copies take the place of what was padded; x itself stays for D·x, unless that was cast
            token -= 0 if a == wide else a * channels
            token -= a * bc + 2 * wide * heads
            fixed += chunks * chunk * (a * channels + 2 * wide * heads)
    else:
        # one operator keeps all that was projected, and computes what it convolved again
        token, fixed = token + 8 + a * sum(widths.values()), 0  # 8: document codes of convolution and scan
    if "dt_bias" in config.routed:
        token += a * len(shape.modalities)
    if config.n_groups % load.tp:  # the norm across ranks keeps its factors
        token += wide * 3 * inner + (0 if a == wide else wide * 2 * inner)
    weights = channels * (config.d_conv + 1)
    for group, entries in ((shared, 1), (routed, len(shape.modalities))):
        weights += d * entries * sum(widths[p] for p in group) if len(group) > 1 else 0  # one alone is not copied
    return T * token + fixed + a * weights


def kept(config: MambaConfig, shape: Shape, load: Load) -> float:
    """Shared in-projections that widen, and the operator between the projections (Triton)."""
    inner, bc, heads = _local_widths(config, shape, load.tp)
    widths = {"z": inner, "x": inner, "B": bc, "C": bc, "dt": heads}
    shared = sum(width for p, width in widths.items() if p not in config.routed)
    token = load.itemsize * (shared if shared > shape.d_model else 0)
    if load.kernels == "torch":
        return load.tokens * token
    token += load.itemsize * 2 * inner + 4 * max(1, config.n_groups // load.tp)  # before and after the norm, 1/rms
    return load.tokens * token + 4 * inner * config.d_state


def hf_keys(config: MambaConfig) -> tuple[HFKey, ...]:
    return (
        HFKey("in_proj.weight", tuple(f"in_proj.{p}.weight" for p in PROJECTIONS)),
        HFKey("conv1d.weight", tuple(f"conv.{p}.weight" for p in "xBC"), unsqueeze=1),
        HFKey("conv1d.bias", tuple(f"conv.{p}.bias" for p in "xBC")),
        HFKey("dt_bias", ("dt_bias",)),
        HFKey("A_log", ("A_log",)),
        HFKey("D", ("D",)),
        HFKey("norm.weight", ("norm.weight",)),
        HFKey("out_proj.weight", ("out_proj.weight",)),
    )


KIND = Kind("M", "Mamba-2", "mamba", Mamba, parts, check, flops, hf_keys, work, saved, kept)
