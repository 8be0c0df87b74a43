"""The worker: `torchrun … -m polylepis.pretrain.train CONFIG [section.key=value …]`, one linear loop."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from ..checkpoints.keeper import Keeper
from ..checkpoints.manifest import hash_config
from ..data.stream import Step
from ..parallel.engines.base import Engine, Objective
from ..parallel.engines.deepspeed import DeepSpeedEngine
from ..parallel.engines.fsdp import FSDPEngine, build_model
from ..parallel.engines.pipeline import PipelineEngine, build_stages
from ..parallel.kinds.base import Load
from ..parallel.megatron import preload
from ..parallel.mesh import Mesh, build_mesh
from .claim import claim_folder
from .config import RunConfig, load_config
from .errors import DivergenceError
from .experts import check_routers, expert_layers, finish_experts, place_by_load
from .health.events import Events
from .health.expectation import planned_memory
from .health.guard import Health, Verdict
from .meter.environment import environment, write_environment
from .meter.meter import Meter
from .meter.peaks import peak_flops
from .meter.pulse import Pulse
from .meter.tracker import Tracker, plot_losses
from .meter.window import ProfileWindow
from .objectives.next_token import next_token
from .optim import build_optimizer
from .plan.assign import run_deal
from .plan.measure import predicted_step
from .preempt import Preemption, die_with_parent, write_outcome
from .prepare import check_run, open_data, open_stream, prepare_folder, stages_of


def train(config: RunConfig) -> None:
    """Train from the newest complete checkpoint, or from the start, to `config.train.steps`."""
    device = None if config.train.device == "auto" else config.train.device
    mesh = build_mesh(config.mesh, device, config.context, config.train.timeout)
    if mesh.tp_size * mesh.cp_size > 1:
        preload()
    check_run(config, dist.get_world_size())
    dataset = open_data(config)
    stream = open_stream(config, dataset, mesh.dp_rank, mesh.dp_size, run_deal(config, dist.get_world_size()))
    engine = build_engine(config, mesh)

    first, carried = 0, {}
    environs = environment(mesh.device)
    if dist.get_rank() == 0:
        prepare_folder(config)
        write_environment(config.path, environs)
    dist.barrier()
    keeper = open_keeper(config, engine)
    resumed = keeper.resume()
    if resumed is not None:
        stream.load_state_dict(resumed["data"])
        first, carried = resumed["step"], resumed["data"].get("health", {})
        if config.train.places_after(first):
            place_by_load(engine)

    predicted = predicted_step(config, dist.get_world_size()) if dist.get_rank() == 0 else {}
    pulse = Pulse()
    planned = partial(planned_memory, config, mesh.pp_rank)
    health = Health(config.health, config.path, engine, stream, keeper, pulse, config.optim.warmup, planned)
    meter = open_meter(config, engine, pulse, environs["device"])
    claim = claim_folder(config.path) if dist.get_rank() == 0 else contextlib.nullcontext()
    with (
        claim,
        Preemption(config.path, config.train.steps) as preemption,
        keeper,
        open_tracker(config, first) as tracker,
        health,
        meter,
    ):
        health.resume(first, carried)
        step, last = first, first >= config.train.steps
        while not last:
            with located(step + 1):
                pulse.enter("data", step + 1)
                verdict, metrics = Verdict.SKIP, None
                if not health.leaves_out(step + 1):
                    data = stream.next()
                    check_agreement(step + 1, data.agreed, preemption)
                    verdict, metrics = train_step(config, step, data, engine, health, meter)
                if tracker is not None and metrics is not None:
                    tracker.log(metrics | keeper.times() | predicted)
                if verdict is Verdict.ROLL_BACK:
                    step = health.roll_back(step + 1)
                    if tracker is not None:
                        tracker.rewind(step)
                    continue
                step += 1
                pulse.enter("checkpoint")
                last = preemption.ends_after(step)
                keeper.after_step(step, health.state, last=last)
                if config.train.places_after(step):
                    place_by_load(engine)

    if tracker is not None and importlib.util.find_spec("matplotlib") and first < config.train.steps:
        plot_losses(config.path, config.model.modalities)


def train_step(
    config: RunConfig, step: int, data: Step, engine: Engine, health: Health, meter: Meter
) -> tuple[Verdict, dict[str, Any] | None]:
    """One step, the one after `step` others, and its metrics, unless the guards object before the update."""
    meter.pulse.enter("compute")
    sums = engine.accumulate(data.micro_batches, data.total_weight)
    travelling = meter.reduce(sums)
    norm = engine.gradient_norm()
    totals = meter.read(travelling)
    loss = totals.loss / max(1, sum(data.target_tokens.values()))
    verdict = health.judge(step + 1, data, sums, loss, norm)
    if verdict is not Verdict.TRAIN:
        engine.discard()
        for layer in expert_layers(engine).values():
            layer.forget()
        return verdict, None
    check_routers(engine, norm)

    meter.pulse.enter("update")
    if config.optim.clip and norm > config.optim.clip:
        engine.scale(config.optim.clip / norm)
    lr = config.optim.lr * config.optim.factor(step, config.train.steps)
    engine.update(lr)
    experts = finish_experts(engine)

    meter.pulse.enter("between")
    timing = meter.time()
    imbalance = health.after(step + 1, timing.own)
    metrics = step_metrics(config, step + 1, data, totals.losses, norm, lr, timing.step, timing.data)
    metrics |= meter.metrics(data, totals, timing) | experts
    return verdict, metrics if imbalance is None else metrics | {"seconds/imbalance": imbalance}


def build_engine(
    config: RunConfig, mesh: Mesh, objective: Objective = next_token, dtype: torch.dtype = torch.float32
) -> Engine:
    """Model (or this rank's pipeline stages), optimizer and objective of the run; parameters are of `dtype`."""
    compute = config.train.compute_dtype if dtype == torch.float32 else dtype
    if config.engine == "deepspeed":
        adam = config.optim
        return DeepSpeedEngine(
            config.model,
            mesh,
            objective,
            config.deepspeed,
            lr=adam.lr,
            betas=(adam.beta1, adam.beta2),
            eps=adam.eps,
            weight_decay=adam.weight_decay,
            seed=config.seed,
            compute_dtype=compute,
            recompute=config.recompute,
        )
    options: dict[str, Any] = {"seed": config.seed, "dtype": dtype, "compute_dtype": compute}
    options["recompute"] = config.recompute
    if mesh.pp_size == 1:
        model = build_model(config.model, mesh, **options)
        return FSDPEngine(model, build_optimizer(config.optim, model), objective, config.train.overlap_dispatch)
    stages = stages_of(config, mesh.pp_size)
    models = build_stages(config.model, mesh, config.pipeline, stages, **options)
    optimizer = build_optimizer(config.optim, *models)
    return PipelineEngine(models, optimizer, objective, config.pipeline, compute, config.recompute)


def open_keeper(config: RunConfig, engine: Engine) -> Keeper:
    """What saves the run and finds where it stopped; every checkpoint carries the resolved configuration."""
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    facts = {"config": values, "config_hash": hash_config(values)}
    report = partial(Events(config.path, dist.get_rank()).tell, "checkpoint")
    rules = config.train.keep_rules()
    return Keeper(config.checkpoints, engine.models, engine.optimizer, rules, facts=facts, report=report)


@contextlib.contextmanager
def located(step: int) -> Iterator[None]:
    """An exception on its way out learns on which rank and step it happened."""
    try:
        yield
    except Exception as error:
        error.add_note(f"rank {dist.get_rank()}, step {step}")
        raise


def check_agreement(step: int, digest: str, preemption: Preemption) -> None:
    """All ranks must be about to train on the same global batch, dealt out alike, at the same step.

    One 24-byte all-gather tells; also whether any rank has been asked to save and stop.

    Raises:
        DivergenceError: on every rank; names those that are not with the majority.
    """
    if dist.get_world_size() == 1:
        preemption.agree(preemption.wanted())
        return
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    mine = torch.tensor([[step, int(digest, 16) >> 1, preemption.wanted()]], device=device)
    everyone = mine.new_empty(dist.get_world_size(), 3)
    dist.all_gather_into_tensor(everyone, mine)
    seen = [(theirs, digest) for theirs, digest, _ in everyone.tolist()]
    usual, count = Counter(seen).most_common(1)[0]
    if count < len(seen):
        others = [f"rank {rank} (step {pair[0]})" for rank, pair in enumerate(seen) if pair != usual]
        raise DivergenceError(
            f"step {usual[0]}: ranks hold different batches; {', '.join(others[:8])} differ from the "
            f"other {count} ranks"
        )
    preemption.agree(int(everyone[:, 2].max()))


def open_meter(config: RunConfig, engine: Engine, pulse: Pulse, device_name: str) -> Meter:
    """What measures the steps of this run."""
    peak = peak_flops(device_name, config.train.precision, config.tracking.peak_tflops)
    window = ProfileWindow(config.path, engine.mesh.device)
    rows = config.data.global_batch * config.data.seq_len
    on_gpu = engine.mesh.device.type == "cuda"
    load = Load(0, 0.0, itemsize=config.train.compute_dtype.itemsize, kernels="triton" if on_gpu else "torch")
    return Meter(config.model, engine, pulse, window, rows, peak, config.recompute, load)


def step_metrics(
    config: RunConfig,
    step: int,
    data: Step,
    sums: Sequence[float],
    norm: float,
    lr: float,
    seconds: float,
    waited: float,
) -> dict[str, Any]:
    """One line of `metrics.jsonl`; losses are nats per predicted token of a modality."""
    tokens = sum(data.tokens.values())
    metrics: dict[str, Any] = {"step": step, "lr": lr, "grad_norm": norm}
    for modality, total in zip(config.model.modalities, sums, strict=True):
        if targets := data.target_tokens.get(modality, 0):
            metrics[f"loss/{modality}"] = total / targets
    weighted = [(total, data.target_tokens.get(m, 0)) for m, total in zip(config.model.modalities, sums, strict=True)]
    metrics["loss"] = sum(total for total, _ in weighted) / max(1, sum(count for _, count in weighted))
    metrics |= {f"tokens/{modality}": count for modality, count in data.tokens.items()} | data.dealt
    return metrics | {"tokens_per_second": tokens / seconds, "step_seconds": seconds, "data_wait_seconds": waited}


@contextlib.contextmanager
def open_tracker(config: RunConfig, first: int) -> Iterator[Tracker | None]:
    """The tracker on rank 0, None elsewhere."""
    if dist.get_rank() != 0:
        yield None
        return
    with Tracker(config.path, config.train.steps, first) as tracker:
        if config.tracking.wandb != "disabled" and first < config.train.steps:
            values = dataclasses.asdict(config)
            tracker.start_wandb(config.tracking.wandb, config.tracking.project, config.name, values)
        if config.tracking.tensorboard and first < config.train.steps:
            tracker.start_tensorboard()
        yield tracker


def main(arguments: Sequence[str]) -> int:
    """Entry point of each process that torchrun starts; a user's mistake is one line on rank 0 and exit code 2."""
    die_with_parent()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    config = None
    try:
        config = load_config(arguments[0], arguments[1:])
        train(config)
    except Exception as error:
        code = getattr(error, "exit_code", None)
        where = "; ".join(getattr(error, "__notes__", []))
        if code == 2 and not where and config is not None and config.path.is_dir():
            write_outcome(config.path, "refused", 0)  # another attempt would end the same way
        if where:  # in the loop, where one rank alone may have failed and the others only hear of it
            print(f"polylepis: {where}: {type(error).__name__}: {error}", file=sys.stderr)
        elif code is not None and os.environ.get("RANK", "0") == "0":
            print(f"polylepis: {error}", file=sys.stderr)
        if code is None:
            raise
        return code
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
