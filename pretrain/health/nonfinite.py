"""Who made a number that is not finite. Runs only after the gradient norm has shown that there is one.

Reductions spread a NaN over the ranks, so its origin is not where it is found. The step is run once more, with hooks:
each rank then reports the first of its own layers whose output, or gradient, was not finite while its input was.
A value that does not come back was not computed from the data: suspect the hardware.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ...parallel.engines.base import Batch, Engine
from ...parallel.parts import Part, named_parts


@dataclass(frozen=True)
class Finding:
    """What one rank knows.

    Attributes:
        rank: of it.
        loss: whether its own loss was not finite.
        parameters: whose gradient shards on this rank were not finite, at most ten.
        n_parameters: how many in all.
        again: whether the norm was not finite the second time.
        forward, backward: the first layer whose output or output's gradient was not finite the second time, if any.
    """

    rank: int
    loss: bool
    parameters: list[str] = field(default_factory=list)
    n_parameters: int = 0
    again: bool = False
    forward: str = ""
    backward: str = ""

    @property
    def origin(self) -> str:
        """The layer where it began on this rank, empty if it only arrived here."""
        return self.forward or self.backward


def local_gradients(engine: Engine) -> Iterator[tuple[str, Part, Tensor]]:
    """What this rank holds of every gradient; a flat stretch of it where ZeRO has cut the parameter anywhere."""
    optimizer = engine.optimizer
    kept = {} if isinstance(optimizer, torch.optim.Optimizer) else {id(p): piece for p, _, piece in optimizer.pieces()}
    for model in engine.models:
        for name, parameter, part in named_parts(model):
            grad = kept.get(id(parameter), parameter.grad)
            if grad is not None and grad.numel():
                yield name, part, grad.to_local() if isinstance(grad, DTensor) else grad


def bad_parameters(engine: Engine) -> list[str]:
    """Parameters whose gradient is not finite in what this rank holds of it."""
    found = []
    for name, part, grad in local_gradients(engine):
        if bool(torch.isfinite(grad).all()):
            continue
        if part.entries and grad.dim() == len(part.shape) + 1:
            names = part.own_entries(name, engine.mesh)
            found += [key for key, entry in zip(names, grad, strict=True) if not torch.isfinite(entry).all()]
        else:
            found.append(name)
    return found


class _Witness:
    """Hooks on every layer of this rank: remembers the first output, and the first gradient, that is not finite."""

    def __init__(self, models: Iterable[nn.Module]) -> None:
        self.forward, self.backward = "", ""
        self._handles = []
        for model in models:
            layers = {f"layers.{index}": block for index, block in model.get_submodule("layers").named_children()}
            for name, block in layers.items():
                self._handles.append(block.register_forward_hook(self._watch(name)))

    def _watch(self, name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            if not isinstance(output, Tensor):
                return
            arrived = any(isinstance(a, Tensor) and not _finite(a) for a in arguments)
            if not self.forward and not arrived and not _finite(output):
                self.forward = name
            if output.requires_grad and _finite(output):
                output.register_hook(lambda gradient: self._gradient(name, gradient))

        return hook

    def _gradient(self, name: str, gradient: Tensor) -> None:
        if not self.backward and not _finite(gradient):
            self.backward = name  # the gradient that enters this layer from behind: the one after it, or the loss

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def _finite(value: Tensor) -> bool:
    return not value.is_floating_point() or bool(torch.isfinite(value).all())


def blame(
    engine: Engine, batches: Sequence[Batch], total_weight: float, own_sums: Tensor, bad: Sequence[str]
) -> list[Finding]:
    """Every rank's finding, in rank order. All ranks call it; gradients are discarded.

    Args:
        own_sums: what `engine.accumulate` returned on this rank, before it was reduced.
        bad: `bad_parameters` of this rank.
    """
    loss = not _finite(own_sums)
    engine.discard()
    witness = _Witness(engine.models)
    try:
        engine.accumulate(batches, total_weight)
        norm = engine.gradient_norm()
    finally:
        witness.close()
        engine.discard()
    again = norm != norm or norm in (float("inf"), float("-inf"))
    mine = Finding(dist.get_rank(), loss, list(bad[:10]), len(bad), again, witness.forward, witness.backward)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, asdict(mine))
    return [Finding(**values) for values in everyone]


def earliest(findings: Sequence[Finding]) -> list[Finding]:
    """Those that saw it first: it travels on, to other ranks' layers in a gather and to other stages in a pipeline.

    Forward comes before backward, which runs from the last layer to the first.
    """

    def layer(place: str) -> int:
        return int(place.rpartition(".")[2])

    if forward := [f for f in findings if f.forward]:
        return [f for f in forward if layer(f.forward) == min(layer(g.forward) for g in forward)]
    backward = [f for f in findings if f.backward]
    return [f for f in backward if layer(f.backward) == max(layer(g.backward) for g in backward)]


def explain(findings: Sequence[Finding]) -> str:
    """One line: where it began, or where it was found, and whether it came back."""
    origins = earliest(findings) or [f for f in findings if f.loss]
    holders = [f for f in findings if f.n_parameters]
    parts = []
    if origins:
        places = [f"rank {f.rank}{f' in {f.origin}' if f.origin else ''}" for f in origins[:8]]
        parts.append(f"began on {', '.join(places)}")
    if holders:
        first = holders[0]
        more = f" and {first.n_parameters - 1} more" if first.n_parameters > 1 else ""
        ranks = ", ".join(str(f.rank) for f in holders[:8])
        parts.append(f"found in the gradient of {first.parameters[0]}{more} on rank {ranks}")
    again = any(f.again for f in findings)
    parts.append("it came back when the step was repeated" if again else "it did not come back: suspect the hardware")
    return "; ".join(parts)
