"""A plan's prediction: memory of each pipeline rank, and the step's time, taken apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from ...parallel.mesh import MeshConfig
from ...parallel.model import ModelConfig, flops_per_token
from ...parallel.parts import Part
from ...parallel.pipeline.config import check_split_backward, cut_stages
from ...parallel.pipeline.cost import (
    Cost,
    Setting,
    Timing,
    end_cost,
    end_parts,
    layer_costs,
    layer_parts,
    layer_seconds,
    sharded_numel,
)
from ...parallel.pipeline.devices import collective_seconds
from ...parallel.pipeline.lanes import overlapped
from ...parallel.pipeline.schedule import Schedule, build_schedule, peak_in_flight, receive_buffers, stage_rank
from ...parallel.pipeline.simulate import StageTime, Timeline, simulate
from ...parallel.pipeline.stage import Stage, whole_model
from ..config import RunConfig
from ..errors import ConfigError
from ..prepare import stages_of
from .loads import Loads, busiest_ranks

RESERVE = 0.06  # of a GPU's memory: CUDA context, communication buffers, fragmentation. An assumption.
METADATA = 72  # bytes per token of a prepared micro-batch: tokens, labels, weights, modalities, routes, positions


@dataclass(frozen=True)
class Memory:
    """Bytes on one pipeline rank (its first FSDP rank, which holds the most).

    Attributes:
        parameters, gradients, optimizer: the sharded float32 masters, their gradients, AdamW's moments.
        gathered: unsharded parameters in the compute dtype: of a whole stage under pp, else of the ends and two layers.
        unsharded_gradients: under pp of the whole stage, float32, all step long; else of the largest module.
        activations: the most that is kept for backward at once.
        received: under pp torch's buffers for what stages receive, one per micro-batch and direction, kept for good.
        workspace: what the dearest backward needs besides.
        reserve: kept free.
    """

    parameters: float
    gradients: float
    optimizer: float
    gathered: float
    unsharded_gradients: float
    activations: float
    received: float
    workspace: float
    reserve: float

    @property
    def total(self) -> float:
        return sum(self.__dict__.values())


@dataclass(frozen=True)
class Estimate:
    """What is predicted of one plan.

    Attributes:
        config: the plan, mesh resolved and cuts explicit.
        stages: of the pipeline.
        memory: of each pipeline rank.
        limit: bytes of one GPU.
        timeline: the simulated step, one row per pipeline rank.
        parts: seconds of the step by cause; they sum to `seconds`.
        tokens: of a step.
        mfu: useful FLOPs (what the mask lets through, nothing repeated) over what all GPUs could do.
    """

    config: RunConfig
    stages: tuple[Stage, ...]
    memory: tuple[Memory, ...]
    limit: float
    timeline: Timeline
    parts: Mapping[str, float]
    tokens: int
    mfu: float

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def peak(self) -> float:
        return max(memory.total for memory in self.memory)

    @property
    def fits(self) -> bool:
        return self.peak <= self.limit


@dataclass(frozen=True)
class Assumptions:
    """What a configuration does not say.

    Attributes:
        document: mean tokens of a document; None takes one document per row.
        loads: by expert layer, choices [modalities, experts] that a run has measured; even without them.
    """

    document: int | None = None
    loads: Loads = field(default_factory=lambda: MappingProxyType({}))


def setting_of(config: RunConfig, timing: Timing, assumptions: Assumptions | None = None) -> Setting:
    """The setting that `config` (mesh resolved) runs in."""
    assumptions = assumptions or Assumptions()
    length = min(config.data.seq_len, assumptions.document or config.data.seq_len)
    return Setting(
        mesh=config.mesh,
        tokens=config.data.micro_batch * config.data.seq_len,
        mean_keys=(length + 1) / 2,
        itemsize=2 if config.train.precision == "bfloat16" else 4,
        kernels="torch" if timing.device.name == "cpu" else "triton",
        context=config.context,
        recompute=config.recompute,
        modalities=len(config.model.modalities),
        busiest=busiest_ranks(assumptions.loads, config.mesh, config.train.placement == "load"),
    )


def micro_batches(config: RunConfig) -> int:
    """Micro-batches per data-parallel rank and step.

    Raises:
        ConfigError: the global batch does not divide.
    """
    mesh, data = config.mesh, config.data
    dp = mesh.dp_replicate * mesh.dp_shard
    at_once = dp * data.micro_batch
    if data.global_batch % at_once:
        raise ConfigError(
            f"data.global_batch: {data.global_batch} rows do not divide over dp {dp} × micro_batch {data.micro_batch}; "
            f"the nearest that does is {at_once * max(1, round(data.global_batch / at_once))}"
        )
    return data.global_batch // at_once


@dataclass(frozen=True)
class Priced:
    """A plan with its costs, before anything is simulated.

    Attributes:
        costs, ends: of each stage its layers', and its ends'.
        memory: of each pipeline rank.
        seconds: of the step without bubble: a lower bound.
    """

    config: RunConfig
    timing: Timing
    setting: Setting
    schedule: Schedule
    stages: tuple[Stage, ...]
    costs: Sequence[Sequence[Cost]]
    ends: Sequence[Cost]
    memory: tuple[Memory, ...]
    limit: float
    parts: Mapping[str, float]

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def peak(self) -> float:
        return max(memory.total for memory in self.memory)

    @property
    def fits(self) -> bool:
        return self.peak <= self.limit

    def simulated(self) -> Estimate:
        """The whole prediction."""
        config, model = self.config, self.config.model
        send = _send(config, self.setting, self.timing)
        operation = self.timing.device.operation if config.mesh.pp > 1 else 0.0
        timeline = simulate(self.schedule, _stage_times(self.costs, self.ends, operation), send)
        parts = {**self.parts, "bubble": timeline.bubble_seconds}
        tokens = config.data.global_batch * config.data.seq_len
        useful = 3 * flops_per_token(model, self.setting.mean_keys) * tokens
        mfu = useful / (sum(parts.values()) * config.mesh.n_processes * self.timing.device.peak)
        return Estimate(config, self.stages, self.memory, self.limit, timeline, parts, tokens, mfu)


def estimate(
    config: RunConfig,
    timing: Timing,
    memory_limit: float | None = None,
    assumptions: Assumptions | None = None,
) -> Estimate:
    """Predict one plan. Arguments and errors as in `price`."""
    return price(config, timing, memory_limit, assumptions).simulated()


def price(
    config: RunConfig,
    timing: Timing,
    memory_limit: float | None = None,
    assumptions: Assumptions | None = None,
    recut: bool = False,
) -> Priced:
    """What a plan's layers cost, where it is cut, and whether it fits.

    Args:
        config: its mesh must be resolved (`MeshConfig.resolve`).
        timing: a roofline or measurements.
        memory_limit: bytes of one GPU; None takes the device's.
        recut: cut the stages by what `timing` says of this device, not as a run would that is not told where.

    Raises:
        PlanError, ConfigError: the plan cannot be built.
    """
    model, mesh = config.model, config.mesh
    setting, count = setting_of(config, timing, assumptions), micro_batches(config)
    n = len(model.symbols)
    stages: tuple[Stage, ...] = (whole_model(n),)
    name, chunks = "1f1b", 1
    layers, at_once = layer_costs(model, setting, timing), 1
    if config.train.overlap_dispatch:
        layers, at_once = overlapped([symbol == "E" for symbol in model.symbols], layers), 2
    if mesh.pp > 1:
        check_split_backward(model, config.pipeline, config.recompute)
        name, chunks = config.pipeline.schedule, config.pipeline.chunks_per_rank
        if recut:
            pipeline = replace(config.pipeline, cuts=())
            stages = cut_stages(model, pipeline, mesh.pp, layer_seconds(model, setting, timing))
        else:
            stages = stages_of(config, mesh.pp)
    schedule = build_schedule(name, mesh.pp, count, chunks)
    costs = [[layers[index] for index in stage.layers] for stage in stages]
    ends = [end_cost(model, stage, setting, timing) for stage in stages]
    limit = timing.device.memory if memory_limit is None else memory_limit
    held = [at_once * (end.saved + sum(c.saved for c in group)) for group, end in zip(costs, ends, strict=True)]
    numels = _shards(model, stages, mesh)
    memory = tuple(
        _memory(config, schedule, rank, (costs, ends, held), numels, setting, RESERVE * limit)
        for rank in range(mesh.pp)
    )
    parts = _parts_of_step(config, schedule, costs, ends, numels, timing)
    return Priced(config, timing, setting, schedule, stages, costs, ends, memory, limit, parts)


Costs = tuple[Sequence[Sequence[Cost]], Sequence[Cost], Sequence[float]]
Shards = Sequence[tuple[int, int]]


def _memory(
    config: RunConfig,
    schedule: Schedule,
    rank: int,
    costs: Costs,
    numels: Shards,
    setting: Setting,
    reserve: float,
) -> Memory:
    """The memory of one pipeline rank."""
    layers, ends, held = costs
    mesh, a = config.mesh, setting.itemsize
    mine = _stages_of(schedule, rank)
    sharded, tensors = (sum(numels[s][i] for s in mine) for i in (0, 1))
    whole = sum(cost.parameters for s in mine for cost in (*layers[s], ends[s]))
    roots = sum(ends[s].parameters for s in mine)
    blocks = sorted((cost.parameters for s in mine for cost in layers[s]), reverse=True)
    copies = 0 if a == 4 and mesh.dp_shard * mesh.cp == 1 else a  # one rank in float32 computes with the masters
    if mesh.pp > 1:
        gathered, gradients = copies * whole, 4 * whole
    else:  # float32 input of the reduce-scatter besides the gradient itself
        gathered, gradients = copies * (roots + sum(blocks[:2])), (4 + a) * max(roots, blocks[0])
    prepared = METADATA * setting.tokens // mesh.cp * (schedule.n_micro_batches if mesh.pp > 1 else 1)
    return Memory(
        parameters=4 * sharded,
        gradients=4 * sharded,
        optimizer=8 * sharded + 4 * tensors,
        gathered=gathered,
        unsharded_gradients=gradients,
        activations=peak_in_flight(schedule, rank, held) + prepared,
        received=receive_buffers(schedule, rank) * stream_bytes(config, setting),
        workspace=max(cost.workspace for s in mine for cost in (*layers[s], ends[s])),
        reserve=reserve,
    )


def stream_bytes(config: RunConfig, setting: Setting) -> int:
    """Bytes of a stage's output for one micro-batch: this rank's sequence shard."""
    return setting.tokens // config.mesh.cp // config.mesh.tp * config.model.d_model * setting.itemsize


def _stages_of(schedule: Schedule, rank: int) -> list[int]:
    return [s for s in range(schedule.n_stages) if stage_rank(schedule.name, s, schedule.n_ranks) == rank]


def parameter_shard(parts: Iterable[Part], mesh: MeshConfig) -> tuple[int, int]:
    """Elements and tensors of these parts on the first FSDP rank."""
    ranks, numel, tensors = mesh.dp_shard * mesh.cp, 0, 0
    for part in parts:
        numel += sharded_numel(part, mesh.tp, ranks, mesh.ep, mesh.ep_spare)
        tensors += len(part.entries) if part.entries and len(part.shape) == 1 else 1
    return numel, tensors


def _shards(model: ModelConfig, stages: Sequence[Stage], mesh: MeshConfig) -> list[tuple[int, int]]:
    """`parameter_shard` of each stage; equal layers are counted once."""
    counted: dict[tuple[str, str], tuple[int, int]] = {}
    symbols, result = model.symbols, []
    for stage in stages:
        found = [parameter_shard(end_parts(model, stage).values(), mesh)]
        for index in stage.layers:
            key = (symbols[index], repr(model.layers.get(index)))
            if key not in counted:
                counted[key] = parameter_shard(layer_parts(*model.layer(index), model, mesh.tp).values(), mesh)
            found.append(counted[key])
        result.append((sum(numel for numel, _ in found), sum(tensors for _, tensors in found)))
    return result


def _stage_times(costs: Sequence[Sequence[Cost]], ends: Sequence[Cost], operation: float) -> list[StageTime]:
    """Seconds of each stage's F, I and W; collectives of the backward, and what an operation adds, belong to I."""
    return [
        StageTime(
            sum(c.forward + c.sent for c in (*layers, end)) + operation,
            sum(c.inputs + c.sent_back for c in (*layers, end)) + operation,
            sum(c.weights for c in (*layers, end)),
        )
        for layers, end in zip(costs, ends, strict=True)
    ]


