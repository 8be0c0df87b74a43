"""Megatron-LM hybrids: distributed checkpoints (`torch_dist`) and the pickled `mp_rank_*` layout of one file per rank.

In the pickled layout each tensor-parallel rank packs *its* share of z, x, B, C and dt, so the ranks' tensors must be
split by partition sizes before they are joined; concatenating them interleaves the parts without any error. The
distributed layout stores the parts apart. Layers are counted from zero on each pipeline stage.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...parallel.kinds.attention import AttentionConfig
from ...parallel.kinds.mamba import PROJECTIONS, MambaConfig
from ...parallel.kinds.mlp import MLPConfig
from ...parallel.kinds.moe import MoEConfig
from ...parallel.model import ModelConfig
from ..errors import CheckpointError
from ..hf.layout import model_shapes
from ..maps import KEEP, Axis, Fan, Map, Permute, Squeeze, Unpack, Unstack
from ..restricted import load_torch
from ..sources import Distributed, Merged, TorchFile
from ..transforms import Rule, Source, Spec, Transformed, check_tensors
from .base import Foreign, Settings, checked, inner_width, vocab_multiple

_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3}))?(?:_(\d{3}))?")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


def read(folder: Path) -> Foreign:
    """A checkpoint folder, one iteration of it, or the newest of several.

    Raises:
        CheckpointError: not such a folder, or a model that our layers cannot express.
    """
    folder = _iteration(folder)
    stored = _distributed(folder) if (folder / ".metadata").is_file() else _pickled(folder)
    settings = Settings(f"{folder}, args", stored.args)
    config = checked(settings, _config(settings, stored))
    rules = list(_rules(config, stored))
    wanted = {source for rule in rules for source in rule.sources}
    known = {_without_rank(name) for name in wanted}  # ranks beside the first repeat what is not sharded
    left = [n for n in stored.tensors.specs() if _without_rank(n) not in known and not _is_known_extra(n)]
    if left:
        more = f" and {len(left) - 10} more" if len(left) > 10 else ""
        raise CheckpointError(
            f"{folder}: {len(left)} tensors are of no layer that we know: {', '.join(left[:10])}{more}"
        )
    tensors = Transformed(_Only(stored.tensors, wanted, folder), rules)
    check_tensors(folder, tensors.specs(), model_shapes(config))
    notes = []
    if not settings.get("untie_embeddings_and_output_weights", default=False):
        notes.append("embeddings were tied and are not any more: lm_head starts as a copy")
    if settings.get("squared_relu", "swiglu") is None and "-" in config.symbols:
        notes.append("neither squared_relu nor swiglu is set: the MLPs are GELU, as Megatron computes them")
    context = int(settings.get("seq_length", "max_position_embeddings", default=4096))
    return Foreign(config, tensors, context, tuple(notes), f"Megatron-LM ({stored.kind}), {folder.name}")


def _without_rank(name: str) -> str:
    return name.rpartition(":")[2]


def _iteration(folder: Path) -> Path:
    latest = folder / "latest_checkpointed_iteration.txt"
    if not latest.is_file():
        return folder
    text = latest.read_text().strip()
    if text != "release" and not text.isdigit():
        raise CheckpointError(f"{latest}: {text!r} is no iteration")
    found = folder / (text if text == "release" else f"iter_{int(text):07d}")
    if not found.is_dir():
        raise CheckpointError(f"{latest}: names {found.name}, which is not there")
    return found


@dataclass(frozen=True)
class _Stored:
    """What a checkpoint holds, its files opened.

    Attributes:
        kind: of layout.
        args: the training's settings.
        tensors: under `{rank prefix}{name}`, layers counted globally.
        ranks: prefixes of the tensor-parallel ranks for all tensors but experts.
        expert_ranks: for each expert-parallel rank, the prefixes of its tensor-parallel ranks.
        packed: whether Mamba projections (and gated MLPs) are packed by rank, or stand apart.
    """

    kind: str
    args: Mapping[str, Any]
    tensors: Source
    ranks: tuple[str, ...]
    expert_ranks: tuple[tuple[str, ...], ...]
    packed: bool

    def names(self) -> set[str]:
        prefix = self.ranks[0]
        names = {n.removeprefix(prefix) for n in self.tensors.specs() if n.startswith(prefix)}
        return names


class _Only:
    """The tensors that rules ask for."""

    def __init__(self, source: Source, wanted: set[str], where: Path) -> None:
        self._source = source
        specs = source.specs()
        absent = sorted(wanted - specs.keys())
        if absent:
            more = f" and {len(absent) - 10} more" if len(absent) > 10 else ""
            raise CheckpointError(f"{where}: {len(absent)} tensors are missing: {', '.join(absent[:10])}{more}")
        self._specs = {name: spec for name, spec in specs.items() if name in wanted}

    def specs(self) -> Mapping[str, Spec]:
        return self._specs

    def load(self, name: str) -> Any:
        return self._source.load(name)

    def pieces(self, name: str) -> Iterator[Any]:
        return self._source.pieces(name)


def _is_known_extra(name: str) -> bool:
    """Tensors that Megatron keeps and a model does not need: its layers' own state, optimizer, random states."""
    return name.endswith("_extra_state") or "rng" in name or name.startswith(("optimizer.", "chained_"))


