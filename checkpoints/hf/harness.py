"""lm-evaluation-harness on an exported folder: its own tasks, or yours, from files alone."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

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
        CheckpointError: the harness is not installed, the folder holds no model or no tokenizer, no such task.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no config.json in it; export a run first: polylepis convert RUN --to hf")
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(f"{folder}: no tokenizer.json in it, which the harness needs to read its tasks")
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
    return {
        task: {k: v for k, v in row.items() if isinstance(v, int | float)} for task, row in found["results"].items()
    }
