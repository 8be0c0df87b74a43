"""What is measured, against brute force: gradients of each modality's own weights, FLOPs of real documents, windows."""

from __future__ import annotations

import gzip
import json
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from faults import small, train_with
from polylepis.data.stream import Stream
from polylepis.parallel.engines.deepspeed import DeepSpeedConfig
from polylepis.parallel.mesh import MeshConfig, build_mesh
from polylepis.parallel.model import flops_per_token
from polylepis.pretrain import train as train_module
from polylepis.pretrain.config import RunConfig
from polylepis.pretrain.errors import ConfigError
from polylepis.pretrain.meter.meter import Meter
from polylepis.pretrain.meter.peaks import peak_flops
from polylepis.pretrain.meter.pulse import Pulse
from polylepis.pretrain.meter.sampler import Sampler
from polylepis.pretrain.meter.sinks import Bar, TensorBoard
from polylepis.pretrain.meter.tracker import Tracker, read_metrics
from polylepis.pretrain.meter.window import ProfileWindow, ask
from polylepis.pretrain.prepare import open_data
from polylepis.pretrain.verify import whole_tensors
from ranks import run_ranks


def norms_of_a_step(config: RunConfig, folder: Path) -> tuple[dict[str, float], dict[str, float], float, float]:
    """By the meter; by brute force over whole gradients; the summed loss by the meter and by hand."""
    mesh = build_mesh(config.mesh, "cpu", config.context)
    engine = train_module.build_engine(config, mesh, dtype=torch.float64)
    window = ProfileWindow(folder, mesh.device)
    meter = Meter(config.model, engine, Pulse(), window, 1, None)
    stream = Stream(open_data(config), config.data, dp_rank=mesh.dp_rank, dp_size=mesh.dp_size)
    data = stream.next()
    sums = engine.accumulate(data.micro_batches, data.total_weight)
    travelling = meter.reduce(sums)
    whole = torch.tensor(engine.gradient_norm())
    totals = meter.read(travelling)
    gradients = whole_tensors(engine.models, gradient=True)
    expected = {
        m: float(torch.stack([g.norm() for name, g in gradients.items() if name.endswith(f".{m}")]).norm())
        for m in config.model.modalities
    }
    assert sum(v**2 for v in totals.norms.values()) < float(whole) ** 2
    return totals.norms, expected, totals.loss, float(sums.sum())


@pytest.mark.parametrize(
    ("stage", "axes"),
    [(2, {"dp_shard": 2}), *(pytest.param(n, {"dp_shard": 2, "tp": 2}, marks=pytest.mark.full) for n in (1, 2, 3))],
)
def test_gradient_norms_per_modality_under_zero(stage: int, axes: dict[str, int], tmp_path: Path) -> None:
    """ZeRO's pieces begin and end anywhere; their squares are those of FSDP's shards."""
    pytest.importorskip("deepspeed")
    mesh = MeshConfig(**axes)
    fsdp = replace(small(tmp_path / "fsdp", 1), mesh=mesh)
    zero = replace(fsdp, folder=str(tmp_path / "zero"), engine="deepspeed", deepspeed=DeepSpeedConfig(stage=stage))  # type: ignore[arg-type]
    for config in (fsdp, zero):
        assert run_ranks(mesh.n_processes, train_with, config) == [""] * mesh.n_processes
    (expected,), (found,) = read_metrics(fsdp.path), read_metrics(zero.path)
    norms = {key: value for key, value in expected.items() if key.startswith("grad_norm")}
    assert len(norms) == 4 and min(norms.values()) > 0
    assert {key: found[key] for key in norms} == pytest.approx(norms, rel=1e-4)


@pytest.mark.parametrize("axes", [{"tp": 2}, {"dp_shard": 2}, {"dp_replicate": 2}], ids=str)
def test_gradient_norms_per_modality(axes: dict[str, int], tmp_path: Path) -> None:
    config = small(tmp_path, 1)
    config = replace(config, mesh=MeshConfig(**{"dp_shard": 1, **axes}))
    results = run_ranks(2, norms_of_a_step, config, tmp_path)
    for norms, expected, loss, _ in results:
        assert norms == pytest.approx(expected, rel=1e-6)  # squares travel in the losses' all-reduce, in its type
        assert loss == results[0][2]
    by_hand = sum(own for *_, own in results) / axes.get("tp", 1)
    assert results[0][2] == pytest.approx(by_hand, rel=1e-6)  # float32 sums


