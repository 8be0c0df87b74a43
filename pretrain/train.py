"""The worker: `torchrun … -m polylepis.pretrain.train CONFIG [section.key=value …]`, one linear loop."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
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
from ..parallel.megatron import preload
from ..parallel.mesh import Mesh, build_mesh
from .claim import claim_folder
from .config import RunConfig, load_config
from .errors import DivergenceError
from .experts import check_routers, finish_experts, place_by_load
from .meter.tracker import Tracker, plot_losses
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

    first = 0
    if dist.get_rank() == 0:
        prepare_folder(config)
    dist.barrier()
    keeper = open_keeper(config, engine)
    resumed = keeper.resume()
    if resumed is not None:
        stream.load_state_dict(resumed["data"])
        first = resumed["step"]
        if config.train.places_after(first):
            place_by_load(engine)

    predicted = predicted_step(config, dist.get_world_size()) if dist.get_rank() == 0 else {}
    claim = claim_folder(config.path) if dist.get_rank() == 0 else contextlib.nullcontext()
    with (
        claim,
        Preemption(config.path, config.train.steps) as preemption,
        keeper,
        open_tracker(config, first) as tracker,
    ):
        for step in range(first, config.train.steps):
            with located(step + 1):
                started = time.perf_counter()
                data = stream.next()
                check_agreement(step + 1, data.agreed, preemption)
                waited = time.perf_counter() - started

                sums = engine.accumulate(data.micro_batches, data.total_weight)
                norm = engine.gradient_norm()
                check_routers(engine, norm)
                if config.optim.clip and norm > config.optim.clip:
                    engine.scale(config.optim.clip / norm)
                lr = config.optim.lr * config.optim.factor(step, config.train.steps)
                engine.update(lr)
                experts = finish_experts(engine)

                dist.all_reduce(sums)
                losses = sums / mesh.tp_size  # every tp rank counted the same tokens
                if tracker is not None:
                    seconds = time.perf_counter() - started
                    metrics = step_metrics(config, step + 1, data, losses.tolist(), norm, lr, seconds, waited)
                    tracker.log(metrics | experts | keeper.times() | predicted)
                last = preemption.ends_after(step + 1)
                keeper.after_step(step + 1, stream.state_dict, last=last)
                if config.train.places_after(step + 1):
                    place_by_load(engine)
            if last:
                break

    if tracker is not None and importlib.util.find_spec("matplotlib") and first < config.train.steps:
        plot_losses(config.path, config.model.modalities)


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
        return FSDPEngine(model, build_optimizer(config.optim, model), objective)
    stages = stages_of(config, mesh.pp_size)
    models = build_stages(config.model, mesh, config.pipeline, stages, **options)
    optimizer = build_optimizer(config.optim, *models)
    return PipelineEngine(models, optimizer, objective, config.pipeline, compute, config.recompute)


def open_keeper(config: RunConfig, engine: Engine) -> Keeper:
    """What saves the run and finds where it stopped; every checkpoint carries the resolved configuration."""
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    facts = {"config": values, "config_hash": hash_config(values)}
    return Keeper(config.checkpoints, engine.models, engine.optimizer, config.train.keep_rules(), facts=facts)


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
