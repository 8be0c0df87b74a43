"""Where metrics go: one protocol, and a file, a progress bar, wandb and TensorBoard behind it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from tqdm import tqdm

METRICS_FILE = "metrics.jsonl"
Metrics = Mapping[str, Any]


class Sink(Protocol):
    """Takes one line of metrics per trained step; `step` is among them and grows, except after `rewind`."""

    def log(self, metrics: Metrics) -> None: ...

    def rewind(self, step: int) -> None:
        """The run goes on from `step`: lines of later steps are void and will be written again."""
        ...

    def close(self, exit_code: int) -> None: ...


class JsonLines:
    """`metrics.jsonl`. A disk that is full costs lines, never the run, and never leaves half a line."""

    def __init__(self, folder: Path, first_step: int) -> None:
        self.path = folder / METRICS_FILE
        self.lost = 0
        self._file = -1
        self.rewind(first_step)

    def log(self, metrics: Metrics) -> None:
        line = (json.dumps(dict(metrics)) + "\n").encode()
        before = os.lseek(self._file, 0, os.SEEK_END)
        try:
            if os.write(self._file, line) < len(line):
                raise OSError("no space for a whole line")
        except OSError as error:
            os.ftruncate(self._file, before)
            self._lose(error)

    def rewind(self, step: int) -> None:
        kept = [line for line in read_metrics(self.path.parent) if line["step"] <= step]
        aside = self.path.with_suffix(".part")
        try:
            aside.write_text("".join(json.dumps(line) + "\n" for line in kept))
            aside.replace(self.path)
        except OSError as error:
            if self._file < 0:
                raise  # at the start of a run a folder that cannot be written is a mistake, not bad luck
            aside.unlink(missing_ok=True)
            self._lose(error)
            return
        if self._file >= 0:
            os.close(self._file)
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND)

    def close(self, exit_code: int) -> None:
        os.close(self._file)

    def _lose(self, error: OSError) -> None:
        self.lost += 1
        if self.lost == 1 or self.lost % 1000 == 0:
            print(f"polylepis: {self.path}: {self.lost} lines could not be written: {error}", file=sys.stderr)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All complete lines of a run's metrics; a line cut by a crash is left out."""
    path = folder / METRICS_FILE
    lines: list[dict[str, Any]] = []
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


class Bar:
    """The progress bar."""

    def __init__(self, steps: int, first_step: int) -> None:
        self._bar = tqdm(total=steps, initial=first_step, unit="step", file=sys.stderr)

    def log(self, metrics: Metrics) -> None:
        shown = {key.removeprefix("loss/"): f"{v:.2f}" for key, v in metrics.items() if key.startswith("loss/")}
        shown["tok/s"] = f"{metrics['tokens_per_second']:,.0f}"
        shown["s/step"] = f"{metrics['step_seconds']:.2f}"
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(metrics["step"] - self._bar.n)

    def rewind(self, step: int) -> None:
        self._bar.n = self._bar.last_print_n = step
        self._bar.refresh()

    def close(self, exit_code: int) -> None:
        self._bar.close()


class Wandb:
    """wandb; `auto` is online where a key is configured, offline in the run folder otherwise."""

    def __init__(
        self, folder: Path, mode: Literal["auto", "offline", "online"], project: str, name: str, config: Any
    ) -> None:
        import wandb

        if mode == "auto":
            mode = "online" if wandb.api.api_key else "offline"
        settings = wandb.Settings(silent=True)
        self._run = wandb.init(dir=str(folder), mode=mode, project=project, name=name, config=config, settings=settings)
        # wandb's own step cannot go back, a rollback does: our step is the axis.
        self._run.define_metric("*", step_metric="step")

    def log(self, metrics: Metrics) -> None:
        self._run.log(dict(metrics))

    def rewind(self, step: int) -> None:
        self._run.log({"rolled_back_to": step})

    def close(self, exit_code: int) -> None:
        self._run.finish(exit_code=exit_code)


class TensorBoard:
    """TensorBoard's event files in `tensorboard/` of the run folder (extra `tensorboard`).

    Raises:
        ModuleNotFoundError: the extra is not installed.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        self._folder = str(folder / "tensorboard")
        self._open(first_step)

    def _open(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Readers hide what an earlier process, or the time before a rollback, wrote from this step on.
        self._writer: Any = SummaryWriter(self._folder, purge_step=step + 1)

    def log(self, metrics: Metrics) -> None:
        for name, value in metrics.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(name, value, metrics["step"])

    def rewind(self, step: int) -> None:
        self._writer.close()
        self._open(step)

    def close(self, exit_code: int) -> None:
        self._writer.close()
