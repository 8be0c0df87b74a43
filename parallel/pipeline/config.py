"""How the stack is cut into pipeline stages and in which order ranks work on them; everything refused beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from ..errors import PlanError
from ..kinds.mamba import MambaConfig
from ..model import ModelConfig
from ..pattern import PIPELINE_CUT
from ..recompute import RecomputeConfig
from .partition import partition
from .stage import Stage, stage_indices

ScheduleName = Literal["gpipe", "1f1b", "interleaved", "zbv", "dualpipev"]
# Stages per rank that each schedule accepts, from and to.
CHUNKS = MappingProxyType({"gpipe": (1, 1), "1f1b": (1, 1), "interleaved": (2, 64), "zbv": (2, 2), "dualpipev": (2, 2)})
V_SHAPED = frozenset({"zbv", "dualpipev"})
# They compute the gradients of inputs first and those of weights later, to fill bubbles.
SPLIT_BACKWARD = V_SHAPED


@dataclass(frozen=True)
class PipelineConfig:
    """The pipeline, for `mesh.pp` > 1.

    Attributes:
        schedule: `1f1b`; `interleaved` (several stages per rank, smaller bubble, more messages); `zbv` and `dualpipev`
            (two stages per rank, folded, the backward split into inputs and weights); `gpipe` (all forwards first).
        chunks: stages per rank; None takes what the schedule needs (1, or 2).
        cuts: the first layer of every stage, 0 first; empty takes the `|` of the pattern, or, where there is none, the
            cut whose dearest stage is cheapest.
    """

    schedule: ScheduleName = "1f1b"
    chunks: int | None = None
    cuts: tuple[int, ...] = ()

    __pydantic_config__ = {"extra": "forbid"}

    @property
    def chunks_per_rank(self) -> int:
        """Stages per rank.

        Raises:
            PlanError: an unknown schedule, or a number that it cannot work with.
        """
        if self.schedule not in CHUNKS:
            raise PlanError(f"pipeline.schedule: {self.schedule!r} is unknown; accepted: {', '.join(CHUNKS)}")
        least, most = CHUNKS[self.schedule]
        chunks = least if self.chunks is None else self.chunks
        if not least <= chunks <= most:
            wanted = f"{least}" if least == most else f"{least} to {most}"
            raise PlanError(
                f"pipeline.chunks: {chunks}, but {self.schedule} works with {wanted} stages per rank; the nearest is "
                f"{min(max(chunks, least), most)}"
            )
        return chunks

    @property
    def v_shaped(self) -> bool:
        return self.schedule in V_SHAPED

    def of_rank(self, stages: Sequence[Stage], pp_rank: int, pp_size: int) -> tuple[Stage, ...]:
        """Of all stages, those of one rank, ascending."""
        return tuple(stages[i] for i in stage_indices(pp_rank, pp_size, self.chunks_per_rank, self.v_shaped))

    def check_micro_batches(self, count: int, pp: int) -> None:
        """Refuse a step with too few micro-batches for the schedule, or a number that it cannot divide into rounds.

        Args:
            count: micro-batches of one rank in one step.

        Raises:
            PlanError: with the numbers and the nearest that works.
        """
        least = {"gpipe": 1, "1f1b": pp, "interleaved": pp, "zbv": 2 * pp - 1, "dualpipev": 2 * pp}[self.schedule]
        if count < least:
            raise PlanError(
                f"pipeline: {count} micro-batches per rank and step, but {self.schedule} over pp {pp} needs at least "
                f"{least}; raise data.global_batch, or lower data.micro_batch or a data-parallel axis"
            )
        if self.schedule == "interleaved" and count % (count // pp):
            fitting = [n for n in range(pp, 2 * count + 1) if n % (n // pp) == 0]
            raise PlanError(
                f"pipeline: {count} micro-batches per rank and step cannot be divided into {count // pp} rounds of "
                f"interleaved over pp {pp}; the nearest is {min(fitting, key=lambda n: abs(n - count))}"
            )


def cut_stages(model: ModelConfig, pipeline: PipelineConfig, pp: int, costs: Sequence[float]) -> tuple[Stage, ...]:
    """All stages of the model: by `pipeline.cuts`, else by `|` in the pattern, else by cost.

    Args:
        costs: of each layer, in any unit.

    Raises:
        PlanError: a stage without layers, or another number of stages than pp × chunks.
    """
    count, n = pp * pipeline.chunks_per_rank, len(model.symbols)
    wanted = f"pp {pp} × {pipeline.chunks_per_rank} stages per rank ({pipeline.schedule}) = {count}"
    if count > n:
        raise PlanError(
            f"pipeline: {wanted} stages, but the pattern has only {n} layers and no stage may be empty; choose mesh.pp "
            f"at most {n // pipeline.chunks_per_rank}"
        )
    if pipeline.cuts:
        firsts = tuple(pipeline.cuts)
        if firsts[0] != 0 or firsts[-1] >= n or any(b <= a for a, b in zip(firsts, firsts[1:], strict=False)):
            raise PlanError(
                f"pipeline.cuts: {list(firsts)} must start with 0 and ascend below {n} (the number of layers): each "
                f"number is the first layer of a stage, and no stage may be empty"
            )
        if len(firsts) != count:
            raise PlanError(f"pipeline.cuts: names {len(firsts)} stages, but {wanted}")
    elif PIPELINE_CUT in model.pattern:
        parts = model.pattern.split(PIPELINE_CUT)
        if "" in parts:
            raise PlanError(f"model.pattern: {model.pattern!r} cuts off a stage without layers; remove that |")
        if len(parts) != count:
            raise PlanError(
                f"model.pattern: {len(parts) - 1} cuts | make {len(parts)} stages, but {wanted}; write {count - 1} "
                f"cuts, or none to cut by cost"
            )
        firsts = tuple(sum(map(len, parts[:i])) for i in range(count))
    else:
        firsts = partition(costs, count)
    return tuple(
        Stage(index, count, first, stop)
        for index, (first, stop) in enumerate(zip(firsts, (*firsts[1:], n), strict=True))
    )


def check_split_backward(model: ModelConfig, pipeline: PipelineConfig, recompute: RecomputeConfig) -> None:
    """Refuse a schedule that splits the backward where that repeats matrix products or collectives.

    What splits is what PyTorch differentiates operator by operator. A routed product is one operator for inputs and
    weights, so both halves would run all of it; a recomputed layer would be recomputed in both.
    (`tests/parallel/test_honest.py` counts products and collectives.)

    Raises:
        PlanError: names the layer and its kind.
    """
    if pipeline.schedule not in SPLIT_BACKWARD:
        return
    others = ", ".join(name for name in CHUNKS if name not in SPLIT_BACKWARD)
    for index in range(len(model.symbols)):
        kind, layer = model.layer(index)
        routed = sorted(set(layer.routed) - {"dt_bias"}) if isinstance(layer, MambaConfig) else []
        why = ""
        if kind.section == "moe" or routed:
            why = f"its {'experts' if not routed else 'routed ' + ', '.join(routed)} would be multiplied twice"
        elif getattr(recompute, kind.section) != "none":
            why = f"recompute.{kind.section}: {getattr(recompute, kind.section)} would recompute it twice"
        if why:
            raise PlanError(
                f"pipeline.schedule: {pipeline.schedule} computes gradients of inputs and of weights apart, but layer "
                f"{index} is {kind.title}: {why}; accepted here: {others}"
            )
