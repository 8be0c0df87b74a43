"""When a run saves, what it keeps, and how it calls what is not the model's."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import CheckpointError

OPTIMIZER = "optimizer."  # the prefix of all that belongs to the optimizer
RANDOM = "random."  # and of the random states, one tensor per rank


def is_of_model(name: str) -> bool:
    """Whether a tensor of a checkpoint belongs to the model itself."""
    return not name.startswith((OPTIMIZER, RANDOM))


@dataclass(frozen=True)
class KeepRules:
    """When to save and what to keep.

    Attributes:
        every: steps between durable checkpoints, 0 for none but the last.
        keep: how many of them stay, 0 for all.
        keep_every: those at multiples of this many steps stay for ever, 0 for none.
        asynchronous: write in the background, from a copy in host memory (weights and both moments once more).
        local_folder: the node-local tier's folder, "" for no such tier.
        local_every: steps between its saves.

    Raises:
        CheckpointError: a negative number, or a local folder without local_every or the other way round.
    """

    every: int = 0
    keep: int = 2
    keep_every: int = 0
    asynchronous: bool = True
    local_folder: str = ""
    local_every: int = 0

    def __post_init__(self) -> None:
        for name in ("every", "keep", "keep_every", "local_every"):
            if getattr(self, name) < 0:
                raise CheckpointError(f"checkpoints: {name} must not be negative, got {getattr(self, name)}")
        if bool(self.local_folder) != bool(self.local_every):
            raise CheckpointError(
                f"checkpoints: the local tier needs both local_folder and local_every ≥ 1, got "
                f"{self.local_folder!r} and {self.local_every}"
            )
