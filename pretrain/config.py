"""The configuration of a run: composed from the rooms' dataclasses, read from YAML, validated strictly."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pydantic
import torch
import yaml

from ..checkpoints.rules import KeepRules
from ..data.stream import StreamConfig
from ..parallel.engines.deepspeed import DeepSpeedConfig
from ..parallel.mesh import ContextConfig, MeshConfig
from ..parallel.model import ModelConfig
from ..parallel.pipeline.config import PipelineConfig
from ..parallel.recompute import RecomputeConfig
from .errors import ConfigError
from .health.config import HealthConfig
from .optim import OptimConfig

SCHEMA = 1
RECIPES = Path(__file__).parent / "recipes"
CONFIG_FILE = "config.yaml"


@dataclass(frozen=True)
class TrainConfig:
    """The loop.

    Attributes:
        steps: optimizer steps in all.
        precision: of forward and backward; parameters, reductions and optimizer state are float32 always.
        checkpoint_every: steps between checkpoints (0: only at the end); the last step always makes one.
        keep: how many checkpoints to keep (0: all).
        keep_every: checkpoints at multiples of this many steps are kept for ever (0: none).
        async_checkpoint: write checkpoints in the background, from a copy of the state in host memory; a step waits
            only for the copy.
        local_folder: a folder on a fast disk of each machine; there every rank also keeps its own part of the newest
            states, every `local_every` steps, from which a run on the same mesh resumes when it is newer.
        local_every: steps between them (0: none).
        device: `auto` takes CUDA where there is one.
        timeout: seconds after which a collective that some rank never joined stops the run.
        assign: how the packs of a global batch are dealt out to ranks and micro-batches: in their `order`, or by
            predicted `cost`, so that ranks wait less for each other. The batch is the same.
        loads: a run folder or checkpoint whose measured expert loads predictions start from; empty takes even ones.
        placement: which experts lie on which expert-parallel rank: `dealt` out in runs, or by `load`, after every
            `checkpoint_every` steps anew.
        overlap_dispatch: two micro-batches pass the model at once; while rows of one travel to their experts, layers of
            the other compute. Their activations live at the same time.
    """

    steps: int = 1000
    precision: Literal["float32", "bfloat16"] = "float32"
    checkpoint_every: int = 1000
    keep: int = 2
    keep_every: int = 0
    async_checkpoint: bool = True
    local_folder: str = ""
    local_every: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    timeout: float = 600.0
    assign: Literal["order", "cost"] = "order"
    loads: str = ""
    placement: Literal["dealt", "load"] = "dealt"
    overlap_dispatch: bool = False

    __pydantic_config__ = {"extra": "forbid"}

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of forward and backward."""
        return torch.bfloat16 if self.precision == "bfloat16" else torch.float32

    def places_after(self, step: int) -> bool:
        """Whether experts are placed anew after this many steps."""
        return self.placement == "load" and step % self.checkpoint_every == 0

    def keep_rules(self) -> KeepRules:
        """What of it the checkpoints room wants to know.

        Raises:
            CheckpointError: values that cannot be.
        """
        return KeepRules(
            self.checkpoint_every,
            self.keep,
            self.keep_every,
            self.async_checkpoint,
            self.local_folder,
            self.local_every,
        )


