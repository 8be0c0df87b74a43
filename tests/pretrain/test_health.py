"""Guards: each sees what it is for, says who it was, and what it does about it is exact."""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from faults import Fault, small, train_with
from polylepis.checkpoints.manifest import newest_checkpoint, read_manifest
from polylepis.checkpoints.sharded import read_tensors
from polylepis.pretrain.config import load_config
from polylepis.pretrain.errors import HANG_EXIT, ConfigError
from polylepis.pretrain.health.config import HealthConfig
from polylepis.pretrain.health.events import Events, read_events
from polylepis.pretrain.health.ledger import Entry, Ledger
from polylepis.pretrain.health.replicas import CHUNK, compare, content_hash
from polylepis.pretrain.health.spikes import SpikeDetector, deviations
from polylepis.pretrain.health.stragglers import Stragglers
from polylepis.pretrain.health.watchdog import Watchdog, judge
from polylepis.pretrain.meter.pulse import Pulse
from polylepis.pretrain.meter.sinks import JsonLines, read_metrics
from polylepis.pretrain.prepare import check_run
from ranks import run_ranks


def whole_state(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = newest_checkpoint(folder / "checkpoints")
    assert checkpoint is not None
    return read_tensors(checkpoint) | read_tensors(checkpoint, "optimizer.")


def assert_same_end(a: Path, b: Path) -> None:
    """Weights, moments, the position in the data, the ledger and the spike history, to the bit."""
    ours, theirs = whole_state(a), whole_state(b)
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    manifests = [read_manifest(newest_checkpoint(f / "checkpoints")) for f in (a, b)]  # type: ignore[arg-type]
    assert manifests[0]["data"] == manifests[1]["data"]
    positions = [[entry["position"] for entry in m["data"]["health"]["skipped"]] for m in manifests]
    assert positions[0] == positions[1]
    assert manifests[0]["data"]["health"]["spikes"] == manifests[1]["data"]["health"]["spikes"]


def guarded(folder: Path) -> list[dict[str, Any]]:
    """What guards told; the run's own starts and ends left out."""
    return [event for event in read_events(folder) if event["guard"] != "run"]


def messages(folder: Path) -> list[str]:
    return [event["message"] for event in guarded(folder)]


# ---------------------------------------------------------------- spikes


@given(
    st.lists(st.floats(0.1, 10.0), min_size=5, max_size=40),
    st.floats(0.1, 100.0),
    st.floats(0.0, 50.0),
    st.floats(0.001, 0.1),
)
def test_deviations_know_no_unit(history: list[float], scale: float, value: float, floor: float) -> None:
    once = deviations(value, history, floor)
    assert deviations(value * scale, [v * scale for v in history], floor) == pytest.approx(once, rel=1e-6, abs=1e-6)
    assert deviations(value + 1.0, history, floor) > once
    assert deviations(math.nan, history, floor) == math.inf


def test_a_flat_history_makes_no_ripple_a_spike() -> None:
    assert deviations(2.02, [2.0] * 20, 0.01) == pytest.approx(1.0)
    assert deviations(3.0, [2.0] * 20, 0.01) == pytest.approx(50.0)


def test_half_of_the_history_may_be_spikes() -> None:
    """What mean and standard deviation could not do."""
    assert deviations(100.0, [1.0, 1.1, 0.9, 1.05, 0.95, 1.0, 100.0, 90.0, 80.0], 0.01) > 100


def test_detector_waits_for_warm_up_and_history_and_its_state_travels() -> None:
    config = HealthConfig(spike_history=4, spike_window=6)
    detector = SpikeDetector(config, warmup=3)
    for step in range(1, 7):  # 3 warm-up steps, 3 of history
        assert detector.judge(step, {"loss": 1e9, "grad_norm": 1e9}) == {}
        detector.accept(step, {"loss": 2.0 + step / 100, "grad_norm": 1.0})
    detector.accept(7, {"loss": math.inf, "grad_norm": 1.0})  # the infinite is no history
    assert detector.judge(7, {"loss": 1e9, "grad_norm": 1e9}) == {}
    detector.accept(7, {"loss": 2.0, "grad_norm": 1.0})
    copy = SpikeDetector(config, warmup=3)
    copy.load_state_dict(json.loads(json.dumps(detector.state_dict())))
    for one in (detector, copy):
        assert list(one.judge(8, {"loss": 2.1, "grad_norm": 50.0})) == ["grad_norm"]
        assert list(one.judge(8, {"loss": 9.0, "grad_norm": 1.0})) == ["loss"]
    assert copy.state_dict() == detector.state_dict()


ACT = HealthConfig(spike="act", spike_history=4, spike_window=8, snapshot_every=3, straggler="off")


def listed(folder: Path, entries: list[Entry]) -> None:
    """A ledger in a run folder, as an earlier process would have left it."""
    (folder / "health").mkdir(parents=True)
    values = {"version": 1, "skipped": [vars(entry) for entry in entries]}
    (folder / "health" / "skipped.json").write_text(json.dumps(values))


def test_rollback_equals_never_having_seen_the_batches(tmp_path: Path) -> None:
    """Bitwise, on tp 2: roll back from memory; leave the same out from the start; resume in between."""
    rolled, clean, resumed = tmp_path / "rolled", tmp_path / "clean", tmp_path / "resumed"
    fault = Fault("spike", -1, (5,))
    assert run_ranks(2, train_with, small(rolled, 8, ACT, tp=2), fault) == ["", ""]
    said = messages(rolled)
    assert said[0].startswith("spike: loss ") and "grad_norm" in said[0] and len(said) == 2
    assert said[1] == "rolled back to step 3 (memory); batches 4 to 5 are left out"
    assert [line["step"] for line in read_metrics(rolled)] == [1, 2, 3, 4, 7, 8]

    entries = [Entry(**entry) for entry in json.loads((rolled / "health" / "skipped.json").read_text())["skipped"]]
    assert [(e.position, e.reason, e.found) for e in entries] == [(4, "spike", 6), (5, "spike", 6)]
    assert all(entry.digest for entry in entries)
    listed(clean, entries)
    assert run_ranks(2, train_with, small(clean, 8, ACT, tp=2, checkpoint_every=3)) == ["", ""]
    assert_same_end(rolled, clean)

    # The ledger also travels in the checkpoint alone, into a folder without one. Step 6 itself is left out.
    (resumed / "checkpoints").mkdir(parents=True)
    (clean / "checkpoints" / "step-00000006").rename(resumed / "checkpoints" / "step-00000006")
    assert run_ranks(2, train_with, small(resumed, 8, ACT, tp=2)) == ["", ""]
    assert_same_end(rolled, resumed)


def test_rollback_from_disk_sets_spoilt_checkpoints_aside(tmp_path: Path) -> None:
    """The memory of a resumed process does not reach back far enough; the checkpoint in the middle is spoilt."""
    config = small(tmp_path, 8, replace(ACT, spike_before=2), checkpoint_every=2, keep=0)
    first = replace(config, train=replace(config.train, steps=6))
    assert run_ranks(2, train_with, replace(first, optim=replace(first.optim, schedule="constant"))) == ["", ""]
    again = replace(config, optim=replace(config.optim, schedule="constant"))
    assert run_ranks(2, train_with, again, Fault("spike", -1, (6,))) == ["", ""]
    assert messages(tmp_path)[-1] == (
        "rolled back to step 4 (checkpoint step-00000004); batches 4 to 6 are left out; set aside: step-00000006"
    )
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [".set-aside-step-00000006", *(f"step-{n:08d}" for n in (2, 4, 6, 8))]


def test_rollbacks_that_do_not_help_stop_the_run(tmp_path: Path) -> None:
    health = replace(ACT, max_rollbacks=1, spike_before=0)
    said = run_ranks(2, train_with, small(tmp_path, 12, health), Fault("spike", -1, (6, 7)))
    assert len(said) == 2 and said[0] == said[1]
    assert said[0].startswith("HealthError: spike: ") and "1 rollbacks within 8 steps have not helped" in said[0]


# ---------------------------------------------------------------- not finite


def test_a_nan_is_traced_to_its_rank_and_layer_and_left_out(tmp_path: Path) -> None:
    """Reductions spread it over both ranks; a resumed run leaves the same batch out without seeing a NaN."""
    config = small(tmp_path / "a", 5, checkpoint_every=2, keep=0)
    assert run_ranks(2, train_with, config, Fault("nan in a layer", 1, (2,))) == ["", ""]
    (said,) = messages(tmp_path / "a")
    assert said.startswith(
        "not finite: loss nan, gradient norm nan; began on rank 1 in layers.2; found in the gradient"
    )
    assert said.endswith("it came back when the step was repeated; step left out")
    assert [line["step"] for line in read_metrics(tmp_path / "a")] == [1, 2, 4, 5]
    (tmp_path / "b" / "health").mkdir(parents=True)
    (tmp_path / "b" / "checkpoints").mkdir()
    (tmp_path / "a" / "health" / "skipped.json").rename(tmp_path / "b" / "health" / "skipped.json")
    (tmp_path / "a" / "checkpoints" / "step-00000002").rename(tmp_path / "b" / "checkpoints" / "step-00000002")
    assert run_ranks(2, train_with, small(tmp_path / "b", 5)) == ["", ""]
    assert_same_end(tmp_path / "a", tmp_path / "b")


def test_a_nan_that_does_not_come_back_is_the_hardware_and_too_many_stop(tmp_path: Path) -> None:
    fault = Fault("nan in a gradient", 1, (1, 2))
    health = HealthConfig(nan_limit=2)
    said = run_ranks(2, train_with, small(tmp_path, 5, health), fault)
    assert said[0] == said[1] and said[0].startswith("HealthError: 2 steps in a row were not finite")
    first, second = guarded(tmp_path)
    assert (
        "found in the gradient of embed.weight on rank 1; it did not come back: suspect the hardware"
        in first["message"]
    )
    assert first["details"]["ranks"][0]["rank"] == 1 and second["details"]["streak"] == 2


def test_off_and_warn_do_not_act(tmp_path: Path) -> None:
    fault = Fault("nan in a gradient", 0, (1,))
    assert run_ranks(2, train_with, small(tmp_path, 2, HealthConfig(nan="warn")), fault) == ["", ""]
    (said,) = messages(tmp_path)
    first, second = read_metrics(tmp_path)
    told = f"not finite: loss {second['loss']:.3f}, gradient norm nan; on rank 0 in the gradient of embed.weight"
    assert said == told and (first["step"], second["step"]) == (1, 2)
    assert not (tmp_path / "health" / "skipped.json").exists()


# ---------------------------------------------------------------- the ledger


def open_ledger(folder: Path, carried: list[dict[str, Any]]) -> list[dict[str, Any]] | str:
    ledger = Ledger(folder)
    try:
        ledger.open(carried)
        ledger.check(3, "aa")
    except ConfigError as error:
        return str(error)
    return ledger.as_list()


def test_ledger_joins_what_it_finds_and_refuses_other_data(tmp_path: Path) -> None:
    carried = [vars(Entry(3, "spike", "", 5)), vars(Entry(4, "nan", "bb", 5))]
    listed(tmp_path / "x", [Entry(3, "spike", "aa", 5), Entry(9, "spike", "cc", 10)])
    (joined,) = run_ranks(1, open_ledger, tmp_path / "x", carried)
    assert [(e["position"], e["digest"]) for e in joined] == [(3, "aa"), (4, "bb"), (9, "cc")]
    listed(tmp_path / "y", [Entry(3, "spike", "dd", 5)])
    (said,) = run_ranks(1, open_ledger, tmp_path / "y", [])
    assert "position 3 was listed as batch dd, but this run's data have aa there" in said
    (tmp_path / "y" / "health" / "skipped.json").write_text('{"version": 1, "skipped": [{"position": 1}]}')
    (said,) = run_ranks(1, open_ledger, tmp_path / "y", [])
    assert "is not a ledger of skipped steps" in said and "restore it or remove it" in said


# ---------------------------------------------------------------- replicas


@settings(deadline=None)
@given(st.integers(1, 400), st.data())
def test_one_flipped_bit_changes_the_hash(size: int, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.uint8]))
    generator = torch.Generator().manual_seed(size)
    values = torch.randint(0, 256, (size, dtype.itemsize), generator=generator, dtype=torch.uint8)
    before = content_hash(values.view(dtype).flatten())
    at, bit = data.draw(st.integers(0, values.numel() - 1)), data.draw(st.integers(0, 7))
    values.view(-1)[at] ^= 1 << bit
    assert content_hash(values.view(dtype).flatten()) != before


