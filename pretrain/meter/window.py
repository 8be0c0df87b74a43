"""A torch-profiler window on a running job: a request file, one agreed decision, a trace per rank in `profile/`."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist

from ..errors import ConfigError

FOLDER = "profile"
REQUEST = "request.json"
MOST = 100  # steps: traces grow by tens of megabytes per step


def ask(run: Path, steps: int, all_ranks: bool) -> Path:
    """Ask the job of a run folder to profile its next steps, on rank 0 or on all ranks.

    Raises:
        ConfigError: no run folder, a request that is still waiting, or a number of steps that makes no sense.
    """
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{run}: not a run folder: it has no config.yaml")
    if not 1 <= steps <= MOST:
        raise ConfigError(f"--steps {steps}: between 1 and {MOST} steps can be profiled")
    path = run / FOLDER / REQUEST
    if path.exists():
        raise ConfigError(f"{path}: a request is waiting already; is the job running? Remove the file to take it back")
    path.parent.mkdir(exist_ok=True)
    aside = path.with_suffix(".part")
    aside.write_text(json.dumps({"steps": steps, "all_ranks": all_ranks}))
    aside.replace(path)
    return path


class ProfileWindow:
    """Opens when rank 0 has seen a request and all ranks have heard of it; closes itself after its steps."""

    def __init__(self, run: Path, device: torch.device) -> None:
        self.folder, self.device = run / FOLDER, device
        self.rank = dist.get_rank()
        self._steps_left, self._step = 0, 0
        self._profiler: torch.profiler.profile | None = None

    def wanted(self) -> int:
        """Rank 0: steps that a waiting request asks for, negative for all ranks; else 0. One look at the disk."""
        path = self.folder / REQUEST
        if self.rank != 0 or self._steps_left or not path.exists():
            return 0
        try:
            request = json.loads(path.read_text())
            steps = min(MOST, max(0, int(request["steps"])))
            return -steps if request["all_ranks"] else steps
        except (OSError, ValueError, KeyError, TypeError):
            return 0
        finally:
            path.unlink(missing_ok=True)

    def agree(self, steps: int) -> None:
        """All ranks, once per step, with the same number: open, go on, or close."""
        self._step += 1
        if self._steps_left:
            self._steps_left -= 1
            if not self._steps_left:
                self._finish()
        elif steps:
            self._open(steps)

    def _open(self, steps: int) -> None:
        self._steps_left = abs(steps)
        if self.rank != 0 and steps > 0:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=activities, record_shapes=True)
        self._profiler.start()

    def _finish(self) -> None:
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        profiler.stop()
        try:
            profiler.export_chrome_trace(str(self.folder / f"trace-{self._step:08d}-rank-{self.rank:05d}.json.gz"))
        except OSError as error:
            print(f"polylepis: the profile could not be written: {error}", flush=True)

    def close(self) -> None:
        """The loop is over: what has been seen so far is written."""
        if self._steps_left:
            self._steps_left = 0
            self._finish()
