"""What a user asks of machines, checked against the plan before any script is written."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..data.mock import MockDataset
from ..data.stream import Stream
from ..pretrain.config import RunConfig
from ..pretrain.errors import ConfigError
from ..pretrain.prepare import check_all, check_folder, check_run
from .errors import LaunchError

TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?")
TIME_FORMS = "minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes[:seconds]"


@dataclass(frozen=True)
class Container:
    """An image for SLURM's container plug-in (pyxis).

    Attributes:
        image: a file, or a registry reference as enroot writes it.
        mounts: SOURCE:TARGET[:FLAGS] each; the folder of submission is mounted in any case.
        flags: further options of srun, one each.
    """

    image: str
    mounts: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()

    @property
    def is_file(self) -> bool:
        return "://" not in self.image and "#" not in self.image and (self.image[0] in "/.~" or "." in self.image)

    def check(self) -> None:
        """Refuse an image or a mount that is not there; a registry is not asked."""
        if self.is_file and not Path(self.image).expanduser().is_file():
            raise LaunchError(f"--container {self.image}: no such file; accepted: an image file or docker://…")
        for mount in self.mounts:
            source, separator, target = mount.partition(":")
            if not separator or not target.startswith("/"):
                raise LaunchError(f"--container-mount {mount}: is written SOURCE:TARGET, TARGET absolute")
            if not Path(source).expanduser().exists():
                raise LaunchError(f"--container-mount {mount}: {source} does not exist here")


@dataclass(frozen=True)
class Request:
    """How many machines, for how long, and what else the script carries.

    Attributes:
        nodes: least and most; equal except for elastic runs under bare torchrun.
        procs: worker processes per node.
        gpus: GPUs per node; 0 on CPU nodes.
        cpus: cores per node given to the workers; 0 takes all of an exclusive node.
        time: SLURM's format; "" leaves it to the partition.
        partition, account: SLURM's; "" leaves them to the cluster.
        exclusive: take whole nodes.
        grace: seconds before the time limit at which the run is told to save.
        sbatch: further `#SBATCH` options, one each.
        setup: shell lines that run on every node before Python.
        env: exported variables; they win over the template's own.
        max_restarts: how often torchrun restarts failed workers.
        chain: jobs that follow one another.
        doctor: check the nodes before training.
    """

    nodes: tuple[int, int] = (1, 1)
    procs: int = 1
    gpus: int = 0
    cpus: int = 0
    time: str = ""
    partition: str = ""
    account: str = ""
    exclusive: bool = True
    grace: int = 300
    sbatch: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    container: Container | None = None
    max_restarts: int = 0
    chain: int = 1
    doctor: bool = False

    def check(self, config: RunConfig) -> None:
        """Refuse what no cluster could run.

        Raises:
            LaunchError, PlanError, ConfigError, DataError: one line each.
        """
        least, most = self.nodes
        if not 1 <= least <= most:
            raise LaunchError(f"--nodes {least}:{most}: need 1 ≤ MIN ≤ MAX")
        least_values = {"procs_per_node": (self.procs, 1), "chain": (self.chain, 1), "grace": (self.grace, 1),
                        "gpus_per_node": (self.gpus, 0), "cpus_per_node": (self.cpus, 0),
                        "max_restarts": (self.max_restarts, 0)}  # fmt: skip
        for name, (value, minimum) in least_values.items():
            if value < minimum:
                raise LaunchError(f"--{name.replace('_', '-')} {value}: must be at least {minimum}")
        if config.train.device == "cuda" and self.gpus != self.procs:
            raise LaunchError(
                f"train.device is cuda: one process drives one GPU, but {self.procs} processes and {self.gpus} GPUs "
                f"per node were asked for"
            )
        if self.cpus and self.cpus < self.procs:
            raise LaunchError(f"--cpus-per-node {self.cpus}: fewer than the {self.procs} processes of a node")
        limit = parse_time(self.time) if self.time else None
        if limit is not None and limit <= self.grace:
            raise LaunchError(
                f"--time {self.time}: {limit} s, but the run is told to save {self.grace} s before the end (--grace)"
            )
        for name in self.env:
            if not re.fullmatch(r"[A-Za-z_]\w*", name):
                raise LaunchError(f"--env {name}=…: is no name of a variable")
        for line in (*self.sbatch, *self.env.values()):
            if "\n" in line:
                raise LaunchError(f"{line.splitlines()[0]} …: one line each")

    def check_plan(self, config: RunConfig, elsewhere: bool) -> None:
        """Refuse a plan that does not fit the machines; an elastic request must fit every number of nodes.

        Args:
            elsewhere: data and container belong to another machine, where alone they can be looked at.
        """
        if self.nodes[0] != self.nodes[1] and config.mesh.dp_shard != -1:
            raise LaunchError(
                f"--nodes {self.nodes[0]}:{self.nodes[1]}: a run whose number of nodes may change needs "
                f"mesh.dp_shard=-1, which takes what is there; it is {config.mesh.dp_shard}"
            )
        if self.container is not None and not elsewhere:
            self.container.check()
        for nodes in range(self.nodes[0], self.nodes[1] + 1):
            world = nodes * self.procs
            try:
                _check(config, world, elsewhere)
            except ValueError as error:
                if getattr(error, "exit_code", None) is None:
                    raise
                raise type(error)(f"{nodes} node(s) × {self.procs} processes: {error}") from None


def _check(config: RunConfig, world: int, elsewhere: bool) -> None:
    if not elsewhere:
        check_all(config, world)
        return
    check_run(config, world)
    mesh = config.mesh.resolve(world)
    if not config.data.sources:  # the batch must divide, whatever the data
        mock = MockDataset(config.model.modalities, config.model.vocab_size, config.data.seq_len)
        Stream(mock, config.data, dp_rank=0, dp_size=mesh.dp_replicate * mesh.dp_shard)
    check_folder(config)


def parse_time(text: str) -> int:
    """A time limit in SLURM's format, in seconds.

    Raises:
        LaunchError: not one of SLURM's six forms.
    """
    match = TIME.fullmatch(text)
    if match is None or (match["days"] is None and match["third"] is None and ":" in text and text.count(":") > 1):
        raise LaunchError(f"--time {text}: is no time limit; accepted: {TIME_FORMS}, for example 2-00:00:00")
    days = int(match["days"] or 0)
    first, second, third = (int(match[name] or 0) for name in ("first", "second", "third"))
    if match["days"] is not None:
        seconds = days * 86400 + first * 3600 + second * 60 + third
    elif match["third"] is not None:
        seconds = first * 3600 + second * 60 + third
    else:
        seconds = first * 60 + second
    if seconds == 0:
        raise LaunchError(f"--time {text}: is no time at all; accepted: {TIME_FORMS}")
    return seconds


def parse_nodes(text: str) -> tuple[int, int]:
    """`4`, or `2:4` for an elastic run."""
    match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    if match is None:
        raise LaunchError(f"--nodes {text}: is written N, or MIN:MAX for an elastic run")
    return int(match[1]), int(match[2] or match[1])


def parse_env(pairs: Sequence[str]) -> dict[str, str]:
    """`KEY=VALUE` each."""
    values = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator:
            raise LaunchError(f"--env {pair}: is written KEY=VALUE")
        values[name] = value
    return values


def parse_sbatch(lines: Sequence[str]) -> tuple[str, ...]:
    """Options with or without `#SBATCH` before them; a value with several lines gives several."""
    found = [line.strip().removeprefix("#SBATCH").strip() for text in lines for line in text.splitlines()]
    for line in filter(None, found):
        if not line.startswith("-"):
            raise LaunchError(f"--sbatch {shlex.quote(line)}: is no option of sbatch; it begins with - or --")
    return tuple(filter(None, found))


def parse_setup(values: Sequence[str]) -> tuple[str, ...]:
    """Shell lines, or files that hold them."""
    lines: list[str] = []
    for value in values:
        is_file = "\n" not in value and Path(value).is_file()
        lines += (Path(value).read_text() if is_file else value).rstrip("\n").splitlines()
    if any(line.strip() == "END_OF_NODE" for line in lines):
        raise LaunchError("--setup: a line END_OF_NODE would end the block it stands in")
    return tuple(lines)


def plan_environment(config: RunConfig, world: int) -> list[tuple[str, str, str]]:
    """Variables that the plan decides: (name, value, why); an empty value leaves the variable alone and says why."""
    mesh = config.mesh.resolve(world)
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    if config.train.device == "cpu":
        return []
    sharded = mesh.dp_shard * mesh.cp > 1
    if mesh.tp > 1 and not sharded:
        why = (
            f"tp {mesh.tp} without sharding: one queue keeps the tensor-parallel collectives in front of the kernels "
            f"that hide them (Hopper and older; later GPUs ignore it)"
        )
        return [(name, "1", why)]
    if mesh.tp > 1:
        why = (
            f"tp {mesh.tp} would like it at 1, but parameters are sharded over dp_shard × cp = "
            f"{mesh.dp_shard * mesh.cp} and one queue would hold FSDP's prefetch back"
        )
    else:
        why = "tp 1: there is no tensor-parallel collective to order, and FSDP wants several queues"
    return [(name, "", why)]


def check_sweep(values: Sequence[str]) -> list[tuple[str, list[str]]]:
    """`section.key=a,b,c` each → (key, values)."""
    found = []
    for text in values:
        key, separator, raw = text.partition("=")
        choices = [choice for choice in raw.split(",") if choice]
        if not separator or len(choices) < 2 or len(set(choices)) < len(choices):
            raise ConfigError(
                f"--sweep {text}: is written section.key=VALUE,VALUE,… with at least two different values"
            )
        found.append((key, choices))
    return found
