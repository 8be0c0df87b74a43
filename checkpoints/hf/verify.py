"""Proof that an exported folder is the model: what transformers computes from it against what we compute.

Gates (all must hold): logits over more than two chunks, by a length that is no multiple of the chunk, and eight greedy
tokens decoded with the cache, by full recomputation, and by us.
"""

from __future__ import annotations

import json
import platform
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...parallel.model import ModelConfig
from ..errors import CheckpointError
from .reference import Logits
from .targets import BOS, PAD

REPORT = "export_report.json"
LOGIT_TOLERANCE = 1e-4
GREEDY_TOKENS = 8
OLDEST_TRANSFORMERS = (5, 15, 1)  # from 5.6 to 5.14.1 NemotronH was wrong on the CPU beyond one chunk


def transformers_module() -> ModuleType:
    """transformers, imported when it is first needed.

    Raises:
        CheckpointError: not installed, or too old to be right.
    """
    try:
        module = import_module("transformers")
    except ModuleNotFoundError as error:
        hint = "" if error.name == "transformers" else f" and {error.name}"
        raise CheckpointError(f"Hugging Face export needs transformers{hint}: pip install polylepis[hf]") from error
    except ImportError as error:  # a dependency in a version that it refuses
        raise CheckpointError(f"transformers cannot be imported: {str(error).splitlines()[0]}") from error
    numbers = tuple(int(part) for part in module.__version__.split(".")[:3] if part.isdigit())
    if numbers < OLDEST_TRANSFORMERS:
        oldest = ".".join(map(str, OLDEST_TRANSFORMERS))
        raise CheckpointError(
            f"transformers {module.__version__} computes NemotronH wrongly; pip install transformers>={oldest}"
        )
    return module


