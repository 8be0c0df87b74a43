"""The doctor finds what is planted, says nothing of a sound machine, and its arithmetic is right."""

from __future__ import annotations

import itertools
import json
import os
import stat
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from polylepis.launch.cli import main
from polylepis.launch.doctor import node as node_module
from polylepis.launch.doctor import ranks as ranks_module
from polylepis.launch.doctor.node import Subject, examine_node, facts
from polylepis.launch.doctor.ranks import Ranks, examine_ranks, judge_pairs, rounds
from polylepis.launch.doctor.report import Check, Report, Thresholds, collect, compare_facts, guarded, read_reports
from polylepis.launch.errors import LaunchError
from polylepis.pretrain.config import RunConfig, load_config, to_yaml
from polylepis.pretrain.shrink import shrink
from ranks import run_ranks

LIMITS = Thresholds.read()


def tiny(folder: Path) -> RunConfig:
    return replace(shrink(load_config("quickstart")), folder=str(folder))


def subject(folder: Path, **limits: Any) -> Subject:
    return Subject(tiny(folder), 2, folder, replace(LIMITS, free_memory_gib=0.1, **limits))


def by_name(report: Report) -> dict[str, Check]:
    return {check.name: check for check in report.checks}


def test_a_sound_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    report = examine_node(subject(tmp_path, write_mb_per_second=0.0))
    found = by_name(report)
    assert report.status in ("ok", "warn")
    assert [name for name, check in found.items() if check.status == "fail"] == []
    assert found["data"].value == "made up (mock)" and found["GPUs"].status == "skip"
    assert found["network"].value == "lo (127.0.0.1) leads to 127.0.0.1"
    assert float(found["product"].value.split()[0]) > 0 and list(tmp_path.iterdir()) == []


SICK = {
    "memory": ({"free_memory_gib": 1e6}, {}, "fail", "GiB free"),
    "shared memory": ({"shm_gib": 1e6}, {}, "warn", "in /dev/shm"),
    "open files": ({"open_files": 10**9}, {}, "warn", ""),
    "disk speed": ({"write_mb_per_second": 1e9}, {}, "warn", "MB/s with fsync"),
    "network": ({}, {"MASTER_ADDR": "127.0.0.1", "SLURM_NNODES": "2"}, "fail", "lo (127.0.0.1) leads to 127.0.0.1"),
    "NCCL variables": ({}, {"NCCL_SOCKET_IFNAME": "none0"}, "fail", "NCCL_SOCKET_IFNAME=none0"),
    "rendezvous port": ({}, {"MASTER_PORT": "taken"}, "fail", ""),
}