def test_the_hash_sees_order_across_chunks() -> None:
    values = torch.zeros(CHUNK + 5)
    values[3], values[CHUNK + 3] = 1.0, 2.0
    swapped = values.clone()
    swapped[3], swapped[CHUNK + 3] = 2.0, 1.0
    assert content_hash(values) != content_hash(swapped)
    assert content_hash(torch.zeros(0)) == content_hash(torch.zeros(0))


class Holder:
    """The smallest engine that `compare` accepts: one replicated and one sharded parameter over (2 replicas, 2 tp)."""

    def __init__(self, broken: int) -> None:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "tp"))
        model: Any = torch.nn.Module()
        rank = dist.get_rank()
        both = DTensor.from_local(torch.arange(6.0), mesh, [Replicate(), Replicate()], run_check=False)
        cut = DTensor.from_local(torch.arange(6.0) + rank % 2, mesh, [Replicate(), Shard(0)], run_check=False)
        model.both, model.cut = torch.nn.Parameter(both), torch.nn.Parameter(cut)
        if rank == broken:
            model.cut.data.to_local()[2] += 1
        model.mesh = self.mesh = type("M", (), {"device_mesh": mesh, "device": torch.device("cpu")})
        self.models, self.optimizer = (model,), torch.optim.AdamW(model.parameters())


