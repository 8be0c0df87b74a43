"""An imported model on a data set of ours: each row of embedding and output projection goes where its token is there.

Foreign ids start at 0; ours have 32 special ids first, then the text ids, then further modalities.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..surgery import adopt_vocabulary, extend_vocabulary
from ..transforms import Transformed
from .base import Foreign, read_json

TOKENIZER = "tokenizer.json"


def onto_data(foreign: Foreign, folder: Path, data: Path) -> Foreign:
    """The model with the vocabulary, and where it has only text the modalities, of a data set.

    Args:
        foreign: what was read.
        folder: where; its `tokenizer.json` must be the data set's if both have one.
        data: the data set's folder.

    Raises:
        CheckpointError: no such data set, or one whose text ids are another tokenizer's.
    """
    vocabulary = read_json(data / "manifest.json").get("vocabulary")
    if not isinstance(vocabulary, Mapping):
        raise CheckpointError(f"{data}: no vocabulary in its manifest.json, so this is no data set")
    config = foreign.config
    if foreign.vocabulary is not None:
        config, rules = extend_vocabulary(config, foreign.vocabulary, vocabulary)
        line = f"the vocabulary is that of {data}: every code keeps its row, new ones start near the mean"
    else:
        _same_tokenizer(folder, data)
        if len(config.modalities) > 1:
            raise CheckpointError(f"{folder}: is routed by modality, but does not say where their ids lie")
        config, rules = adopt_vocabulary(config, vocabulary, foreign.specials)
        known = ", ".join(
            name for name, k in zip(("pad", "bos", "eos"), foreign.specials, strict=True) if k is not None
        )
        line = (
            f"the vocabulary is that of {data}: text id k there is {vocabulary['specials']} + k here; new ids start "
            f"near the mean, but for {known or 'none'}"
        )
    if config.modalities != tuple(vocabulary["modalities"]):
        if any(config.layer(i)[1].routed for i, symbol in enumerate(config.symbols) if symbol == "M"):
            raise CheckpointError(
                f"{folder}: is routed by {list(config.modalities)}, but {data} holds {vocabulary['modalities']}"
            )
        config = dataclasses.replace(config, modalities=tuple(vocabulary["modalities"]))
    return dataclasses.replace(
        foreign,
        config=config,
        tensors=Transformed(foreign.tensors, rules),
        notes=(*foreign.notes, line),
        vocabulary=dict(vocabulary),
        data=str(data),
    )


def _same_tokenizer(folder: Path, data: Path) -> None:
    """Refuse a data set that was tokenised otherwise, as far as files tell."""
    theirs, ours = (_content(place / TOKENIZER) for place in (folder, data))
    if theirs is None:
        return
    if ours is None:
        raise CheckpointError(
            f"{data}: was not tokenised with {folder / TOKENIZER}; make it with polylepis data encode --tokenizer"
        )
    if ours != theirs:
        raise CheckpointError(f"{data / TOKENIZER} is another tokenizer than {folder / TOKENIZER}")


def _content(path: Path) -> dict[str, Any] | None:
    """What decides about ids; how a text is cut to a length does not."""
    if not path.is_file():
        return None
    return {k: v for k, v in read_json(path).items() if k not in ("truncation", "padding", "post_processor")}