def verify(
    folder: Path,
    config: ModelConfig,
    reference: Logits,
    *,
    vocabulary: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Load `folder` with transformers on the CPU in float32, compare, write `export_report.json`.

    Args:
        folder: what `export` wrote.
        config: the model that was exported.
        reference: our model's logits.
        vocabulary: ranges of the modalities, if the folder has them; the test tokens then span all of them. Without,
            modality ids are random and given explicitly.
        seed: of the test tokens.

    Returns:
        The report.

    Raises:
        CheckpointError: a gate fails; the report says which and by how much. Or the folder does not load.
    """
    length = probe_length(config)
    tokens, modality = probe_tokens(config, vocabulary, length, random.Random(seed))
    ours = reference(tokens, modality)[:, : config.vocab_size]
    extra = {"modality_ids": modality[None]} if _needs_ids(config, vocabulary) else {}
    prompt = slice(length // 2 + 1)
    with _quiet(), torch.no_grad():
        model = _load(folder)
        try:
            theirs = model(tokens[None], use_cache=False, **extra).logits[0, :, : config.vocab_size].to(ours.dtype)
            greedy = _greedy_gates(model, config, reference, vocabulary, tokens[prompt], modality[prompt])
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise CheckpointError(f"{folder}: transformers loads it but fails to run it: {_line(error)}") from error
    difference = float((theirs - ours).abs().max())
    limit = LOGIT_TOLERANCE
    gates = [
        {"name": "max abs logit difference", "value": difference, "limit": limit, "passed": difference <= limit},
        *greedy,
    ]
    report = {
        "class": type(model).__name__,
        "proof": "full",
        "tokens": length,
        "modalities in them": sorted({config.modalities[m] for m in modality.tolist()})
        if extra or vocabulary
        else None,
        "largest logit": float(ours.abs().max()),
        "gates": gates,
        "passed": all(gate["passed"] for gate in gates),
        "versions": _versions(),
    }
    write_report(folder, report)
    failed = [gate for gate in gates if not gate["passed"]]
    if failed:
        raise CheckpointError(
            f"{folder}: the export is not the model: {failed[0]['name']} is {failed[0]['value']}, allowed is "
            f"{failed[0]['limit']}; do not use it (all gates in {folder / REPORT})"
        )
    return report


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n")


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, and no advice to install kernels that a check on the CPU has no use for."""
    logger = transformers_module().utils.logging
    verbosity, bars = logger.get_verbosity(), logger.is_progress_bar_enabled()
    logger.set_verbosity_error()
    logger.disable_progress_bar()
    try:
        yield
    finally:
        logger.set_verbosity(verbosity)
        if bars:
            logger.enable_progress_bar()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _load(folder: Path) -> Any:
    auto = transformers_module().AutoModelForCausalLM
    try:
        model, info = auto.from_pretrained(
            str(folder),
            dtype=torch.float32,
            trust_remote_code="auto_map" in json.loads((folder / "config.json").read_text()),
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: transformers cannot load it: {_line(error)}") from error
    wrong = sorted([*info["missing_keys"], *info["unexpected_keys"], *map(str, info["mismatched_keys"])])
    if wrong:
        raise CheckpointError(f"{folder}: transformers found tensors missing or left over, {wrong[0]} first")
    return model.eval()


def probe_length(config: ModelConfig) -> int:
    """Two and a half chunks and a token, no multiple of any chunk in the model."""
    layers = [config.layer(i)[1] for i, symbol in enumerate(config.symbols) if symbol == "M"]
    chunks = {layer.chunk_size for layer in layers} or {config.mamba.chunk_size}
    largest = max(chunks)
    length = 2 * largest + largest // 2 + 1
    while any(chunk > 1 and length % chunk == 0 for chunk in chunks):
        length += 1
    return length


def probe_tokens(
    config: ModelConfig, vocabulary: Mapping[str, Any] | None, length: int, generator: random.Random
) -> tuple[Tensor, Tensor]:
    """Token and modality ids [length], every modality among them; spans with their begin and end tokens if known."""
    if vocabulary is None:
        tokens = [BOS, *(generator.randrange(config.vocab_size) for _ in range(length - 1))]
        modality = [generator.randrange(len(config.modalities)) for _ in range(length)]
        return torch.tensor(tokens), torch.tensor(modality)
    tokens, modality = [BOS], [0]
    span = max(1, length // (4 * len(vocabulary["sizes"])))
    while len(tokens) < length:
        start = vocabulary["specials"]
        for k, size in enumerate(vocabulary["sizes"]):
            codes = [start + generator.randrange(size) for _ in range(span)]
            codes = [2 * k + 2, *codes, 2 * k + 3] if k else codes
            tokens += codes
            modality += [k] * len(codes)
            start += size
    return torch.tensor(tokens[:length]), torch.tensor(modality[:length])


def modality_of(token: int, vocabulary: Mapping[str, Any] | None) -> int:
    """The modality of one token, from the vocabulary's ranges."""
    if vocabulary is None:
        return 0
    start = vocabulary["specials"]
    if token < start:
        k = (token - 2) // 2
        return k if 1 <= k < len(vocabulary["sizes"]) else 0
    for k, size in enumerate(vocabulary["sizes"]):
        if token < start + size:
            return k
        start += size
    return 0


def _needs_ids(config: ModelConfig, vocabulary: Mapping[str, Any] | None) -> bool:
    routed = any(config.layer(i)[1].routed for i, symbol in enumerate(config.symbols) if symbol == "M")
    return routed and vocabulary is None


def _greedy_gates(
    model: Any,
    config: ModelConfig,
    reference: Logits,
    vocabulary: Mapping[str, Any] | None,
    tokens: Tensor,
    modality: Tensor,
) -> list[dict[str, Any]]:
    """Eight tokens after a prompt, three ways."""
    transformers = transformers_module()
    explicit = _needs_ids(config, vocabulary)
    extra = {"modality_ids": modality[None]} if explicit else {}
    pads = list(range(config.vocab_size, config.padded_vocab)) or None
    model.generation_config.eos_token_id = None  # eight tokens, whatever they are
    plan = transformers.GenerationConfig(
        max_new_tokens=GREEDY_TOKENS, do_sample=False, pad_token_id=PAD, suppress_tokens=pads
    )
    mask = torch.ones(1, tokens.shape[0], dtype=torch.int64)
    cached = model.generate(tokens[None], attention_mask=mask, generation_config=plan, **extra)[0, tokens.shape[0] :]

    def recompute(step: Logits) -> list[int]:
        ids, kinds = tokens, modality
        for _ in range(GREEDY_TOKENS):
            best = int(step(ids, kinds)[-1, : config.vocab_size].argmax())
            ids = torch.cat((ids, torch.tensor([best])))
            kinds = torch.cat((kinds, torch.tensor([modality_of(best, vocabulary)])))
        return ids[tokens.shape[0] :].tolist()

    def theirs(ids: Tensor, kinds: Tensor) -> Tensor:
        return model(ids[None], use_cache=False, **({"modality_ids": kinds[None]} if explicit else {})).logits[0]

    results = {"greedy tokens with cache": cached.tolist(), "greedy tokens by recomputation": recompute(theirs)}
    ours = recompute(reference)
    return [{"name": name, "value": value, "limit": ours, "passed": value == ours} for name, value in results.items()]


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("polylepis", "torch", "transformers", "safetensors", "huggingface_hub"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions
