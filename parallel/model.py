"""The hybrid stack: embedding, one pre-norm residual layer per character of the pattern, norm, output projection."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.norm import rms_norm
from .context import cut_tokens, share_heads
from .errors import PlanError
from .kinds import KINDS, Kind
from .kinds.attention import AttentionConfig
from .kinds.base import Mixer, NewTokens, Shape
from .kinds.mamba import MambaConfig
from .kinds.mlp import MLPConfig
from .kinds.moe import Meanwhile, MoE, MoEConfig, check_experts
from .layout import Layout
from .megatron import gather_sequence, scatter_sum_sequence
from .mesh import ContextConfig, Mesh, MeshConfig
from .overlap import interleave
from .parts import Init, Part, PartModule, add_part, local
from .pattern import parse_pattern
from .pipeline.stage import Stage, whole_model
from .recompute import RecomputeConfig, recomputed
from .vocab import embed_local, mask_pad_logits, vocab_parallel_cross_entropy


@dataclass(frozen=True)
class ModelConfig:
    """A hybrid model. Defaults per kind, overridden by global layer index.

    Attributes:
        pattern: one character per layer, M (Mamba-2), * (attention), - (MLP), E (experts); `|` marks a pipeline cut.
        d_model: width of the residual stream.
        vocab_size: ids the model knows; rows of the embedding are padded to `vocab_multiple`, pad logits are −∞.
        modalities: names in bank order; id 0 is the first.
        vocab_multiple: independent of the mesh, so that a checkpoint's shapes are.
        norm_eps, init_std: of every RMSNorm; standard deviation of initial weights.
        mamba, attention, mlp, moe: defaults of each kind.
        layers: overrides, global layer index → {field: value} of that layer's kind.
    """

    pattern: str
    d_model: int
    vocab_size: int
    modalities: tuple[str, ...] = ("text",)
    vocab_multiple: int = 1024
    norm_eps: float = 1e-5
    init_std: float = 0.02
    mamba: MambaConfig = field(default_factory=MambaConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    mlp: MLPConfig = field(default_factory=MLPConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    layers: dict[int, dict[str, Any]] = field(default_factory=dict)

    __pydantic_config__ = {"extra": "forbid"}

    @property
    def symbols(self) -> str:
        return parse_pattern(self.pattern)

    @property
    def padded_vocab(self) -> int:
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def shape(self) -> Shape:
        return Shape(self.d_model, len(self.symbols), tuple(self.modalities), self.init_std, self.norm_eps)

    def layer(self, index: int) -> tuple[Kind, Any]:
        """Kind and configuration of layer `index`, overrides applied.

        Raises:
            PlanError: an override that names no field of this kind.
        """
        kind = KINDS[self.symbols[index]]
        config = getattr(self, kind.section)
        override = self.layers.get(index, {})
        known = {f.name for f in dataclasses.fields(config)}
        for name in override:
            if name not in known:
                raise PlanError(
                    f"model.layers.{index}.{name}: layer {index} is {kind.title}, which has no such field; it has "
                    f"{', '.join(sorted(known))}"
                )
        return kind, dataclasses.replace(config, **override)

    def parts(self) -> dict[str, Part]:
        """Every logical parameter of the model, by dotted name, banks not split."""
        shape, ends = self.shape, self.end_parts()
        result = {"embed.weight": ends.pop("embed.weight")}
        for index in range(shape.n_layers):
            kind, config = self.layer(index)
            result[f"layers.{index}.norm.weight"] = norm_part(self.d_model)
            result.update({f"layers.{index}.mixer.{n}": p for n, p in kind.parts(config, shape).items()})
        return result | ends

    def end_parts(self) -> dict[str, Part]:
        """Embedding, final norm and output projection."""
        rows, normal = (self.padded_vocab, self.d_model), Init("normal", self.init_std)
        return {
            "embed.weight": Part(rows, normal, 0),
            "final_norm.weight": norm_part(self.d_model),
            "lm_head.weight": Part(rows, normal, 0),
        }

    def check(self, tp: int) -> None:
        """Refuse, before anything is built, what cannot be built.

        Raises:
            PlanError: with the numbers.
        """
        if not self.modalities or len(set(self.modalities)) != len(self.modalities):
            raise PlanError(f"model.modalities: need distinct names, got {list(self.modalities)}")
        if self.d_model < 1 or self.vocab_size < 1:
            raise PlanError(f"model: d_model {self.d_model} and vocab_size {self.vocab_size} must be positive")
        if self.padded_vocab % tp:
            raise PlanError(f"model: padded vocabulary {self.padded_vocab} is not divisible by tp {tp}")
        for index in self.layers:
            if not 0 <= index < len(self.symbols):
                raise PlanError(f"model.layers.{index}: the pattern has layers 0 to {len(self.symbols) - 1}")
        for index in range(len(self.symbols)):
            kind, config = self.layer(index)
            kind.check(config, self.shape, tp)

    def check_context(self, mesh: MeshConfig, context: ContextConfig) -> None:
        """Refuse heads and groups that cannot be exchanged over the context-parallel ranks.

        Raises:
            PlanError: with the numbers.
        """
        if mesh.cp == 1:
            return
        for index in range(len(self.symbols)):
            layer = self.layer(index)[1]
            if isinstance(layer, MambaConfig) and context.mamba == "heads":
                groups = max(1, layer.n_groups // mesh.tp)
                share_heads(layer.n_heads(self.shape) // mesh.tp, groups, mesh.cp, "context.mamba: heads")
            elif isinstance(layer, AttentionConfig) and context.attention == "heads":
                share_heads(layer.n_heads // mesh.tp, layer.n_kv_heads // mesh.tp, mesh.cp, "context.attention: heads")

    def check_experts(self, mesh: MeshConfig) -> None:
        """Refuse experts that cannot be dealt out over the expert-parallel ranks.

        Raises:
            PlanError: with the numbers.
        """
        layers = [layer for _, layer in map(self.layer, range(len(self.symbols))) if isinstance(layer, MoEConfig)]
        if mesh.ep > 1 and not layers:
            raise PlanError(f"mesh: ep {mesh.ep}, but the pattern {self.pattern} has no expert layer E")
        for layer in layers:
            check_experts(layer, mesh.ep, mesh.ep_spare)


def norm_part(width: int) -> Part:
    return Part((width,), Init("constant", 1.0), decay=False)


def count_parameters(config: ModelConfig) -> int:
    """Logical parameters of the model, padding of the vocabulary included."""
    return sum(part.numel for part in config.parts().values())


def flops_per_token(config: ModelConfig, mean_keys: float) -> float:
    """Forward FLOPs per token (2 per multiply-add): every layer and the output projection.

    Args:
        mean_keys: keys that a token attends to on average, which the mask decides: for documents of lengths n_i,
            Σ n_i(n_i+1)/2 / Σ n_i.
    """
    layers = (config.layer(i) for i in range(len(config.symbols)))
    head = 2 * config.d_model * config.padded_vocab
    return head + sum(kind.flops(layer, config.shape, mean_keys) for kind, layer in layers)


class Block(PartModule):
    """x + scatter(mixer(gather(norm(x)))): the residual stream is sharded along the sequence over tp."""

    def __init__(
        self, kind: Kind, config: Any, shape: Shape, mesh: Mesh, recompute: RecomputeConfig | None = None
    ) -> None:
        super().__init__()
        self.eps, self.mesh = shape.norm_eps, mesh
        self.run = recomputed(self._run, kind.section, shape.d_model, recompute or RecomputeConfig())
        self.norm = PartModule()
        add_part(self, "norm.weight", norm_part(shape.d_model), mesh)
        self.mixer: Mixer = kind.mixer(config, shape, mesh, kind.parts(config, shape))

    def forward(self, x_TD: Tensor, layout: Layout, meanwhile: Meanwhile | None = None) -> Tensor:
        """One layer; `meanwhile` is for one with experts, see `MoE.forward` (such a layer cannot be recomputed: what it
        calls would be repeated as well)."""
        return self.run(x_TD, layout) if meanwhile is None else self._run(x_TD, layout, meanwhile)

    def _run(self, x_TD: Tensor, layout: Layout, *meanwhile: Meanwhile) -> Tensor:
        normed = rms_norm(x_TD, local(self.norm.weight, partial=True), self.eps)
        mixed = self.mixer(gather_sequence(normed, self.mesh.tp_group), layout, *meanwhile)
        return x_TD + scatter_sum_sequence(mixed, self.mesh.tp_group)


Cache = list[dict[str, Tensor]]


class HybridModel(PartModule):
    """The model, or one pipeline stage of it. Build it with `build_model`, which also shards and initialises it."""

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        stage: Stage | None = None,
        recompute: RecomputeConfig | None = None,
    ) -> None:
        super().__init__()
        config.check(mesh.tp_size)
        self.config, self.mesh = config, mesh
        self.stage = stage or whole_model(len(config.symbols))
        parts = config.parts()
        ends = (("embed",) if self.stage.embeds else ()) + (("final_norm", "lm_head") if self.stage.predicts else ())
        for name in ends:
            add_part(self, f"{name}.weight", parts[f"{name}.weight"], mesh)
        # Keyed by global index: names stay the same when a pipeline stage holds only some of the layers.
        self.layers = nn.ModuleDict()
        for index in self.stage.layers:
            kind, layer = config.layer(index)
            self.layers[str(index)] = Block(kind, layer, config.shape, mesh, recompute)

    def forward(self, x: Tensor, layout: Layout, labels_T: Tensor | None = None) -> Tensor:
        """Per-token cross-entropy, or the logits where there are no labels; of a stage that is not the last, x again.

        Args:
            x: int64 [T], all tokens of the micro-batch on every tp rank; under context parallelism this
                rank's share of them (`Layout.mine`), and so the labels and the result. For a stage that is not the
                first, what the stage before returned.
            layout: their documents and modalities.
            labels_T: int64 [T] or None.

        Returns:
            [T] cross-entropy in at least float32, the same on all tp ranks; without labels this rank's logits
            [T, padded_vocab / tp]. From a stage that is not the last, the residual stream [T/tp, D].

        Raises:
            PlanError: T is not divisible by tp.
        """
        x_TD = self._embedded(x) if self.stage.embeds else x
        for block in self.layers.values():
            x_TD = block(x_TD, layout)
        return self._predicted(x_TD, labels_T) if self.stage.predicts else x_TD

    def forward_pair(
        self, tokens: Sequence[Tensor], layouts: Sequence[Layout], labels: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """The cross-entropy of two micro-batches, as `forward` has it for one, of a whole model: while the rows of one
        travel to experts and back, layers of the other compute (`overlap.py`).

        Autograd runs nodes in the reverse order of their making, so one backward of both losses is interleaved alike.
        Where FSDP shards the model this method must be known to it (`register_fsdp_forward_method`).
        """
        blocks = [block for block in self.layers.values() if isinstance(block, Block)]
        streams = [self._embedded(x) for x in tokens]

        def run(batch: int, layers: Sequence[int]) -> None:
            for layer in layers:
                streams[batch] = blocks[layer](streams[batch], layouts[batch])

        for turn in interleave([isinstance(block.mixer, MoE) for block in blocks]):
            at, other = turn.batch, 1 - turn.batch
            *plain, last = turn.layers
            run(at, plain)
            meanwhile = (partial(run, other, turn.out), partial(run, other, turn.back))
            hides = (meanwhile,) if turn.out or turn.back else ()
            streams[at] = blocks[last](streams[at], layouts[at], *hides)
        return tuple(self._predicted(x_TD, labels_T) for x_TD, labels_T in zip(streams, labels, strict=True))

    def _embedded(self, tokens_T: Tensor) -> Tensor:
        cut_tokens(tokens_T.shape[0], 1, self.mesh.tp_size, "contiguous")
        rows = embed_local(tokens_T, local(self.embed.weight), self.mesh.tp_rank)
        return scatter_sum_sequence(rows, self.mesh.tp_group)

    def _predicted(self, x_TD: Tensor, labels_T: Tensor | None) -> Tensor:
        group = self.mesh.tp_group
        normed = rms_norm(x_TD, local(self.final_norm.weight, partial=True), self.config.norm_eps)
        logits = self._logits(gather_sequence(normed, group))
        return logits if labels_T is None else vocab_parallel_cross_entropy(logits, labels_T, group)

    def _logits(self, h_TD: Tensor) -> Tensor:
        logits = F.linear(h_TD, local(self.lm_head.weight))
        return mask_pad_logits(logits, self.config.vocab_size, self.mesh.tp_rank)

    @torch.no_grad()
    def extend(self, tokens_bs: Tensor, new: NewTokens, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """Decoding: logits of the last new token [b, padded_vocab] and the cache that includes all new tokens.

        Args:
            tokens_bs: int64 [b, s], s ≥ 1 new tokens per sequence, left-padded in the first call.
            new: their positions, padding and modalities.
            cache: what the call before returned; None at the start.

        Raises:
            PlanError: on a tensor-parallel mesh. Load the checkpoint on one process: it re-shards.
        """
        if self.mesh.tp_size > 1:
            raise PlanError(f"decoding runs on one process per model, not on tp {self.mesh.tp_size}")
        cache = cache or [{} for _ in self.layers]
        embedding: PartModule = self.embed
        x_bsD = F.embedding(tokens_bs, local(embedding.weight))
        updated: Cache = []
        for block, entry in zip(self.layers.values(), cache, strict=True):
            assert isinstance(block, Block)
            scale = local(block.norm.weight)
            mixed, entry = block.mixer.extend(rms_norm(x_bsD, scale, block.eps), new, entry)
            x_bsD = x_bsD + mixed
            updated.append(entry)
        last = rms_norm(x_bsD[:, -1], local(self.final_norm.weight), self.config.norm_eps)
        return self._logits(last), updated


def config_from_mapping(values: Mapping[str, Any]) -> ModelConfig:
    """The inverse of `dataclasses.asdict` for configurations that were validated when they were written."""
    sections = {"mamba": MambaConfig, "attention": AttentionConfig, "mlp": MLPConfig, "moe": MoEConfig}
    fields: dict[str, Any] = dict(values)
    for name, section in sections.items():
        fields[name] = section(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields[name].items()})
    fields["modalities"] = tuple(fields["modalities"])
    fields["layers"] = {int(k): dict(v) for k, v in fields["layers"].items()}
    return ModelConfig(**fields)
