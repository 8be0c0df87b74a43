"""Generation: recurrent states and a key/value cache, one step per token, nothing computed twice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor

from ..data.codecs import PatchKMeans
from ..data.corpus import CAPTION_TEMPLATES, DIGIT_NAMES
from ..data.vocabulary import Vocabulary
from ..parallel.kinds.base import NewTokens
from ..parallel.model import HybridModel
from ..parallel.routing import route
from .errors import ConfigError
from .load import LoadedRun, load_run


def generate_run(
    folder: Path, *, prompt: str, n_tokens: int, per_digit: int, temperature: float, seed: int
) -> tuple[Path, str]:
    """Draw digits from captions into `generated.png` and continue a text prompt; prints the text.

    Raises:
        ConfigError: a count below 1, a negative temperature, or a data set without images.
    """
    if n_tokens < 1 or per_digit < 1 or temperature < 0:
        raise ConfigError(
            f"need --tokens ≥ 1, --per-digit ≥ 1, --temperature ≥ 0; got {n_tokens}, {per_digit}, {temperature}"
        )
    run = load_run(folder)
    generator = torch.Generator(run.model.mesh.device).manual_seed(seed)
    images = draw_digits(run, per_digit, temperature, generator)
    picture = save_grid(images, folder / "generated.png")
    text = continue_text(run, prompt, n_tokens, temperature, generator)
    click.echo(text)
    click.echo(f"drew {images.shape[0] * images.shape[1]} digits: {picture}", err=True)
    return picture, text


@torch.no_grad()
def sample(
    model: HybridModel,
    prompts: Sequence[np.ndarray],
    n_tokens: int,
    allowed: Tensor,
    modality_table: np.ndarray,
    *,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> np.ndarray:
    """Continue each prompt by `n_tokens` tokens drawn from `allowed`.

    Args:
        model: on one process, in evaluation mode.
        prompts: int64 [n_i] each; shorter ones are left-padded.
        n_tokens: tokens to draw, ≥ 1.
        allowed: bool [padded_vocab], which tokens may be drawn.
        modality_table: int64, token → modality.
        temperature: 0 takes the likeliest token.

    Returns:
        int64 [len(prompts), n_tokens].
    """
    device = model.mesh.device
    table = torch.from_numpy(modality_table).to(device)
    longest = max(map(len, prompts))
    tokens = torch.zeros(len(prompts), longest, dtype=torch.int64)
    real = torch.zeros(len(prompts), longest, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = torch.from_numpy(prompt)
        real[row, longest - len(prompt) :] = True
    tokens, real = tokens.to(device), real.to(device)
    cache, mask, drawn = None, real, []
    positions = (real.cumsum(dim=1) - 1).clamp(min=0)
    for _ in range(n_tokens):
        new = NewTokens(
            seq_idx=torch.where(real, 0, -1).to(torch.int32),
            position_ids=positions,
            key_mask=mask,
            modality=route(table[tokens].reshape(-1), len(model.config.modalities)),
        )
        logits, cache = model.extend(tokens, new, cache)
        tokens = _draw(logits.masked_fill(~allowed, float("-inf")), temperature, generator)
        drawn.append(tokens)
        real = torch.ones_like(tokens, dtype=torch.bool)
        mask = torch.cat((mask, real), dim=1)
        positions = positions[:, -1:] + 1
    return torch.cat(drawn, dim=1).cpu().numpy()


def _draw(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    return torch.multinomial((logits.float() / temperature).softmax(dim=-1), 1, generator=generator)


def allow(run: LoadedRun, modality: str, *extra: int) -> Tensor:
    """bool [padded_vocab]: the codes of a modality and some more ids."""
    mask = torch.zeros(run.config.model.padded_vocab, dtype=torch.bool)
    ids = run.dataset.vocabulary.range_of(modality)
    mask[ids.start : ids.stop] = True
    mask[list(extra)] = True
    return mask.to(run.model.mesh.device)


def draw_digits(run: LoadedRun, per_digit: int, temperature: float, generator: torch.Generator) -> np.ndarray:
    """Images [10, per_digit, height, width] drawn after the caption of each digit."""
    composer = run.dataset.composer
    captions = [CAPTION_TEMPLATES[0].format(name) for name in DIGIT_NAMES]
    prompts = [composer.prompt([("text", caption)], open="image") for caption in captions for _ in range(per_digit)]
    codec = run.dataset.codecs.get("image")
    if not isinstance(codec, PatchKMeans):
        raise ConfigError(f"{run.config.data.path}: has no patch codec for images, so no digit can be drawn")
    table, allowed = run.dataset.vocabulary.modality_table(), allow(run, "image")
    codes = sample(run.model, prompts, codec.n_codes, allowed, table, temperature=temperature, generator=generator)
    first = run.dataset.vocabulary.range_of("image").start
    images = np.stack([codec.decode(row - first) for row in codes])
    return images.reshape(len(captions), per_digit, *images.shape[1:])


def continue_text(run: LoadedRun, prompt: str, n_tokens: int, temperature: float, generator: torch.Generator) -> str:
    """The prompt and its continuation, up to the end of the document."""
    composer = run.dataset.composer
    start = composer.prompt([("text", prompt)])
    table, allowed = run.dataset.vocabulary.modality_table(), allow(run, "text", Vocabulary.EOS)
    (drawn,) = sample(run.model, [start], n_tokens, allowed, table, temperature=temperature, generator=generator)
    content = composer.decode(np.concatenate((start, drawn)))
    return "".join(text for _, text in content if isinstance(text, str))


def save_grid(images: np.ndarray, path: Path) -> Path:
    """Write images [rows, columns, height, width] as a captioned PNG grid, one row per digit name."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ConfigError("drawing needs matplotlib: pip install 'polylepis[quickstart]'") from None
    rows, columns = images.shape[:2]
    figure = Figure(figsize=(1.3 + 0.62 * columns, 0.62 * rows), dpi=110, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for row in range(rows):
        for column in range(columns):
            cell = axes[row][column]
            cell.imshow(images[row, column], cmap="gray_r", vmin=0, vmax=images.max() or 1)
            cell.set_xticks([])
            cell.set_yticks([])
        axes[row][0].set_ylabel(DIGIT_NAMES[row], rotation=0, ha="right", va="center", fontsize=9)
    figure.savefig(path)
    return path
