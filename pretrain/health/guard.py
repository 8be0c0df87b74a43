"""The one object through which the loop speaks with the guards: see `HealthConfig` for what each of them does."""

from __future__ import annotations

import enum
import math
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ...checkpoints.keeper import Keeper
from ...data.stream import Step, Stream
from ...parallel.engines.base import Engine
from ..errors import HealthError, RouterError
from ..experts import check_routers
from ..meter.pulse import Pulse
from . import memory, nonfinite, replicas
from .config import HealthConfig
from .events import Events
from .ledger import Entry, Ledger
from .rollback import Rollback
from .spikes import SpikeDetector
from .stragglers import Stragglers
from .watchdog import Watchdog


class Verdict(enum.Enum):
    """What becomes of a step whose gradients are ready."""

    TRAIN = "train"
    SKIP = "skip"
    ROLL_BACK = "roll back"


class Health:
    """Guards of a run. Enter it around the loop; every method is called by all ranks alike.

    Decisions rest on numbers that are the same on all ranks (the gradient norm and reduced losses), so they need no
    communication of their own.

    Args:
        config: the guards.
        run: the run folder.
        engine, stream: what is guarded.
        keeper: of its checkpoints.
        pulse: what the loop is doing.
        warmup: steps of learning-rate warm-up.
        planned: gives the planner's expectation of this rank's memory, in bytes by part; asked when memory runs out.
    """

    def __init__(
        self,
        config: HealthConfig,
        run: Path,
        engine: Engine,
        stream: Stream,
        keeper: Keeper,
        pulse: Pulse,
        warmup: int,
        planned: Callable[[], Mapping[str, float] | None] = lambda: None,
    ) -> None:
        self.config, self.run, self.engine, self.stream, self.pulse = config, run, engine, stream, pulse
        self.planned = planned
        self.events = Events(run, dist.get_rank())
        self.ledger = Ledger(run)
        self.stragglers = Stragglers(config)
        self._spikes = SpikeDetector(config, warmup)
        self._rollback, self._keeper = Rollback(engine, stream, keeper), keeper
        self._watchdog = Watchdog(config, run, dist.get_rank(), dist.get_world_size(), pulse, self.events)
        self._bad_streak = 0
        self._offending: tuple[int, int] = (0, 0)
        self._digests: dict[int, str] = {}  # of the last batches, by position
        self._rollbacks: list[int] = []

    def resume(self, first: int, carried: Mapping[str, Any]) -> None:
        """Before the loop: go on from what a checkpoint of `first` steps carries (empty: from the start)."""
        self.ledger.open(carried.get("skipped", ()))
        self._spikes.load_state_dict(carried.get("spikes", {}))
        if self.config.spike == "act":
            self._keep(first)
        host, world = socket.gethostname(), dist.get_world_size()
        self._tell("run", "start", first, f"started on {world} ranks, rank 0 on {host}", world=world, host=host)

    def state(self) -> dict[str, Any]:
        """JSON values for a checkpoint: the position in the data, what is left out of them, and what has been seen."""
        known = {"skipped": self.ledger.as_list(), "spikes": self._spikes.state_dict()}
        return self.stream.state_dict() | {"health": known}

    def __enter__(self) -> Health:
        if self.config.hang != "off":
            self._watchdog.start()
        if self.config.memory == "act":
            memory.keep_history(self.engine.mesh.device)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watchdog.close()
        if error is None:
            self._tell("run", "end", self.pulse.beat.step, "the loop has ended")
        elif self.events.rank == 0:
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            self._tell("run", "stop", self.pulse.beat.step, f"stopped by {said}")
        if error is not None and self.config.memory != "off" and memory.is_out_of_memory(error):
            self._report_memory(error)

    def leaves_out(self, step: int) -> bool:
        """Whether the ledger lists the batch of `step` (from 1); the stream then passes over it."""
        if step - 1 not in self.ledger:
            return False
        self.ledger.check(step - 1, self.stream.skip())
        return True

    def judge(self, step: int, data: Step, own_sums: Tensor, loss: float, norm: float) -> Verdict:
        """Before the update of `step` (from 1): train on it, leave it out, or roll back.

        Args:
            data: its batch.
            own_sums: what `engine.accumulate` returned on this rank.
            loss, norm: of the global batch, before clipping; the same on all ranks.

        Raises:
            HealthError: more bad steps, or rollbacks, than the configuration allows.
        """
        oldest = step - 1 - self.config.spike_before
        self._digests = {p: d for p, d in self._digests.items() if p >= oldest} | {step - 1: data.doc_digest}
        finite = math.isfinite(loss) and math.isfinite(norm)
        if not finite and self.config.nan != "off":
            return self._not_finite(step, data, own_sums, loss, norm)
        self._bad_streak = 0
        values = {"loss": loss, "grad_norm": norm}
        found = self._spikes.judge(step, values) if self.config.spike != "off" else {}
        if found and self._spiked(step, data, values, found):
            return Verdict.ROLL_BACK
        self._spikes.accept(step, values)
        return Verdict.TRAIN

    def _not_finite(self, step: int, data: Step, own_sums: Tensor, loss: float, norm: float) -> Verdict:
        acts = self.config.nan == "act"
        self._bad_streak += 1
        what = f"loss {loss:.4g}, gradient norm {norm:.4g}"
        details: dict[str, Any] = {"position": step - 1, "digest": data.doc_digest, "streak": self._bad_streak}
        if acts:  # the gradients are not needed any more, so the step can be repeated to see who it was
            bad = nonfinite.bad_parameters(self.engine)
            try:
                check_routers(self.engine, norm)
            except RouterError as error:
                details["router"] = str(error)
            findings = nonfinite.blame(self.engine, data.micro_batches, data.total_weight, own_sums, bad)
            what += f"; {nonfinite.explain(findings)}"
            details["ranks"] = [vars(finding) for finding in findings if finding.origin or finding.n_parameters]
            self.ledger.add([Entry(step - 1, "nan", data.doc_digest, step)])
        else:
            bad = nonfinite.bad_parameters(self.engine)
            what += f"; on rank {self.events.rank} in the gradient of {', '.join(bad[:4]) or 'no parameter'}"
        self._tell("nan", "not finite", step, f"not finite: {what}{'; step left out' if acts else ''}", **details)
        if not acts:
            return Verdict.TRAIN
        if self._bad_streak >= self.config.nan_limit:
            raise HealthError(
                f"{self._bad_streak} steps in a row were not finite (health.nan_limit {self.config.nan_limit}); {what}"
            )
        return Verdict.SKIP

    def _spiked(self, step: int, data: Step, values: dict[str, float], found: dict[str, float]) -> bool:
        """Tell of a spike; True if it is to be rolled back."""
        line = ", ".join(
            f"{name} {values[name]:.4g} is {by:.0f} deviations above the median {self._spikes.median(name):.4g}"
            for name, by in found.items()
        )
        details = {"position": step - 1, "digest": data.doc_digest, "values": values, "deviations": found}
        self._tell("spike", "spike", step, f"spike: {line}", **details)
        if self.config.spike != "act":
            return False
        recent = [s for s in self._rollbacks if s > step - self.config.spike_window]
        if len(recent) >= self.config.max_rollbacks:
            raise HealthError(
                f"spike: {line}; {len(recent)} rollbacks within {self.config.spike_window} steps have not helped "
                f"(health.max_rollbacks {self.config.max_rollbacks}); last at steps {', '.join(map(str, recent))}"
            )
        self._rollbacks.append(step)
        self._offending = (max(0, step - 1 - self.config.spike_before), step - 1 + self.config.spike_after)
        return True

    def roll_back(self, step: int) -> int:
        """Return to a good state before the batches that `judge` found offending at `step` (from 1), and list them.

        Returns:
            How many steps that state has seen.
        """
        first, last = self._offending
        self.pulse.enter("snapshot")
        self.engine.discard()
        back, state, where = self._rollback.restore(first, lambda: self.pulse.enter("checkpoint"))
        first = max(first, back)
        fresh = [p for p in range(first, last + 1) if p not in self.ledger]
        listed = [Entry(p, "spike", self._digests.get(p, ""), step) for p in fresh]
        self.ledger.add(listed)  # before a later checkpoint goes: it is what makes going on from there right
        set_aside = self._keeper.set_aside(back)
        self._spikes.load_state_dict(state.get("health", {}).get("spikes", {}))
        self.stragglers = Stragglers(self.config)
        details = {"to": back, "from": where, "positions": [entry.position for entry in listed], "set_aside": set_aside}
        message = f"rolled back to step {back} ({where}); batches {first} to {last} are left out"
        message += f"; set aside: {', '.join(set_aside)}" if set_aside else ""
        self._tell("spike", "rollback", step, message, **details)
        return back

    def after(self, step: int, own_seconds: float) -> float | None:
        """After the update of `step` (from 1): snapshots and comparisons that are due.

        Args:
            own_seconds: this rank's own work in this step.

        Returns:
            Seconds per step that the average rank waits for the slowest, when ranks were compared.

        Raises:
            HealthError: replicas that differ, or a straggler that stays one, where the guard acts.
        """
        if self.config.spike == "act" and step % self.config.snapshot_every == 0:
            self._keep(step)
        if self.config.replicas != "off" and step % self.config.replicas_every == 0:
            self._compare_replicas(step)
        self.stragglers.add(own_seconds)
        if self.config.straggler == "off" or not self.stragglers.due():
            return None
        return self._compare_ranks(step)

    def _keep(self, step: int) -> None:
        self.pulse.enter("snapshot")
        self._rollback.keep(step, self.state())
        self.pulse.enter("between")

    def _compare_replicas(self, step: int) -> None:
        differing = replicas.compare(self.engine)
        if not differing:
            return
        self._tell("replicas", "divergence", step, f"replicas hold different bits: {differing}")
        if self.config.replicas == "act":
            raise HealthError(f"replicas hold different bits: {differing}; resume from the newest checkpoint")

    def _compare_ranks(self, step: int) -> float:
        compared = self.stragglers.compare()
        if compared.slow:
            least = max(1e-9, compared.median)
            names = ", ".join(f"rank {rank} ({compared.own[rank] / least:.1f}×)" for rank in compared.slow[:8])
            message = f"slow: {names} of the median's {compared.median:.3f} s of own work per step"
            self._tell("straggler", "slow ranks", step, message, own_seconds=compared.own, slow=compared.slow)
            if self.config.straggler == "act" and (late := self.stragglers.persistent()):
                raise HealthError(
                    f"{', '.join(f'rank {rank}' for rank in late)} slow in {self.config.straggler_limit} comparisons "
                    f"in a row; {message}; replace the node and start again"
                )
        return compared.imbalance

    def _report_memory(self, error: BaseException) -> None:
        beat = self.pulse.beat
        rank = self.events.rank
        try:
            path, line = memory.report(self.run, rank, beat.step, beat.phase, error, self.engine, self.planned())
            if self.config.memory == "act":
                memory.dump_history(self.run, rank, self.engine.mesh.device)
        except OSError as failure:
            path, line = Path(), f"out of memory in phase {beat.phase}; its report could not be written: {failure}"
        self.events.tell("memory", "out of memory", beat.step, f"rank {rank}: {line}", report=path.name)

    def _tell(self, guard: str, kind: str, step: int, message: str, **details: Any) -> None:
        """What all ranks know, told once."""
        if self.events.rank == 0:
            self.events.tell(guard, kind, step, message, **details)
