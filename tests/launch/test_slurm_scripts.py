"""The rendered scripts under a real SLURM, around a worker that costs nothing: what is requeued, and what is not.

`test_slurm_training.py` runs the same scripts around real training.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from clusters import Slurm, wait_for
from polylepis.launch.cli import main
from polylepis.launch.runs import launched
from polylepis.parallel.mesh import MeshConfig
from polylepis.pretrain.config import load_config, to_yaml
from polylepis.pretrain.preempt import read_outcome
from polylepis.pretrain.shrink import shrink

RUN = Path("runs/tiny")
# What torchrun and the ranks do, as far as the script can see it. `mode` lies in the run folder.
WORKER = """\
#!/bin/bash
run=$(sed -n 's/^folder: //p' "${@: -1}")
[ "$SLURM_NODEID" = 0 ] || exit 0
mkdir -p "$run/checkpoints"
step=$(ls "$run/checkpoints" | tail -n1 | sed 's/^step-0*//')
step=${step:-0}
finish() { # outcome
  local folder
  folder=$run/checkpoints/$(printf 'step-%08d' "$step")
  mkdir -p "$folder" && touch "$folder/manifest.json"
  echo "$1 $step" >"$run/launch/outcome"
  rm -f "$run/launch/stop"
  exit 0
}
told= # SLURM preempts the steps, not the script: torchrun hands SIGTERM to the ranks
trap 'told=requeue' TERM
case $(cat mode) in
  crash) echo "the worker crashes" >&2; exit 1 ;;
  refused) echo "refused 0" >"$run/launch/outcome"; exit 1 ;;
esac
while [ "$step" -lt "$(cat steps)" ]; do
  step=$((step + 1)); echo "$step" >"$run/step"; sleep 0.1
  [ -e "$run/launch/stop" ] && told=$(cat "$run/launch/stop")
  [ -n "$told" ] && finish "stopped $told"
done
finish "done"
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    worker = tmp_path / "bin" / "torchrun"
    worker.parent.mkdir()
    worker.write_text(WORKER)
    worker.chmod(0o755)
    config = shrink(load_config("quickstart"), 4, MeshConfig(tp=2, dp_shard=-1))
    Path("tiny.yaml").write_text(to_yaml(replace(config, name="tiny", folder=str(RUN))))
    return tmp_path


def submit(mode: str, steps: int, *options: str) -> list[str]:
    """The numbers of the jobs."""
    Path("mode").write_text(mode)
    Path("steps").write_text(str(steps))
    words = [
        "--procs-per-node",
        "2",
        "--shared",
        "--cpus-per-node",
        "2",
        "--setup",
        f"export PATH={Path.cwd()}/bin:$PATH",
    ]
    assert main(["launch", "slurm", "tiny.yaml", *words, *options, "--submit"]) == 0
    return [entry.id for entry in launched(RUN)]


def step(run: Path = RUN) -> int:
    file = run / "step"
    return int(file.read_text().strip() or 0) if file.exists() else 0


def output() -> str:
    return "".join(file.read_text() for file in sorted((RUN / "launch" / "0001").glob("*.out")))


def test_told_to_save_it_goes_back_into_the_queue(slurm: Slurm) -> None:
    """Two nodes; twice told as before a time limit; then it finishes."""
    (job,) = submit(
        "work", 10_000, "--nodes", "2", "--gpus-per-node", "2", "--env", "MASTER_ADDR=127.0.0.1", "--time", "20"
    )
    before = 0
    for _ in range(2):
        wait_for(lambda: step() > before + 3, 60, "steps")  # noqa: B023
        slurm.ask("scancel", "--signal=USR1", "--batch", job)
        wait_for(lambda: slurm.state(job) == "PENDING", 60, "requeue")
        outcome = read_outcome(RUN)
        assert outcome is not None and outcome.startswith("stopped requeue")
        before = int(outcome.split()[-1])
    Path("steps").write_text("0")
    assert slurm.wait(job, 120) == "COMPLETED"
    text = output()
    assert text.count("USR1: asking the run to save and stop") == 2
    assert "] start 0 on n[1-2] from none, rendezvous 127.0.0.1:2" in text
    assert f"] start 2 on n[1-2] from step-{before:08d}" in text


