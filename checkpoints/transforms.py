"""Checkpoint transforms: a list of rules, each (names → names, a linear map), applied tensor by tensor.

A transform never holds more than one tensor at a time, knows nothing of meshes, and composes by chaining: what one
yields, the next takes. Models change with it, so each instance returns the new configuration beside its rules.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..parallel.kinds.mamba import ROUTABLE, MambaConfig
from ..parallel.model import ModelConfig
from .errors import CheckpointError

Tensors = Iterable[tuple[str, Tensor]]


@dataclass(frozen=True)
class Rule:
    """What becomes of the tensors whose whole name matches.

    Attributes:
        pattern: a regular expression over the logical name.
        names: the new names, as templates of the match (`\\1`); none drops the tensor.
        apply: the linear map, the same for every new name.
    """

    pattern: str
    names: tuple[str, ...]
    apply: Callable[[Tensor], Tensor] = lambda tensor: tensor


def transform(rules: Sequence[Rule], tensors: Tensors) -> Iterator[tuple[str, Tensor]]:
    """Apply the first rule that matches each name; names that none matches pass unchanged."""
    for name, tensor in tensors:
        for rule in rules:
            match = re.fullmatch(rule.pattern, name)
            if match:
                for template in rule.names:
                    yield match.expand(template), rule.apply(tensor)
                break
        else:
            yield name, tensor


def _stem(routed: str) -> str:
    """The logical name of a routable Mamba parameter below `mixer.`."""
    if routed == "dt_bias":
        return "dt_bias"
    return "out_proj.weight" if routed == "out" else f"in_proj.{routed}.weight"


def _mamba_layers(config: ModelConfig) -> list[tuple[int, MambaConfig]]:
    layers = ((index, config.layer(index)[1]) for index in range(len(config.symbols)))
    return [(index, layer) for index, layer in layers if isinstance(layer, MambaConfig)]


def route_modalities(
    config: ModelConfig, modalities: Sequence[str], routed: Sequence[str] = ROUTABLE
) -> tuple[ModelConfig, list[Rule]]:
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
    stems = "|".join(re.escape(_stem(name)) for name in routed)
    copies = tuple(rf"\1.{modality}" for modality in modalities)
    rules = [Rule(rf"(layers\.\d+\.mixer\.(?:{stems}))", copies)]
    mamba = dataclasses.replace(config.mamba, routed=tuple(routed))
    return dataclasses.replace(config, modalities=tuple(modalities), mamba=mamba), rules


def select_modality(config: ModelConfig, modality: str) -> tuple[ModelConfig, list[Rule]]:
    """Mixture-of-Mamba → the dense model that one modality sees; other modalities' projections are dropped.

    For tokens of that modality the function is unchanged, which is what serving text alone needs.

    Raises:
        CheckpointError: no such modality.
    """
    if modality not in config.modalities:
        raise CheckpointError(f"no modality {modality!r} in the model; it has {', '.join(config.modalities)}")
    rules = []
    for index, layer in _mamba_layers(config):
        for name in layer.routed:
            stem = re.escape(f"layers.{index}.mixer.{_stem(name)}")
            rules += [Rule(rf"({stem})\.{re.escape(modality)}", (r"\1",)), Rule(rf"{stem}\..*", ())]
    layers = {i: {k: v for k, v in override.items() if k != "routed"} for i, override in config.layers.items()}
    mamba = dataclasses.replace(config.mamba, routed=())
    return dataclasses.replace(config, modalities=(modality,), mamba=mamba, layers=layers), rules


def cast(dtype: torch.dtype, keep: str = r".*\.(A_log|D|dt_bias.*|selection_bias)") -> list[Rule]:
    """A dtype policy: everything to `dtype` but the names that match `keep`, which are small and sensitive."""
    return [Rule(rf"({keep})", (r"\1",)), Rule("(.*)", (r"\1",), lambda tensor: tensor.to(dtype))]
