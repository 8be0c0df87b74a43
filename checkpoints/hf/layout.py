"""Names: from our logical parts to the tensors of a Hugging Face folder, as the registry of layer kinds declares it.

The library's classes and ours share one layout, that of NemotronH on disk; they differ in the prefix (`backbone.` or
`model.`) and in the Mamba projections, which our own class keeps apart (`in_proj.z.weight`), one tensor per modality
where they are routed (`in_proj.z.image.weight`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...parallel.kinds.base import HFKey
from ...parallel.model import ModelConfig
from ...parallel.parts import Part
from ..errors import CheckpointError
from .targets import Target

# Small and sensitive: decays and thresholds. Stored in float32 whatever the weights are stored in.
ALWAYS_FLOAT32 = ("A_log", "D", "dt_bias", "selection_bias")
BUFFER = HFKey("gate.e_score_correction_bias", ("selection_bias",))


@dataclass(frozen=True)
class Entry:
    """One tensor of the exported folder.

    Attributes:
        name: its key.
        sources: our tensors, concatenated along dim 0.
        shape: of the result.
        unsqueeze: a dimension of size 1 to insert, or None.
        dtype: it is stored in.
    """

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    unsqueeze: int | None
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def build(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The tensor itself, contiguous, on the CPU, in memory of its own.

        Raises:
            CheckpointError: a source is absent or has another shape than the model declares.
        """
        absent = [source for source in self.sources if source not in tensors]
        if absent:
            raise CheckpointError(f"the checkpoint holds no {absent[0]}, which {self.name} is made of")
        pieces = [tensors[source].detach() for source in self.sources]
        value = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        value = value if self.unsqueeze is None else value.unsqueeze(self.unsqueeze)
        if tuple(value.shape) != self.shape:
            raise CheckpointError(f"{self.name}: {tuple(value.shape)} in the checkpoint, {self.shape} in the model")
        return value.to(device="cpu", dtype=self.dtype, copy=True).contiguous()


def entries(config: ModelConfig, target: Target, dtype: torch.dtype) -> list[Entry]:
    """Every tensor of the exported folder, embedding first, output projection last."""
    prefix = "model." if target == "polylepis" else "backbone."
    shapes = _shapes(config)

    def entry(name: str, sources: tuple[str, ...], unsqueeze: int | None = None) -> Entry:
        rows = sum(shapes[source][0] for source in sources)
        shape = [rows, *shapes[sources[0]][1:]]
        if unsqueeze is not None:
            shape.insert(unsqueeze, 1)
        kept = any(word in ALWAYS_FLOAT32 for word in sources[0].split("."))
        return Entry(name, sources, tuple(shape), unsqueeze, torch.float32 if kept else dtype)

    result = [entry(f"{prefix}embeddings.weight", ("embed.weight",))]
    for index in range(len(config.symbols)):
        ours, theirs = f"layers.{index}.", f"{prefix}layers.{index}."
        result.append(entry(f"{theirs}norm.weight", (f"{ours}norm.weight",)))
        for key in _layer_keys(config, index, target):
            sources = tuple(f"{ours}mixer.{part}" for part in key.parts)
            result.append(entry(f"{theirs}mixer.{key.name}", sources, key.unsqueeze))
    result.append(entry(f"{prefix}norm_f.weight", ("final_norm.weight",)))
    result.append(entry("lm_head.weight", ("lm_head.weight",)))
    _check_complete(result, shapes)
    return result


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every logical tensor of a checkpoint, banks split, selection biases included."""
    shapes = {key: part.shape for name, part in config.parts().items() for key in part.entry_names(name)}
    for index, symbol in enumerate(config.symbols):
        if symbol == "E":
            shapes[f"layers.{index}.mixer.selection_bias"] = (config.layer(index)[1].n_experts,)
    return shapes


def _layer_keys(config: ModelConfig, index: int, target: Target) -> Iterator[HFKey]:
    """The keys of one mixer with experts counted out, and for our own class projections kept apart."""
    kind, layer = config.layer(index)
    parts = kind.parts(layer, config.shape)
    for key in kind.hf_keys(layer):
        if "{j}" in key.name:
            for j in range(layer.n_experts):
                yield HFKey(key.name.format(j=j), tuple(part.format(j=j) for part in key.parts), key.unsqueeze)
        elif target == "polylepis" and kind.symbol == "M" and key.unsqueeze is None and key.name != "conv1d.bias":
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


def _check_complete(result: list[Entry], shapes: Mapping[str, tuple[int, ...]]) -> None:
    used = sorted(source for entry in result for source in entry.sources)
    if used != sorted(shapes):
        different = sorted(set(used) ^ set(shapes))
        raise AssertionError(f"the layout must use every tensor once: {different or 'some are used twice'}")


def unknown_tensors(entries_: list[Entry], tensors: Mapping[str, Tensor]) -> list[str]:
    """Tensors of the checkpoint that no entry is made of: it holds another model than the configuration says."""
    return sorted(set(tensors) - {source for entry in entries_ for source in entry.sources})