def test_two_restarts_without_progress_are_enough(slurm: Slurm) -> None:
    (job,) = submit("crash", 1)
    assert slurm.wait(job, 180) == "FAILED"
    text = output()
    assert [f"] start {n} on " in text for n in range(4)] == [True, True, True, False]
    assert "two restarts in a row made no checkpoint beyond none: giving up" in text


@pytest.mark.full
def test_progress_starts_the_count_again(slurm: Slurm) -> None:
    """Two crashes, a saved step, and there are two restarts again."""
    (job,) = submit("crash", 10_000)
    wait_for(lambda: "] start 1 on" in output() and output().count("] requeue") == 2, 120, "two crashes")
    Path("mode").write_text("work")
    wait_for(lambda: step() > 2, 60, "steps")
    slurm.ask("scancel", "--signal=USR1", "--batch", job)
    wait_for(lambda: output().count("] requeue") == 3, 60, "requeue")
    Path("mode").write_text("crash")
    assert slurm.wait(job, 240) == "FAILED"
    assert [f"] start {n} on " in output() for n in (5, 6)] == [True, False]


def test_what_was_refused_is_not_tried_again(slurm: Slurm) -> None:
    (job,) = submit("refused", 1)
    assert slurm.wait(job, 60) == "FAILED"
    assert "the run: refused 0" in output() and "] requeue" not in output()
    assert "ExitCode=2:0" in slurm.ask("scontrol", "show", "job", job)


def test_scancel_means_it(slurm: Slurm) -> None:
    (job,) = submit("work", 10_000)
    wait_for(lambda: step() > 2, 60, "steps")
    slurm.ask("scancel", job)
    wait_for(lambda: slurm.state(job) in ("CANCELLED", "GONE"), 90, "the end")
    assert "] requeue" not in output()


def test_preemption_saves_and_comes_back(slurm: Slurm) -> None:
    """A job of a higher partition takes the nodes; ours is told by SIGTERM, saves, and goes on afterwards."""
    (job,) = submit("work", 10_000, "--nodes", "2", "--env", "MASTER_ADDR=127.0.0.1", "--partition", "main")
    wait_for(lambda: step() > 2, 60, "steps")
    other = slurm.ask(
        "sbatch", "--parsable", "-p", "urgent", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 3"
    ).strip()
    wait_for(lambda: slurm.state(job) == "PENDING", 90, "preemption")
    saved = read_outcome(RUN)
    assert saved is not None and saved.startswith("stopped requeue")
    Path("steps").write_text("0")
    slurm.wait(other, 60)
    assert slurm.wait(job, 180) == "COMPLETED"
    assert f"from step-{int(saved.split()[-1]):08d}" in output()


def test_status_logs_and_stop(slurm: Slurm, capsys: pytest.CaptureFixture[str]) -> None:
    (job,) = submit("work", 10_000)
    wait_for(lambda: step() > 2, 60, "steps")
    capsys.readouterr()
    assert main(["launch", "slurm", "tiny.yaml", "--procs-per-node", "2", "--submit"]) == 2
    assert f"runs/tiny: job {job} of this run is RUNNING; `polylepis launch stop" in capsys.readouterr().err
    assert main(["launch", "status", str(RUN)]) == 0
    assert f"job         {job}  RUNNING" in capsys.readouterr().out
    assert main(["launch", "stop", str(RUN)]) == 0
    assert "asked to save at the next step and stop" in capsys.readouterr().out
    assert slurm.wait(job, 60) == "COMPLETED"
    assert (read_outcome(RUN) or "").startswith("stopped end")
    assert main(["launch", "logs", str(RUN)]) == 0
    said = capsys.readouterr().out
    assert "==> runs/tiny/launch/0001/tiny-" in said and "the run: stopped end" in said
    assert main(["launch", "status", str(RUN), "--json"]) == 0
    assert '"state": "COMPLETED"' in capsys.readouterr().out
    assert main(["launch", "stop", str(RUN)]) == 2
    assert "runs/tiny: nothing to stop" in capsys.readouterr().err


