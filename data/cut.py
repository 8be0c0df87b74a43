"""Long texts in pieces that fill a row: each nearly as long as it may be, cut between words.

Halving a text until its pieces fit leaves pieces of half to all of the limit, and two of them never share a row: a
third of every batch would be padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

_FULL = 0.985  # a piece that fills so much of the limit is long enough
_AIM = 0.995
_TRIES = 10


def cut_text(text: str, limit: int, encode: Callable[[str], list[int]]) -> Iterator[tuple[str, list[int]]]:
    """Successive pieces of `text` that lose nothing: joined, they are the text.

    Args:
        text: any text.
        limit: most tokens of a piece (a single character may have more).
        encode: the tokenizer, text to ids.

    Yields:
        (piece, its ids). A piece ends before a space or after a newline where there is one in its later half, and is
        as long as that allows, up to 1.5 % of `limit`. The pieces follow from text and tokenizer alone.
    """
    start, density = 0, 4.0  # characters per token, of the text so far
    while start < len(text):
        end, ids = _next(text, start, limit, density, encode)
        yield text[start:end], ids
        density = max((end - start) / max(len(ids), 1), 1 / limit)
        start = end


def _next(
    text: str, start: int, limit: int, density: float, encode: Callable[[str], list[int]]
) -> tuple[int, list[int]]:
    """(end, ids) of the piece that begins at `start`: by the secant method between an end that fits and one too far."""
    fits, best = start, list[int]()
    beyond = len(text) + 1
    aim = start + math.ceil(limit * density)
    for tries in range(len(text).bit_length() + _TRIES):
        end = _between_words(text, start, min(max(aim, fits + 1), beyond - 1, len(text)))
        if end <= fits:  # the last place before the aim is known to fit: the next one may as well
            end = _next_place(text, fits)
            if end >= beyond:
                break
        ids = encode(text[start:end])
        if len(ids) <= limit:
            fits, best = end, ids
            if end == len(text) or len(ids) >= _FULL * limit or (tries >= _TRIES):
                break
        elif end == start + 1:
            return end, ids  # one character of more tokens than the limit
        else:
            beyond = end
        aim = start + int((end - start) * _AIM * limit / max(len(ids), 1))
        if tries >= _TRIES or not fits < aim < beyond:  # the density is uneven: halve instead
            aim = (max(fits, start) + beyond) // 2 if beyond <= len(text) else start + 2 * (end - start)
    return fits, best


def _between_words(text: str, start: int, end: int) -> int:
    """The last place for a cut in the later half of start..end: before a space or after a newline; else `end`."""
    if end >= len(text):
        return end
    least = start + (end - start) // 2 + 1
    place = max(text.rfind(" ", least, end + 1), text.rfind("\n", least - 1, end) + 1)
    return place if place >= least else end


def _next_place(text: str, after: int) -> int:
    """The first place for a cut behind `after`."""
    space, line = text.find(" ", after + 1), text.find("\n", after) + 1
    return min((place for place in (space, line) if place > after), default=len(text))
