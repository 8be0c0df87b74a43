"""When a run saves, where, and what it resumes from: everything between the training loop and the files.

Three tiers. The *durable* one is the run's checkpoint folder: any mesh opens it. It is written in the background from
copies in host memory, so a step waits only for the copy. The *local* one is optional, see `local.py`. The last good
state in *memory*, `host.Snapshot`, belongs to whoever watches over the run's health.
"""

from __future__ import annotations

import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from ..parallel.engines.base import Optimizer
from ..parallel.model import HybridModel
from .errors import CheckpointError
from .host import HostCopy, Snapshot
from .local import LocalTier, fill
from .manifest import (
    bring_back,
    clear_leftovers,
    complete_checkpoints,
    newest_checkpoint,
    read_manifest,
    step_of,
)
from .rules import RANDOM, KeepRules
from .saving import together, write_checkpoint
from .sharded import load_checkpoint, random_tensors
from .tensors import put_back, state_tensors

RUN_ID = "run_id"
PATIENCE = timedelta(hours=2)  # for the slowest rank's disk; the loop's collectives have a timeout of their own
LAST_WAIT = 30.0  # seconds that a failing run still gives a save in flight

Report = Callable[[str, int, str], None]


class Background:
    """One piece of work in a thread of its own; the next one waits for it."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._seconds = 0.0

    def start(self, work: Callable[[], Any]) -> None:
        """Begin; nothing else may be running."""
        assert self._thread is None, "one at a time"
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True, name="checkpoint")
        self._thread.start()

    def _run(self, work: Callable[[], Any]) -> None:
        started = time.perf_counter()
        try:
            work()
        except BaseException as error:
            self._error = error
        self._seconds = time.perf_counter() - started

    @property
    def busy(self) -> bool:
        """Whether there is work, running or not asked about yet."""
        return self._thread is not None

    def result(self, timeout: float | None = 0.0) -> tuple[float, BaseException | None] | None:
        """Seconds it took and what went wrong, once, when it is over within `timeout` seconds (None: however long)."""
        if self._thread is None:
            return None
        self._thread.join(timeout)
        if self._thread.is_alive():
            return None
        answer = self._seconds, self._error
        self._thread, self._error = None, None
        return answer


class Keeper:
    """Saves a run by its rules and finds what it resumes from.

    A context: entering it removes what crashes have left (by then the folder must be this run's alone), leaving it
    waits for what is being written.

    Args:
        folder: of the durable checkpoints, shared by all nodes.
        models: the layers of this rank.
        optimizer: over their parameters.
        rules: when, and what to keep.
        facts: JSON values for every manifest: the resolved configuration, say.
        report: is told on rank 0 of what went wrong or is worth a line: kind, step, text. Standard error by default.

    All ranks construct it together, and call every method together.
    """

    def __init__(
        self,
        folder: Path,
        models: Sequence[HybridModel],
        optimizer: Optimizer,
        rules: KeepRules,
        *,
        facts: Mapping[str, Any] | None = None,
        report: Report | None = None,
    ) -> None:
        self.folder, self.models, self.optimizer, self.rules = folder, models, optimizer, rules
        self.facts = dict(facts or {})
        self._report = report or print_report
        self._first = dist.get_rank() == 0
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE)
        self._copy, self._snapshot = HostCopy(), Snapshot()
        self._durable, self._local = Background(), Background()
        self._steps = {"durable": 0, "local": 0}
        self._times: dict[str, float] = {}
        self._tier: LocalTier | None = None

    # What a run resumes from.

    def resume(self) -> dict[str, Any] | None:
        """Fill models and optimizer from the newest complete checkpoint of both tiers.

        Returns:
            `step` and `data` (the stream's state) of what was loaded, None where there is nothing yet.

        Raises:
            CheckpointError: on every rank; the durable checkpoint is damaged or of another model.
        """
        newest, run = self._look()
        if self.rules.local_folder:
            self._tier = LocalTier(Path(self.rules.local_folder), run)
            step = self._newest_local(0 if newest is None else step_of(newest))
            if step is not None:
                resumed = self._read_local(step)
                if resumed is not None:
                    return resumed
        if newest is None:
            return None
        if read_manifest(newest).get("weights_only"):  # an import: weights to start from, nothing trained yet
            load_checkpoint(newest, self.models)
            return None
        manifest = load_checkpoint(newest, self.models, self.optimizer)
        saved_on = sum(name.startswith(RANDOM) for name in manifest["tensors"])
        if saved_on != dist.get_world_size():
            line = f"resumed on {dist.get_world_size()} ranks what {saved_on} have saved; random states start anew"
            self._say("resharded", step_of(newest), line)
        return {"step": manifest["step"], "data": manifest["data"]}

    def _look(self) -> tuple[Path | None, str]:
        """The newest durable checkpoint and the run's id, as rank 0 sees them."""

        def look() -> tuple[Path | None, str] | None:
            if not self._first:
                return None
            bring_back(self.folder)
            if not self.rules.local_folder:
                return newest_checkpoint(self.folder), ""
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / RUN_ID
            if not path.is_file():
                aside = path.with_suffix(".part")
                aside.write_text(uuid.uuid4().hex[:16])
                aside.replace(path)
            return newest_checkpoint(self.folder), path.read_text()

        return together(self._group, look)[0]

    def _newest_local(self, durable: int) -> int | None:
        """The newest step of which every rank has its part, if it is newer than the durable checkpoint's."""
        tier = self._tier
        assert tier is not None
        live = state_tensors(self.models, self.optimizer)
        everyone: list[set[int]] = together(self._group, lambda: tier.steps(live))
        common, any_rank = set.intersection(*everyone), set.union(*everyone)
        if max(any_rank, default=0) > max(common, default=0):
            lacking = [rank for rank, steps in enumerate(everyone) if max(any_rank) not in steps]
            line = f"the local parts of step {max(any_rank)} are not whole: rank {lacking[0]} has none that fits"
            self._say("local_incomplete", max(any_rank), line)
        newer = {step for step in common if step > durable}
        return max(newer, default=None)

    def _read_local(self, step: int) -> dict[str, Any] | None:
        """Load a local step; None where a rank finds its part damaged, before any rank has changed anything."""
        tier = self._tier
        assert tier is not None
        read: list[Any] = []
        try:
            together(self._group, lambda: read.append(tier.read(step)))
        except CheckpointError as error:
            self._say("local_damaged", step, f"the local parts of step {step} cannot be used: {error}")
            return None
        part, data = read[0]
        live = state_tensors(self.models, self.optimizer)
        fill(live, part)
        put_back(live, self.optimizer)
        self._say("local_resumed", step, f"resumed step {step} from {tier.folder.parent.parent}")
        return {"step": step, "data": data}

    # What it saves.

    def after_step(self, step: int, state: Callable[[], Mapping[str, Any]], *, last: bool = False) -> None:
        """Hear of saves that have ended meanwhile, and begin those that are due.

        Args:
            step: how many steps have been done.
            state: gives the stream's state; called only when something is saved.
            last: save now and wait: the run ends here, or is about to be stopped.

        Raises:
            CheckpointError: a last save that failed. Any other failure is reported, and training goes on.
        """
        self._settle("durable", self._durable, 0.0)
        self._settle("local", self._local, 0.0)
        rules = self.rules
        if last or (rules.every and step % rules.every == 0):
            self.save(step, state(), wait=last)
        elif self._tier is not None and step % rules.local_every == 0:
            self._save_local(step, state())

    def save(self, step: int, state: Mapping[str, Any], *, wait: bool = False) -> None:
        """Begin a durable save; it waits for the one before it, and for its own end where `wait` says so.

        Raises:
            CheckpointError: with `wait`, when it failed.
        """
        started = time.perf_counter()
        self._settle("durable", self._durable, None)
        tensors = state_tensors(self.models, self.optimizer) | random_tensors()
        copies, problem = None, None
        if self.rules.asynchronous and not wait:
            try:
                self._copy.take(tensors)
                copies = self._copy.tensors
            except Exception as error:  # no memory, say: the others must hear of it, or they would wait for this rank
                problem = error
        values = {**self.facts, "step": step, "data": dict(state)}

        def write() -> Path:
            keep, keep_every = self.rules.keep, self.rules.keep_every
            return write_checkpoint(
                self.folder,
                tensors,
                values,
                copies=copies,
                group=self._group,
                keep=keep,
                keep_every=keep_every,
                problem=problem,
            )

        self._steps["durable"] = step
        self._durable.start(write)
        if copies is None and problem is None:
            self._settle("durable", self._durable, None, must=wait)
        self._count("blocked_seconds", time.perf_counter() - started)

    def _save_local(self, step: int, state: Mapping[str, Any]) -> None:
        tier, started = self._tier, time.perf_counter()
        assert tier is not None
        self._settle("local", self._local, None)
        live = state_tensors(self.models, self.optimizer)
        self._snapshot.take(self.models, self.optimizer, state)
        self._steps["local"] = step
        self._local.start(lambda: tier.write(step, self._snapshot, live))
        self._count("blocked_seconds", time.perf_counter() - started)

    def _settle(self, tier: str, work: Background, timeout: float | None, must: bool = False) -> None:
        """Take the result of a save that is over; wait for it up to `timeout` seconds."""
        ended = work.result(timeout)
        if ended is None:
            return
        seconds, error = ended
        self._count("write_seconds" if tier == "durable" else "local_write_seconds", seconds)
        if error is None:
            return
        if must:
            raise error
        step = self._steps[tier]
        if tier == "durable":
            self._say("checkpoint_failed", step, f"{error}; training goes on")
        else:  # no agreement: every rank speaks for itself
            self._report("local_failed", step, f"rank {dist.get_rank()}: local part of step {step}: {error}")

    def wait(self) -> None:
        """Return when nothing is being written any more."""
        self._settle("durable", self._durable, None)
        self._settle("local", self._local, None)

    def set_aside(self, step: int) -> list[str]:
        """Make sure that nothing resumes from a state after `step` steps: the run has rolled back behind it.

        Durable checkpoints are renamed, not removed; local parts go.

        Returns:
            Names of the checkpoints, on rank 0.
        """
        self.wait()
        if self._tier is not None:
            self._tier.forget_after(step)
        spoilt = [path for path in complete_checkpoints(self.folder) if step_of(path) > step] if self._first else []
        for path in spoilt:
            others = len(list(path.parent.glob(f".set-aside-{path.name}*")))  # of earlier rollbacks
            path.rename(path.with_name(f".set-aside-{path.name}" + (f"-{others}" if others else "")))
        return [path.name for path in spoilt]

    @property
    def writing(self) -> bool:
        """Whether a durable save is in flight, as far as this rank can tell."""
        self._settle("durable", self._durable, 0.0)
        return self._durable.busy

    def times(self) -> dict[str, float]:
        """Seconds since the last call: `blocked_seconds` that steps waited, `write_seconds` of saves that ended."""
        times, self._times = self._times, {}
        return times

    def _count(self, name: str, seconds: float) -> None:
        self._times[name] = self._times.get(name, 0.0) + seconds

    def _say(self, kind: str, step: int, text: str) -> None:
        if self._first:
            self._report(kind, step, text)

    def __enter__(self) -> Keeper:
        if self._first:
            clear_leftovers(self.folder)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.wait()
            if self._tier is not None:
                self._tier.forget()
        else:  # another rank may be gone: a save that can still end may do so
            self._settle("durable", self._durable, LAST_WAIT)
            self._settle("local", self._local, LAST_WAIT)


def print_report(kind: str, step: int, text: str) -> None:
    """One line on standard error."""
    print(f"polylepis: {text}", file=sys.stderr, flush=True)
