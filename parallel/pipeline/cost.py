"""What each layer costs one rank for one micro-batch: seconds, bytes kept for backward, bytes sent.

Everything about a layer comes from its kind in the registry (`work`, `saved`, `kept`, `parts`) and from `volume.py`.
Seconds come from a roofline of the device, or from a table of measurements (`polylepis bench layers`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, Protocol

from ..kinds.base import Kind, Load, Work
from ..kinds.mamba import MambaConfig, placed
from ..mesh import ContextConfig, MeshConfig
from ..model import ModelConfig, norm_part
from ..parts import EXPERTS, Part
from ..recompute import RecomputeConfig
from ..volume import Volume, ends_volume, layer_volume
from .devices import Device, collective_seconds
from .stage import Stage


@dataclass(frozen=True)
class Setting:
    """How a model is run: all that costs depend on besides the model and the device.

    Attributes:
        mesh: with `dp_shard` resolved.
        tokens: of one micro-batch, all context-parallel ranks together.
        mean_keys: keys that a token attends to on average (see `Load`).
        itemsize: bytes of an activation.
        kernels: `triton` on a GPU, else `torch`.
        busiest: by layer index, tokens of the busiest expert-parallel rank over the mean, as measured in a run.
    """

    mesh: MeshConfig
    tokens: int
    mean_keys: float
    itemsize: int = 2
    kernels: Literal["torch", "triton"] = "triton"
    context: ContextConfig = field(default_factory=ContextConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    modalities: int = 1
    busiest: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))

    def load(self, index: int = -1) -> Load:
        """What one rank has of a micro-batch, for layer `index`."""
        mesh = self.mesh
        return Load(
            self.tokens // mesh.cp,
            self.mean_keys,
            mesh.tp,
            mesh.cp,
            self.itemsize,
            self.modalities,
            self.kernels,
            self.busiest.get(index, 1.0),
        )


@dataclass(frozen=True)
class Seconds:
    """Computation of one layer (or end) for one micro-batch, communication left out.

    Attributes:
        forward, inputs, weights: of F, I and W.
        repeated, partly: of the forward, what `full` and `selective` recompute repeat.
    """

    forward: float
    inputs: float
    weights: float
    repeated: float = 0.0
    partly: float = 0.0


class Timing(Protocol):
    """Where seconds come from: a roofline or measurements."""

    @property
    def device(self) -> Device: ...

    def layer(self, kind: Kind, config: Any, model: ModelConfig, load: Load) -> Seconds: ...

    def embedding(self, model: ModelConfig, load: Load) -> Seconds: ...

    def head(self, model: ModelConfig, load: Load) -> Seconds: ...

    def update(self, n_parameters: float) -> float:
        """Seconds of norm and AdamW over this many sharded parameters."""
        ...


@dataclass(frozen=True)
class Roofline:
    """Products at a share of the peak, everything else at a share of the memory's bandwidth, one after the other."""

    device: Device

    def layer(self, kind: Kind, config: Any, model: ModelConfig, load: Load) -> Seconds:
        work = kind.work(config, model.shape, load)
        products, scan, scan_back = self._products(work.weights, load), *self._scans(work, load)
        # What is kept was written once and is read about twice in the forward; the backward does twice as much.
        passes = self._passes(3 * mixer_and_block(kind, config, model, load))
        forward = products + scan + passes
        kept = kind.kept(config, model.shape, load)
        kept_products = 2 * model.d_model * kept / load.itemsize
        again = max(0.0, work.weights - work.last - kept_products)
        scanned = 0.0 if kind.section == "attention" or load.kernels == "triton" else scan
        return Seconds(
            forward,
            products + scan_back + 2 * passes,
            products,
            forward - self._products(work.last, load),
            passes + scanned + self._products(again, load),
        )

    def _products(self, flops: float, load: Load) -> float:
        return flops / (self._peak(load) * self.device.matmul)

    def _scans(self, work: Work, load: Load) -> tuple[float, float]:
        reached = self._peak(load) * self.device.mixing
        return work.mixing / reached, work.mixing_backward / reached

    def _peak(self, load: Load) -> float:
        return self.device.peak if load.itemsize < 4 else self.device.peak / 2  # float32 goes through TF32

    def _passes(self, size: float) -> float:
        return size / (self.device.bandwidth * self.device.stream)

    def embedding(self, model: ModelConfig, load: Load) -> Seconds:
        passes = self._passes(3 * load.tokens * model.d_model * load.itemsize)
        return Seconds(passes, 0.0, 2 * passes)

    def head(self, model: ModelConfig, load: Load) -> Seconds:
        logits = load.tokens * model.padded_vocab / load.tp
        products = self._products(2 * model.d_model * logits, load)
        passes = self._passes(logits * (2 * load.itemsize + 4 * load.wide))
        return Seconds(products + passes, products + passes, products)

    def update(self, n_parameters: float) -> float:
        # AdamW reads weight, gradient and two moments and writes three; the norm reads the gradient once more.
        return 32 * n_parameters / (self.device.bandwidth * self.device.stream)