def _arguments(values: Any, where: Path) -> Mapping[str, Any]:
    args = values.get("args") if isinstance(values, Mapping) else None
    if args is None or not hasattr(args, "__dict__"):
        raise CheckpointError(f"{where}: no args in it, which say what the tensors mean")
    return vars(args)


def _distributed(folder: Path) -> _Stored:
    args = _arguments(load_torch(folder / "common.pt"), folder / "common.pt")
    tensors = Distributed(folder)
    return _Stored("torch_dist", args, tensors, ("",), (("",),), packed=False)


def _pickled(folder: Path) -> _Stored:
    found = {path.parent.name: path for path in folder.glob("mp_rank_*/model_optim_rng.pt")}
    if not found:
        raise CheckpointError(f"{folder}: neither .metadata (torch_dist) nor mp_rank_*/model_optim_rng.pt in it")
    args: Mapping[str, Any] = {}
    files: dict[tuple[int, int, int], list[TorchFile]] = {}
    for name, path in sorted(found.items()):
        match = _RANK.fullmatch(name)
        if match is None:
            raise CheckpointError(f"{path.parent}: is not named mp_rank_TP, mp_rank_TP_PP or mp_rank_TP_PP_EP")
        values = load_torch(path)
        args = args or _arguments(values, path)
        stages = args.get("pipeline_model_parallel_size", 1) > 1
        first, second = (int(g) if g else 0 for g in match.groups()[1:])
        pipeline, expert = (first, second) if stages or match[3] else (0, first)
        files[int(match[1]), pipeline, expert] = _chunks(values, path)
    tp, pp, ep = (max(key[k] for key in files) + 1 for k in range(3))
    absent = [(t, p, e) for t in range(tp) for p in range(pp) for e in range(ep) if (t, p, e) not in files]
    if absent:
        raise CheckpointError(f"{folder}: ranks (tp, pp, ep) {absent[:10]} have no file")
    declared = args.get("tensor_model_parallel_size", tp), args.get("pipeline_model_parallel_size", pp)
    if declared != (tp, pp):
        raise CheckpointError(f"{folder}: files of tp {tp}, pp {pp}, but args say tp {declared[0]}, pp {declared[1]}")
    virtual = args.get("virtual_pipeline_model_parallel_size") or 1
    if {len(chunks) for chunks in files.values()} != {virtual}:
        counts = sorted({len(chunks) for chunks in files.values()})
        raise CheckpointError(f"{folder}: files of {counts} virtual pipeline stages, but args say {virtual}")
    # The layers go through the first chunks of all ranks, then through the second ones, and so on.
    merged = Merged(
        {f"tp{t}.pp{v * pp + p}.ep{e}:": files[t, p, e][v] for v in range(virtual) for t, p, e in sorted(files)}
    )
    renamed = Transformed(merged, _global_layers(merged, tp, pp * virtual, ep))
    experts = tuple(tuple(f"tp{t}.ep{e}:" for t in range(tp)) for e in range(ep))
    return _Stored("mp_rank", args, renamed, experts[0], experts, packed=True)


