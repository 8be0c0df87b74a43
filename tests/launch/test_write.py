"""Scripts: the committed examples are what the tool writes, and what cannot run is refused before anything exists."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polylepis.launch.cli import main
from polylepis.launch.errors import LaunchError
from polylepis.launch.render import Places, render
from polylepis.launch.request import Request, parse_sbatch, parse_time, plan_environment
from polylepis.launch.slurm import Partition, check_request
from polylepis.launch.snapshot import PACKAGE, code_hash
from polylepis.parallel.mesh import MeshConfig
from polylepis.pretrain.claim import Claim
from polylepis.pretrain.config import load_config, to_yaml
from polylepis.pretrain.shrink import shrink

EXAMPLES = PACKAGE / "examples" / "launch"
SETUP = ("--setup", "source /opt/polylepis/bin/activate", "--elsewhere")
HYBRID = ("mamba2-hybrid-8b", "mesh.tp=8", "mesh.dp_shard=-1", "train.device=cuda")
LONG = ("--time", "2-00:00:00", "--partition", "gpu", "--account", "research")
CASES = {
    "slurm-1-node.sbatch": ("slurm", *HYBRID, "--nodes", "1", "--gpus-per-node", "8", *LONG),
    "slurm-8-nodes.sbatch": (
        "slurm", *HYBRID, "--nodes", "8", "--gpus-per-node", "8", "--cpus-per-node", "96", *LONG, "--doctor",
        "--sbatch", "--constraint=h100", "--env", "NCCL_IB_HCA=mlx5",
        "--container", "/images/polylepis.sqsh", "--container-mount", "/data:/data",
    ),
    "slurm-128-nodes-chain.sbatch": (
        "slurm", *HYBRID, "mesh.dp_replicate=8", "data.micro_batch=2", "--nodes", "128", "--gpus-per-node", "8", *LONG,
        "--chain", "6",
    ),
    "torchrun-1-node.sh": ("torchrun", "quickstart", "--procs-per-node", "2"),
    # 840 divides by 4, 5, 6, 7 and 8: the global batch stays the same whatever is lost.
    "torchrun-8-nodes-elastic.sh": (
        "torchrun", *HYBRID, "data.global_batch=840", "data.micro_batch=1", "--nodes", "4:8", "--gpus-per-node", "8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_examples_are_what_the_tool_writes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Set POLYLEPIS_WRITE_EXAMPLES=1 to write them anew."""
    monkeypatch.chdir(tmp_path)
    assert main(["launch", *CASES[name], *SETUP]) == 0
    script = Path(capsys.readouterr().out.strip())
    if os.environ.get("POLYLEPIS_WRITE_EXAMPLES") == "1":
        shutil.copyfile(script, EXAMPLES / name)
    assert script.read_text() == (EXAMPLES / name).read_text()
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_every_example_is_tested() -> None:
    assert sorted(path.name for path in EXAMPLES.iterdir()) == sorted(CASES)


def tiny(folder: str = "runs/tiny") -> str:
    config = shrink(load_config("quickstart"), 4, MeshConfig(tp=2, dp_shard=-1))
    Path("tiny.yaml").write_text(to_yaml(replace(config, name="tiny", folder=folder)))
    return "tiny.yaml"


def test_the_snapshot_is_the_code_and_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["launch", "torchrun", tiny(), "train.steps=3", "--procs-per-node", "2"]) == 0
    folder = Path("runs/tiny/launch/0001")
    assert load_config(str(folder / "config.yaml")) == load_config("tiny.yaml", ["train.steps=3"])
    told = json.loads((folder / "code.json").read_text())
    assert told["code_hash"] == code_hash()
    code = (
        "import polylepis.pretrain.config as c, polylepis.launch.snapshot as s;"
        "c.load_config('quickstart'); print(c.__file__, s.code_hash())"
    )
    environment = os.environ | {"PYTHONPATH": str((folder / "code").absolute()), "PYTHONSAFEPATH": "1"}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    file, digest = said.stdout.split()
    assert Path(file).is_relative_to(folder.absolute()) and digest == code_hash()
    assert main(["launch", "torchrun", "tiny.yaml", "--procs-per-node", "2"]) == 0
    assert sorted(path.name for path in Path("runs/tiny/launch").iterdir()) == ["0001", "0002"]


def test_an_absolute_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "far away"
    assert main(["launch", "slurm", tiny(str(folder)), "--procs-per-node", "2", "--elsewhere"]) == 0
    text = (folder / "launch" / "0001" / "job.sbatch").read_text()
    assert f"export LAUNCH='{folder}/launch/0001'" in text and '"$PWD"/' not in text