def compared(broken: int) -> str:
    return compare(Holder(broken))  # type: ignore[arg-type]


def test_only_what_must_be_equal_is_compared() -> None:
    """Shards differ by right; a shard differs from its replica by wrong, and only that pair is named."""
    assert run_ranks(4, compared, -1) == [""] * 4
    assert run_ranks(4, compared, 3) == ["cut differs between ranks 1, 3"] * 4


def test_a_drifting_replica_stops_the_run_by_name(tmp_path: Path) -> None:
    config = small(tmp_path, 6, HealthConfig(replicas_every=2, straggler="off"))
    config = replace(config, mesh=replace(config.mesh, dp_shard=1, dp_replicate=2))
    said = run_ranks(2, train_with, config, Fault("drift", 1, (2,)))
    expected = "replicas hold different bits: layers.1.norm.weight differs between ranks 0, 1"
    assert said == [f"HealthError: {expected}; resume from the newest checkpoint"] * 2
    assert messages(tmp_path) == [expected]
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]


# ---------------------------------------------------------------- slow ranks


def compare_work(seconds: dict[int, float]) -> tuple[list[int], list[list[int]], float]:
    stragglers = Stragglers(HealthConfig(straggler_every=2, straggler_limit=2))
    persistent = []
    for _ in range(2):
        for _ in range(2):
            assert not stragglers.due()
            stragglers.add(seconds[dist.get_rank()])
        assert stragglers.due()
        comparison = stragglers.compare()
        persistent.append(stragglers.persistent())
    return comparison.slow, persistent, comparison.imbalance


