"""`E`: a mixture of experts: a router (`moe_router.py`), top-k experts over the ep ranks, one shared expert.

Tokens are gathered over tp like those of every other layer, and experts are cut by columns over tp as well as dealt out
over ep: one contract for all mixers, expert weights in 1/(ep·tp), and the tp ranks send the same rows to the experts of
their own columns. The other choice, dispatching each tp rank's own tokens, sends 1/tp as much but keeps whole experts;
at tp 1, where expert layers are usually trained, they are one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ...kernels.routed_gemm import routed_linear
from ..errors import PlanError
from ..layout import Layout
from ..linear import packed_linear, project
from ..mesh import Mesh
from ..parts import EXPERTS, Init, Part, PartModule, local
from ..placement import first_slots
from ..routing import Route, Slots, by_entry, dispatch, send, send_back
from .base import HFKey, Kind, Load, Mixer, NewTokens, Shape, Work, flat, squared_relu
from .moe_router import (
    Router,
    RouterConfig,
    check_router,
    count_choices,
    excess,
    fair_share,
    join,
    open_experts,
    score,
    select,
    weigh,
    within_capacity,
)

Meanwhile = tuple[Callable[[], None] | None, Callable[[], None] | None]
LOAD_MEMORY = 0.95
"""What a step leaves of the average of the loads before it: about the last twenty count."""


@dataclass(frozen=True)
class MoEConfig(RouterConfig):
    """Sizes of an expert layer, besides its router's.

    Attributes:
        d_ff: inner width of each routed expert.
        d_ff_shared: inner width of the shared expert that every token passes.
        activation: of all of them: `relu2` (squared ReLU), or `swiglu` (gated, with a third matrix).
    """

    d_ff: int = 4096
    d_ff_shared: int = 4096
    activation: Literal["relu2", "swiglu"] = "relu2"

    __pydantic_config__ = {"extra": "forbid"}

    @property
    def projections(self) -> tuple[str, ...]:
        """The projections into the inner width."""
        return ("gate_proj", "up_proj") if self.activation == "swiglu" else ("up_proj",)


def check(config: MoEConfig, shape: Shape, tp: int) -> None:
    check_router(config, shape.modalities)
    if config.d_ff % tp or config.d_ff_shared % tp:
        raise PlanError(
            f"model.moe: d_ff {config.d_ff} and d_ff_shared {config.d_ff_shared} must both be divisible by tp {tp}"
        )


def check_experts(config: MoEConfig, ep: int, spare: int = 0) -> None:
    """Refuse experts that cannot be dealt out evenly, and more slots than experts on a rank.

    Raises:
        PlanError: with the numbers.
    """
    if config.n_experts % ep:
        fitting = [n for n in range(1, config.n_experts + 1) if config.n_experts % n == 0]
        raise PlanError(
            f"model.moe: n_experts {config.n_experts} is not divisible by mesh.ep {ep}; accepted: "
            f"{', '.join(map(str, fitting))}"
        )
    others = config.n_experts - config.n_experts // ep
    if spare > others:
        raise PlanError(
            f"mesh.ep_spare: {spare} spare slots on each rank, but the other ranks hold {others} of the "
            f"{config.n_experts} experts; accepted: 0 to {others}"
        )


def parts(config: MoEConfig, shape: Shape) -> dict[str, Part]:
    """Logical parameters; experts are numbered bank entries, keys end in `.experts.{j}`."""
    d, normal, output = shape.d_model, Init("normal", shape.init_std), Init("normal", shape.output_std)
    experts = tuple(str(j) for j in range(config.n_experts))
    result = {"router.weight": Part((config.n_experts, d), normal)}
    for name in config.projections:
        result[f"{name}.weight"] = Part((config.d_ff, d), normal, 0, entries=experts, suffix=EXPERTS)
    result["down_proj.weight"] = Part((d, config.d_ff), output, 1, entries=experts, suffix=EXPERTS)
    for name in config.projections:
        result[f"shared.{name}.weight"] = Part((config.d_ff_shared, d), normal, 0)
    result["shared.down_proj.weight"] = Part((d, config.d_ff_shared), output, 1)
    return result


class Bank(PartModule):
    """One projection of this rank's experts. A module of its own, so that FSDP can gather it over other ranks."""

    def forward(self, rows: Tensor, counts: tuple[int, ...]) -> Tensor:
        """Rows [N, in] sorted by expert → [N, out]."""
        return routed_linear(rows, local(self.weight), counts)