def mixer_and_block(kind: Kind, config: Any, model: ModelConfig, load: Load) -> float:
    """Bytes that a layer keeps for backward without recompute: its mixer's, its input and 1/rms of the norm."""
    return kind.saved(config, model.shape, load) + block_input(model, load) + load.wide * load.tokens / load.tp


def block_input(model: ModelConfig, load: Load) -> float:
    """Bytes of the residual stream that enters a layer, this rank's sequence shard."""
    return load.itemsize * load.tokens * model.d_model / load.tp


def embedding_saved(load: Load) -> float:
    """The rows to look up, and which of them are on this rank."""
    return 9 * load.tokens


def head_saved(model: ModelConfig, load: Load) -> float:
    """Final norm, the tokens gathered for the projection, and the probabilities; targets and weights of the loss."""
    norm = block_input(model, load) + load.wide * load.tokens / load.tp
    probabilities = load.wide * model.padded_vocab / load.tp
    return norm + load.tokens * (load.itemsize * model.d_model + probabilities + 13)


def head_workspace(model: ModelConfig, load: Load) -> float:
    """Bytes alive at once beside `head_saved`: logits and their float32 copy, or two gradients of the logits."""
    wide, narrow = load.wide, load.itemsize
    return load.tokens * model.padded_vocab / load.tp * max(2 * wide, narrow + wide)


@dataclass(frozen=True)
class Cost:
    """One layer, or an end of the model, for one micro-batch on one rank.

    Attributes:
        forward, inputs, weights: seconds of computation; `inputs` holds what recompute repeats.
        tensor, context, experts: seconds of collectives over tp, cp and ep in the forward.
        tensor_back, context_back, experts_back: the same of the backward, repeated forwards included.
        saved: bytes kept for backward under the choice of recompute.
        workspace: bytes that its backward needs besides, among them what recompute restores.
        parameters: of this rank's tensor-parallel shard.
    """

    forward: float
    inputs: float
    weights: float
    tensor: float
    context: float
    tensor_back: float
    context_back: float
    experts: float
    experts_back: float
    saved: float
    workspace: float
    parameters: float

    @property
    def total(self) -> float:
        """Seconds of forward and backward, communication included."""
        return self.forward + self.inputs + self.weights + self.sent + self.sent_back

    @property
    def sent(self) -> float:
        """Seconds of all collectives of the forward."""
        return self.tensor + self.context + self.experts

    @property
    def sent_back(self) -> float:
        return self.tensor_back + self.context_back + self.experts_back


def layer_parts(kind: Kind, config: Any, model: ModelConfig, tp: int) -> dict[str, Part]:
    """The parts of a layer as they lie over tp, its norm among them."""
    parts = kind.parts(config, model.shape)
    if isinstance(config, MambaConfig):
        parts = placed(config, parts, tp)
    return {"norm.weight": norm_part(model.d_model), **{f"mixer.{name}": part for name, part in parts.items()}}


def end_parts(model: ModelConfig, stage: Stage) -> dict[str, Part]:
    """The parts of embedding, final norm and output projection that a stage has."""
    names = (("embed",) if stage.embeds else ()) + (("final_norm", "lm_head") if stage.predicts else ())
    parts = model.end_parts()
    return {f"{name}.weight": parts[f"{name}.weight"] for name in names}


def local_numel(part: Part, tp: int, ep: int = 1, spare: int = 0) -> int:
    """Elements of a part's shard over tp, of experts also over ep, with a rank's spare slots."""
    numel = part.numel if part.tp_dim is None else part.numel // tp
    if part.suffix != EXPERTS:
        return numel
    return numel // len(part.entries) * (len(part.entries) // ep + spare)


