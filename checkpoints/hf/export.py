"""Writing a folder that `transformers` (and, for library classes, vLLM and others) load as it is."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...parallel.model import ModelConfig, count_parameters
from ..errors import CheckpointError
from .layout import Entry, entries, unknown_tensors
from .targets import BOS, CLASSES, EOS, PAD, Target, caution, choose_target, config_json

CODE = ("configuration_polylepis.py", "layers_polylepis.py", "modeling_polylepis.py")
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def export(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    out: Path,
    *,
    vocabulary: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    target: str | None = None,
    tokenizer_files: Sequence[Path] = (),
    facts: Mapping[str, Any] | None = None,
    context: int = 4096,
    max_shard_size: str = "2GB",
    force: bool = False,
) -> Path:
    """Write `out`: weights, `config.json`, `generation_config.json`, tokenizer files, a model card.

    Written aside, flushed, renamed last. Memory: the tensors given, and one shard.

    Args:
        config: the model.
        tensors: its logical tensors by name (`read_tensors` of a checkpoint).
        vocabulary: `Vocabulary.to_json()`; modality ids then derive from token ids. None for models without.
        dtype: of the stored weights; `A_log`, `D`, `dt_bias` and selection biases stay float32.
        target: `mamba2`, `nemotron_h`, `polylepis`; None takes the first that can hold the model.
        tokenizer_files: copied into the folder (`tokenizer.model`, codecs).
        facts: lines of the model card.
        context: the sequence length of training.
        max_shard_size: of one weight file, such as "500MB".
        force: replace a folder that exists.

    Returns:
        `out`.

    Raises:
        CheckpointError: `out` exists; the target cannot hold the model; tensors or vocabulary are another model's.
    """
    chosen = choose_target(config, target)
    if out.exists() and not force:
        raise CheckpointError(f"{out} exists already; remove it, choose another --out, or give --force to replace it")
    check_vocabulary(config, vocabulary)
    plan = entries(config, chosen, dtype)
    unknown = unknown_tensors(plan, tensors)
    if unknown:
        raise CheckpointError(f"the checkpoint holds {unknown[0]}, which this model configuration does not have")
    aside = out.parent / f".{out.name}.part"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        _write_weights(aside, plan, tensors, parse_size(max_shard_size))
        _write_json(aside / "config.json", config_json(config, chosen, vocabulary, dtype, context))
        _write_json(aside / "generation_config.json", _generation_config(config, chosen))
        for source in tokenizer_files:
            shutil.copyfile(source, aside / source.name)
        if chosen == "polylepis":
            for name in CODE:
                shutil.copyfile(Path(__file__).parent / name, aside / name)
        (aside / "README.md").write_text(_model_card(config, chosen, vocabulary, dtype, dict(facts or {})))
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    _publish(aside, out)
    return out


def check_vocabulary(config: ModelConfig, vocabulary: Mapping[str, Any] | None) -> None:
    """Refuse a vocabulary that is not the model's.

    Raises:
        CheckpointError: other modalities than the model routes by, or more ids than it has.
    """
    if vocabulary is None:
        return
    used = vocabulary["specials"] + sum(vocabulary["sizes"])
    if used > config.vocab_size:
        raise CheckpointError(f"the data's vocabulary has {used} ids, but the model knows {config.vocab_size}")
    names = list(vocabulary["modalities"])
    if len(config.modalities) > 1 and names != list(config.modalities):
        raise CheckpointError(f"the data's modalities are {names}, but the model's are {list(config.modalities)}")


def parse_size(text: str) -> int:
    """Bytes of a size such as "2GB" (decimal units)."""
    number, unit = text[:-2].strip(), text[-2:].upper()
    if unit not in UNITS or not number.replace(".", "", 1).isdigit() or float(number) <= 0:
        raise CheckpointError(f"max_shard_size {text!r}: write a positive number and KB, MB or GB, for example 2GB")
    return int(float(number) * UNITS[unit])


def plan_shards(plan: Sequence[Entry], limit: int) -> list[list[Entry]]:
    """Entries in order, each shard filled up to `limit` bytes; one tensor larger than that has a shard of its own."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in plan:
        if shards[-1] and size + entry.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    return shards


def _write_weights(folder: Path, plan: Sequence[Entry], tensors: Mapping[str, Tensor], limit: int) -> None:
    shards = plan_shards(plan, limit)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({e.name: e.build(tensors) for e in shard}, folder / name, metadata={"format": "pt"})
        weight_map.update({e.name: name for e in shard})
    if len(shards) > 1:
        total = sum(entry.nbytes for entry in plan)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)


def _generation_config(config: ModelConfig, target: Target) -> dict[str, Any]:
    result: dict[str, Any] = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    if target != "polylepis" and config.padded_vocab > config.vocab_size:
        # Ours has −∞ there; the library's classes would compute logits from rows that were never trained.
        result["suppress_tokens"] = list(range(config.vocab_size, config.padded_vocab))
    return result


def _model_card(
    config: ModelConfig,
    target: Target,
    vocabulary: Mapping[str, Any] | None,
    dtype: torch.dtype,
    facts: Mapping[str, Any],
) -> str:
    trust = ", trust_remote_code=True" if target == "polylepis" else ""
    table = {
        "class": CLASSES[target],
        "pattern": f"`{config.symbols}`",
        "parameters": f"{count_parameters(config):,}",
        "stored in": str(dtype).removeprefix("torch."),
        "vocabulary": f"{config.vocab_size} ids, padded to {config.padded_vocab}",
        **facts,
    }
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "---",
        "",
        "# Trained with Polylepis",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in table.items()),
        "",
        "```python",
        "from transformers import AutoModelForCausalLM",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("."{trust})',
        "```",
        "",
        f"Special ids: {PAD} padding, {BOS} begin of document, {EOS} end of document.",
    ]
    if vocabulary:
        lines += ["Tokens of each modality (subtract the first id to get the tokenizer's or codec's own):", ""]
        lines += _ranges(vocabulary)
    warning = caution(config, target)
    if warning:
        lines += ["", f"**Beware:** {warning}."]
    if target != "polylepis":
        lines += ["", "Logits of the vocabulary's padding mean nothing; `generation_config.json` suppresses them."]
    return "\n".join(lines) + "\n"


def _ranges(vocabulary: Mapping[str, Any]) -> list[str]:
    lines = []
    start = vocabulary["specials"]
    for k, name in enumerate(vocabulary["modalities"]):
        stop = start + vocabulary["sizes"][k]
        span = f"; a span opens with {2 * k + 2} and closes with {2 * k + 3}" if k else ""
        lines.append(f"- {name}: ids {start} to {stop - 1}{span}")
        start = stop
    return lines


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _publish(aside: Path, out: Path) -> None:
    """Flush everything, move what was there out of the way, rename, delete what was there."""
    mode = (aside / "config.json").stat().st_mode
    for path in aside.iterdir():
        path.chmod(mode)  # safetensors writes files that only their owner may read
    for path in (*aside.iterdir(), aside):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    old = out.parent / f".{out.name}.old"
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    aside.rename(out)
    shutil.rmtree(old, ignore_errors=True)