def _send(config: RunConfig, setting: Setting, timing: Timing) -> float:
    """Seconds that a stage's output, one sequence shard, travels to the next pipeline rank."""
    mesh, device = config.mesh, timing.device
    if mesh.pp == 1:
        return 0.0
    span = mesh.n_processes // mesh.pp + 1  # pp is the outermost axis: neighbours are a whole stage apart
    return stream_bytes(config, setting) / device.wire(span) + device.latency


def _parts_of_step(
    config: RunConfig,
    schedule: Schedule,
    costs: Sequence[Sequence[Cost]],
    ends: Sequence[Cost],
    numels: Shards,
    timing: Timing,
) -> dict[str, float]:
    """Seconds by cause on the busiest pipeline rank, the bubble left out."""
    count = schedule.n_micro_batches

    def parts_of(rank: int) -> dict[str, float]:
        mine = _stages_of(schedule, rank)
        all_costs = [cost for s in mine for cost in (*costs[s], ends[s])]
        operations = 2 * len(mine) * timing.device.operation if config.mesh.pp > 1 else 0.0
        return {
            "computation": count * (sum(c.forward + c.inputs + c.weights for c in all_costs) + operations),
            "tensor parallel": count * sum(c.tensor + c.tensor_back for c in all_costs),
            "expert parallel": count * sum(c.experts + c.experts_back for c in all_costs),
            "context parallel": count * sum(c.context + c.context_back for c in all_costs),
        }

    ranks = [parts_of(rank) for rank in range(schedule.n_ranks)]
    busiest = max(range(len(ranks)), key=lambda rank: sum(ranks[rank].values()))
    mine = _stages_of(schedule, busiest)
    exposed = exposed_sharding(config, [(costs[s], ends[s]) for s in mine], timing, count)
    update = timing.update(sum(numels[s][0] for s in mine))
    return ranks[busiest] | {"data parallel": exposed, "optimizer": update}