def sharded_numel(part: Part, tp: int, ranks: int, ep: int = 1, spare: int = 0) -> int:
    """Elements that the first of `ranks` FSDP ranks holds of a tensor-parallel shard: rows are rounded up, banks are
    cut along a matrix dimension that divides."""
    local = local_numel(part, tp)
    if part.entries and len(part.shape) > 1:
        return local_numel(part, tp, ep, spare) * ep // ranks if part.suffix == EXPERTS else local // ranks
    rows = part.shape[0] // (tp if part.tp_dim == 0 else 1)
    entries = max(1, len(part.entries))
    return entries * -(-rows // ranks) * (local // entries // rows)


def layer_cost(model: ModelConfig, index: int, setting: Setting, timing: Timing) -> Cost:
    """Cost of layer `index` for one micro-batch."""
    kind, config = model.layer(index)
    load, choice, mesh = setting.load(index), getattr(setting.recompute, kind.section), setting.mesh
    seconds = timing.layer(kind, config, model, load)
    over_tp, over_cp, over_ep = layer_volume(model, index, mesh, setting.context, setting.tokens, setting.itemsize)
    tensor = link_seconds(over_tp, mesh.tp, mesh.tp, timing.device)
    context = link_seconds(over_cp, mesh.cp, mesh.tp * mesh.cp, timing.device)
    experts = link_seconds(over_ep, mesh.ep, mesh.tp * mesh.ep, timing.device) * load.busiest
    whole, kept, again = mixer_and_block(kind, config, model, load), block_input(model, load), 0.0
    if choice == "selective":
        kept, again = kept + kind.kept(config, model.shape, load), seconds.partly
    elif choice == "full":
        again = seconds.repeated
    repeats = choice != "none"
    parts = layer_parts(kind, config, model, load.tp).values()
    return Cost(
        forward=seconds.forward,
        inputs=seconds.inputs + again,
        weights=seconds.weights,
        tensor=tensor,
        context=context,
        tensor_back=tensor * (1.5 if repeats else 1.0),  # the repetition gathers again, and stops before it scatters
        context_back=context * (2.0 if repeats else 1.0),
        experts=experts,
        experts_back=experts * (2.0 if repeats else 1.0),
        saved=kept if repeats else whole,
        # Gradients of what a layer keeps are about as large as it, and live while its backward runs.
        workspace=whole + (max(0.0, whole - kept) if repeats else 0.0),
        parameters=sum(local_numel(part, load.tp, mesh.ep, mesh.ep_spare) for part in parts),
    )


def end_cost(model: ModelConfig, stage: Stage, setting: Setting, timing: Timing) -> Cost:
    """Cost of embedding and of output projection with loss, as far as `stage` has them."""
    load, mesh = setting.load(), setting.mesh
    seconds, saved, workspace = [], 0.0, 0.0
    if stage.embeds:
        seconds.append(timing.embedding(model, load))
        saved += embedding_saved(load)
    if stage.predicts:
        seconds.append(timing.head(model, load))
        saved += head_saved(model, load)
        workspace = head_workspace(model, load)
    # Sent over tp: one reduce-scatter for the embedding, the rest for the projection and the loss.
    volume = ends_volume(model, mesh, setting.tokens, setting.itemsize)
    names = (("reduce_scatter",) if stage.embeds else ()) + (("all_gather", "all_reduce") if stage.predicts else ())
    volume = Volume(*(Counter({n: c[n] for n in names}) for c in (volume.calls, volume.bytes)))
    tensor = link_seconds(volume, mesh.tp, mesh.tp, timing.device)
    return Cost(
        forward=sum(s.forward for s in seconds),
        inputs=sum(s.inputs for s in seconds),
        weights=sum(s.weights for s in seconds),
        tensor=tensor,
        context=0.0,
        tensor_back=tensor,
        context_back=0.0,
        experts=0.0,
        experts_back=0.0,
        saved=saved,
        workspace=workspace,
        parameters=sum(local_numel(part, load.tp) for part in end_parts(model, stage).values()),
    )


def link_seconds(volume: Volume, ranks: int, span: int, device: Device) -> float:
    """Seconds of a volume's collectives over a group of `ranks` that lie within `span` neighbouring GPUs."""
    wire = device.wire(span)
    return sum(
        calls * collective_seconds(name, volume.bytes[name] / calls, ranks, wire, device.latency)
        for name, calls in volume.calls.items()
        if calls
    )


def layer_costs(model: ModelConfig, setting: Setting, timing: Timing) -> list[Cost]:
    """Cost of every layer; equal layers are priced once."""
    priced: dict[tuple[str, str, float], Cost] = {}
    costs = []
    for index, symbol in enumerate(model.symbols):
        key = (symbol, repr(model.layers.get(index)), setting.busiest.get(index, 1.0))
        if key not in priced:
            priced[key] = layer_cost(model, index, setting, timing)
        costs.append(priced[key])
    return costs


def layer_seconds(model: ModelConfig, setting: Setting, timing: Timing) -> list[float]:
    """Seconds of each layer, embedding and head added to the first and the last: what to cut the stack by."""
    seconds, n = [cost.total for cost in layer_costs(model, setting, timing)], len(model.symbols)
    seconds[0] += end_cost(model, Stage(0, 2, 0, n), setting, timing).total
    seconds[-1] += end_cost(model, Stage(1, 2, 0, n), setting, timing).total
    return seconds
