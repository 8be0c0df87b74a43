"""What a user can get wrong in the pretrain room."""

from __future__ import annotations

import signal


class ConfigError(ValueError):
    """A configuration that cannot be run. The message is one line that names the key, the value and the file."""

    exit_code = 2


class RouterError(RuntimeError):
    """A router whose logits are not finite. Raised on all ranks before the optimizer's step; names layer and ranks."""

    exit_code = 3


class DivergenceError(RuntimeError):
    """Ranks that must do the same do not. Raised on all of them at the same step; names the ranks that differ."""

    exit_code = 3


class StoppedError(RuntimeError):
    """A person, or whoever ends processes, has stopped the workers by a signal. The shell's own exit code for that."""

    def __init__(self, module: str, number: int) -> None:
        super().__init__(f"{module}: stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class HealthError(RuntimeError):
    """A guard stopped the run, on all ranks at the same step; says which and what to look at."""

    exit_code = 4


HANG_EXIT = 75  # EX_TEMPFAIL: the process was ended by its own watchdog; starting it again may help
