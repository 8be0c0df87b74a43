"""FLOPs of a step from the layer-kind registry: what was useful, and what was done."""

from __future__ import annotations

from dataclasses import dataclass

from ...parallel.kinds.base import Load
from ...parallel.model import ModelConfig, flops_per_token
from ...parallel.recompute import RecomputeConfig

TRAINING = 3  # a forward, and a backward of twice its products


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one step over all ranks.

    Attributes:
        useful: of real tokens, attention within their documents, nothing repeated: the numerator of MFU.
        done: padding computed like tokens, and what recompute repeats: the numerator of HFU.
    """

    useful: float
    done: float


def step_flops(
    config: ModelConfig, recompute: RecomputeConfig, tokens: int, row_tokens: int, attended: int, load: Load
) -> StepFlops:
    """FLOPs of a step.

    Args:
        tokens: real ones.
        row_tokens: padding included.
        attended: Σ n(n+1)/2 over the documents (`Step.attended`).
        load: item size and kernels of the run; its other fields are not read.
    """
    mean_keys = attended / max(1, tokens)
    forward = flops_per_token(config, mean_keys)
    whole = Load(row_tokens, mean_keys, itemsize=load.itemsize, kernels=load.kernels)
    again = repeated(config, recompute, whole)
    return StepFlops(TRAINING * forward * tokens, TRAINING * forward * row_tokens + again)


def repeated(config: ModelConfig, recompute: RecomputeConfig, load: Load) -> float:
    """FLOPs that the backward computes a second time, with what the planner's cost model says is kept."""
    total = 0.0
    for index in range(len(config.symbols)):
        kind, layer = config.layer(index)
        choice = getattr(recompute, kind.section)
        if choice == "none":
            continue
        work = kind.work(layer, config.shape, load)
        if choice == "full":
            total += work.forward - work.last
        else:  # a kept element of a product stands for one dot product over the width
            kept = 2 * config.d_model * kind.kept(layer, config.shape, load) / load.itemsize
            total += max(0.0, work.weights - work.last - kept)
    return total