def test_slow_ranks_against_the_median() -> None:
    for slow, persistent, imbalance in run_ranks(3, compare_work, {0: 1.0, 1: 1.2, 2: 4.0}):
        assert slow == [2] and persistent == [[], [2]]
        assert imbalance == pytest.approx(4.0 - 6.2 / 3)
    assert run_ranks(2, compare_work, {0: 1.0, 1: 1.4})[0][0] == []
    assert run_ranks(2, compare_work, {0: 1.0, 1: 1.6})[1][0] == [1]


# ---------------------------------------------------------------- hangs


def shown(**changes: Any) -> dict[str, Any]:
    return {
        "tick": 1,
        "step": 5,
        "host": "h",
        "phase": "compute",
        "in_collective": True,
        "collectives": {"0": 9},
    } | changes


JUDGED = [
    ({0: shown(), 1: shown()}, {0: shown(tick=2), 1: shown()}, [1], "its process is stopped, dead or unreachable"),
    ({0: shown()}, {0: shown(tick=2)}, [1], "has shown no sign of life"),
    ({0: shown(step=4), 1: shown()}, {0: shown(tick=2, step=4), 1: shown(tick=2)}, [0], "at an earlier step than 5"),
    ({}, {0: shown(), 1: shown(in_collective=False)}, [1], "is in no collective, the others wait in one"),
    ({}, {0: shown(), 1: shown(collectives={"0": 8})}, [1], "has called fewer collectives of its group"),
    ({}, {0: shown(), 1: shown()}, [], "all ranks are at the same collective"),
]


@pytest.mark.parametrize(("before", "after", "ranks", "why"), JUDGED, ids=[case[3][:20] for case in JUDGED])
def test_who_is_behind(before: dict[int, Any], after: dict[int, Any], ranks: list[int], why: str) -> None:
    behind, reason = judge(before, after, 2)
    assert behind == ranks and reason.startswith(why)