def test_attended_pairs_are_those_of_the_documents(tmp_path: Path) -> None:
    """From the plan, against the batches themselves; skipping passes over the same step."""
    config = small(tmp_path, 1)
    dataset = open_data(config)
    stream, skipping = (Stream(dataset, config.data, dp_rank=0, dp_size=1) for _ in range(2))
    for _ in range(3):
        step = stream.next()
        pairs = 0
        for batch in step.micro_batches:
            lengths = batch["cu_seqlens"].diff(dim=1).flatten()
            pairs += int((lengths * (lengths + 1) // 2).sum())
        assert step.attended == pairs
        assert skipping.skip() == step.doc_digest
        assert skipping.state_dict() == stream.state_dict()


def test_utilisation_is_that_of_real_documents(tmp_path: Path) -> None:
    """metrics.jsonl against the registry: attention counts what documents attend to, padding counts for HFU alone."""
    config = small(tmp_path, 2)
    config = replace(config, mesh=MeshConfig(dp_shard=1), tracking=replace(config.tracking, peak_tflops=0.5))
    assert run_ranks(1, train_with, config) == [""]
    stream = Stream(open_data(config), config.data, dp_rank=0, dp_size=1)
    for line in read_metrics(tmp_path):
        step = stream.next()
        tokens = sum(step.tokens.values())
        useful = 3 * tokens * flops_per_token(config.model, step.attended / tokens)
        assert line["mfu"] == pytest.approx(useful / line["step_seconds"] / 0.5e12)
        rows = config.data.global_batch * config.data.seq_len
        assert line["hfu"] / line["mfu"] == pytest.approx(rows / tokens)
        assert line["padding"] == pytest.approx(1 - tokens / rows)
        phases = ("data", "communication", "checkpoint", "snapshot", "between")
        assert all(line[f"seconds/{phase}"] >= 0 for phase in phases)


def test_peaks_name_the_device_and_the_precision() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") == 989.4e12
    assert peak_flops("NVIDIA H100 PCIe", "bfloat16") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "float32") == 156e12
    assert peak_flops("AMD EPYC", "bfloat16") is None
    assert peak_flops("AMD EPYC", "bfloat16", 2.0) == 2e12


@given(st.lists(st.sampled_from(["data", "compute", "update"]), max_size=20))
def test_phases_add_up_to_the_time_that_passed(phases: list[str]) -> None:
    pulse = Pulse()
    began = time.monotonic()
    for number, phase in enumerate(phases):
        pulse.enter(phase, number)
    seconds = pulse.take()
    assert 0 <= sum(seconds.values()) <= time.monotonic() - began + 1e-3
    assert pulse.beat.count == len(phases) + 1 and set(seconds) <= {"start", *phases}
    assert sum(pulse.take().values()) < 1.0, "what was taken is not counted twice"


def wait_for_each_other(seconds: float) -> tuple[float, float]:
    """Rank 1 sleeps, rank 0 waits for it in a collective; what each one's sampler saw."""
    import torch.distributed as dist

    sampler = Sampler(0.005)
    sampler.start()
    began = time.monotonic()
    if dist.get_rank() == 1:
        time.sleep(seconds)
    dist.all_reduce(torch.ones(1))
    passed = time.monotonic() - began
    sampler.close()
    return sampler.take(), passed


def test_the_sampler_tells_waiting_from_work() -> None:
    (waited, passed), (worked, _) = run_ranks(2, wait_for_each_other, 1.0)
    assert waited > 0.5 * passed and worked < 0.5 * waited


def test_a_window_is_opened_on_a_running_job(tmp_path: Path) -> None:
    config = small(tmp_path, 24)
    with pytest.raises(ConfigError, match="not a run folder"):
        ask(tmp_path, 2, True)
    asked: list[Any] = []

    def operator() -> None:
        while not read_metrics(tmp_path):  # until the job runs
            time.sleep(0.02)
        asked.append(ask(tmp_path, 2, True))

    with pytest.raises(ConfigError, match="between 1 and 100 steps"):
        (tmp_path / "config.yaml").write_text("")
        ask(tmp_path, 0, False)
    (tmp_path / "config.yaml").unlink()
    thread = threading.Thread(target=operator)
    thread.start()
    assert run_ranks(2, train_with, config) == ["", ""]
    thread.join()
    traces = sorted((tmp_path / "profile").glob("trace-*.json.gz"))
    assert [path.name[-18:] for path in traces] == ["rank-00000.json.gz", "rank-00001.json.gz"]
    with gzip.open(traces[0]) as file:
        names = {event.get("name", "") for event in json.load(file)["traceEvents"]}
    assert any("gloo:" in name or "all_gather" in name for name in names)
    assert not asked[0].exists() and len(read_metrics(tmp_path)) == 24


def test_every_sink_goes_back_with_a_rollback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    line = {"tokens_per_second": 1.0, "step_seconds": 1.0, "loss": 1.0}
    with Tracker(tmp_path, 9, 0, progress=False) as tracker:
        tracker.start_tensorboard()
        tracker.sinks.append(Bar(9, 0))
        for step in (1, 2, 3, 4):
            tracker.log(line | {"step": step})
        tracker.rewind(2)
        assert [entry["step"] for entry in read_metrics(tmp_path)] == [1, 2]
        tracker.log(line | {"step": 5, "loss": 7.0})
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1, 2, 5]
    assert "5/9" in capsys.readouterr().err
    assert any(isinstance(sink, TensorBoard) for sink in tracker.sinks)
    shown = EventAccumulator(str(tmp_path / "tensorboard"))
    shown.Reload()
    assert [(event.step, event.value) for event in shown.Scalars("loss")] == [(1, 1.0), (2, 1.0), (5, 7.0)]
