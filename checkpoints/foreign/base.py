"""What every reader of a foreign checkpoint gives, and how settings of foreign configurations are read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...parallel.errors import PlanError
from ...parallel.model import ModelConfig
from ..errors import CheckpointError
from ..transforms import Source

SUPPORTED = (
    "Mamba2ForCausalLM, NemotronHForCausalLM, GraniteMoeHybridForCausalLM, PolylepisForCausalLM, "
    "state-spaces/mamba2 and Megatron-LM hybrids"
)


@dataclass(frozen=True)
class Foreign:
    """A foreign checkpoint, understood.

    Attributes:
        config: its model in our terms.
        tensors: our logical tensors, read when they are asked for.
        context: its sequence length, as far as it says.
        notes: what is different here from there, one line each.
        origin: what it is, for the manifest.
        vocabulary: ranges of the modalities, where it is an export of ours that has them.
        specials: its ids for padding, begin and end of a document, None where it does not say.
        data: a data set of ours whose vocabulary it has been given.
    """

    config: ModelConfig
    tensors: Source
    context: int
    notes: tuple[str, ...]
    origin: str
    vocabulary: Mapping[str, Any] | None = None
    specials: tuple[int | None, int | None, int | None] = (None, None, None)
    data: str | None = None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: absent, or none.
    """
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: no {path.name} in it") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds no JSON object")
    return value


class Settings:
    """A foreign configuration: values by their several names, and refusals that name the setting.

    Args:
        where: for messages.
        values: the configuration.
    """

    def __init__(self, where: object, values: Mapping[str, Any]) -> None:
        self.where, self.values = where, values

    def get(self, *names: str, default: Any = None) -> Any:
        """The first of `names` that is set."""
        return next((self.values[name] for name in names if self.values.get(name) is not None), default)

    def need(self, *names: str) -> Any:
        """The same.

        Raises:
            CheckpointError: none is.
        """
        value = self.get(*names)
        if value is None:
            raise CheckpointError(f"{self.where}: no {' or '.join(names)} in it, which the model needs")
        return value

    def refuse(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {reason}; our layers cannot express that (imported are {SUPPORTED})")

    def only(self, name: str, *accepted: Any) -> None:
        """Refuse a setting that is there and none of `accepted`.

        Raises:
            CheckpointError: names the setting.
        """
        value = self.values.get(name)
        if value is not None and value not in accepted:
            raise self.refuse(f"{name} is {value!r}")


def vocab_multiple(size: int) -> int:
    """The largest power of two up to 1024 that divides `size`: the embedding then has exactly that many rows."""
    multiple = 1024
    while size % multiple:
        multiple //= 2
    return multiple


def inner_width(settings: Settings, d_model: int, inner: int) -> dict[str, Any]:
    """`expand` where the inner width is a multiple of the model's, `width` otherwise."""
    return {"expand": inner // d_model} if inner % d_model == 0 else {"expand": 1, "width": inner}


def checked(settings: Settings, config: ModelConfig) -> ModelConfig:
    """A configuration that can be built.

    Raises:
        CheckpointError: sizes that do not divide.
    """
    try:
        config.check(1)
    except PlanError as error:
        raise CheckpointError(f"{settings.where}: {error}") from error
    return config
