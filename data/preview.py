"""A page to look at: decoded samples with their pictures and sounds, and packs with their documents in colour."""

from __future__ import annotations

import base64
import html
import io
import wave
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .codecs import HubSpeech, LogMelKMeans, SeriesCodec
from .dataset import Dataset, Split
from .files import write_atomic
from .packing import PackPlan, permute

_STYLE = """body{font:15px/1.45 system-ui,sans-serif;margin:2em auto;max-width:70em;padding:0 1em;color:#222}
table{border-collapse:collapse}td,th{padding:.2em .8em;text-align:right}td:first-child,th:first-child{text-align:left}
.sample{border-top:1px solid #ccc;padding:.6em 0;display:flex;flex-wrap:wrap;gap:.4em 1.2em;align-items:center}
.sample>small:first-child{flex-basis:100%}.sample p{margin:0}figure{margin:0;text-align:center}
figcaption{color:#777;font-size:80%}.sample img{image-rendering:pixelated;height:96px}
.pack{display:flex;height:14px;margin:2px 0;background:#eee}.pack a{display:flex;margin-right:1px}
.pack i{height:100%}small{color:#777}.legend i{display:inline-block;width:1em;height:1em;margin:0 .3em 0 1em}"""


def colour(modality: int, document: int = 0) -> str:
    """A hue per modality; neighbouring documents differ in lightness."""
    return f"hsl({(215 + 137 * modality) % 360} 60% {45 + 18 * (document % 2)}%)"


def write_preview(
    dataset: Dataset, split: str, path: Path, *, samples: int, packs: int, seq_len: int, window: int, seed: int
) -> None:
    """Writes one self-contained HTML page, atomically.

    Args:
        dataset, split: what to show.
        path: the page.
        samples: how many decoded samples, drawn by `seed`.
        packs: how many packs of the first window.
        seq_len, window: as a stream would pack.

    Raises:
        DataError: samples that cannot be decoded, or documents longer than seq_len.
    """
    chosen = dataset.split(split)
    title = html.escape(f"{dataset.path} · {split}")
    parts = [
        f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style><h1>{title}</h1>",
        f"<p>identity {dataset.identity[:16]} · {len(chosen):,d} documents · {int(chosen.lengths.sum()):,d} tokens</p>",
        *_totals(dataset),
        *_packs(dataset, chosen, packs, seq_len, window, seed),
        "<h2>Samples</h2>",
    ]
    shown = permute(np.arange(min(samples, len(chosen))), len(chosen), (3, seed))
    for sample in shown.tolist():
        parts += _sample(dataset, chosen, sample)
    write_atomic(path, "\n".join(parts).encode())


def write_picture(
    dataset: Dataset, split: str, path: Path, *, packs: int, seq_len: int, window: int, seed: int
) -> None:
    """Writes the page's packs as one SVG, atomically; arguments and errors as `write_preview`."""
    chosen = dataset.split(split)
    plan = PackPlan(chosen.lengths, seq_len=seq_len, window=window, seed=seed)
    names = dataset.vocabulary.modalities
    width, high, step = 960, 12, 15
    rows = plan.packs(0, 0)[:packs]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{step * len(rows) + 30}" '
        'font-family="sans-serif" font-size="12">'
    ]
    for number, name in enumerate([*names, "padding"]):
        fill = colour(number) if number < len(names) else "#eee"
        parts.append(f'<rect x="{90 * number}" y="4" width="12" height="12" fill="{fill}"/>')
        parts.append(f'<text x="{90 * number + 17}" y="14">{html.escape(name)}</text>')
    for row, pack in enumerate(rows):
        top, start = 26 + step * row, 0
        parts.append(f'<rect x="0" y="{top}" width="{width}" height="{high}" fill="#eee"/>')
        for number, sample in enumerate(pack.tolist()):
            for a, b, modality in _runs(dataset, chosen.tokens(sample)):
                x, wide = (start + a) * width / seq_len, (b - a) * width / seq_len
                box = f'x="{x:.2f}" y="{top}" width="{wide:.2f}" height="{high}"'
                parts.append(f'<rect {box} fill="{colour(modality, number)}"/>')
            start += int(chosen.lengths[sample])
    write_atomic(path, "\n".join([*parts, "</svg>", ""]).encode())


def _runs(dataset: Dataset, tokens: np.ndarray) -> list[tuple[int, int, int]]:
    """(first, end, modality) of the stretches of one modality in a document."""
    kinds = dataset.vocabulary.modality_table()[tokens]
    edges = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(kinds)]
    return [(a, b, int(kinds[a])) for a, b in zip(edges[:-1], edges[1:], strict=True)]


def _totals(dataset: Dataset) -> Iterator[str]:
    names = dataset.vocabulary.modalities
    yield "<table><tr><th>split<th>documents" + "".join(f"<th>{html.escape(n)} tokens" for n in names) + "</tr>"
    for split in dataset.splits.values():
        counts = "".join(f"<td>{count:,d}" for count in split.modality_lengths.sum(axis=0).tolist())
        yield f"<tr><td>{html.escape(split.name)}<td>{len(split):,d}{counts}</tr>"
    yield "</table>"