def test_stop_now_kills_and_nothing_comes_back(slurm: Slurm, capsys: pytest.CaptureFixture[str]) -> None:
    """A running job and the one that waits behind it."""
    first, second = submit("work", 10_000, "--chain", "2")
    wait_for(lambda: step() > 2, 60, "steps")
    capsys.readouterr()
    assert main(["launch", "stop", str(RUN), "--now"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert f"{RUN}: job {second}: cancelled before it started" in said
    assert f"{RUN}: job {first}: cancelled; it resumes from the newest checkpoint" in said
    for job in (first, second):
        wait_for(lambda: slurm.state(job) in ("CANCELLED", "GONE"), 90, "the end")  # noqa: B023
    assert "] requeue" not in output()
    assert main(["launch", "stop", str(RUN), "--now"]) == 2
    assert "nothing to stop" in capsys.readouterr().err


def test_a_sweep_is_an_array_with_a_run_each(slurm: Slurm, capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs").mkdir()
    submit("work", 3, "--sweep", "optim.lr=1e-3,2e-3", "--sweep", "seed=1,2", "--sbatch=--array=0-3%2")
    runs = [RUN / f"optim.lr={lr}_seed={seed}" for lr in ("1e-3", "2e-3") for seed in (1, 2)]
    wait_for(lambda: [read_outcome(run) for run in runs] == ["done 3"] * 4, 120, "four runs")
    values = [load_config(str(RUN / "launch" / "0001" / f"config-{index}.yaml")) for index in range(4)]
    assert [(c.optim.lr, c.seed, c.path) for c in values] == [
        (lr, seed, run) for (lr, seed), run in zip([(1e-3, 1), (1e-3, 2), (2e-3, 1), (2e-3, 2)], runs, strict=True)
    ]
    capsys.readouterr()
    assert main(["launch", "status", str(runs[2])]) == 0
    assert "done 3" in capsys.readouterr().out


def test_a_chain_goes_on_where_the_last_job_stopped(slurm: Slurm) -> None:
    first, second = submit("work", 10_000, "--chain", "2")
    wait_for(lambda: step() > 2, 60, "steps")
    assert slurm.state(second) == "PENDING"
    slurm.ask("scancel", "--signal=USR1", "--batch", first)
    assert slurm.wait(first, 60) == "COMPLETED"
    wait_for(lambda: slurm.state(second) == "RUNNING", 60, "the second job")
    Path("steps").write_text("0")
    assert slurm.wait(second, 60) == "COMPLETED"
    assert "] start 0 on" in output() and (read_outcome(RUN) or "").startswith("done")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            ("--partition", "mian"),
            "--partition mian: no such partition; did you mean main? accepted: main, short, urgent",
        ),
        (("--nodes", "3"), "--nodes 3: partition main has 2"),
        (("--gpus-per-node", "4"), "--gpus-per-node 4: partition main has 2 at most"),
        (("--partition", "short", "--time", "1-0"), "--time 1-0: 86400 s, but partition short allows 600 s"),
        (("--sbatch=--constraint=none",), "sbatch: "),  # the scheduler's own words
    ],
)
def test_what_this_cluster_cannot_do(
    slurm: Slurm, options: tuple[str, ...], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = shrink(load_config("quickstart"), 4, MeshConfig(dp_shard=-1))
    Path("tiny.yaml").write_text(to_yaml(replace(config, folder=str(RUN), data=replace(config.data, global_batch=12))))
    assert main(["launch", "slurm", "tiny.yaml", "--procs-per-node", "2", "--shared", *options, "--submit"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"polylepis: {line}") and error.count("\n") == 1
    assert not list((RUN / "launch").glob("*.jsonl")) if "sbatch" in line else not RUN.exists()