def _chunks(values: Mapping[str, Any], path: Path) -> list[TorchFile]:
    """The model of one rank, or its virtual pipeline stages `model0`, `model1`, … in order."""
    found = {k: v for k, v in values.items() if re.fullmatch(r"model\d*", k) and isinstance(v, Mapping)}
    names = ["model"] if "model" in found else [f"model{k}" for k in range(max(len(found), 1))]
    if sorted(found) != sorted(names):
        raise CheckpointError(
            f"{path}: holds {', '.join(sorted(found)) or 'no model'}; expected is model, or model0, model1 and so on "
            "for virtual pipeline stages"
        )
    return [TorchFile(_flat(found[name])) for name in names]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries (old `language_model` layouts) by dotted names."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            result |= _flat(value, f"{prefix}{name}.")
        else:
            result[f"{prefix}{name}".removeprefix("module.")] = value
    return result


def _global_layers(merged: Source, tp: int, pp: int, ep: int) -> list[Rule]:
    """`tp0.pp1.ep0:decoder.layers.2.…` → `tp0.ep0:decoder.layers.{2 + layers of the stages before}.…`."""
    layers: dict[int, set[int]] = defaultdict(set)
    for name in merged.specs():
        stage, rest = name.split(":", 1)
        if match := _LAYER.match(rest):
            layers[int(stage.split(".")[1].removeprefix("pp"))].add(int(match[1]))
    rules, first = [], 0
    for number in range(pp):
        for t in range(tp):
            for e in range(ep):
                before, after = f"tp{t}.pp{number}.ep{e}:", f"tp{t}.ep{e}:"
                for local in sorted(layers[number]):
                    name = "decoder.layers.{n}.{rest*}"
                    source = name.replace("{n}", str(local))
                    rules.append(Rule((before + source,), (after + name.replace("{n}", str(first + local)),)))
                rules.append(Rule((f"{before}{{rest*}}",), (f"{after}{{rest*}}",)))
        first += len(layers[number])
    return rules


