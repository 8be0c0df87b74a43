"""Names: the tensors of a Hugging Face folder as rules over our logical parts, from the registry of layer kinds.

`backbone` rules are NemotronH's and Mamba2's layout on disk; our own class has it with the Mamba projections apart
(`in_proj.z.weight`), one tensor per modality where they are routed (`in_proj.z.image.weight`); GraniteMoeHybrid has
one layer where we have two (mixer, then MLP or experts). Read forwards the rules export, read backwards they import.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from ...parallel.kinds.base import HFKey
from ...parallel.model import ModelConfig
from ...parallel.parts import Part
from ..maps import KEEP, Cast, LeaveZero, Map, Pack, Unflatten, Unsqueeze
from ..surgery import SENSITIVE
from ..transforms import Rule, Source, Tensors, Transformed, check_tensors, invert
from .targets import Target

BUFFER = HFKey("gate.e_score_correction_bias", ("selection_bias",))


def export_rules(config: ModelConfig, target: Target) -> list[Rule]:
    """One rule per tensor of the exported folder, embedding first, output projection last; nothing is rounded.

    Args:
        config: a model that `target` can hold.
    """
    shapes = model_shapes(config)
    rules = list(_granite(config, shapes) if target == "granite" else _backbone(config, target, shapes))
    used = sorted(source for rule in rules for source in rule.sources)
    if used != sorted(shapes):
        different = sorted(set(used) ^ set(shapes))
        raise AssertionError(f"the layout must use every tensor once: {different or 'some are used twice'}")
    return rules


def exported(config: ModelConfig, target: Target, tensors: Source, dtype: torch.dtype | None = None) -> Transformed:
    """Our tensors as the exported folder holds them, read when they are asked for.

    Args:
        tensors: the model's logical tensors.
        dtype: of the folder; small and sensitive tensors are float32 in any. None rounds nothing.

    Raises:
        CheckpointError: tensors are absent, of another shape, or not this model's.
    """
    check_tensors("the checkpoint", tensors.specs(), model_shapes(config))
    rules = export_rules(config, target)
    if dtype is not None:
        rules = [Rule(r.sources, r.targets, r.map.then(Cast(stored_dtype(r.sources[0], dtype)))) for r in rules]
    return Transformed(tensors, rules).in_order(rule.targets[0] for rule in rules)


def imported(config: ModelConfig, target: Target, tensors: Source) -> Transformed:
    """The tensors of a folder as our logical tensors: the export's rules read backwards.

    Raises:
        CheckpointError: as `exported`.
    """
    expected = exported_shapes(config, target)
    check_tensors("the folder", tensors.specs(), expected)
    return Transformed(tensors, invert(export_rules(config, target))).in_order(model_shapes(config))


def exported_shapes(config: ModelConfig, target: Target) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the exported folder, by its name there."""
    metas = {name: torch.empty(shape, device="meta") for name, shape in model_shapes(config).items()}
    specs = Transformed(Tensors(metas), export_rules(config, target)).specs()
    return {name: spec.shape for name, spec in specs.items()}


