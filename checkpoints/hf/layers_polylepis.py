"""Layers of Polylepis hybrid models, in plain PyTorch: Mamba-2 (Mixture-of-Mamba), attention, feed-forward, experts.

Self-contained (torch and the configuration beside it): copied into every exported folder. It shares no code with the
trainer, so that its agreement with the trainer's logits and gradients means something.

Shapes: b batch, s new tokens, L all tokens so far, D model width, H heads, P head width, G groups, N state, I inner
width, T = b·s tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_polylepis import PolylepisConfig


def compute_dtype(x: Tensor) -> torch.dtype:
    """At least float32: norms, decays, states and router scores do not live in half precision."""
    return torch.promote_types(x.dtype, torch.float32)


def dispatch(x_TD: Tensor, ids_T: Tensor, modules: Iterable[nn.Module]) -> Tensor:
    """`y[t] = modules[ids[t]](x[t])`: rows sorted by id, one call per module (with no rows, too), unsorted."""
    modules = list(modules)
    order = ids_T.argsort(stable=True)
    counts = torch.bincount(ids_T, minlength=len(modules)).tolist()
    pieces = [module(rows) for module, rows in zip(modules, x_TD[order].split(counts), strict=True)]
    return torch.cat(pieces)[order.argsort()]


class BackLinear(nn.Linear):
    """A projection back into the residual stream; only its initial values are different."""


class RoutedLinear(nn.ModuleDict):
    """One matrix per modality: each token is multiplied by its own modality's."""

    def __init__(self, kind: type[nn.Linear], d_in: int, d_out: int, modalities: list[str]) -> None:
        super().__init__({modality: kind(d_in, d_out, bias=False) for modality in modalities})

    def forward(self, x: Tensor, modality_ids: Tensor) -> Tensor:
        return dispatch(x.flatten(0, 1), modality_ids.flatten(), self.values()).view(*x.shape[:-1], -1)


def apply_linear(linear: nn.Module, x: Tensor, modality_ids: Tensor) -> Tensor:
    return linear(x, modality_ids) if isinstance(linear, RoutedLinear) else linear(x)


class PolylepisRMSNorm(nn.Module):
    """RMSNorm over groups of `group_size` channels; with a gate, of y·silu(gate)."""

    def __init__(self, width: int, eps: float, group_size: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps, self.group_size = eps, group_size or width

    def forward(self, y: Tensor, gate: Tensor | None = None) -> Tensor:
        wide = y.to(compute_dtype(y))
        if gate is not None:
            wide = wide * F.silu(gate.to(wide.dtype))
        groups = wide.unflatten(-1, (-1, self.group_size))
        normed = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + self.eps)
        return (normed.flatten(-2) * self.weight.to(wide.dtype)).to(y.dtype)


def ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, chunk_size: int, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mamba-2's state space (Dao & Gu 2024): hₜ = exp(dtₜ·A)·hₜ₋₁ + dtₜ·xₜ⊗Bₜ, yₜ = hₜ·Cₜ + D·xₜ.

    Inside a chunk this is masked attention; from chunk to chunk it is the recurrence. A chunk of one token is the
    recurrence itself, so decoding needs no code of its own.

    Args:
        x: [b, s, H, P]. dt: positive [b, s, H]. A: negative [H]. B, C: [b, s, G, N]. D: [H].
        state: [b, H, P, N] to go on from, or None for zeros.

    Returns:
        y [b, s, H, P] and the state after the last token.
    """
    b, _, H, P = x.shape
    repeats = H // B.shape[2]
    if state is None:
        state = x.new_zeros(b, H, P, B.shape[3])
    outputs = []
    pieces = zip(*(t.split(chunk_size, dim=1) for t in (x, dt, B, C)), strict=True)
    for x_c, dt_c, B_c, C_c in pieces:
        B_c, C_c = B_c.repeat_interleave(repeats, dim=2), C_c.repeat_interleave(repeats, dim=2)
        update = x_c * dt_c[..., None]
        log_decay = (dt_c * A).cumsum(dim=1)  # [b, q, H], from the chunk's start to each token
        between = log_decay[:, :, None] - log_decay[:, None]  # [b, q, q, H], from the second token to the first
        future = torch.ones(x_c.shape[1], x_c.shape[1], dtype=torch.bool, device=x.device).triu(1)
        weights = between.masked_fill(future[None, :, :, None], -torch.inf).exp()
        scores = torch.einsum("bthn,bshn->btsh", C_c, B_c) * weights
        y = torch.einsum("btsh,bshp->bthp", scores, update)
        y = y + torch.einsum("bthn,bhpn->bthp", C_c, state) * log_decay.exp()[..., None]
        outputs.append(y + D[:, None] * x_c)
        to_end = (log_decay[:, -1:] - log_decay).exp()
        state = state * log_decay[:, -1].exp()[..., None, None]
        state = state + torch.einsum("bshp,bshn->bhpn", update * to_end[..., None], B_c)
    return torch.cat(outputs, dim=1), state


class PolylepisMamba(nn.Module):
    """`M`: Mamba-2, its projections shared or one per modality (Mixture-of-Mamba)."""

    def __init__(self, config: PolylepisConfig, index: int) -> None:
        super().__init__()
        self.sizes = sizes = config.layer(index)
        self.modalities = config.modalities
        d, inner = config.hidden_size, sizes["width"] or sizes["expand"] * config.hidden_size
        self.heads, states = inner // sizes["head_dim"], sizes["n_groups"] * sizes["d_state"]
        self.widths = [inner, states, states]
        widths = {"z": inner, "x": inner, "B": states, "C": states, "dt": self.heads}
        self.in_proj = nn.ModuleDict({name: self._linear(name, d, width) for name, width in widths.items()})
        self.conv1d = nn.Conv1d(sum(self.widths), sum(self.widths), sizes["d_conv"], groups=sum(self.widths))
        if "dt_bias" in sizes["routed"]:
            self.dt_bias = nn.ParameterDict({m: torch.empty(self.heads) for m in self.modalities})
        else:
            self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.D = nn.Parameter(torch.empty(self.heads))
        self.norm = PolylepisRMSNorm(inner, config.norm_eps, inner // sizes["n_groups"])
        self.out_proj = self._linear("out", inner, d)

    def _linear(self, name: str, d_in: int, d_out: int) -> nn.Module:
        kind = BackLinear if name == "out" else nn.Linear
        if name in self.sizes["routed"]:
            return RoutedLinear(kind, d_in, d_out, self.modalities)
        return kind(d_in, d_out, bias=False)

    def forward(self, h: Tensor, batch: dict[str, Any], cache: dict[str, Tensor] | None) -> Tensor:
        """[b, s, D] → [b, s, D]; padding neither enters the convolution nor touches the state."""
        padding, modality_ids = batch["padding"], batch["modality_ids"]
        if padding is not None:
            h = h.masked_fill(padding[..., None], 0.0)
        z, x, B, C, dt = (apply_linear(linear, h, modality_ids) for linear in self.in_proj.values())
        xBC = self._convolve(torch.cat((x, B, C), dim=-1), cache)
        dt = F.softplus(dt.to(compute_dtype(dt)) + self._dt_bias(modality_ids))
        if padding is not None:
            xBC, dt = xBC.masked_fill(padding[..., None], 0.0), dt.masked_fill(padding[..., None], 0.0)
        x, B, C = xBC.to(dt.dtype).split(self.widths, dim=-1)
        y, state = ssd(
            x.unflatten(-1, (self.heads, -1)),
            dt,
            -self.A_log.to(dt.dtype).exp(),
            B.unflatten(-1, (self.sizes["n_groups"], -1)),
            C.unflatten(-1, (self.sizes["n_groups"], -1)),
            self.D.to(dt.dtype),
            self.sizes["chunk_size"],
            None if cache is None else cache.get("ssm"),
        )
        if cache is not None:
            cache["ssm"] = state
        return apply_linear(self.out_proj, self.norm(y.flatten(-2).to(z.dtype), gate=z), modality_ids)

    def _convolve(self, xBC: Tensor, cache: dict[str, Tensor] | None) -> Tensor:
        """Causal depthwise convolution and SiLU, [b, s, channels]; the cache keeps the last d_conv − 1 inputs."""
        past = self.sizes["d_conv"] - 1
        window = None if cache is None else cache.get("conv")
        if window is None:
            window = xBC.new_zeros(xBC.shape[0], past, xBC.shape[2])
        inputs = torch.cat((window, xBC), dim=1)
        if cache is not None:
            cache["conv"] = inputs[:, inputs.shape[1] - past :]
        return F.silu(self.conv1d(inputs.transpose(1, 2))).transpose(1, 2)

    def _dt_bias(self, modality_ids: Tensor) -> Tensor:
        if isinstance(self.dt_bias, nn.ParameterDict):
            table = torch.stack([self.dt_bias[m] for m in self.modalities])
            return table.to(compute_dtype(table))[modality_ids]
        return self.dt_bias.to(compute_dtype(self.dt_bias))


def rotate(x: Tensor, position_ids: Tensor, base: float) -> Tensor:
    """Rotary embedding of x [b, h, s, d] at positions [b, s], first half of the channels paired with the second."""
    half = x.shape[-1] // 2
    wide = x.to(compute_dtype(x))
    frequencies = base ** (-torch.arange(half, device=x.device, dtype=wide.dtype) / half)
    angles = position_ids[:, None, :, None].to(wide.dtype) * frequencies
    first, second = wide[..., :half], wide[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class PolylepisAttention(nn.Module):
    """`*`: grouped-query attention, without positional encoding unless `rope_base` is set."""

    def __init__(self, config: PolylepisConfig, index: int) -> None:
        super().__init__()
        self.sizes = sizes = config.layer(index)
        d, q, kv = config.hidden_size, sizes["n_heads"] * sizes["head_dim"], sizes["n_kv_heads"] * sizes["head_dim"]
        self.q_proj = nn.Linear(d, q, bias=False)
        self.k_proj = nn.Linear(d, kv, bias=False)
        self.v_proj = nn.Linear(d, kv, bias=False)
        self.o_proj = BackLinear(q, d, bias=False)

    def forward(self, h: Tensor, batch: dict[str, Any], cache: dict[str, Tensor] | None) -> Tensor:
        heads = (p(h).unflatten(-1, (-1, self.sizes["head_dim"])) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (x.transpose(1, 2) for x in heads)
        if self.sizes["rope_base"] is not None:
            q, k = (rotate(x, batch["position_ids"], self.sizes["rope_base"]) for x in (q, k))
        if cache is not None:
            if cache:
                k, v = torch.cat((cache["k"], k), dim=2), torch.cat((cache["v"], v), dim=2)
            cache["k"], cache["v"] = k, v
        repeats = self.sizes["n_heads"] // self.sizes["n_kv_heads"]
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        mask = batch["attention"]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and q.shape[2] > 1)
        return self.o_proj(y.transpose(1, 2).flatten(-2))


def squared_relu(x: Tensor) -> Tensor:
    return torch.relu(x).square()


class PolylepisFeedForward(nn.Module):
    """Up, activation, down; `swiglu` has a third matrix."""

    def __init__(self, d: int, d_ff: int, activation: str) -> None:
        super().__init__()
        self.activation = activation
        if activation == "swiglu":
            self.gate_proj = nn.Linear(d, d_ff, bias=False)
        self.up_proj = nn.Linear(d, d_ff, bias=False)
        self.down_proj = BackLinear(d_ff, d, bias=False)

    def forward(self, h: Tensor, batch: Any = None, cache: Any = None) -> Tensor:
        up = self.up_proj(h)
        if self.activation == "swiglu":
            return self.down_proj(F.silu(self.gate_proj(h)) * up)
        return self.down_proj(squared_relu(up) if self.activation == "relu2" else F.gelu(up))


class PolylepisRouter(nn.Module):
    """Sigmoid or softmax scores; a bias takes part in the choice of the top k, not in their weights.

    With a `partition`, tokens of a modality choose among its own experts and the common ones, which come last; with
    groups, a token first chooses those whose two best experts have the largest biased scores in sum.
    """

    def __init__(self, d: int, sizes: dict[str, Any], modalities: list[str]) -> None:
        super().__init__()
        self.sizes, self.modalities = sizes, modalities
        self.weight = nn.Parameter(torch.empty(sizes["n_experts"], d))
        self.register_buffer("e_score_correction_bias", torch.zeros(sizes["n_experts"]))

    def forward(self, h_TD: Tensor, modality_T: Tensor) -> tuple[Tensor, Tensor]:
        sizes, wide = self.sizes, compute_dtype(h_TD)
        logits = F.linear(h_TD.to(wide), self.weight.to(wide))
        closed = self._closed(modality_T)
        if closed is not None:
            logits = logits.masked_fill(closed, float("-inf"))
        scores = logits.sigmoid() if sizes["router"] == "sigmoid" else logits.softmax(dim=-1)
        biased = scores.detach() + self.e_score_correction_bias.to(wide)
        if closed is not None:
            biased = biased.masked_fill(closed, float("-inf"))
        if sizes["n_groups"] > 1:
            groups = biased.unflatten(1, (sizes["n_groups"], -1))
            order = groups.topk(2, dim=-1).values.sum(dim=-1).argsort(dim=-1, descending=True, stable=True)
            biased = groups.scatter(
                1, order[:, sizes["top_groups"] :, None].expand(-1, -1, groups.shape[2]), float("-inf")
            )
            biased = biased.flatten(1)
        chosen = biased.topk(sizes["top_k"], dim=-1).indices
        weights = scores.gather(1, chosen)
        if sizes["renormalise"]:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return chosen, weights * sizes["scale"]

    def _closed(self, modality_T: Tensor) -> Tensor | None:
        """bool [T, E]: the experts that each token may not choose; None where all may choose all."""
        partition = self.sizes["partition"]
        if not partition:
            return None
        common = partition.get("shared", 0)
        counts = torch.tensor([*(partition[name] for name in self.modalities), common], device=modality_T.device)
        owner = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
        return (owner != modality_T[:, None]) & (owner != len(self.modalities))


class PolylepisExperts(nn.Module):
    """`E`: each token passes its top-k experts and one shared expert, all squared-ReLU (or swiglu) MLPs."""

    def __init__(self, config: PolylepisConfig, index: int) -> None:
        super().__init__()
        sizes, d = config.layer(index), config.hidden_size
        self.gate = PolylepisRouter(d, sizes, config.modalities)
        kind = sizes["activation"]
        experts = [PolylepisFeedForward(d, sizes["d_ff"], kind) for _ in range(sizes["n_experts"])]
        self.experts = nn.ModuleList(experts)
        self.shared_experts = PolylepisFeedForward(d, sizes["d_ff_shared"], kind)

    def forward(self, h: Tensor, batch: dict[str, Any], cache: Any = None) -> Tensor:
        h_TD = h.flatten(0, 1)
        chosen, weights = self.gate(h_TD, batch["modality_ids"].flatten())
        rows = h_TD.repeat_interleave(chosen.shape[1], dim=0)
        out = dispatch(rows, chosen.flatten(), self.experts).view(*chosen.shape, -1)
        out = (out * weights.to(out.dtype)[..., None]).sum(dim=1)
        return (out + self.shared_experts(h_TD)).view(h.shape)
