"""Copies of a rank's state in host memory: what the background writes, and the last good state to roll back to."""

from __future__ import annotations

import base64
import copy
import json
import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..parallel.engines.base import Optimizer
from ..parallel.model import HybridModel
from .tensors import put_back, state_tensors


class HostCopy:
    """Local tensors copied storage by storage into buffers that are allocated once (pinned for a GPU) and reused."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[int, int, torch.device], Tensor] = {}
        self._live: dict[tuple[int, int, torch.device], Tensor] = {}
        self.tensors: dict[str, Tensor] = {}

    @torch.no_grad()
    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy; returns when the originals may change. `self.tensors` then has every local tensor by name."""
        self._live, self.tensors = {}, {}
        for name, tensor in tensors.items():
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            storage = local.untyped_storage()
            key = (storage.data_ptr(), storage.nbytes(), local.device)
            if key not in self._live:
                live = torch.empty(0, dtype=torch.uint8, device=local.device).set_(storage)
                self._live[key] = live
                if key not in self._buffers:
                    pinned = local.device.type == "cuda"
                    self._buffers[key] = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=pinned)
                self._buffers[key].copy_(live, non_blocking=True)
            host = self._buffers[key].untyped_storage()
            view = torch.empty(0, dtype=local.dtype).set_(host, local.storage_offset(), local.shape, local.stride())
            self.tensors[name] = view
        self._buffers = {key: self._buffers[key] for key in self._live}  # forget memory that has been replaced
        _synchronize(self._live)

    @torch.no_grad()
    def restore(self) -> None:
        """Copy back into the memory it was taken from."""
        for key, live in self._live.items():
            live.copy_(self._buffers[key], non_blocking=True)
        _synchronize(self._live)


def _synchronize(live: Mapping[tuple[int, int, torch.device], Tensor]) -> None:
    for device in {device for _, _, device in live if device.type == "cuda"}:
        torch.cuda.synchronize(device)


class Snapshot:
    """The last good state of this rank in host memory, for a rollback without any file; see `take` and `restore`."""

    def __init__(self) -> None:
        self._copy = HostCopy()
        self._state: dict[str, Any] | None = None
        self._home: Callable[[], None] = lambda: None
        self._random = torch.empty(0)

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The host copies by name, what this rank holds of each logical tensor."""
        return self._copy.tensors

    @property
    def state(self) -> Mapping[str, Any] | None:
        """The stream's state that was given to `take`, None before."""
        return self._state

    @property
    def random(self) -> Tensor:
        """This rank's random states, see `random_state`."""
        return self._random

    def take(self, models: Sequence[HybridModel], optimizer: Optimizer, stream_state: Mapping[str, Any]) -> None:
        """Copy weights, persistent buffers, optimizer state, random states and the position in the data.

        Args:
            models: the layers of this rank.
            optimizer: over their parameters.
            stream_state: `Stream.state_dict()`, or any JSON values.
        """
        tensors = state_tensors(models, optimizer)
        self._copy.take(tensors)
        self._home = partial(put_back, tensors, optimizer)
        self._random, self._state = random_state(), copy.deepcopy(dict(stream_state))

    def restore(self) -> dict[str, Any]:
        """Write everything back, bit for bit, into the models and the optimizer it was taken from.

        Gradients are not part of it: call `Engine.discard` where there are any.

        Returns:
            The stream's state, for `Stream.load_state_dict`.

        Raises:
            RuntimeError: nothing has been taken yet.
        """
        if self._state is None:
            raise RuntimeError("no snapshot has been taken that could be restored")
        self._copy.restore()
        self._home()
        set_random_state(self._random)
        return copy.deepcopy(self._state)


def random_state() -> Tensor:
    """The states of the generators of python, numpy, torch and this rank's GPU: JSON in a uint8 tensor, no pickle."""
    name, keys, *rest = np.random.get_state(legacy=True)
    values = {
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "torch": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        values["cuda"] = base64.b64encode(torch.cuda.get_rng_state().numpy().tobytes()).decode()
    return torch.frombuffer(bytearray(json.dumps(values).encode()), dtype=torch.uint8)


def set_random_state(state: Tensor) -> None:
    """Put back what `random_state` returned."""
    values = json.loads(state.numpy().tobytes())
    version, keys, gauss = values["python"]
    random.setstate((version, tuple(keys), gauss))
    name, keys, *rest = values["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(values["torch"])), dtype=torch.uint8))
    if "cuda" in values and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(values["cuda"])), dtype=torch.uint8))
