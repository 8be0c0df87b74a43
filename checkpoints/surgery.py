"""Model surgery as lists of rules: routing by modality, one modality, experts, a larger vocabulary, a dtype policy.

The model changes with its tensors, so each returns the new configuration beside the rules.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..parallel.kinds.mamba import ROUTABLE, MambaConfig
from ..parallel.kinds.moe import MoEConfig
from ..parallel.kinds.moe import parts as expert_parts
from ..parallel.model import ModelConfig
from ..parallel.parts import initial_values
from .errors import CheckpointError
from .maps import KEEP, Cast, Each, Fan, Fresh, Map, Noise, Place, Scale, Unpack
from .transforms import Rule

Surgery = tuple[ModelConfig, list[Rule]]
SENSITIVE = ("A_log", "D", "dt_bias", "selection_bias")
"""Components of names that a dtype policy leaves in float32: small and sensitive."""


def _stem(routed: str) -> str:
    """The logical name of a routable Mamba parameter below `mixer.`."""
    if routed == "dt_bias":
        return "dt_bias"
    return "out_proj.weight" if routed == "out" else f"in_proj.{routed}.weight"


def _mamba_layers(config: ModelConfig) -> list[tuple[int, MambaConfig]]:
    layers = ((index, config.layer(index)[1]) for index in range(len(config.symbols)))
    return [(index, layer) for index, layer in layers if isinstance(layer, MambaConfig)]


def route_modalities(config: ModelConfig, modalities: Sequence[str], routed: Sequence[str] = ROUTABLE) -> Surgery:
    """Dense → Mixture-of-Mamba: every modality starts with a copy, so the function is unchanged ("upcycling").

    Args:
        modalities: all modalities of the new model, those of the old one first.
        routed: which parameters to decouple; see `MambaConfig.routed`.

    Raises:
        CheckpointError: the model is routed already, or the modalities do not extend its own.
    """
    if any(layer.routed for _, layer in _mamba_layers(config)):
        raise CheckpointError("the model is routed by modality already")
    if tuple(modalities[: len(config.modalities)]) != tuple(config.modalities) or len(modalities) < 2:
        raise CheckpointError(f"modalities {list(modalities)} do not extend the model's {list(config.modalities)}")
    rules = []
    for index, _ in _mamba_layers(config):
        for name in (f"layers.{index}.mixer.{_stem(part)}" for part in routed):
            rules.append(Rule((name,), tuple(f"{name}.{m}" for m in modalities), Fan((len(modalities),))))
    mamba = dataclasses.replace(config.mamba, routed=tuple(routed))
    return dataclasses.replace(config, modalities=tuple(modalities), mamba=mamba), rules


def select_modality(config: ModelConfig, modality: str) -> Surgery:
    """Mixture-of-Mamba → the dense model that one modality sees; other modalities' projections are dropped.

    For tokens of that modality the function is unchanged, which is what serving text alone needs.

    Raises:
        CheckpointError: no such modality.
    """
    if modality not in config.modalities:
        raise CheckpointError(f"no modality {modality!r} in the model; it has {', '.join(config.modalities)}")
    rules = []
    for index, layer in _mamba_layers(config):
        for stem in (f"layers.{index}.mixer.{_stem(name)}" for name in layer.routed):
            rules += [Rule((f"{stem}.{m}",), (stem,) if m == modality else ()) for m in config.modalities]
    layers = {i: {k: v for k, v in override.items() if k != "routed"} for i, override in config.layers.items()}
    mamba = dataclasses.replace(config.mamba, routed=())
    return dataclasses.replace(config, modalities=(modality,), mamba=mamba, layers=layers), rules


def grow_experts(
    config: ModelConfig,
    n_experts: int,
    top_k: int,
    d_ff_shared: int,
    *,
    layers: Sequence[int] | None = None,
    noise: float = 0.0,
    seed: int = 0,
) -> Surgery:
    """Dense → mixture of experts ("sparse upcycling", Komatsuzaki et al. 2023), the function unchanged.

    An MLP's hidden units are shared out: the first `d_ff_shared` become the shared expert, all the others become
    *every* routed expert. A token's expert weights sum to `scale`, so with the experts' outputs divided by it the layer
    computes what the MLP did, whatever the fresh router decides; experts diverge as they train, at once with `noise`.

    Args:
        d_ff_shared: hidden units of the shared expert, at least one and not all of the MLP's.
        layers: which `-` layers become `E`; all of them by default.
        noise: added to the experts' matrices, in standard deviations of each. The function then changes.
        seed: of router and noise.

    Raises:
        CheckpointError: not such layers, or sizes that do not fit.
    """
    if "E" in config.symbols:
        raise CheckpointError(f"{config.symbols} has experts already")
    chosen = [i for i, symbol in enumerate(config.symbols) if symbol == "-"] if layers is None else list(layers)
    if not chosen or any(not 0 <= i < len(config.symbols) or config.symbols[i] != "-" for i in chosen):
        raise CheckpointError(f"layers {chosen} of {config.symbols}: need layers that are MLPs (-)")
    if not 1 <= top_k <= n_experts:
        raise CheckpointError(f"top_k {top_k} must lie between 1 and n_experts {n_experts}")
    widths = [config.layer(i)[1].d_ff for i in chosen]
    for index, width in zip(chosen, widths, strict=True):
        activation = config.layer(index)[1].activation
        if activation not in ("relu2", "swiglu"):
            raise CheckpointError(f"layer {index} is a {activation} MLP, but experts are relu2 or swiglu")
        if activation != config.layer(chosen[0])[1].activation:
            raise CheckpointError(f"layers {chosen[0]} and {index} differ in their activation, experts are all alike")
        if not 0 < d_ff_shared < width:
            raise CheckpointError(f"d_ff_shared {d_ff_shared} must lie between 1 and {width - 1} (layer {index})")
    kept = {i: dict(v) for i, v in config.layers.items() if i not in chosen}
    default = widths[0] - d_ff_shared
    overrides = {
        i: {"d_ff": w - d_ff_shared} for i, w in zip(chosen, widths, strict=True) if w - d_ff_shared != default
    }
    sizes = {"n_experts": n_experts, "top_k": top_k, "d_ff": default, "d_ff_shared": d_ff_shared}
    moe = dataclasses.replace(config.moe, **sizes, activation=config.layer(chosen[0])[1].activation)
    if not moe.renormalise or moe.capacity_factor:
        raise CheckpointError("expert weights must sum to scale: needs renormalise and no capacity_factor")
    new = dataclasses.replace(config, pattern=_exchange(config.pattern, set(chosen)), moe=moe, layers=kept | overrides)
    rules: list[Rule] = []
    for index, width in zip(chosen, widths, strict=True):
        rules += _expert_rules(new, index, (d_ff_shared, width - d_ff_shared), noise, seed)
    return new, rules


def _expert_rules(config: ModelConfig, index: int, sizes: tuple[int, int], noise: float, seed: int) -> list[Rule]:
    layer: MoEConfig = config.layer(index)[1]
    name, experts = f"layers.{index}.mixer", range(layer.n_experts)
    fan = Fan((1, layer.n_experts))
    router = expert_parts(layer, config.shape)["router.weight"]

    def fresh() -> list[Tensor]:
        return [initial_values(router, f"{name}.router.weight", seed), torch.zeros(layer.n_experts)]

    def to_experts(stem: str) -> tuple[str, ...]:
        return (f"{name}.shared.{stem}_proj.weight", *(f"{name}.{stem}_proj.weight.experts.{j}" for j in experts))

    rules = [Rule((), (f"{name}.router.weight", f"{name}.selection_bias"), Fresh(fresh))]
    for k, stem in enumerate((*(p.removesuffix("_proj") for p in layer.projections), "down")):
        split: Map = Unpack(sizes)
        if stem == "down":
            split = Unpack(sizes, axis="in").then(Each((KEEP, Scale(1 / layer.scale))))
        noisy = Each((KEEP, *(Noise(noise, seed + k * layer.n_experts + j) for j in experts)))
        map_ = split.then(fan).then(noisy) if noise else split.then(fan)
        rules.append(Rule((f"{name}.{stem}_proj.weight",), to_experts(stem), map_))
    return rules


def _exchange(pattern: str, layers: set[int]) -> str:
    """`-` → `E` at these layers; pipeline cuts are no layers."""
    result, index = "", 0
    for symbol in pattern:
        result += "E" if symbol != "|" and index in layers else symbol
        index += symbol != "|"
    return result


def extend_vocabulary(
    config: ModelConfig,
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    *,
    noise: float = 1e-2,
    seed: int = 0,
) -> Surgery:
    """More codes: longer ranges, modalities more. Every code keeps its own row, wherever its range moves.

    New rows of the embedding and of the output projection start as the mean of the used ones plus noise (Hewitt 2021).

    Args:
        old, new: vocabularies as their manifests hold them: `specials`, `modalities`, `sizes`, `vocab_multiple`.
        noise: in standard deviations of the used rows.

    Raises:
        CheckpointError: the old one is not the model's, or the new one lacks something that the old one has.
    """
    sizes = dict(zip(new["modalities"], new["sizes"], strict=True))
    runs, lost, start = [(0, 0, old["specials"])], [], old["specials"]
    firsts = _first_ids(new)
    for name, size in zip(old["modalities"], old["sizes"], strict=True):
        if sizes.get(name, -1) < size:
            lost.append(f"{name}: {size} → {sizes.get(name, 0)}")
        else:
            runs.append((start, firsts[name], size))
        start += size
    if lost or new["specials"] != old["specials"]:
        raise CheckpointError(f"the new vocabulary is smaller than the old one ({', '.join(lost) or 'specials'})")
    if tuple(new["modalities"][: len(old["modalities"])]) != tuple(old["modalities"]):
        raise CheckpointError(f"{list(new['modalities'])} do not extend {list(old['modalities'])} in their order")
    if start != config.vocab_size:
        raise CheckpointError(f"the old vocabulary has {start} ids, but the model knows {config.vocab_size}")
    used = new["specials"] + sum(new["sizes"])
    larger = dataclasses.replace(config, vocab_size=used, vocab_multiple=new["vocab_multiple"])
    place = Place(config.padded_vocab, larger.padded_vocab, tuple(runs), "mean", noise, seed)
    head = dataclasses.replace(place, seed=seed + 1)
    names = {"embed.weight": place, "lm_head.weight": head}
    return larger, [Rule((name,), (name,), map_) for name, map_ in names.items()]


def adopt_vocabulary(
    config: ModelConfig,
    new: Mapping[str, Any],
    specials: Sequence[int | None],
    *,
    noise: float = 1e-2,
    seed: int = 0,
) -> Surgery:
    """A text model's ids, which start at 0, become the text ids of a vocabulary of ours.

    Args:
        new: the vocabulary, as its manifest holds it.
        specials: which of the old ids ours 0 (padding), 1 (begin) and 2 (end of document) continue; None for none.
        noise, seed: of rows that nothing continues, as in `extend_vocabulary`.

    Raises:
        CheckpointError: more text ids than the model has rows.
    """
    n_text, first = new["sizes"][0], new["specials"]
    if n_text > config.padded_vocab:
        raise CheckpointError(f"the vocabulary has {n_text} text ids, but the model has {config.padded_vocab} rows")
    used = first + sum(new["sizes"])
    larger = dataclasses.replace(config, vocab_size=used, vocab_multiple=new["vocab_multiple"])
    copies = [(old, k, 1) for k, old in enumerate(specials) if old is not None and 0 <= old < config.padded_vocab]
    runs = (*copies, (0, first, n_text))
    names = ("embed.weight", "lm_head.weight")
    sizes = config.padded_vocab, larger.padded_vocab
    return larger, [
        Rule((name,), (name,), Place(*sizes, runs, "mean", noise, seed + k)) for k, name in enumerate(names)
    ]


def _first_ids(vocabulary: Mapping[str, Any]) -> dict[str, int]:
    result, start = {}, vocabulary["specials"]
    for name, size in zip(vocabulary["modalities"], vocabulary["sizes"], strict=True):
        result[name] = start
        start += size
    return result


def cast(dtype: torch.dtype, keep: Sequence[str] = SENSITIVE) -> list[Rule]:
    """A dtype policy: everything to `dtype` but what has one of `keep` among the components of its name."""
    kept = [Rule((name,), (name,), KEEP) for word in keep for name in _with_component(word)]
    return [*kept, Rule(("{rest*}",), ("{rest*}",), Cast(dtype))]


def _with_component(word: str) -> tuple[str, ...]:
    return (word, f"{{rest*}}.{word}", f"{{rest*}}.{word}.{{more*}}", f"{word}.{{more*}}")
