"""The model card of an exported folder: what it is, what it was trained on, how to load it, what to beware of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...parallel.model import ModelConfig, count_parameters
from .targets import BOS, CLASSES, EOS, PAD, Target, caution


def model_card(
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