REFUSED = {
    "no processes": ((), "--gpus-per-node or --procs-per-node: how many"),
    "world size": (("--procs-per-node", "3"), "1 node(s) × 3 processes: mesh: "),
    "batch": (("--procs-per-node", "2", "--nodes", "3"), "3 node(s) × 2 processes: global_batch"),
    "time": (("--procs-per-node", "2", "--time", "2 days"), "--time 2 days: is no time limit; accepted: minutes,"),
    "no time": (("--procs-per-node", "2", "--time", "0"), "--time 0: is no time at all"),
    "grace": (("--procs-per-node", "2", "--time", "5"), "--time 5: 300 s, but the run is told to save 300 s before"),
    "nodes": (("--procs-per-node", "2", "--nodes", "many"), "--nodes many: is written N, or MIN:MAX"),
    "elastic slurm": (("--procs-per-node", "2", "--nodes", "1:2"), "--nodes 1:2: a SLURM job has a fixed number"),
    "image": (("--procs-per-node", "2", "--container", "./none.sqsh"), "--container ./none.sqsh: no such file"),
    "mount": (
        ("--procs-per-node", "2", "--container", "docker://x", "--container-mount", "/none:/data"),
        "--container-mount /none:/data: /none does not exist here",
    ),
    "variable": (("--procs-per-node", "2", "--env", "A"), "--env A: is written KEY=VALUE"),
    "sbatch": (("--procs-per-node", "2", "--sbatch", "mem=3"), "--sbatch mem=3: is no option of sbatch"),
    "cores": (("--procs-per-node", "2", "--cpus-per-node", "1"), "--cpus-per-node 1: fewer than the 2 processes"),
    "sweep": (("--procs-per-node", "2", "--sweep", "optim.lr=1"), "--sweep optim.lr=1: is written section.key="),
    "sweep of nothing": (("--procs-per-node", "2", "--sweep", "optim.lt=1,2"), "optim.lt: unknown key; nearest is lr"),
    "gpus": (("train.device=cuda", "--procs-per-node", "2", "--gpus-per-node", "4"), "train.device is cuda: one"),
    "submit": (("--procs-per-node", "2", "--elsewhere", "--submit"), "--submit with --elsewhere"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "line"), REFUSED.values(), ids=REFUSED)
def test_refusals_come_before_anything_is_written(
    options: tuple[str, ...],
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["launch", "slurm", tiny(), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"polylepis: {line}") and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


def test_a_run_that_lives_is_not_launched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dataclasses import asdict

    monkeypatch.chdir(tmp_path)
    name = tiny()
    Path("runs/tiny").mkdir(parents=True)
    elsewhere = Claim("node17", 4242, 0.0, "pid:[1]", "SLURM job 99")
    Path("runs/tiny/lock.json").write_text(json.dumps(asdict(elsewhere)))
    for command in (("launch", "slurm", name, "--procs-per-node", "2"), ("train", name)):
        assert main(command) == 2
        assert "runs/tiny: belongs to a live job, process 4242 on node17 of SLURM job 99" in capsys.readouterr().err
    assert [path.name for path in Path("runs/tiny").iterdir()] == ["lock.json"]


KNOWN = (Partition("gpu", True, 2 * 86400, 16, 96, 8), Partition("debug", False, 3600, 2, 96, 8))
IMPOSSIBLE = {
    "--partition gpus: no such partition; did you mean gpu? accepted: gpu, debug": Request(partition="gpus"),
    "--nodes 17: partition gpu has 16": Request(nodes=(17, 17)),
    "--gpus-per-node 16: partition gpu has 8 at most": Request(gpus=16, procs=16),
    "--cpus-per-node 128: partition gpu has 96 at most": Request(cpus=128),
    "--time 2:00:00: 7200 s, but partition debug allows 3600 s": Request(partition="debug", time="2:00:00"),
}


@pytest.mark.parametrize(("line", "request_"), IMPOSSIBLE.items(), ids=IMPOSSIBLE)
def test_what_a_partition_cannot_give(line: str, request_: Request) -> None:
    check_request(Request(nodes=(16, 16), gpus=8, cpus=96, time="2-0"), KNOWN)
    with pytest.raises(LaunchError) as error:
        check_request(request_, KNOWN)
    assert str(error.value) == line


@given(st.integers(0, 30), st.integers(0, 23), st.integers(0, 59), st.integers(0, 59))
def test_times_as_slurm_reads_them(days: int, hours: int, minutes: int, seconds: int) -> None:
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    forms = {
        f"{days}-{hours:02}:{minutes:02}:{seconds:02}": total,
        f"{days}-{hours}:{minutes:02}": total - seconds,
        f"{days}-{hours}": total - seconds - 60 * minutes,
        f"{hours}:{minutes:02}:{seconds:02}": total - days * 86400,
        f"{minutes}:{seconds:02}": minutes * 60 + seconds,
        f"{minutes}": minutes * 60,
    }
    for text, expected in forms.items():
        if expected:
            assert parse_time(text) == expected
        else:
            with pytest.raises(LaunchError, match="no time at all"):
                parse_time(text)


@pytest.mark.parametrize("text", ["", "1:2:3:4", "1-", "1h", "-1", "1-2:3:4:5", "::"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(LaunchError, match="is no time limit"):
        parse_time(text)


def test_sbatch_lines_pass_through_as_written() -> None:
    assert parse_sbatch(["#SBATCH --mem=4G\n--qos=high", " -p x "]) == ("--mem=4G", "--qos=high", "-p x")


def test_connections_are_chosen_by_the_plan() -> None:
    config = load_config("mamba2-hybrid-8b", ["train.device=cuda"])
    chosen = [
        plan_environment(replace(config, mesh=MeshConfig(dp_replicate=r, dp_shard=s, tp=tp)), r * s * tp)[0][1]
        for r, s, tp in ((1, 8, 1), (1, 4, 8), (1, 1, 8), (4, 1, 8))
    ]
    assert chosen == ["", "", "1", "1"]
    assert plan_environment(shrink(config), 2) == []  # no GPU, no queues


def test_values_of_the_user_cannot_break_out_of_the_script() -> None:
    nasty = "a'b\"c $(touch broken) `touch broken` ; touch broken #"
    config = replace(shrink(load_config("quickstart")), name=nasty, folder=f"runs/{nasty}")
    request = Request(procs=2, env={"NASTY": nasty})
    for kind in ("slurm", "torchrun"):
        text = render(kind, config, request, Places(f"runs/{nasty}/launch/0001", (f"runs/{nasty}",)))
        line = next(line for line in text.splitlines() if line.startswith("export NASTY="))
        said = subprocess.run(["bash", "-c", f'{line}; printf %s "$NASTY"'], capture_output=True, text=True, check=True)
        assert said.stdout == nasty
        subprocess.run(["bash", "-n", "-c", text], check=True)
