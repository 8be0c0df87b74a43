"""Writing a folder that `transformers` (and, for library classes, vLLM and others) load as it is."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...parallel.model import ModelConfig
from ..errors import CheckpointError
from ..transforms import Source
from .card import model_card
from .layout import exported
from .targets import BOS, EOS, PAD, Target, choose_target, config_json
from .tokenizer import write_tokenizer
from .writer import verify_weights, write_weights

CODE = ("configuration_polylepis.py", "layers_polylepis.py", "modeling_polylepis.py")
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def export(
    config: ModelConfig,
    tensors: Source,
    out: Path,
    *,
    vocabulary: Mapping[str, Any] | None = None,
    text_vocabulary: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    target: str | None = None,
    tokenizer_files: Sequence[Path] = (),
    facts: Mapping[str, Any] | None = None,
    context: int = 4096,
    max_shard_size: str = "2GB",
    force: bool = False,
) -> Path:
    """Write `out`: weights, `config.json`, `generation_config.json`, tokenizer files, a model card.

    Written aside, every tensor read back, flushed, renamed last. Memory: one tensor where a rule needs it whole, a
    piece of one otherwise.

    Args:
        config: the model.
        tensors: its logical tensors (`Distributed(checkpoint)`, say).
        vocabulary: `Vocabulary.to_json()`; modality ids then derive from token ids. None for models without.
        text_vocabulary: where the tokenizer's ids lie, for a model without `vocabulary` that was made of one with it.
        dtype: of the stored weights; `A_log`, `D`, `dt_bias` and selection biases stay float32.
        target: `mamba2`, `nemotron_h`, `granite`, `polylepis`; None takes the first that can hold the model.
        tokenizer_files: copied into the folder (`tokenizer.model`, codecs); of a sentencepiece model or a
            `tokenizer.json` a tokenizer for transformers is made too, with the model's ids.
        facts: lines of the model card.
        context: the sequence length of training.
        max_shard_size: of one weight file, such as "500MB".
        force: replace a folder that exists.

    Returns:
        `out`.

    Raises:
        CheckpointError: `out` exists; the target cannot hold the model; tensors or vocabulary are another model's; what
            was written does not read back.
    """
    chosen = choose_target(config, target)
    if out.exists() and not force:
        raise CheckpointError(f"{out} exists already; remove it, choose another --out, or give --force to replace it")
    check_vocabulary(config, vocabulary)
    limit = parse_size(max_shard_size)
    weights = exported(config, chosen, tensors, dtype)
    aside = out.parent / f".{out.name}.part"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        hashes = write_weights(aside, weights, limit)
        verify_weights(aside, hashes)
        _write_json(aside / "config.json", config_json(config, chosen, vocabulary, dtype, context))
        _write_json(aside / "generation_config.json", _generation_config(config, chosen))
        for source in tokenizer_files:
            if source.name != "tokenizer.json":  # its ids are not the model's; the one written below has those
                shutil.copyfile(source, aside / source.name)
        write_tokenizer(aside, tokenizer_files, vocabulary or text_vocabulary, context)
        if chosen == "polylepis":
            for name in CODE:
                shutil.copyfile(Path(__file__).parent / name, aside / name)
        (aside / "README.md").write_text(model_card(config, chosen, vocabulary, dtype, facts or {}))
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


def _generation_config(config: ModelConfig, target: Target) -> dict[str, Any]:
    result: dict[str, Any] = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    if target != "polylepis" and config.padded_vocab > config.vocab_size:
        # Ours has −∞ there; the library's classes would compute logits from rows that were never trained.
        result["suppress_tokens"] = list(range(config.vocab_size, config.padded_vocab))
    return result


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
