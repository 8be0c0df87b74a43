"""What each pack of a global batch is predicted to cost, and the packs dealt out by it (`train.assign: cost`).

A pack is a row of fixed length, so most of its cost is the same for all. What differs: the keys that its tokens attend
to (long documents), how many modality banks its routed projections sort for, and, where a run's expert loads are
known, how much its modalities send to the busiest expert-parallel rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ...data.deal import Deal, Dealt, PackFacts
from ...parallel.pipeline.cost import Roofline, Setting, layer_seconds
from ...parallel.pipeline.deal import deal, imbalance
from ...parallel.pipeline.devices import DEVICES
from ..config import RunConfig
from .estimate import setting_of
from .loads import Loads, modality_pressure, read_loads

KEYS = 4096.0  # attention's work is linear in the mean number of keys; any two of them give the line


@dataclass(frozen=True)
class PackCosts:
    """Predicted seconds of a pack: `rest[banks] + keys · per_key + share of modalities · experts`.

    Attributes:
        seq_len: tokens of a row.
        rest: by number of modality banks that have tokens (from 1), without attention's products and routed experts.
        per_key: for each key that a token attends to on average.
        experts: of the routed experts, if all tokens were of a modality.
    """

    seq_len: int
    rest: tuple[float, ...]
    per_key: float
    experts: tuple[float, ...]

    def seconds(self, pack: PackFacts) -> float:
        """Forward and backward through all layers, communication included."""
        keys = float((pack.lengths * (pack.lengths + 1)).sum()) / 2 / self.seq_len
        tokens = pack.modalities.astype(np.float64)
        tokens[0] += self.seq_len - tokens.sum()  # padding passes as the first modality
        banks = max(1, int((tokens > 0).sum()))
        routed = float(tokens @ np.array(self.experts)) / self.seq_len
        return self.rest[banks - 1] + keys * self.per_key + routed


def pack_costs(config: RunConfig, loads: Loads | None = None) -> PackCosts:
    """Costs on an H100 by its roofline, whatever the run's device: the same order wherever a run goes on.

    Args:
        config: its mesh resolved.
        loads: expert loads of a run; None takes even ones.
    """
    model, timing = config.model, Roofline(DEVICES["h100"])
    plain = replace(setting_of(config, timing), tokens=config.data.seq_len, busiest={})

    def total(setting: Setting) -> float:
        return sum(layer_seconds(model, setting, timing))

    def at(banks: int, keys: float = 0.5, busy: float = 0.0) -> float:
        everywhere = dict.fromkeys(range(len(model.symbols)), busy)
        return total(replace(plain, modalities=banks, mean_keys=keys, busiest=everywhere))

    per_key = (at(1, KEYS) - at(1)) / (KEYS - 0.5)
    pressure = modality_pressure(loads, config.mesh, config.train.placement == "load") if loads else {}
    slopes = np.zeros(len(model.modalities))
    nothing = dict.fromkeys(range(len(model.symbols)), 0.0)
    for index, symbol in enumerate(model.symbols):
        if symbol == "E":
            one = total(replace(plain, modalities=1, mean_keys=0.5, busiest=nothing | {index: 1.0})) - at(1)
            slopes += one * np.array(pressure.get(index, [1.0] * len(slopes)))
    rest = tuple(at(banks) - 0.5 * per_key for banks in range(1, len(model.modalities) + 1))
    return PackCosts(config.data.seq_len, rest, per_key, tuple(slopes.tolist()))


def lockstep(config: RunConfig) -> bool:
    """Whether data-parallel ranks wait for each other in every micro-batch: stages of a pipeline keep their parameters
    gathered and meet at the end of the step, but not where they share experts."""
    return config.mesh.pp == 1 or config.mesh.ep > 1


@dataclass(frozen=True)
class CostDeal:
    """A `Deal` by predicted cost.

    Attributes:
        costs: of packs.
        dp_size, micro_batch, lockstep: see `parallel.pipeline.deal.deal`.
    """

    costs: PackCosts
    dp_size: int
    micro_batch: int
    lockstep: bool

    def __call__(self, packs: Sequence[PackFacts]) -> Dealt:
        costs = [self.costs.seconds(pack) for pack in packs]
        options = (self.dp_size, self.micro_batch, self.lockstep)
        order = deal(costs, *options)
        before, after = imbalance(costs, range(len(costs)), *options), imbalance(costs, order, *options)
        return Dealt(order, {"imbalance_before": round(before, 5), "imbalance_after": round(after, 5)})


def run_deal(config: RunConfig, world_size: int) -> Deal | None:
    """What deals out the packs of a run; None leaves them in their order.

    Raises:
        ConfigError: `train.loads` that cannot be read.
    """
    if config.train.assign == "order":
        return None
    loads = read_loads(Path(config.train.loads), config.model) if config.train.loads else None
    mesh = config.mesh.resolve(world_size)
    config = replace(config, mesh=mesh)
    dp_size = mesh.dp_replicate * mesh.dp_shard
    return CostDeal(pack_costs(config, loads), dp_size, config.data.micro_batch, lockstep(config))