def model_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every logical tensor of a checkpoint, banks split, selection biases included."""
    shapes = {key: part.shape for name, part in config.parts().items() for key in part.entry_names(name)}
    for index, symbol in enumerate(config.symbols):
        if symbol == "E":
            shapes[f"layers.{index}.mixer.selection_bias"] = (config.layer(index)[1].n_experts,)
    return shapes


def stored_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """What one of our tensors is stored in: decays, thresholds and biases in float32 whatever the others are in."""
    return torch.float32 if any(word in SENSITIVE for word in name.split(".")) else dtype


def _rule(
    shapes: Mapping[str, tuple[int, ...]], name: str, sources: tuple[str, ...], unsqueeze: int | None = None
) -> Rule:
    map_: Map = Pack(tuple(shapes[source][0] for source in sources)) if len(sources) > 1 else KEEP
    return Rule(sources, (name,), map_ if unsqueeze is None else map_.then(Unsqueeze(unsqueeze)))


def _backbone(config: ModelConfig, target: Target, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Rule]:
    prefix = "model." if target == "polylepis" else "backbone."
    yield Rule(("embed.weight",), (f"{prefix}embeddings.weight",))
    for index in range(len(config.symbols)):
        ours, theirs = f"layers.{index}.", f"{prefix}layers.{index}."
        yield Rule((f"{ours}norm.weight",), (f"{theirs}norm.weight",))
        for key in layer_keys(config, index, split=target == "polylepis"):
            sources = tuple(f"{ours}mixer.{part}" for part in key.parts)
            yield _rule(shapes, f"{theirs}mixer.{key.name}", sources, key.unsqueeze)
    yield Rule(("final_norm.weight",), (f"{prefix}norm_f.weight",))
    yield Rule(("lm_head.weight",), ("lm_head.weight",))


def _granite(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Rule]:
    """Our layers 2k and 2k+1 are its layer k."""
    yield Rule(("embed.weight",), ("model.embed_tokens.weight",))
    for index in range(0, len(config.symbols), 2):
        theirs = f"model.layers.{index // 2}."
        mixer, mlp = f"layers.{index}", f"layers.{index + 1}"
        yield Rule((f"{mixer}.norm.weight",), (f"{theirs}input_layernorm.weight",))
        module = "mamba" if config.symbols[index] == "M" else "self_attn"
        for key in layer_keys(config, index):
            sources = tuple(f"{mixer}.mixer.{part}" for part in key.parts)
            yield _rule(shapes, f"{theirs}{module}.{key.name}", sources, key.unsqueeze)
        yield Rule((f"{mlp}.norm.weight",), (f"{theirs}post_attention_layernorm.weight",))
        experts = config.symbols[index + 1] == "E"
        if experts:
            yield from _granite_experts(shapes, f"{mlp}.mixer.", theirs, config.layer(index + 1)[1].n_experts)
        shared = f"{mlp}.mixer.shared." if experts else f"{mlp}.mixer."
        gated = tuple(f"{shared}{name}_proj.weight" for name in ("gate", "up"))
        yield _rule(shapes, f"{theirs}shared_mlp.input_linear.weight", gated)
        yield Rule((f"{shared}down_proj.weight",), (f"{theirs}shared_mlp.output_linear.weight",))
    yield Rule(("final_norm.weight",), ("model.norm.weight",))
    yield Rule(("lm_head.weight",), ("lm_head.weight",))


def _granite_experts(shapes: Mapping[str, tuple[int, ...]], ours: str, theirs: str, n_experts: int) -> Iterator[Rule]:
    """Stacks by expert under their names on disk, gate over up; a router without a selection bias."""
    bias, block = f"{ours}selection_bias", f"{theirs}block_sparse_moe."
    yield Rule((f"{ours}router.weight", bias), (f"{block}router.layer.weight",), LeaveZero(n_experts, bias))
    for name, stems in (("input_linear", ("gate", "up")), ("output_linear", ("down",))):
        parts = tuple(f"{ours}{stem}_proj.weight.experts.{j}" for j in range(n_experts) for stem in stems)
        packed = Pack(tuple(shapes[part][0] for part in parts)).then(Unflatten(n_experts))
        yield Rule(parts, (f"{block}{name}.weight",), packed)


def layer_keys(config: ModelConfig, index: int, split: bool = False) -> Iterator[HFKey]:
    """The keys of one mixer, experts counted out.

    Args:
        split: Mamba projections apart, one key per modality where they are routed.
    """
    kind, layer = config.layer(index)
    parts = kind.parts(layer, config.shape)
    for key in kind.hf_keys(layer):
        if "{j}" in key.name:
            for j in range(layer.n_experts):
                yield HFKey(key.name.format(j=j), tuple(part.format(j=j) for part in key.parts), key.unsqueeze)
        elif split and kind.symbol == "M" and key.unsqueeze is None and key.name != "conv1d.bias":
            for part in key.parts:
                yield from _routed(part, parts[part])
        else:
            yield key
    if kind.symbol == "E":
        yield BUFFER


def _routed(name: str, part: Part) -> Iterator[HFKey]:
    """`in_proj.z.weight` → `in_proj.z.image.weight`, `dt_bias` → `dt_bias.image`."""
    if not part.entries:
        yield HFKey(name, (name,))
    stem, dot, leaf = name.rpartition(".weight") if name.endswith(".weight") else (name, "", "")
    for entry, ours in zip(part.entries, part.entry_names(name), strict=False):
        yield HFKey(f"{stem}.{entry}{dot}{leaf}", (ours,))
