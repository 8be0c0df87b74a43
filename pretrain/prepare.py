"""Everything that is checked before the first step, so that nothing starts that cannot finish."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from ..checkpoints.manifest import newest_checkpoint, read_manifest, step_of
from ..data import mock
from ..data.dataset import Dataset
from ..data.deal import Deal
from ..data.stream import Stream
from ..parallel.context import cut_tokens
from ..parallel.mesh import MeshConfig
from ..parallel.pipeline.config import check_split_backward, cut_stages
from ..parallel.pipeline.cost import Roofline, Setting, layer_seconds
from ..parallel.pipeline.devices import DEVICES
from ..parallel.pipeline.stage import Stage
from .claim import check_free
from .config import CONFIG_FILE, RunConfig, differing_keys, load_config, to_yaml
from .errors import ConfigError
from .plan.loads import busiest_ranks, read_loads

# What may change between the runs that share a folder: where and how long it trains, not what is trained on what.
READING = ("data.micro_batch", "data.workers", "data.prefetch", "data.stall_seconds", "data.path")
PLAN = ("mesh.", "context.", "pipeline.", "recompute.", "engine", "deepspeed.")
# Of a model's configuration, what its weights do not depend on.
TRAINING_ONLY = (
    "model.init_std:",
    *(f"model.moe.{k}:" for k in ("aux_sequence", "aux_global", "z_loss", "capacity_factor", "bias_update_rate")),
)
FREE_KEYS = (*PLAN, "train.", "tracking.", "health.", "name", "folder", *READING)


def n_processes(config: RunConfig) -> int:
    """The processes that the mesh asks for; `dp_shard: -1` alone means 1 unless a launcher has decided."""
    return int(os.environ.get("WORLD_SIZE", config.mesh.n_processes))


def check_run(config: RunConfig, world_size: int) -> None:
    """Refuse what cannot run on `world_size` processes, with the numbers.

    Raises:
        ConfigError, PlanError, DataError: one line each.
    """
    mesh = config.mesh.resolve(world_size)
    config.model.check(mesh.tp)
    config.optim.check()
    config.health.check()
    if config.tracking.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("tracking.tensorboard: not installed; pip install 'polylepis[tensorboard]'")
    if config.tracking.peak_tflops < 0:
        raise ConfigError(f"tracking.peak_tflops: must not be negative, not {config.tracking.peak_tflops}")
    if config.train.steps < 1:
        raise ConfigError(f"train.steps: must be at least 1, not {config.train.steps}")
    config.train.keep_rules()
    check_placement(config)
    check_overlap(config, mesh)
    config.model.check_context(mesh, config.context)
    config.model.check_experts(mesh)
    cut_tokens(config.data.micro_batch * config.data.seq_len, mesh.cp, mesh.tp, config.context.order)
    if config.engine == "deepspeed":
        config.deepspeed.check(mesh, config.train.compute_dtype)
    if mesh.pp > 1:
        stages_of(config, mesh.pp)
        check_split_backward(config.model, config.pipeline, config.recompute)
        rows = config.data.global_batch // (mesh.dp_replicate * mesh.dp_shard)
        config.pipeline.check_micro_batches(rows // config.data.micro_batch, mesh.pp)


def check_placement(config: RunConfig) -> None:
    """Refuse to place experts by load where that cannot be done, and loads that would change while they are used.

    Raises:
        ConfigError: with what would be accepted.
    """
    train = config.train
    if train.loads and config.path.resolve() in (Path(train.loads).resolve(), *Path(train.loads).resolve().parents):
        raise ConfigError(
            f"train.loads: {train.loads} is this run's own folder, whose loads change; accepted: another run, or a "
            "checkpoint copied elsewhere"
        )
    if train.placement == "dealt":
        return
    if "E" not in config.model.symbols:
        raise ConfigError("train.placement: load, but the model has no expert layers; accepted: dealt")
    if config.engine == "deepspeed":
        raise ConfigError("train.placement: load needs engine: fsdp2, not deepspeed")
    if not train.checkpoint_every:
        raise ConfigError("train.placement: load happens every train.checkpoint_every steps, which is 0")
    if config.health.spike == "act":
        raise ConfigError(
            "train.placement: load does not go with health.spike: act, whose states in memory do not know where "
            "experts lay; accepted: placement dealt, or spike warn"
        )
    if train.local_folder:
        raise ConfigError(
            "train.placement: load does not go with train.local_folder: local parts name the experts that lay on a "
            "rank; accepted: placement dealt, or no local_folder"
        )


def check_overlap(config: RunConfig, mesh: MeshConfig) -> None:
    """Refuse `train.overlap_dispatch` where there is nothing to overlap, or somebody else orders the micro-batches.

    Args:
        mesh: resolved.

    Raises:
        ConfigError: with the numbers.
    """
    if not config.train.overlap_dispatch:
        return
    refused = "train.overlap_dispatch:"
    if config.engine == "deepspeed":
        raise ConfigError(f"{refused} needs engine: fsdp2, not deepspeed")
    if mesh.ep == 1:
        raise ConfigError(f"{refused} with mesh.ep 1 no rows travel; accepted: false, or ep ≥ 2")
    if mesh.pp > 1:
        raise ConfigError(
            f"{refused} with mesh.pp {mesh.pp} the pipeline's schedule gives a stage one micro-batch at a time; "
            "accepted: false, or pp 1"
        )
    if config.recompute.moe != "none":
        raise ConfigError(
            f"{refused} with recompute.moe {config.recompute.moe} the backward would repeat an expert layer together "
            "with the other micro-batch's layers inside it; accepted: recompute.moe none, whatever the other kinds do"
        )
    dp = mesh.dp_replicate * mesh.dp_shard
    rows, at_once = config.data.global_batch // dp, config.data.micro_batch
    if rows < 2 * at_once:
        raise ConfigError(
            f"{refused} needs two micro-batches on each rank, but data.global_batch {config.data.global_batch} over dp "
            f"{dp} is {rows} rows, and data.micro_batch is {at_once}; accepted: global_batch ≥ {2 * at_once * dp}"
        )


def stages_of(config: RunConfig, pp: int) -> tuple[Stage, ...]:
    """All pipeline stages of the run, cut by cost where neither pattern nor configuration says where.

    Costs are those of an H100, whatever the run's own device: the cut of a configuration is always the same.
    `polylepis plan` cuts for the device and writes the cuts out. Loads of experts are those of `train.loads`.

    Raises:
        PlanError: see `cut_stages`.
    """
    data, mesh = config.data, replace(config.mesh, dp_shard=1, dp_replicate=1, ep=1, ep_spare=0)
    itemsize, keys = config.train.compute_dtype.itemsize, (data.seq_len + 1) / 2
    setting = Setting(mesh, data.micro_batch * data.seq_len, keys, itemsize, context=config.context)
    if config.train.loads:
        loads, by_load = read_loads(Path(config.train.loads), config.model), config.train.placement == "load"
        setting = replace(setting, busiest=busiest_ranks(loads, config.mesh, by_load))
    costs = layer_seconds(config.model, setting, Roofline(DEVICES["h100"]))
    return cut_stages(config.model, config.pipeline, pp, costs)


def open_data(config: RunConfig) -> Dataset | mock.MockDataset:
    """The data set, checked against the model.

    Raises:
        ConfigError: modalities or vocabulary that differ.
        DataError: shards that are missing, truncated or foreign.
    """
    if config.data.path == mock.PATH:
        return mock.MockDataset(config.model.modalities, config.model.vocab_size, config.data.seq_len)
    dataset = Dataset.open(config.data.path)
    if dataset.latent_format is not None:
        raise ConfigError(
            f"data.path: {config.data.path} holds continuous latents ({', '.join(dataset.latent_format.modalities)}, "
            f"{dataset.latent_format.width} x {dataset.latent_format.dtype}), and this version's models have no head "
            "for them; accepted: data sets of discrete codes alone"
        )
    if tuple(dataset.vocabulary.modalities) != tuple(config.model.modalities):
        raise ConfigError(
            f"model.modalities: {list(config.model.modalities)}, but {config.data.path} holds "
            f"{list(dataset.vocabulary.modalities)} in this order"
        )
    if dataset.vocabulary.used != config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size: {config.model.vocab_size}, but the vocabulary of {config.data.path} has "
            f"{dataset.vocabulary.used} ids"
        )
    return dataset


def open_stream(
    config: RunConfig, dataset: Dataset | mock.MockDataset, dp_rank: int, dp_size: int, deal: Deal | None = None
) -> Stream:
    """The stream of this rank; called on every rank. `deal` as in `Stream`.

    All ranks agree on quarantined samples. One rank of each data-parallel coordinate reads, and sends to its
    model-parallel peers through host memory: a GPU has no part in it.
    """
    world = dist.get_world_size()
    if world == 1:
        return Stream(dataset, config.data, dp_rank=0, dp_size=1, deal=deal)
    coordinates: list[int] = [0] * world
    dist.all_gather_object(coordinates, dp_rank)
    peers = [rank for rank, coordinate in enumerate(coordinates) if coordinate == dp_rank]
    # Only the members of a group make it: thousands of ranks need not enter thousands of groups.
    timeout = timedelta(seconds=config.train.timeout)
    alone = len(peers) == 1
    group = None if alone else dist.new_group(peers, timeout, "gloo", use_local_synchronization=True)
    everyone = dist.group.WORLD
    return Stream(dataset, config.data, dp_rank=dp_rank, dp_size=dp_size, group=everyone, model_group=group, deal=deal)


def check_all(config: RunConfig, world_size: int) -> None:
    """Everything that can be known before a process starts: sizes, data, plan, folder."""
    check_run(config, world_size)
    mesh = config.mesh.resolve(world_size)
    if mesh.ep_spare and config.train.placement == "dealt":
        raise ConfigError(
            f"mesh.ep_spare: {mesh.ep_spare} spare slots on each rank for copies of experts with many tokens, but "
            "train.placement: dealt does not look for those; accepted: ep_spare 0, or placement load"
        )
    Stream(open_data(config), config.data, dp_rank=0, dp_size=mesh.dp_replicate * mesh.dp_shard)
    check_folder(config)


def check_folder(config: RunConfig) -> None:
    """Refuse to continue another run in this folder.

    An import that has not been trained yet takes any data, optimizer and seed.

    Raises:
        ConfigError: the folder holds a run of another model, data, optimizer or seed; names the first difference.
    """
    file = config.path / CONFIG_FILE
    if not file.is_file():
        return
    newest = newest_checkpoint(config.checkpoints)
    imported = newest is not None and bool(read_manifest(newest).get("weights_only"))
    differences = differing_keys(load_config(str(file)), config)
    if imported:  # weights to start from: only what they are weights of is settled
        differences = [d for d in differences if d.startswith("model.") and not d.startswith(TRAINING_ONLY)]
    else:
        differences = [d for d in differences if not d.startswith(FREE_KEYS)]
    if differences:
        more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
        if imported:
            raise ConfigError(
                f"{config.folder}: holds imported weights of a model that differs in {differences[0]}{more}; data, "
                "optimizer and seed may be chosen freely"
            )
        raise ConfigError(
            f"{config.folder}: holds a run that differs in {differences[0]}{more}; choose another folder=…, "
            f"or remove it"
        )
    if newest is not None and step_of(newest) > config.train.steps:
        raise ConfigError(
            f"train.steps: {config.train.steps}, but {config.folder} has already trained to {newest.name}"
        )


def prepare_folder(config: RunConfig) -> None:
    """Create the run folder and write the resolved configuration into it."""
    check_folder(config)
    check_free(config.path)
    config.path.mkdir(parents=True, exist_ok=True)
    aside = config.path / f".{CONFIG_FILE}.part"
    aside.write_text(to_yaml(config))
    aside.replace(config.path / CONFIG_FILE)
