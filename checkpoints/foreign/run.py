"""A foreign checkpoint becomes a run folder: a configuration and a checkpoint at step 0, written tensor by tensor."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml
from torch import Tensor

from ...parallel.mesh import MeshConfig, build_mesh
from ...parallel.model import ModelConfig, count_parameters
from ..errors import CheckpointError
from ..saving import write_checkpoint
from ..transforms import Source
from . import hf, mamba_ssm, megatron
from .base import Foreign
from .vocabulary import onto_data

READERS = {"hf": hf.read, "mamba_ssm": mamba_ssm.read, "megatron": megatron.read}
TOKENIZER = "foreign-tokenizer"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")


def import_run(kind: str, path: Path, out: Path, name: str, data: Path | None = None) -> list[tuple[str, Any]]:
    """Read `path` and write the run folder `out`; rows for a table.

    The weights keep the dtype that they have there. Training that starts in the folder starts from them.

    Args:
        data: a data set of ours whose vocabulary the model shall have; without, ids stay as they are.

    Raises:
        CheckpointError: not such a checkpoint, or a model that our layers cannot express. Nothing is written then.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder")
    foreign = READERS[kind](path)
    if data is not None:
        foreign = onto_data(foreign, path, data)
    aside = out.parent / f".{out.name}.part"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        write_run(aside, foreign, name, str(out))
        copied = [file for file in TOKENIZER_FILES if (path / file).is_file()]
        if copied:
            (aside / TOKENIZER).mkdir()
        for file in copied:
            shutil.copyfile(path / file, aside / TOKENIZER / file)
        if out.exists():
            shutil.rmtree(out)
        aside.rename(out)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    config = foreign.config
    rows: list[tuple[str, Any]] = [
        ("run", out),
        ("from", foreign.origin),
        ("pattern", config.symbols),
        ("parameters", f"{count_parameters(config):,} in {len(foreign.tensors.specs())} logical tensors"),
    ]
    rows += [("note", note) for note in foreign.notes]
    return rows + ([("tokenizer", f"{out / TOKENIZER}, its ids as they were")] if copied else [])


def write_run(folder: Path, foreign: Foreign, name: str, final: str) -> None:
    """`config.yaml` and `checkpoints/step-00000000`, the latter without optimizer: weights to start from."""
    folder.mkdir(parents=True)
    settings = {
        "schema": 1,
        "name": name,
        "folder": final,
        "model": plain(foreign.config),
        "data": {"path": foreign.data or "mock", "seq_len": foreign.context},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    facts = {"step": 0, "data": {}, "weights_only": True, "origin": foreign.origin, "notes": list(foreign.notes)}
    if foreign.vocabulary is not None:
        facts["vocabulary"] = foreign.vocabulary
    write_tensors(folder / "checkpoints", foreign.tensors, facts)


def plain(config: ModelConfig) -> dict[str, Any]:
    """A configuration as JSON knows it: lists for tuples."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def write_tensors(folder: Path, source: Source, facts: Mapping[str, Any]) -> Path:
    """Write a source as a finished checkpoint, one tensor in memory at a time; starts a process group if there is none.

    Returns:
        The checkpoint.
    """
    alone = not dist.is_initialized()
    build_mesh(MeshConfig(), "cpu")
    try:
        metas = {name: spec.meta() for name, spec in source.specs().items()}
        return write_checkpoint(folder, metas, facts, copies=_Lazy(source))
    finally:
        if alone:
            dist.destroy_process_group()


class _Lazy(Mapping[str, Tensor]):
    """A source as a mapping that loads what is looked up; the last tensor stays, since it is asked for twice."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._last: tuple[str, Tensor] | None = None

    def __getitem__(self, name: str) -> Tensor:
        if self._last is None or self._last[0] != name:
            self._last = None
            self._last = name, self._source.load(name).contiguous()
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._source.specs())

    def __len__(self) -> int:
        return len(self._source.specs())