def exposed_sharding(
    config: RunConfig, mine: Sequence[tuple[Sequence[Cost], Cost]], timing: Timing, count: int
) -> float:
    """Seconds of all-gathers and reduce-scatters over dp_shard × cp (and all-reduces over replicas) that no computation
    hides.

    Without pp, FSDP gathers the next layer while one computes, in every micro-batch, forwards and backwards, and
    scatters gradients meanwhile; the first gather and the last scatter have nothing to hide behind. Under pp a stage is
    gathered once, of which the first layer waits, and its gradients are scattered once, after the last micro-batch.
    """
    mesh, device = config.mesh, timing.device
    ranks = mesh.dp_shard * mesh.cp
    wire = device.wire(mesh.tp * ranks)
    narrow = 2 if config.train.precision == "bfloat16" else 4

    def gather(parameters: float) -> float:
        return collective_seconds("all_gather", narrow * parameters, ranks, wire, device.latency)

    def scatter(parameters: float) -> float:
        replicas = device.wire(mesh.tp * ranks * mesh.dp_replicate)
        shard = 4 * parameters / ranks
        across = collective_seconds("all_reduce", shard, mesh.dp_replicate, replicas, device.latency)
        return collective_seconds("reduce_scatter", 4 * parameters, ranks, wire, device.latency) + across

    if mesh.pp > 1:
        modules = [cost.parameters for layers, end in mine for cost in (*layers, end) if cost.parameters]
        return gather(modules[0]) + sum(scatter(parameters) for parameters in modules)
    exposed = 0.0
    for layers, end in mine:
        exposed += count * (gather(end.parameters) + scatter(end.parameters))
        for cost, following in zip(layers, (*layers[1:], end), strict=True):
            forward = cost.forward + cost.sent
            backward = cost.inputs + cost.weights + cost.sent_back
            exposed += count * max(0.0, gather(following.parameters) - forward)
            exposed += count * max(0.0, gather(cost.parameters) + scatter(following.parameters) - backward)
        exposed += count * (gather(layers[0].parameters) + scatter(layers[0].parameters))
    return exposed