@dataclass(frozen=True)
class TrackingConfig:
    """Where metrics go, besides `metrics.jsonl` in the run folder.

    Attributes:
        wandb: `auto` is online where a key is configured and offline otherwise; `disabled` does not load it.
        project: the wandb project.
        tensorboard: also write TensorBoard's event files (extra `tensorboard`).
        peak_tflops: peak of one device for MFU, TFLOP/s; 0 takes the data sheet's for a GPU that is known.
    """

    wandb: Literal["auto", "offline", "online", "disabled"] = "auto"
    project: str = "polylepis"
    tensorboard: bool = False
    peak_tflops: float = 0.0

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True)
class RunConfig:
    """Everything that a run depends on.

    Attributes:
        name, folder: of the run; the folder receives configuration, metrics, checkpoints and pictures.
        seed: of the initial weights (the data has its own).
        engine: what shards over the data-parallel ranks; `deepspeed` takes its own section.
    """

    name: str
    folder: str
    model: ModelConfig
    data: StreamConfig
    seed: int = 0
    mesh: MeshConfig = field(default_factory=MeshConfig)
    context: ContextConfig = field(default_factory=ContextConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    engine: Literal["fsdp2", "deepspeed"] = "fsdp2"
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    health: HealthConfig = field(default_factory=HealthConfig)

    __pydantic_config__ = {"extra": "forbid"}

    @property
    def path(self) -> Path:
        return Path(self.folder)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes 1e-3 for a word, because it has no point; people who write it mean the number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(text: str) -> Any:
    """Plain values of a YAML text, numbers as everyone writes them."""
    return yaml.load(text, _Loader)


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def find_config(name: str) -> Path:
    """A recipe's name, a YAML file or a run folder → the file to read.

    Raises:
        ConfigError: none of the three; names the nearest recipe.
    """
    path = Path(name)
    if path.is_dir() and (path / CONFIG_FILE).is_file():
        return path / CONFIG_FILE
    if path.is_file():
        return path
    if (RECIPES / f"{name}.yaml").is_file():
        return RECIPES / f"{name}.yaml"
    near = difflib.get_close_matches(name, recipe_names(), n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(f"{name}: no such recipe, file or run folder; {hint}recipes: {', '.join(recipe_names())}")


def load_config(name: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read, override (`section.key=value`, values in YAML) and validate.

    `gpus=N` among the overrides takes the plan for N GPUs that the file carries (`plans: {N: {mesh: …}}`): its values
    replace the file's, and other overrides go on top.

    Raises:
        ConfigError: unknown or ill-typed key: one line naming the key, the nearest valid one and where it came from.
    """
    file = find_config(name)
    try:
        values = read_yaml(file.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: expected a mapping of sections, found {type(values).__name__}")
    schema = values.pop("schema", SCHEMA)
    if schema != SCHEMA:
        raise ConfigError(f"{file}: schema {schema}, but this version reads schema {SCHEMA}")
    plans = _plans(values.pop("plans", None), str(file))
    wanted = [text for text in overrides if text.startswith("gpus=")]
    for text in wanted:
        _take_plan(values, plans, text, str(file))
    given = [_override(values, text) for text in overrides if text not in wanted]
    return validate(values, str(file), given)


def plan_sizes(name: str) -> list[int]:
    """For how many GPUs a recipe or file carries plans."""
    file = find_config(name)
    values = yaml.safe_load(file.read_text())
    return sorted(_plans(values.get("plans") if isinstance(values, dict) else None, str(file)))


def _plans(values: Any, source: str) -> dict[int, dict[str, Any]]:
    if values is None:
        return {}
    fits = isinstance(values, dict) and all(isinstance(k, int) and isinstance(v, dict) for k, v in values.items())
    if not fits:
        raise ConfigError(f"plans: expected a number of GPUs → sections, such as 8: {{mesh: {{tp: 4}}}} ({source})")
    return values


def _take_plan(values: dict[str, Any], plans: dict[int, dict[str, Any]], text: str, source: str) -> None:
    """Lay the plan for `gpus=N` over the file's values, section by section."""
    number = text.removeprefix("gpus=")
    if not number.isdecimal() or int(number) not in plans:
        sizes = ", ".join(map(str, sorted(plans))) or "none"
        raise ConfigError(
            f"{text}: {source} carries plans for these numbers of GPUs: {sizes}; `polylepis plan` looks for another"
        )
    for section, entries in plans[int(number)].items():
        both = isinstance(values.get(section), dict) and isinstance(entries, dict)
        values[section] = {**values[section], **entries} if both else entries


def _override(values: dict[str, Any], text: str) -> tuple[str, ...]:
    key, separator, raw = text.partition("=")
    if not separator or not key:
        raise ConfigError(f"{text}: an override is written section.key=value, for example train.steps=100")
    path = tuple(key.split("."))
    node = values
    for step in path[:-1]:
        node = node.setdefault(step, {})
        if not isinstance(node, dict):
            raise ConfigError(f"{text}: {step} is a value, not a section")
    try:
        node[path[-1]] = read_yaml(raw)
    except yaml.YAMLError:
        raise ConfigError(f"{text}: {raw!r} is not a YAML value") from None
    return path


def validate(values: dict[str, Any], source: str, overridden: Sequence[tuple[str, ...]] = ()) -> RunConfig:
    """Plain values → RunConfig, strictly: no unknown keys, no silent conversions.

    Raises:
        ConfigError: see `load_config`.
    """
    try:
        # JSON mode: strict, yet lists are accepted for tuples and strings for integer keys, as YAML writes them.
        return pydantic.TypeAdapter(RunConfig).validate_json(json.dumps(values), strict=True)
    except pydantic.ValidationError as error:
        # A misspelt key also leaves its required namesake missing; the misspelling is what the user wants to hear of.
        first = min(error.errors(), key=lambda e: e["type"] != "unexpected_keyword_argument")
    except TypeError as error:
        raise ConfigError(f"{source}: {error}") from None
    location = tuple(str(part) for part in first["loc"])
    given = any(location[: len(path)] == path for path in overridden)
    where = "command line" if given else source
    raise ConfigError(f"{'.'.join(location)}: {_explain(location, first)} ({where})")


def _explain(location: tuple[str, ...], error: Any) -> str:
    if error["type"] == "unexpected_keyword_argument":
        known = [f.name for f in dataclasses.fields(_section(location[:-1]))]
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        return f"unknown key; nearest is {near[0]}" if near else f"unknown key; accepted: {', '.join(known)}"
    if error["type"] in ("missing", "missing_argument"):
        return "is required"
    return f"{error['msg'][0].lower()}{error['msg'][1:]}, not {error['input']!r}"


def _section(path: tuple[str, ...]) -> Any:
    """The dataclass at a path of sections; names and numbers of entries in mappings and lists lead to the entry."""
    node: Any = RunConfig
    for step in path:
        entries = typing.get_args(node)
        if typing.get_origin(node) is dict:
            node = entries[1]
        elif typing.get_origin(node) in (tuple, list):
            node = entries[0]
        else:
            node = typing.get_type_hints(node)[step]
    return node


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration, readable by `load_config` again."""
    return yaml.safe_dump({"schema": SCHEMA, **json.loads(json.dumps(dataclasses.asdict(config)))}, sort_keys=False)


def differing_keys(old: RunConfig, new: RunConfig) -> list[str]:
    """Dotted keys in which two configurations differ, `old → new` values included."""

    def walk(a: Any, b: Any, path: str) -> list[str]:
        if isinstance(a, dict) and isinstance(b, dict):
            keys = sorted(a.keys() | b.keys(), key=str)
            return [line for k in keys for line in walk(a.get(k), b.get(k), f"{path}.{k}" if path else str(k))]
        return [] if a == b else [f"{path}: {a!r} → {b!r}"]

    return walk(dataclasses.asdict(old), dataclasses.asdict(new), "")