class MoE(Mixer):
    """This rank's experts, with its columns of their inner width; the choice of experts is the same on all tp ranks.

    Buffers: `selection_bias` [E] belongs to the model; `expert_load` [M, E], the choices of the last step over all
    ranks by modality of the token, and `expert_load_mean`, their moving average, are kept in checkpoints beside the
    optimizer's state; what a step gathers here (`load`, `unsound`, `terms`) is kept nowhere.
    """

    config: MoEConfig
    lookup: Slots | None

    def __init__(self, config: MoEConfig, shape: Shape, mesh: Mesh, parts: Mapping[str, Part]) -> None:
        banks = {name: Bank() for name in (*config.projections, "down_proj")}
        check_experts(config, mesh.ep_size, mesh.ep_spare)
        slots = first_slots(config.n_experts, mesh.ep_size, mesh.ep_spare)
        lying = tuple(map(str, slots))
        parts = {n: replace(part, entries=lying) if part.expert else part for n, part in parts.items()}
        super().__init__(config, shape, mesh, parts, {"router": Router(), **banks})
        loads = (len(shape.modalities), config.n_experts)
        self.register_buffer("selection_bias", torch.zeros(config.n_experts))
        self.register_buffer("expert_load", torch.zeros(loads), persistent=False)
        self.register_buffer("load", torch.zeros(loads), persistent=False)
        self.register_buffer("expert_load_mean", torch.zeros(loads), persistent=False)
        # The expert of each row of the banks, all ep ranks'; see `replace_experts.py`.
        self.register_buffer("slots", torch.tensor(slots), persistent=False)
        self.moved, self.lookup = slots != tuple(range(config.n_experts)), None
        self.register_buffer("unsound", torch.zeros(()), persistent=False)  # logits that are not finite
        self.register_buffer("terms", torch.zeros(3), persistent=False)  # Σ over tokens: aux_sequence, aux_global, z
        self.register_buffer("open_experts", open_experts(config, shape.modalities), persistent=False)
        # For comparisons: what to choose instead of choosing, so that near-ties do not flip (a dropped choice e is ~e);
        # what was chosen; and how many tokens would not have chosen that even if their scores moved by the margin.
        self.replay: Tensor | None = None
        self.replay_margin = 0.0
        self.chosen: Tensor | None = None
        self.flips = 0

    def forward(self, h_TD: Tensor, layout: Layout, meanwhile: Meanwhile = (None, None)) -> Tensor:
        """[T, D] → [T, D]; `meanwhile` is called while rows are on their way to the experts, and on their way back."""
        logits, scores, chosen = self._choose(h_TD, layout.modality.ids)
        weights = weigh(scores, chosen, self.config)
        real = (layout.seq_idx[0] >= 0).to(scores.dtype)
        counts_RME = self._count(chosen, layout, real)
        taken = None
        if self.training:
            taken = self._limit(chosen, scores, counts_RME, layout, real)
            terms = self._terms(logits, scores, counts_RME, layout, real)
            weights = self._joined(weights, logits, terms, counts_RME, layout)
        self.chosen = chosen if taken is None else torch.where(taken, chosen, ~chosen)
        return self._mix(h_TD, chosen, weights, layout.modality, taken, meanwhile)

    def extend(self, h_bsD: Tensor, new: NewTokens, cache: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        h_TD = flat(h_bsD)
        _, scores, chosen = self._choose(h_TD, new.modality.ids)
        weights = weigh(scores, chosen, self.config)
        return self._mix(h_TD, chosen, weights, new.modality, None).view(h_bsD.shape), {}

    def _choose(self, h_TD: Tensor, modality_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits and scores [T, E] in at least float32, and the chosen experts [T, k]."""
        logits = self.router(h_TD)
        if self.config.partition:
            logits = logits.masked_fill(~self.open_experts[modality_T], float("-inf"))
        scores = score(logits, self.config)
        biased = scores.detach() + self.selection_bias.to(scores.dtype)
        if self.config.partition:  # a score of 0 under a bias must not pass for a choice
            biased = biased.masked_fill(logits.detach().isneginf(), float("-inf"))
        if self.replay is None:
            return logits, scores, select(biased, self.config)
        chosen = torch.where(self.replay < 0, ~self.replay, self.replay)
        wanted = torch.zeros_like(biased, dtype=torch.bool).scatter_(1, chosen, True)
        nudged = torch.where(wanted, biased + self.replay_margin, biased - self.replay_margin)
        own = torch.zeros_like(wanted).scatter_(1, select(nudged, self.config), True)
        self.flips = int((own != wanted).any(dim=-1).sum())
        return logits, scores, chosen

    def _count(self, chosen: Tensor, layout: Layout, real: Tensor) -> Tensor:
        """This rank's choices [R, M, E] by row, modality and expert; padding is routed, but it is nobody's load."""
        n_modalities = len(self.shape.modalities)
        cells = layout.rows * n_modalities + layout.modality.ids
        counts = count_choices(chosen, cells, real, layout.n_rows * n_modalities, self.config.n_experts)
        return counts.view(layout.n_rows, n_modalities, -1)

    def _pooled(self, counts: Tensor) -> Tensor:
        """[..., M, E] → [..., G, E]."""
        return counts if self.config.partition else counts.sum(dim=-2, keepdim=True)

    def _over_rows(self, counts_RME: Tensor) -> Tensor:
        """Choices [R, G, E] over whole rows: the context-parallel ranks that share the rows add theirs up."""
        counts = self._pooled(counts_RME).contiguous()
        if self.mesh.cp_size > 1:
            counts = counts.clone()
            dist.all_reduce(counts, group=self.mesh.cp_group)
        return counts

    def _limit(self, chosen: Tensor, scores: Tensor, counts_RME: Tensor, layout: Layout, real: Tensor) -> Tensor | None:
        """Which choices [T, k] are taken, None for all: see `within_capacity`, whole rows gathered over cp."""
        factor = self.config.capacity_factor
        if not factor:
            return None
        share = fair_share(self._over_rows(counts_RME).double(), self.open_experts)
        limits = (factor * share - 1e-9).ceil().long()
        own = scores.detach().gather(1, chosen)
        if self.replay is not None:
            taken = self.replay >= 0
            own = torch.where(taken, own + self.replay_margin, own - self.replay_margin)
        whole = layout.whole(chosen, own, layout.rows, real)
        everyone = within_capacity(whole[0], whole[1], whole[2], whole[3], limits)
        mine = layout.mine(everyone)
        if self.replay is None:
            return mine
        self.flips += int(((mine != taken) & (real[:, None] > 0)).any(dim=-1).sum())
        return taken

    def _terms(
        self, logits: Tensor, scores: Tensor, counts_RME: Tensor, layout: Layout, real: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Σ over this rank's tokens of the sequence and global balancing terms and of z, None where not asked for."""
        config, sequence, everywhere, z = self.config, None, None, None
        pool = layout.modality.ids if config.partition else torch.zeros_like(layout.modality.ids)
        if config.aux_sequence or config.aux_global:
            share = scores if config.router == "softmax" else scores / scores.sum(dim=-1, keepdim=True)
        if config.aux_sequence:
            f_RGE = excess(self._over_rows(counts_RME), self.open_experts)
            sequence = ((f_RGE[layout.rows, pool] * share).sum(dim=-1) * real).sum()
        if config.aux_global:  # the last step's loads: known everywhere, whatever the micro-batches
            f_GE = excess(self._pooled(self.expert_load).to(share.dtype), self.open_experts)
            everywhere = ((f_GE[pool] * share).sum(dim=-1) * real).sum()
        if config.z_loss:
            z = (logits.logsumexp(dim=-1).square() * real).sum()
        return sequence, everywhere, z

    def _joined(
        self,
        weights: Tensor,
        logits: Tensor,
        terms: tuple[Tensor | None, ...],
        counts_RME: Tensor,
        layout: Layout,
    ) -> Tensor:
        """`weights`, with the terms joined to the loss and this rank's statistics counted in the backward."""
        coefficients = (self.config.aux_sequence, self.config.aux_global, self.config.z_loss)
        total = weights.new_zeros(())
        for coefficient, term in zip(coefficients, terms, strict=True):
            total = total if term is None else total + coefficient * term
        with torch.no_grad():
            load = counts_RME.sum(dim=0)
            broken = (logits.isnan() | logits.isposinf()).any(dim=-1).sum()
            sums = torch.stack([weights.new_zeros(()) if term is None else term.detach() for term in terms])

        def count() -> None:
            self.load += load
            self.unsound += broken
            self.terms += sums

        # Every tp rank has the whole term, and the ranks' gradients are summed.
        scale = 0.0 if layout.total_weight is None else 1.0 / (layout.total_weight * self.mesh.tp_size)
        return join(weights, total, scale, count)

    def _mix(
        self,
        h_TD: Tensor,
        chosen: Tensor,
        weights: Tensor,
        modality: Route,
        taken: Tensor | None,
        meanwhile: Meanwhile = (None, None),
    ) -> Tensor:
        """Σ of the weighted experts and the shared one [T, D], the shared one computed while the rows travel."""
        n_tokens, top_k = chosen.shape
        ids, places = chosen.reshape(-1), None
        if taken is not None:
            places = taken.reshape(-1).nonzero()[:, 0]
            ids = ids[places]
        if self.moved:
            if self.lookup is None:
                self.lookup = Slots.of(self.slots, self.config.n_experts)
            ids = self.lookup.of_rows(ids, self.mesh.ep_rank)
        plan = dispatch(ids, len(self.slots), self.mesh.ep_group)
        order = plan.route.order if places is None else places[plan.route.order]
        there = send(h_TD[order // top_k], plan)
        hidden = self._activate(
            project(h_TD, [getattr(self.shared, n).weight for n in self.config.projections], modality)
        )
        if meanwhile[0] is not None:
            meanwhile[0]()
        rows = by_entry(there.arrive(), plan)
        inner = self._activate([getattr(self, name)(rows, plan.counts) for name in self.config.projections])
        back = send_back(self.down_proj(inner, plan.counts), plan)
        shared = packed_linear(hidden, [self.shared.down_proj.weight], modality)
        if meanwhile[1] is not None:
            meanwhile[1]()
        out = back.arrive()[plan.route.inverse]
        if places is not None:
            out = out.new_zeros(n_tokens * top_k, out.shape[1]).index_copy(0, places, out)
        return (out.view(n_tokens, top_k, -1) * weights.to(out.dtype)[..., None]).sum(dim=1) + shared

    def _activate(self, projected: list[Tensor]) -> Tensor:
        if self.config.activation == "swiglu":
            gate, up = projected
            return F.silu(gate) * up
        return squared_relu(projected[0])

    @torch.no_grad()
    def finish_step(self, load: Tensor) -> None:
        """Keep the step's loads, move the selection bias towards even ones, start counting anew.

        Args:
            load: choices [M, E] by the global batch's tokens of each modality, summed over all ranks by the caller.
        """
        self.expert_load.copy_(load)
        self.expert_load_mean.lerp_(load.to(self.expert_load_mean.dtype), 1 - LOAD_MEMORY)
        share = fair_share(self._pooled(load), self.open_experts)
        self.selection_bias += self.config.bias_update_rate * torch.sign(share - load.sum(dim=0))
        self.forget()

    @property
    def replicated(self) -> bool:
        """Whether experts may have several slots."""
        return len(self.slots) > self.config.n_experts

    def place(self, slots: Sequence[int]) -> None:
        """From now on row s of the banks is expert `slots[s]`; the caller moves the rows."""
        self.slots.copy_(torch.tensor(slots))
        self.moved, self.lookup = list(slots) != list(range(self.config.n_experts)), None

    @torch.no_grad()
    def forget(self) -> None:
        """Drop what this step's micro-batches counted."""
        for buffer in (self.load, self.unsound, self.terms):
            buffer.zero_()


def flops(config: MoEConfig, shape: Shape, mean_keys: float) -> float:
    width = config.top_k * config.d_ff + config.d_ff_shared
    return float(2 * shape.d_model * (config.n_experts + (len(config.projections) + 1) * width))


def work(config: MoEConfig, shape: Shape, load: Load) -> Work:
    width = (load.busiest * config.top_k * config.d_ff + config.d_ff_shared) / load.tp
    product = load.tokens * 2 * shape.d_model
    weights = product * (config.n_experts + (len(config.projections) + 1) * width)
    return Work(weights, product * config.d_ff_shared / load.tp)


def saved(config: MoEConfig, shape: Shape, load: Load) -> float:
    """Input, router scores, dispatched rows and the experts' inner and outer activations."""
    d, wide, top_k = shape.d_model, load.wide, load.busiest * config.top_k
    router = wide * (config.n_experts + 2 * config.top_k + 1) + 8 * config.top_k * 3
    if load.itemsize < wide:
        router += wide * d
    inner = 4 if config.activation == "swiglu" else 2
    experts, shared = top_k * (2 * d + inner * config.d_ff / load.tp), inner * config.d_ff_shared / load.tp
    packed = 2 * d * config.d_ff_shared / load.tp if config.activation == "swiglu" else 0
    return load.tokens * (router + load.itemsize * (d + experts + shared)) + load.itemsize * packed


def kept(config: MoEConfig, shape: Shape, load: Load) -> float:
    """Products that widen: the shared expert's up-projection, perhaps the router; routed ones are computed again."""
    router = load.wide * config.n_experts if config.n_experts > shape.d_model else 0
    width = len(config.projections) * config.d_ff_shared // load.tp
    return load.tokens * (router + (load.itemsize * width if width > shape.d_model else 0))


def hf_keys(config: MoEConfig) -> tuple[HFKey, ...]:
    """NemotronH's names on disk: one tensor per expert."""
    names = (*config.projections, "down_proj")
    experts = (HFKey(f"experts.{{j}}.{name}.weight", (f"{name}.weight.experts.{{j}}",)) for name in names)
    shared = (HFKey(f"shared_experts.{name}.weight", (f"shared.{name}.weight",)) for name in names)
    return (HFKey("gate.weight", ("router.weight",)), *experts, *shared)


KIND = Kind("E", "mixture of experts", "moe", MoE, parts, check, flops, hf_keys, work, saved, kept)
