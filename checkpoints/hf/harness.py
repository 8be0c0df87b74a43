"""lm-evaluation-harness on an exported folder: its own tasks, or yours, from files alone."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from .verify import transformers_module


def evaluate_export(
    folder: Path,
    tasks: Sequence[str],
    *,
    include: Path | None = None,
    device: str = "cpu",
    batch_size: int = 1,
    max_length: int | None = None,
    limit: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Run tasks with the harness's own Hugging Face model; the results by task.

    Nothing is fetched: tasks whose data is on the hub and not in its cache are refused by the harness.

    Args:
        folder: what `export` wrote, a tokenizer in it.
        tasks: names of tasks or groups.
        include: a folder with task files of your own.
        device, batch_size, limit: as the harness has them; `limit` is examples per task.
        max_length: tokens of context; what the model was trained with by default.

    Raises:
        CheckpointError: the harness is not installed, the folder holds no model or no tokenizer, no such task or
            device, or the harness cannot run the task (its data is not here, say).
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no config.json in it; export a run first: polylepis convert RUN --to hf")
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(f"{folder}: no tokenizer.json in it, which the harness needs to read its tasks")
    _check_options(device, batch_size, max_length, limit)
    transformers_module()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    try:
        harness = import_module("lm_eval")
        manager = import_module("lm_eval.tasks").TaskManager(include_path=None if include is None else str(include))
    except ModuleNotFoundError as error:
        raise CheckpointError(f"evaluation needs {error.name}: pip install polylepis[eval]") from error
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        where = f" nor in {include}" if include else "; give the folder of your own with --include"
        raise CheckpointError(f"no task {', '.join(unknown)} in the harness{where}")
    values = json.loads((folder / "config.json").read_text())
    try:
        found = harness.simple_evaluate(
            model="hf",
            model_args={
                "pretrained": str(folder),
                "dtype": "float32" if device == "cpu" else "auto",
                "max_length": max_length or values.get("max_position_embeddings", 2048),
                "trust_remote_code": "auto_map" in values,
            },
            tasks=list(tasks),
            task_manager=manager,
            device=device,
            batch_size=batch_size,
            limit=limit,
        )
    except ConnectionError as error:
        raise CheckpointError(
            f"the data of {', '.join(tasks)} is not on this machine ({_line(error)}), and nothing is fetched; download "
            "it beforehand into HF_HOME, or give tasks with data of your own"
        ) from error
    except (AssertionError, ValueError, KeyError, OSError) as error:  # a task's own settings or data
        raise CheckpointError(f"the harness cannot run {', '.join(tasks)}: {_line(error)}") from error
    return {
        task: {k: v for k, v in row.items() if isinstance(v, int | float)} for task, row in found["results"].items()
    }


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _check_options(device: str, batch_size: int, max_length: int | None, limit: int | None) -> None:
    """What the harness would pass over in silence."""
    for name, value in (("--batch-size", batch_size), ("--max-length", max_length), ("--limit", limit)):
        if value is not None and value < 1:
            raise CheckpointError(f"{name} is {value}; it must be at least 1")
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise CheckpointError(f"--device {device}: no such device; accepted are cpu, cuda, cuda:1 and so on") from error
    devices = torch.cuda.device_count()
    if wanted.type == "cuda" and (wanted.index or 0) >= devices:
        raise CheckpointError(f"--device {device}: torch sees {devices} CUDA devices here; accepted is cpu, too")
