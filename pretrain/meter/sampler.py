"""What the loop's thread waits for, seen by looking at it many times a second: no hooks, no synchronisation.

Ranks run in lockstep, so their step times are equal and say nothing of who is slow. What differs is how long each one
waits inside collectives for the others: a rank's own work is the step without that. The share of samples in which the
innermost frames belong to `torch.distributed` estimates it. On CUDA the thread waits for the device instead, where this
sees nothing: there the profiler's window shows exposed communication.
"""

from __future__ import annotations

import sys
import threading
import time
from types import FrameType

INTERVAL = 0.02
DEPTH = 5  # innermost frames looked at: functional collectives sit a few below torch's operator call
_COLLECTIVES = ("torch/distributed/distributed_c10d.py", "torch/distributed/_functional_collectives.py")
_WAITS = ("wait_for_unshard", "wait_for_post_forward", "finalize_backward")


def in_collective(frame: FrameType | None) -> bool:
    """Whether the innermost frames are those of a collective or of waiting for one."""
    for _ in range(DEPTH):
        if frame is None:
            return False
        code = frame.f_code
        if code.co_filename.endswith(_COLLECTIVES) or code.co_name in _WAITS:
            return True
        frame = frame.f_back
    return False


class Sampler(threading.Thread):
    """Samples the thread that creates it; between `start` and `close` it costs one look per `INTERVAL`."""

    def __init__(self, interval: float = INTERVAL) -> None:
        super().__init__(name="sampler", daemon=True)
        self.interval, self._watched = interval, threading.get_ident()
        self._seconds, self._taken = 0.0, 0.0
        self._stopped = threading.Event()

    def run(self) -> None:
        last = time.monotonic()
        while not self._stopped.wait(self.interval):
            now = time.monotonic()
            # A late look stands for the time since the one before, but not for more than a few intervals.
            if in_collective(sys._current_frames().get(self._watched)):
                self._seconds += min(now - last, 5 * self.interval)
            last = now

    def take(self) -> float:
        """Seconds in collectives since the last call."""
        total = self._seconds  # the sampling thread alone writes it
        seconds, self._taken = total - self._taken, total
        return seconds

    def close(self) -> None:
        self._stopped.set()
        if self.is_alive():
            self.join(timeout=5)
