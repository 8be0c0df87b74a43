"""Held-out evaluation: loss per modality, what captions know of their images, naming digits by likelihood."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
import torch

from ..data.corpus import CAPTION_TEMPLATES, DIGIT_NAMES
from ..data.stream import collate
from ..parallel.layout import Layout
from ..parallel.model import HybridModel
from .errors import ConfigError
from .load import LoadedRun, load_run

BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Evaluation:
    """Attributes:
    step: of the checkpoint.
    loss: nats per predicted token, by modality of the token, over the whole held-out split.
    targets: how many tokens each of these losses averages.
    caption_matched, caption_shuffled: nats per caption, given its own image and one of another digit.
    digit_accuracy: share of held-out digits whose name is the likeliest of the ten in a fixed template.
    digits: how many digits were named.
    """

    step: int
    loss: dict[str, float]
    targets: dict[str, int]
    caption_matched: float
    caption_shuffled: float
    digit_accuracy: float
    digits: int


def evaluate_run(folder: Path, max_digits: int | None = None) -> Evaluation:
    """Evaluate a run's newest checkpoint on split `heldout`, print the table, write `evaluation.json`.

    Raises:
        ConfigError: the data set has no held-out images with captions.
    """
    run = load_run(folder)
    loss, targets = modality_losses(run)
    images, digits = heldout_images(run)
    images, digits = images[:max_digits], digits[:max_digits]
    matched, shuffled = caption_gap(run, images, digits)
    named = name_digits(run, images)
    accuracy = float((named == digits).mean())
    result = Evaluation(run.step, loss, targets, matched, shuffled, accuracy, len(digits))
    aside = folder / ".evaluation.json.part"
    aside.write_text(json.dumps(asdict(result), indent=1) + "\n")
    aside.replace(folder / "evaluation.json")
    click.echo(table(result))
    return result


def table(result: Evaluation) -> str:
    """The evaluation as a person reads it."""
    lines = [f"held-out evaluation at step {result.step}", f"{'loss, nats per token':34}{'tokens':>10}{'loss':>10}"]
    lines += [f"  {name:32}{result.targets[name]:>10,}{loss:>10.3f}" for name, loss in result.loss.items()]
    matched, shuffled = result.caption_matched, result.caption_shuffled
    return "\n".join(
        [
            *lines,
            f"{'caption, nats':34}{'matched':>10}{'shuffled':>10}{'gap':>10}",
            f"  {'given its image / another':32}{matched:>10.3f}{shuffled:>10.3f}{shuffled - matched:>10.3f}",
            f"{'image → digit name by likelihood':34}{'digits':>10}{'accuracy':>10}{'chance':>10}",
            f"  {CAPTION_TEMPLATES[0].format('…'):32}{result.digits:>10}{result.digit_accuracy:>10.3f}{0.1:>10.3f}",
        ]
    )


@torch.no_grad()
def document_losses(model: HybridModel, documents: Sequence[np.ndarray], table: np.ndarray) -> Iterator[np.ndarray]:
    """Cross-entropy of each token after the first, per document: float64 [n − 1], in order.

    Args:
        model: on one process.
        documents: unified tokens, int64 [n] each.
        table: token → modality.
    """
    weights = np.ones(len(model.config.modalities), dtype=np.float32)
    at = 0
    while at < len(documents):
        stop, total = at, 0
        while stop < len(documents) and (stop == at or total + len(documents[stop]) <= BATCH_TOKENS):
            total += len(documents[stop])
            stop += 1
        batch = collate([documents[at:stop]], total, table, weights)
        layout = Layout.from_batch(batch, len(weights), model.mesh.device)
        tokens, labels = (batch[name].reshape(-1).to(model.mesh.device) for name in ("tokens", "labels"))
        ce = model(tokens, layout, labels).double().cpu().numpy()
        edges = np.cumsum([0, *map(len, documents[at:stop])])
        for start, end in zip(edges[:-1], edges[1:], strict=True):
            yield ce[start : end - 1]
        at = stop


def modality_losses(run: LoadedRun) -> tuple[dict[str, float], dict[str, int]]:
    """Mean loss per predicted token over the whole held-out split, and the number of tokens, by modality."""
    split = run.dataset.split("heldout")
    documents = [split.tokens(i) for i in range(len(split))]
    lookup = run.dataset.vocabulary.modality_table()
    names = run.config.model.modalities
    sums, counts = np.zeros(len(names)), np.zeros(len(names), dtype=np.int64)
    for document, losses in zip(documents, document_losses(run.model, documents, lookup), strict=True):
        modality = lookup[document[1:]]
        sums += np.bincount(modality, weights=losses, minlength=len(names))
        counts += np.bincount(modality, minlength=len(names))
    means = {name: float(s / c) for name, s, c in zip(names, sums, counts, strict=True) if c}
    return means, {name: int(c) for name, c in zip(names, counts, strict=True) if c}


def heldout_images(run: LoadedRun) -> tuple[list[np.ndarray], np.ndarray]:
    """Codes and digit of each held-out image.

    Raises:
        ConfigError: there are none.
    """
    images, digits = [], []
    for _, meta, tokens in run.dataset.documents("heldout"):
        if meta["kind"] == "image-caption":
            (modality, codes), *_ = run.dataset.composer.spans(tokens)
            assert modality == "image"
            images.append(codes)
            digits.append(meta["digit"])
    if not images:
        raise ConfigError(f"{run.config.data.path}: no held-out documents of kind image-caption to evaluate on")
    return images, np.array(digits)


def caption_losses(run: LoadedRun, pairs: Sequence[tuple[np.ndarray, str]]) -> np.ndarray:
    """Nats of each caption after its image, end of document included: float64 [len(pairs)]."""
    composer = run.dataset.composer
    documents = [composer.document([("image", codes), ("text", caption)]) for codes, caption in pairs]
    before = [len(composer.prompt([("image", codes)])) for codes, _ in pairs]
    losses = document_losses(run.model, documents, run.dataset.vocabulary.modality_table())
    return np.array([loss[start - 1 :].sum() for loss, start in zip(losses, before, strict=True)])


def caption_gap(run: LoadedRun, images: Sequence[np.ndarray], digits: np.ndarray) -> tuple[float, float]:
    """Mean nats of a caption given its own image, and given an image of another digit."""
    captions = [CAPTION_TEMPLATES[0].format(DIGIT_NAMES[digit]) for digit in digits]
    rng = np.random.default_rng(0)
    others = [images[rng.choice(np.flatnonzero(digits != digit))] for digit in digits]
    matched = caption_losses(run, list(zip(images, captions, strict=True)))
    shuffled = caption_losses(run, list(zip(others, captions, strict=True)))
    return float(matched.mean()), float(shuffled.mean())


def name_digits(run: LoadedRun, images: Sequence[np.ndarray]) -> np.ndarray:
    """The likeliest of the ten digit names after each image: int64 [len(images)]."""
    captions = [CAPTION_TEMPLATES[0].format(name) for name in DIGIT_NAMES]
    losses = caption_losses(run, [(codes, caption) for codes in images for caption in captions])
    return losses.reshape(len(images), len(captions)).argmin(axis=1)
