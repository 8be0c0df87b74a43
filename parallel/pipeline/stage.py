"""A pipeline stage as the model sees it, and which stages lie on which rank."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """A run of layers: the first stage also embeds tokens, the last also normalises, projects and compares.

    Attributes:
        index, count: of this stage, of all stages.
        first, stop: its layers are `first` … `stop − 1`, counted over the whole model.
    """

    index: int
    count: int
    first: int
    stop: int

    @property
    def layers(self) -> range:
        return range(self.first, self.stop)

    @property
    def embeds(self) -> bool:
        return self.index == 0

    @property
    def predicts(self) -> bool:
        return self.index == self.count - 1


def whole_model(n_layers: int) -> Stage:
    """The only stage of a model that is not cut."""
    return Stage(0, 1, 0, n_layers)


def stage_indices(pp_rank: int, pp_size: int, chunks: int, v_shaped: bool) -> tuple[int, ...]:
    """The stages of one rank, ascending.

    Args:
        v_shaped: ZBV and DualPipeV fold the stack: rank r holds stages r and 2·pp − 1 − r, so the last stage meets the
            first on rank 0. Otherwise stages go round the ranks.
    """
    if v_shaped:
        return (pp_rank, chunks * pp_size - 1 - pp_rank)
    return tuple(pp_rank + chunk * pp_size for chunk in range(chunks))
