"""Start the worker processes of a run on this machine, through torchrun's own agent."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from .errors import ConfigError, StoppedError


def run_workers(n_processes: int, arguments: Sequence[str], module: str = "polylepis.pretrain.train") -> None:
    """Run `module` in `n_processes` processes and wait.

    Raises:
        StoppedError: a signal came, and the workers have ended; those of a training run have saved (see `preempt`).
        ConfigError: a worker failed; the worker has said why on standard error.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=n_processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=f"polylepis-{os.getpid()}",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)("-m", module, *arguments)
    except SignalException as signalled:  # after the workers have ended
        raise StoppedError(module.rpartition(".")[2], signalled.sigval) from None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise ConfigError(
            f"{module.rpartition('.')[2]} stopped: rank {rank} ended with exit code {failure.exitcode}"
        ) from None