def _config(settings: Settings, stored: _Stored) -> ModelConfig:
    """Sizes from the arguments, the pattern from what the layers hold."""
    names = stored.names()
    pattern = _pattern_of(names)
    declared = settings.get("hybrid_override_pattern")
    if declared is not None and declared.replace("|", "") != pattern:
        raise CheckpointError(f"{settings.where}: hybrid_override_pattern is {declared}, but the layers are {pattern}")
    settings.only("add_bias_linear", False)
    settings.only("normalization", "RMSNorm")
    settings.only("position_embedding_type", "none", "rope")
    settings.only("rotary_percent", 1.0)
    settings.only("qk_layernorm", False)
    settings.only("num_layers", len(pattern))
    d = settings.need("hidden_size")
    head_dim = settings.get("mamba_head_dim", default=64)
    heads = settings.get("mamba_num_heads", default=2 * d // head_dim)
    n_heads = settings.get("num_attention_heads", default=1)
    grouped = settings.get("group_query_attention", default=False)
    rope = settings.get("position_embedding_type", default="none") == "rope"
    swiglu, squared = settings.get("swiglu", default=False), settings.get("squared_relu", default=False)
    rows = stored.tensors.specs()[f"{stored.ranks[0]}embedding.word_embeddings.weight"].shape[0] * len(stored.ranks)
    used = min(settings.get("vocab_size", default=rows), rows)
    multiple = vocab_multiple(rows)
    while multiple <= rows - used:  # the padded size must come out
        multiple *= 2
    if rows % multiple:
        used, multiple = rows, vocab_multiple(rows)
    return ModelConfig(
        pattern=pattern,
        d_model=d,
        vocab_size=used,
        vocab_multiple=multiple,
        norm_eps=settings.get("norm_epsilon", "layernorm_epsilon", default=1e-5),
        init_std=settings.get("init_method_std", default=0.02),
        mamba=MambaConfig(
            d_state=settings.get("mamba_state_dim", default=128),
            head_dim=head_dim,
            n_groups=settings.get("mamba_num_groups", default=8),
            **inner_width(settings, d, heads * head_dim),
        ),
        attention=AttentionConfig(
            n_heads,
            settings.get("num_query_groups", default=n_heads) if grouped else n_heads,
            settings.get("kv_channels", default=d // n_heads),
            float(settings.get("rotary_base", default=10000)) if rope else None,
        ),
        mlp=MLPConfig(
            settings.get("ffn_hidden_size", default=4 * d), "swiglu" if swiglu else "relu2" if squared else "gelu"
        ),
        moe=_experts(settings) if "E" in pattern else MoEConfig(),
    )


def _experts(settings: Settings) -> MoEConfig:
    settings.only("moe_router_score_function", "sigmoid")
    groups = settings.get("moe_router_num_groups", default=1)
    if settings.get("moe_router_score_function") is None or not settings.get("squared_relu", default=False):
        raise settings.refuse(
            "experts are not routed by sigmoid scores (moe_router_score_function) to squared_relu MLPs"
        )
    if not settings.get("moe_shared_expert_intermediate_size", default=0):
        raise settings.refuse("moe_shared_expert_intermediate_size is 0: no shared expert")
    return MoEConfig(
        n_experts=settings.need("num_experts"),
        top_k=settings.need("moe_router_topk"),
        d_ff=settings.get("moe_ffn_hidden_size", "ffn_hidden_size"),
        d_ff_shared=settings.need("moe_shared_expert_intermediate_size"),
        scale=float(settings.get("moe_router_topk_scaling_factor", default=1.0)),
        n_groups=groups,
        top_groups=settings.get("moe_router_group_topk", default=groups),
    )


def _pattern_of(names: set[str]) -> str:
    kinds = {"mixer.": "M", "self_attention.": "*", "mlp.router": "E", "mlp.linear_fc1": "-"}
    layers: dict[int, set[str]] = defaultdict(set)
    for name in names:
        if match := _LAYER.match(name):
            layers[int(match[1])] |= {symbol for start, symbol in kinds.items() if match[2].startswith(start)}
    wrong = [i for i in range(max(layers, default=-1) + 1) if len(layers.get(i, ())) != 1]
    if wrong or not layers:
        raise CheckpointError(
            f"layers {wrong[:10]} are none of Mamba, attention, MLP or experts alone: this is no hybrid of Megatron-LM "
            "with one kind per layer"
        )
    return "".join(next(iter(layers[i])) for i in range(len(layers)))


def _rules(config: ModelConfig, stored: _Stored) -> Iterator[Rule]:
    """One rule per Megatron tensor: all ranks' pieces → our parts."""
    shapes, reader = model_shapes(config), _Reader(stored, stored.names())
    embed = "embedding.word_embeddings.weight"
    sources = reader.all_ranks(embed)
    joined = Unpack((shapes["embed.weight"][0],), len(stored.ranks))
    if "output_layer.weight" in reader.names:
        yield Rule(sources, ("embed.weight",), joined)
        yield Rule(reader.all_ranks("output_layer.weight"), ("lm_head.weight",), joined)
    else:
        yield Rule(sources, ("embed.weight", "lm_head.weight"), joined.then(Fan((2,))))
    yield reader.replicated("final_norm.weight", "decoder.final_norm.weight", "decoder.final_layernorm.weight")
    for index, symbol in enumerate(config.symbols):
        layer = {"M": _mamba, "*": _attention, "-": _mlp, "E": _moe}[symbol]
        yield from layer(reader, config, shapes, index)


Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class _Reader:
    """Makes rules for one checkpoint."""

    stored: _Stored
    names: set[str]

    def either(self, *alternatives: str) -> str:
        """The one of several names that is there (the first where none is: it will be listed as missing)."""
        return next((name for name in alternatives if name in self.names), alternatives[0])

    def all_ranks(self, name: str, ranks: Sequence[str] | None = None) -> tuple[str, ...]:
        return tuple(f"{rank}{name}" for rank in (self.stored.ranks if ranks is None else ranks))

    def replicated(self, ours: str, *theirs: str) -> Rule:
        return Rule((f"{self.stored.ranks[0]}{self.either(*theirs)}",), (ours,))

    def split(
        self,
        ours: Sequence[str],
        shapes: Shapes,
        *theirs: str,
        axis: Axis = "out",
        before: Map = KEEP,
        after: Map = KEEP,
        ranks: Sequence[str] | None = None,
    ) -> Rule:
        """Ranks' packed tensors → parts."""
        sources = self.all_ranks(self.either(*theirs), ranks)
        sizes = tuple(shapes[name][0 if axis == "out" else -1] for name in ours)
        map_ = before.then(Unpack(sizes, len(sources), axis)).then(after)
        return Rule(sources, tuple(ours), map_)


def _mamba(reader: _Reader, config: ModelConfig, shapes: Shapes, index: int) -> Iterator[Rule]:
    theirs, ours = f"decoder.layers.{index}", f"layers.{index}"
    mixer = f"{theirs}.mixer"
    norms = (f"{mixer}.in_proj.layer_norm_weight", f"{theirs}.norm.weight", f"{theirs}.input_layernorm.weight")
    yield reader.replicated(f"{ours}.norm.weight", *norms)
    weights = [f"{ours}.mixer.in_proj.{p}.weight" for p in PROJECTIONS]
    conv = {leaf: [f"{ours}.mixer.conv.{p}.{leaf}" for p in "xBC"] for leaf in ("weight", "bias")}
    if reader.stored.packed:
        yield reader.split(weights, shapes, f"{mixer}.in_proj.weight")
        for leaf, names in conv.items():
            before = Squeeze(1) if leaf == "weight" else KEEP
            yield reader.split(names, shapes, f"{mixer}.conv1d.{leaf}", f"{mixer}.conv1d_{leaf}", before=before)
    else:
        for part, name in zip(PROJECTIONS, weights, strict=True):
            yield Rule((f"{mixer}.in_proj.weight.{part}",), (name,))
        for leaf, names in conv.items():
            for part, name in zip("xBC", names, strict=True):
                stems = (f"{mixer}.conv1d.{leaf}.{part}", f"{mixer}.conv1d_{leaf}.{part}")
                yield Rule((reader.either(*stems),), (name,), Squeeze(1) if leaf == "weight" else KEEP)
    for name in ("A_log", "D", "dt_bias", "norm.weight"):
        yield reader.split([f"{ours}.mixer.{name}"], shapes, f"{mixer}.{name}")
    yield reader.split([f"{ours}.mixer.out_proj.weight"], shapes, f"{mixer}.out_proj.weight", axis="in")


def _attention(reader: _Reader, config: ModelConfig, shapes: Shapes, index: int) -> Iterator[Rule]:
    """Its qkv rows are, group by group of the key/value heads, that group's queries, its key, its value."""
    theirs, ours = f"decoder.layers.{index}", f"layers.{index}"
    block = f"{theirs}.self_attention"
    norms = (f"{block}.linear_qkv.layer_norm_weight", f"{theirs}.input_layernorm.weight")
    yield reader.replicated(f"{ours}.norm.weight", *norms)
    names = [f"{ours}.mixer.{p}_proj.weight" for p in "qkv"]
    sources = reader.all_ranks(f"{block}.linear_qkv.weight")
    sizes = tuple(shapes[name][0] for name in names)
    order = qkv_order(config.attention)
    together = Unpack((sum(sizes),), len(sources)).then(Permute(order)).then(Unpack(sizes))
    yield Rule(sources, tuple(names), together)
    yield reader.split([f"{ours}.mixer.o_proj.weight"], shapes, f"{block}.linear_proj.weight", axis="in")


def qkv_order(config: AttentionConfig) -> tuple[int, ...]:
    """Rows of Megatron's qkv in the order [all q | all k | all v]."""
    queries = config.n_heads // config.n_kv_heads
    width = (queries + 2) * config.head_dim
    starts = [group * width for group in range(config.n_kv_heads)]
    q = [start + row for start in starts for row in range(queries * config.head_dim)]
    k, v = (
        [start + (queries + which) * config.head_dim + row for start in starts for row in range(config.head_dim)]
        for which in (0, 1)
    )
    return (*q, *k, *v)


def _mlp(reader: _Reader, config: ModelConfig, shapes: Shapes, index: int) -> Iterator[Rule]:
    theirs, ours = f"decoder.layers.{index}", f"layers.{index}"
    norms = (f"{theirs}.mlp.linear_fc1.layer_norm_weight", f"{theirs}.pre_mlp_layernorm.weight")
    yield reader.replicated(f"{ours}.norm.weight", *norms)
    up = ("gate", "up") if config.mlp.activation == "swiglu" else ("up",)
    # A gated layer's first half is the gate: per rank in files of ranks, all ranks' in a distributed checkpoint.
    names = [f"{ours}.mixer.{name}_proj.weight" for name in up]
    if reader.either(f"{theirs}.mlp.linear_fc1.weight_w") in reader.names:
        for name, leaf in zip(names, ("weight_w", "weight_v"), strict=True):
            yield Rule((f"{theirs}.mlp.linear_fc1.{leaf}",), (name,))
    else:
        yield reader.split(names, shapes, f"{theirs}.mlp.linear_fc1.weight")
    yield reader.split([f"{ours}.mixer.down_proj.weight"], shapes, f"{theirs}.mlp.linear_fc2.weight", axis="in")


def _moe(reader: _Reader, config: ModelConfig, shapes: Shapes, index: int) -> Iterator[Rule]:
    theirs, ours = f"decoder.layers.{index}", f"layers.{index}.mixer"
    mlp = f"{theirs}.mlp"
    yield reader.replicated(f"layers.{index}.norm.weight", f"{theirs}.pre_mlp_layernorm.weight")
    yield reader.replicated(f"{ours}.router.weight", f"{mlp}.router.weight")
    yield reader.replicated(f"{ours}.selection_bias", f"{mlp}.router.expert_bias")
    for stem, leaf, axis in (("up", "linear_fc1", "out"), ("down", "linear_fc2", "in")):
        shared = f"{mlp}.shared_experts.{leaf}.weight"
        yield reader.split([f"{ours}.shared.{stem}_proj.weight"], shapes, shared, axis=axis)  # type: ignore[arg-type]
        parts = [f"{ours}.{stem}_proj.weight.experts.{j}" for j in range(config.moe.n_experts)]
        yield from _expert_rules(reader, shapes, mlp, leaf, axis, parts)  # type: ignore[arg-type]


def _expert_rules(
    reader: _Reader, shapes: Shapes, mlp: str, leaf: str, axis: Axis, parts: Sequence[str]
) -> Iterator[Rule]:
    """Stacked, or numbered: over all ranks in a distributed checkpoint, from zero on each expert-parallel rank."""
    stacked = f"{mlp}.experts.experts.{leaf}.weight"
    if stacked in reader.names:
        yield Rule((stacked,), tuple(parts), Unstack())
        return
    ranks = reader.stored.expert_ranks
    each = len(parts) // len(ranks)
    for number, part in enumerate(parts):
        rank, j = ranks[number // each], number % each
        alternatives = (
            f"{mlp}.experts.local_experts.{j}.{leaf}.weight",
            f"{mlp}.experts.{leaf}.weight{j}",
            f"{mlp}.experts.experts.{j}.{leaf}.weight",
        )
        yield reader.split([part], shapes, *alternatives, axis=axis, ranks=rank)
