"""Reading planned packs: in this process, or ahead of time in workers that hold no state.

A worker is told which samples to lay into which rows, and nothing else: how many there are, or that one died, cannot
change a batch. What is read ahead is not yet consumed; the stream's state knows nothing of it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from .batch import Rows, Slots, add_latents, lay_out
from .errors import BadSampleError, DataError
from .plan import Planner, Position, StepPlan

_RESTARTS = 3  # of dead workers, without a step in between


class Samples(Protocol):
    """What a reader needs of a split."""

    @property
    def lengths(self) -> np.ndarray: ...

    @property
    def modality_lengths(self) -> np.ndarray: ...

    def tokens(self, sample: int) -> np.ndarray: ...

    def latents(self, sample: int) -> np.ndarray | None: ...

    def where(self, sample: int) -> str: ...


class Order(NamedTuple):
    """What one rank reads for one step: its packs as (source, samples), and the most documents of any rank's pack."""

    packs: list[tuple[int, list[int]]]
    most: int


class Found(NamedTuple):
    """What came back: a batch of all rows of the rank, and (source, sample, number of the reason, message) of bad ones.

    Arrays, from a worker as tensors: they come through unlinked shared memory, and the message in the pipe stays so
    small that it is written whole or not at all, also by a worker that is killed.
    """

    rows: Rows
    bad: list[tuple[int, int, int, str]]


class Reader:
    """Turns an `Order` into arrays; the map-style data set of the workers.

    Args:
        splits: per source.
        seq_len, table, weights: see `batch.collate`.
        stall_seconds: after so long on one sample its shard and offset are logged.
        slots: how continuous latents go into the batch, where there are such.
    """

    def __init__(
        self,
        splits: Sequence[Samples],
        *,
        seq_len: int,
        table: np.ndarray,
        weights: np.ndarray,
        stall_seconds: float,
        slots: Slots | None = None,
    ) -> None:
        self.splits, self.seq_len, self.slots = splits, seq_len, slots
        self.table, self.weights, self.stall_seconds = table, weights, stall_seconds

    def __getitem__(self, order: Order) -> Found:
        rows, latents, bad = [], [], []
        with Watch(self.stall_seconds) as watch:
            for source, samples in order.packs:
                row, vectors = [], []
                for sample in samples:
                    watch.at(self.splits[source].where, sample)
                    try:
                        tokens, found = self._sample(source, sample)
                        row.append(tokens)
                        vectors += [found] if found is not None else []
                    except BadSampleError as error:
                        bad.append((source, sample, BadSampleError.REASONS.index(error.reason), str(error)))
                        # Any tokens do: the stream masks the slot.
                        row.append(np.zeros(int(self.splits[source].lengths[sample]), dtype=np.int64))
                rows.append(row)
                latents.append(vectors)
        batch = lay_out(rows, self.seq_len, self.table, self.weights, max_documents=order.most)
        if self.slots is not None:
            add_latents(batch, latents, self.slots, self.weights)
        return Found(batch, bad)

    def _sample(self, source: int, sample: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Tokens and latents of a document; BadSampleError also when they do not belong together."""
        split = self.splits[source]
        tokens = split.tokens(sample)
        if self.slots is None:
            return tokens, None
        latents = split.latents(sample)
        given, needed = 0 if latents is None else len(latents), int(self.slots.table[tokens].sum())
        if given != needed:
            raise BadSampleError("undecodable", f"{split.where(sample)}: {needed} slots, but {given} latents")
        return tokens, latents


class Watch:
    """Says which sample a read hangs on: a context that one thread per step supervises."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._doing: tuple[float, Callable[[int], str], int] | None = None
        self._done = threading.Event()

    def at(self, where: Callable[[int], str], sample: int) -> None:
        """From now on `where(sample)` is being read."""
        self._doing = (time.monotonic(), where, sample)

    def __enter__(self) -> Watch:
        # A timer starts no thread of its own work until it fires; cancelling it is cheap against reading a step.
        self._timer = threading.Timer(self.seconds, self._look)
        self._timer.daemon = True
        self._timer.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._done.set()
        self._timer.cancel()

    def _look(self) -> None:
        while not self._done.wait(0):
            if self._doing is not None:
                since, where, sample = self._doing
                waited = time.monotonic() - since
                if waited >= self.seconds:
                    _log().error("reading stalls: %.0f s so far on %s", waited, where(sample))
            if self._done.wait(self.seconds):
                return


class Ahead:
    """Steps of one rank, in order, read by workers while others are computed.

    Args:
        reader: what each worker runs.
        planner: plans the steps.
        cut: a step's plan -> what this rank reads of it.
        workers: processes; 0 reads in this one, when asked.
        prefetch: steps that each worker reads ahead.
    """

    def __init__(
        self, reader: Reader, planner: Planner, cut: Callable[[StepPlan], Order], *, workers: int, prefetch: int
    ) -> None:
        self.reader, self.planner, self.cut = reader, planner, cut
        self.workers, self.prefetch = workers, prefetch
        self._at: Position | None = None
        self._planned: deque[StepPlan] = deque()
        self._loader: Iterator[Any] | None = None

    def read(self, position: Position) -> tuple[StepPlan, Found]:
        """The step at `position`; the next one is expected to be asked for at its `after`.

        Raises:
            DataError: workers died three times in a row.
        """
        if not self.workers:
            plan = self.planner.step(position)
            return plan, self.reader[self.cut(plan)]
        for attempt in range(_RESTARTS + 1):
            if self._loader is None or self._at != position:
                self.close()
                self._loader = self._start(position)
            try:
                rows, bad = next(self._loader)
                break
            except RuntimeError as error:
                if "DataLoader" not in str(error):
                    raise
                self.close()
                if attempt == _RESTARTS:
                    raise DataError(
                        f"data workers died {_RESTARTS + 1} times at draw {position.draws} "
                        f"({' '.join(str(error).split())}); is there enough memory for data.workers {self.workers}?"
                    ) from error
                _log().warning("a data worker died; reading again from draw %d on", position.draws)
        plan = self._planned.popleft()
        self._at = plan.after
        return plan, Found({name: tensor.numpy() for name, tensor in rows.items()}, bad)

    def _start(self, position: Position) -> Iterator[Any]:
        self._planned.clear()
        self._at = position

        def orders() -> Iterator[Order]:
            here = position
            while True:
                plan = self.planner.step(here)
                self._planned.append(plan)
                here = plan.after
                yield self.cut(plan)

        import multiprocessing

        from torch.utils.data import DataLoader

        # A fork of a process that has threads (collectives, CUDA) can hang: the server forks before there are any.
        context = multiprocessing.get_context("forkserver")
        loader: Any = DataLoader(
            self.reader,  # type: ignore[arg-type]
            batch_size=None,
            sampler=orders(),
            num_workers=self.workers,
            prefetch_factor=self.prefetch,
            collate_fn=_to_shared,
            multiprocessing_context=context,
        )
        return iter(loader)

    def close(self) -> None:
        """Ends the workers; a later read starts new ones."""
        loader, self._loader = self._loader, None
        if loader is not None:
            loader._shutdown_workers()  # type: ignore[attr-defined]
        self._planned.clear()


def _log() -> Any:
    import logging  # a start without a word to say is faster by it

    return logging.getLogger("polylepis.data")


def _to_shared(found: Any) -> tuple[dict[str, Any], list[tuple[int, int, int, str]]]:
    """A worker's `Found` as tensors."""
    import torch

    return {name: torch.from_numpy(array) for name, array in found.rows.items()}, found.bad
