"""Opening pickles without running them.

A pickle is a program: loading it calls whatever it names. Here a name is looked up in a short list of harmless
constructors. In the index of our own checkpoints any other name is refused; in other people's files it becomes an inert
placeholder that stores what it is given, so that a checkpoint that mentions a library's own enums and settings
still opens, without that library and without executing anything.
"""

from __future__ import annotations

import argparse
import collections
import pathlib
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint import filesystem, metadata

from .errors import CheckpointError
from .manifest import INDEX

_METADATA = (
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "Metadata",
    "MetadataIndex",
    "StorageMeta",
    "TensorProperties",
    "TensorStorageMetadata",
    "_MEM_FORMAT_ENCODING",
)
Allowed = Mapping[tuple[str, str], Any]
DCP: Allowed = {
    **{("torch.distributed.checkpoint.metadata", name): getattr(metadata, name) for name in _METADATA},
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): filesystem._StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    # Paths as text: nothing that could touch a file.
    ("pathlib", "PosixPath"): pathlib.PurePosixPath,
    ("pathlib._local", "PosixPath"): pathlib.PurePosixPath,
}
"""What the index of a distributed checkpoint is made of; our own holds nothing else."""
FOREIGN: Allowed = {
    **DCP,
    ("argparse", "Namespace"): argparse.Namespace,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "complex"): complex,
    ("builtins", "bytearray"): bytearray,
    ("pathlib", "WindowsPath"): pathlib.PureWindowsPath,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
}
"""What other people's checkpoints are made of, as far as it is harmless."""


class Inert:
    """Stands for an object of a class that is not on the list: keeps its state, does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.__dict__["given"] = args

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):
            state = {**(state[0] or {}), **state[1]}
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})

    def __setitem__(self, key: Any, value: Any) -> None:
        self.__dict__[str(key)] = value

    def append(self, value: Any) -> None:
        self.__dict__.setdefault("items", []).append(value)

    def extend(self, values: Any) -> None:
        self.__dict__.setdefault("items", []).extend(values)


class Unpickler(pickle.Unpickler):
    """Looks names up in a list only.

    Args:
        allowed: the list.
        strict: refuse other names; otherwise they become inert placeholders.
    """

    def __init__(self, file: IO[bytes], *, allowed: Allowed = FOREIGN, strict: bool = False, **options: Any) -> None:
        super().__init__(file, **options)
        self._allowed, self._strict = allowed, strict

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype | torch.layout):
            return getattr(torch, name)
        found = self._allowed.get((module, name))
        if found is None and self._strict:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return type(name.rpartition(".")[2], (Inert,), {"__module__": module}) if found is None else found


def load(file: IO[bytes], **options: Any) -> Any:
    """`pickle.load` with the list. This module can be `torch.load`'s `pickle_module`, which needs this name."""
    return Unpickler(file, **options).load()


UnpicklingError = pickle.UnpicklingError


def read_index(folder: Path, *, strict: bool = True) -> metadata.Metadata:
    """The index (`.metadata`) of a PyTorch distributed checkpoint.

    Args:
        strict: refuse whatever ours do not hold; others' may also hold plans of their writers, for example.

    Raises:
        CheckpointError: it is absent or damaged, or holds anything but an index.
    """
    path = folder / INDEX
    try:
        with open(path, "rb") as file:
            found = Unpickler(file, allowed=DCP, strict=strict).load()
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no {INDEX} in it, so this is no distributed checkpoint") from None
    except Exception as error:  # a damaged pickle may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{path}: is not the index of a checkpoint ({reason}); nothing was executed") from None
    if not isinstance(found, metadata.Metadata):
        raise CheckpointError(f"{path}: holds a {type(found).__name__}, not the index of a checkpoint")
    return found


def load_torch(path: Path) -> Any:
    """What `torch.save` wrote, tensors mapped from the file where its format allows.

    Raises:
        CheckpointError: it is no such file, or a TorchScript archive, which is a program.
    """
    import sys

    this = sys.modules[__name__]
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped:
            with zipfile.ZipFile(path) as archive:
                if any(name.endswith("constants.pkl") for name in archive.namelist()):
                    raise CheckpointError(f"{path}: is a TorchScript program, not a checkpoint")
        return torch.load(path, map_location="cpu", mmap=zipped, pickle_module=this, weights_only=False)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (pickle.UnpicklingError, EOFError, RuntimeError, AttributeError, TypeError, ValueError, KeyError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path}: cannot be read as a PyTorch file ({str(error).splitlines()[0][:200]})"
        ) from error