def _packs(dataset: Dataset, split: Split, count: int, seq_len: int, window: int, seed: int) -> Iterator[str]:
    """Each pack is a bar of seq_len; each document a group; each modality run of it a piece."""
    plan = PackPlan(split.lengths, seq_len=seq_len, window=window, seed=seed)
    names = dataset.vocabulary.modalities
    legend = "".join(f'<i style="background:{colour(m)}"></i>{html.escape(n)}' for m, n in enumerate(names))
    yield f'<h2>Packs of {seq_len}</h2><p class=legend>{legend}<i style="background:#eee"></i>padding</p>'
    for pack in plan.packs(0, 0)[:count]:
        yield "<div class=pack>"
        for number, sample in enumerate(pack.tolist()):
            pieces = "".join(
                f'<i style="width:100%;flex:{b - a};background:{colour(modality, number)}"></i>'
                for a, b, modality in _runs(dataset, split.tokens(sample))
            )
            length = int(split.lengths[sample])
            label = html.escape(f"{split.key(sample)}: {length} tokens", quote=True)
            yield f'<a title="{label}" style="width:{100 * length / seq_len:.4f}%">{pieces}</a>'
        yield "</div>"


def _sample(dataset: Dataset, split: Split, sample: int) -> Iterator[str]:
    meta, members = split.meta(sample), split.members(sample)
    head = html.escape(f"{split.key(sample)} · {meta['kind']} · {split.lengths[sample]} tokens")
    yield f"<div class=sample><small>{head}</small>"
    for modality, content in dataset.composer.decode(split.tokens(sample), split.vectors(sample)):
        if isinstance(content, str):
            yield f"<p>{html.escape(content)}</p>"
        elif content.dtype == np.uint8 and content.ndim in (2, 3):
            yield _image(content, "from its codes")
        elif content.dtype == np.uint8:
            yield f"<pre>{html.escape(hex_dump(content))}</pre>"
        elif isinstance(dataset.codecs.get(modality), SeriesCodec):
            yield _line(content)
        elif dataset.composer.is_continuous(modality):
            low, high = float(content.min()), float(content.max())
            grey = np.rint((content.T - low) / max(high - low, 1e-9) * 255).astype(np.uint8)
            yield _image(grey, f"{len(content)} latents of width {content.shape[-1]}, {low:.3g} to {high:.3g}")
        elif isinstance(codec := dataset.codecs.get(modality), LogMelKMeans):
            yield _sound(_wav(codec.to_waveform(content), codec.rate), "from its codes")
        elif isinstance(codec, HubSpeech):
            yield _sound(_wav(np.rint(np.clip(content, -1, 1) * 32767), codec.rate), "from its codes")
        else:
            yield f"<p><small>{html.escape(modality)}: {content.dtype} {list(content.shape)}</small></p>"
    if "png" in members:
        yield _png(members["png"], "original")
    if "wav" in members:
        yield _sound(members["wav"], "original")
    yield "</div>"


def hex_dump(data: np.ndarray, *, most: int = 256) -> str:
    """Offset, bytes and ASCII of up to `most` bytes uint8 [n], sixteen a line."""
    lines = []
    for start in range(0, min(len(data), most), 16):
        row = data[start : start + 16].tolist()
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        lines.append(f"{start:06x}  {' '.join(f'{byte:02x}' for byte in row):47}  {text}")
    return "\n".join([*lines, *([f"… {len(data):,d} bytes"] if len(data) > most else [])])


def _line(values: np.ndarray) -> str:
    """A series as a line; a missing value interrupts it."""
    known = values[np.isfinite(values)]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 0.0)
    y = 58 - (values - low) / max(high - low, 1e-9) * 56
    steps: list[str] = []
    for x, height in zip(np.linspace(1, 639, len(values)).tolist(), y.tolist(), strict=True):
        # After a gap, or at the beginning, the pen is set down anew.
        steps.append("" if np.isnan(height) else f"{'L' if steps and steps[-1] else 'M'}{x:.1f} {height:.1f}")
    return (
        f'<svg width="640" height="60" role="img"><title>{len(values)} values from {low:.4g} to {high:.4g}</title>'
        f'<path d="{" ".join(steps)}" fill="none" stroke="#357"/></svg><small> {low:.4g} … {high:.4g}</small>'
    )


def _image(pixels: np.ndarray, title: str) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return _png(buffer.getvalue(), title)


def _png(png: bytes, title: str) -> str:
    data = base64.b64encode(png).decode()
    return f'<figure><img alt="{title}" src="data:image/png;base64,{data}"><figcaption>{title}</figcaption></figure>'


def _sound(wav: bytes, title: str) -> str:
    data = base64.b64encode(wav).decode()
    return (
        f'<figure><audio controls title="{title}" src="data:audio/wav;base64,{data}"></audio>'
        f"<figcaption>{title}</figcaption></figure>"
    )


def _wav(samples: np.ndarray, rate: int) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())
    return buffer.getvalue()