@pytest.mark.parametrize("name", SICK)
def test_what_is_planted_is_found(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    limits, environment, status, value = SICK[name]
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        for key, word in environment.items():
            monkeypatch.setenv(key, str(taken.getsockname()[1]) if word == "taken" else word)
        examined = Subject(tiny(tmp_path), 2, tmp_path, replace(LIMITS, **limits))
        check = getattr(node_module, f"check_{SHORT.get(name, name.replace(' ', '_'))}")(examined)
    assert (check.name, check.status) == (name, status) and value in check.value


SHORT = {
    "shared memory": "shm",
    "disk speed": "write_speed",
    "NCCL variables": "nccl_environment",
    "rendezvous port": "port",
}


def test_interfaces_that_are_there_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("lo", "=lo", "^docker,veth", "none,lo"):
        monkeypatch.setenv("NCCL_SOCKET_IFNAME", value)
        expected = "fail" if value.startswith("none") else "ok"
        assert node_module.check_nccl_environment(subject(tmp_path)).status == expected


def test_room_is_counted_in_checkpoints(tmp_path: Path) -> None:
    huge = replace(load_config("mamba2-hybrid-8b"), folder=str(tmp_path))
    check = node_module.check_space(Subject(huge, 1, tmp_path, LIMITS))
    one = 8_654_517_248 * 12 / 2**30
    assert f"of {one:.2f} GiB need {one * (huge.train.keep + 1):.1f} GiB" in check.detail


def test_missing_data_is_a_finding_not_a_crash(tmp_path: Path) -> None:
    config = replace(tiny(tmp_path), data=replace(tiny(tmp_path).data, path=str(tmp_path / "nowhere")))
    report = examine_node(Subject(config, 1, tmp_path, LIMITS))
    assert by_name(report)["data"].status == "fail" and str(tmp_path) in by_name(report)["data"].detail


SMI = """\
0, NVIDIA H100, 81559, 4, 0, No, Not Active, Not Active
1, NVIDIA H100, 81559, 20000, 3, Yes, Active, Not Active
"""


def test_gpus_as_nvidia_smi_tells_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ncat <<END\n{SMI}END\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    found = {c.name: c for c in node_module.check_gpus(replace(subject(tmp_path), procs=2))}
    assert (found["GPUs"].status, found["GPUs"].value) == ("ok", "2 × NVIDIA H100")
    assert found["GPU health"].status == "fail"
    assert found["GPU health"].value == (
        "GPU 1: 3 uncorrected ECC errors; GPU 1: a page waits to be retired, reset it; GPU 1: hw_slowdown; "
        "GPU 1: 20000 MiB held by another process"
    )
    few = {c.name: c for c in node_module.check_gpus(replace(subject(tmp_path), procs=3))}
    assert few["GPUs"].status == "fail"


def test_ranks_together(tmp_path: Path) -> None:
    reports = run_ranks(3, examine_ranks, tiny(tmp_path), replace(LIMITS, gemm_spread=1e9), tmp_path, timeout=240)
    assert reports[0] == reports[1] == reports[2]
    found = by_name(reports[0])
    assert [name for name, check in found.items() if check.status in ("fail", "warn")] == []
    assert found["rendezvous"].value.startswith("3 ranks on 1 node(s)")
    assert found["pairs"].value.startswith("3 links, median ")
    assert list(tmp_path.iterdir()) == []


def examine_with_a_fault(config: RunConfig, folder: Path, fault: str) -> Report:
    """Each rank is a node of its own; rank 1 is the sick one."""
    rank = dist.get_rank()
    ranks_module.node_name = lambda: f"n{rank}"
    limits = replace(LIMITS, gemm_spread=1e9)
    if rank == 1 and fault == "code":
        ranks_module.facts = lambda config: facts(config) | {"code": "0" * 16}
    if rank == 1 and fault == "sum":
        honest = dist.all_reduce

        def wrong(tensor: torch.Tensor) -> None:
            honest(tensor)
            tensor[0] += 1

        dist.all_reduce = wrong
    if rank == 1 and fault == "folder":
        folder = folder / "another"
        ranks_module.SHOWN_LATE = 1.0
    if rank == 1 and fault == "clock":
        import time

        real = time.time
        time.time = lambda: real() + 60
    if fault == "slow":
        limits = replace(limits, all_reduce_gb_per_second=1e9)
    return examine_ranks(config, limits, folder)


FAULTS = {
    "code": ("same everywhere", "fail", ["n1"]),
    "sum": ("all-reduce", "fail", []),
    "folder": ("shared folder", "fail", ["n1"]),
    "clock": ("clock skew", "warn", []),
    "slow": ("bus bandwidth", "fail", []),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named(fault: str, tmp_path: Path) -> None:
    name, status, bad = FAULTS[fault]
    report = run_ranks(2, examine_with_a_fault, tiny(tmp_path), tmp_path, fault, timeout=240)[0]
    assert {n: c.status for n, c in by_name(report).items() if c.status in ("fail", "warn")} == {name: status}
    assert report.bad_nodes == bad
    check = by_name(report)[name]
    assert fault == "slow" or "n1" in check.value + check.detail


@given(st.integers(2, 33))
def test_every_pair_meets_once_and_nobody_twice_a_round(count: int) -> None:
    members = list(range(100, 100 + count))
    played = rounds(members)
    assert len(played) == count - 1 + count % 2
    for pairs in played:
        ranks = [rank for pair in pairs for rank in pair]
        assert len(ranks) == len(set(ranks))
    met = sorted(tuple(sorted(pair)) for pairs in played for pair in pairs)
    assert met == list(itertools.combinations(members, 2))


@given(st.integers(4, 12), st.randoms())
def test_the_slow_node_is_named_and_no_other(count: int, random: Random) -> None:
    slow = random.randrange(count)
    ranks = Ranks(0, count, torch.device("cpu"), [f"n{i}" for i in range(count)], list(range(count)))
    links = {
        a: {b: 0.010 * (5 if slow in (a, b) else 1) * random.uniform(0.9, 1.1) for b in range(count) if b != a}
        for a in range(count)
    }
    check, named = judge_pairs(ranks, links, 16, LIMITS)
    assert (check.status, named) == ("fail", {f"n{slow}"})


def test_nodes_are_collected_into_two_lists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = {"torch": "2.13.0", "code": "a"}
    for name, status in (("n1", "ok"), ("n2", "fail"), ("n3", "warn"), ("n4", "ok")):
        known = {**same, "code": "b"} if name == "n4" else same
        Report(name, [Check("disk", status, "")], known).write(tmp_path)  # type: ignore[arg-type]
    Report("ranks", [Check("pairs", "fail", "")], {}, ["n3"]).write(tmp_path)
    assert main(["doctor", "--collect", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "1 nodes pass, 3 fail: n2, n3, n4" in said and "n4: code b, not a" in said
    assert (tmp_path / "passing_nodes.txt").read_text() == "n1\n"
    assert (tmp_path / "failing_nodes.txt").read_text() == "n2\nn3\nn4\n"
    assert json.loads((tmp_path / "summary.json").read_text())["failing"] == ["n2", "n3", "n4"]
    assert len(read_reports(tmp_path)) == 5  # the summary is none of them
    assert collect(tmp_path, [Report("n1", [Check("disk", "ok")])]) == (["n1"], [])


def test_equal_facts_are_equal() -> None:
    check, odd = compare_facts({"a": {"torch": "1"}, "b": {"torch": "1"}})
    assert (check.status, odd) == ("ok", [])


def test_a_broken_check_is_a_finding() -> None:
    check = guarded("disk", lambda: Check("disk", "ok", str(1 / 0)))
    assert check == Check("disk", "fail", "ZeroDivisionError", "division by zero")


def test_thresholds_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "limits.yaml"
    file.write_text("gemm_spread: 1.5\n")
    assert Thresholds.read(file) == replace(LIMITS, gemm_spread=1.5)
    for text, line in (("gemm_spred: 1.5", "unknown gemm_spred; accepted: free_memory_gib, "),
                       ("open_files: many", "open_files: Input should be a valid integer, not 'many'"),
                       ("3", "unknown 3")):  # fmt: skip
        file.write_text(text)
        with pytest.raises(LaunchError, match=line):
            Thresholds.read(file)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Stage 1 in process; a failing node is exit code 1, and stage 2 does not start on it."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(to_yaml(tiny(Path("runs/tiny"))))
    Path("easy.yaml").write_text("free_memory_gib: 0.1\n")
    assert main(["doctor", "tiny.yaml", "--stage", "node", "--thresholds", "easy.yaml", "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert report["facts"]["torch"] == torch.__version__ and len(report["facts"]["configuration"]) == 16
    Path("hard.yaml").write_text("free_memory_gib: 1.0e+6\n")
    assert main(["doctor", "tiny.yaml", "--thresholds", "hard.yaml"]) == 1
    said = capsys.readouterr().out
    assert "fail  memory" in said and "ranks" not in said
    assert main(["doctor", "tiny.yaml", "--procs", "0"]) == 2
    assert main(["doctor", "--collect"]) == 2
    assert main(["doctor", "tiny.yaml", "--thresholds", "none.yaml"]) == 2


@pytest.mark.full
def test_both_stages_through_torchrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(to_yaml(tiny(Path("runs/tiny"))))
    Path("easy.yaml").write_text("free_memory_gib: 0.1\ngemm_spread: 1000.0\n")
    assert main(["doctor", "tiny.yaml", "--thresholds", "easy.yaml"]) == 0
    said = capsys.readouterr().out
    assert "ok    all-reduce" in said and "2 ranks on 1 node(s)" in said
    assert (tmp_path / "runs/tiny/launch/doctor/ranks.json").is_file()