def test_the_watchdog_waits_longer_where_that_is_normal(tmp_path: Path) -> None:
    """Starting and saving may take `slow_seconds`; progress at any pace is no hang."""
    ended: list[int] = []
    config = HealthConfig(hang_seconds=0.3, slow_seconds=100.0)
    pulse = Pulse()
    dog = Watchdog(config, tmp_path, 0, 1, pulse, Events(tmp_path, 0), ended.append)
    dog.start()

    def wait(phase: str, step: int, seconds: float) -> None:
        pulse.enter(phase, step)
        dog._stopped.wait(seconds)

    wait("compute", 1, 0.6)  # compiling
    wait("checkpoint", 2, 0.6)
    for _ in range(3):
        wait("compute", 2, 0.25)
    assert ended == [] and read_events(tmp_path) == []
    wait("compute", 3, 0.6)
    assert ended == [], "three times the last phase's time is no hang yet"
    wait("compute", 4, 6.0)
    assert ended == [HANG_EXIT]
    (event,) = read_events(tmp_path)
    assert event["step"] == 4 and "no progress" in event["message"]
    dog.close()
    assert "test_the_watchdog_waits" in (tmp_path / "health/hangs/step-00000004-rank-00000.txt").read_text()


def test_the_watchdog_knows_the_first_step_without_having_seen_it(tmp_path: Path) -> None:
    """Steps that are shorter than its tick: the one it sees first is not the first one."""
    ended: list[int] = []
    pulse = Pulse()
    dog = Watchdog(
        HealthConfig(hang_seconds=1.0, slow_seconds=100.0), tmp_path, 0, 1, pulse, Events(tmp_path, 0), ended.append
    )
    for step in range(1, 5):
        pulse.enter("compute", step)
    dog.start()
    for _ in range(300):  # it ends after some three seconds
        if not ended:
            dog._stopped.wait(0.1)
    dog.close()
    assert ended == [HANG_EXIT]


# ---------------------------------------------------------------- memory, disks, mistakes


def test_out_of_memory_leaves_a_report_of_the_rank(tmp_path: Path) -> None:
    _, said = run_ranks(2, train_with, small(tmp_path, 3, timeout=5.0), Fault("memory", 1, (1,)))
    assert said.startswith("OutOfMemoryError")
    (event,) = guarded(tmp_path)
    assert event["rank"] == 1 and event["guard"] == "memory" and "out of memory in phase compute" in event["message"]
    report = json.loads((tmp_path / "health" / "memory-rank-00001.json").read_text())
    assert report["step"] == 2 and report["measured"]["host_peak"] > 0
    # After one step: fp32 parameters on this rank, and two moments of each (plus step counts).
    assert report["state"]["optimizer"] >= 2 * report["state"]["parameters"] > 0


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs root to mount a tiny file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_costs_lines_and_never_half_of_one(tiny_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sink, events = JsonLines(tiny_disk, 0), Events(tiny_disk, 0)
    filler = tiny_disk / "filler"
    filler.write_bytes(b"x" * 40_000)
    for step in range(1, 400):
        sink.log({"step": step, "loss": 1.0, "text": "x" * 200})
    assert sink.lost > 0
    assert "lines could not be written" in capsys.readouterr().err
    kept = [line["step"] for line in read_metrics(tiny_disk)]
    assert kept == list(range(1, len(kept) + 1)) and len(kept) + sink.lost == 399
    filler.write_bytes(b"")
    sink.log({"step": 400})
    sink.rewind(400)
    assert [line["step"] for line in read_metrics(tiny_disk)][-2:] == [len(kept), 400]
    sink.close(0)
    events.tell("hang", "note", 1, "first")
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while file.write(b"x" * 4096):
            pass
    events.tell("hang", "note", 2, "x" * 9000)  # of which the half that fits is written
    assert events.lost == 1 and "an event could not be written (1 so far)" in capsys.readouterr().err
    filler.unlink()
    events.tell("hang", "note", 3, "last")
    assert [event["message"] for event in read_events(tiny_disk)] == ["first", "last"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hang_seconds": 0.0}, r"health\.hang_seconds: must be positive and finite, not 0\.0"),
        ({"nan_limit": 0}, r"health\.nan_limit: must be at least 1, not 0"),
        ({"spike_history": 500}, r"health\.spike_history: 500 steps never come together in a spike_window of 128"),
        ({"straggler_factor": 1.0}, r"health\.straggler_factor: must be above 1"),
    ],
)
def test_thresholds_that_mean_nothing_are_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        check_run(small(tmp_path, 1, HealthConfig(**change)), 2)
    with pytest.raises(ConfigError, match=r"health\.nan: .*'off', 'warn' or 'act', not 'stop'"):
        load_config("quickstart", ["health.nan=stop"])
