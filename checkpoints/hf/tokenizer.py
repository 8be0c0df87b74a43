"""The tokenizer of a data set as one that transformers loads, with the ids of the unified vocabulary.

Text ids of a data set start after the special ids, so neither a sentencepiece model nor a `tokenizer.json` can be
copied as it is: ids are shifted, and the special ids get names. Special names in a text are recognised, as everywhere
in transformers; our own tokenizer has no such names, so for all other texts the ids are the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

_SPACE = "\u2581"  # sentencepiece's visible space
NAMED = ("<|pad|>", "<|bos|>", "<|eos|>", "<|unk|>")


def special_names(vocabulary: Mapping[str, Any]) -> list[str]:
    """A name for each special id: `<|bos|>`, `<|image|>` … `<|/image|>`, `<|special_9|>`."""
    names = list(NAMED)
    for modality in vocabulary["modalities"][1:]:
        names += [f"<|{modality}|>", f"<|/{modality}|>"]
    return [*names, *(f"<|special_{k}|>" for k in range(len(names), vocabulary["specials"]))]


def write_tokenizer(folder: Path, files: Sequence[Path], vocabulary: Mapping[str, Any] | None, context: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` if there is a tokenizer among the files.

    Args:
        folder: the export.
        files: of the data set; `tokenizer.model` or `tokenizer.json` is looked for.
        vocabulary: the data set's; without one the ids are not known and nothing is written.
        context: the sequence length of training.

    Raises:
        CheckpointError: the file is not such a tokenizer, of another size than the vocabulary says, or of a sort whose
            ids cannot be kept.
    """
    found = {path.name: path for path in files}
    if vocabulary is None or not found.keys() & {"tokenizer.model", "tokenizer.json"}:
        return
    names = special_names(vocabulary)
    if "tokenizer.model" in found:
        content = from_sentencepiece(found["tokenizer.model"], names, vocabulary["sizes"][0])
    else:
        content = from_hub(found["tokenizer.json"], names, vocabulary["sizes"][0])
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": NAMED[1],
        "eos_token": NAMED[2],
        "pad_token": NAMED[0],
        "unk_token": NAMED[3],
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def from_sentencepiece(path: Path, names: Sequence[str], size: int) -> dict[str, Any]:
    """The content of `tokenizer.json` for a BPE model with byte fallback as `polylepis data build` trains it.

    Spaces stay spaces: a literal U+2581 is then spelt in bytes, as ours does. A pair of pieces is merged if the result
    is a piece, the best piece first, so the merges follow from the pieces and their scores.

    Raises:
        CheckpointError: not such a model.
    """
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.load_from_serialized_proto(path.read_bytes())
    except RuntimeError as error:
        raise CheckpointError(f"{path}: not a sentencepiece model") from error
    ids = range(processor.get_piece_size())
    if len(ids) != size:
        raise CheckpointError(f"{path}: has {len(ids)} pieces, but the vocabulary has {size} text ids")
    normal: dict[str, float] = {}
    vocab = {name: position for position, name in enumerate(names)}
    for i in ids:
        piece = processor.id_to_piece(i)
        if not (processor.is_byte(i) or processor.is_unknown(i) or processor.is_control(i)):
            piece = piece.replace(_SPACE, " ")
            normal[piece] = processor.get_score(i)
        vocab.setdefault(piece, len(names) + i)
    merges = [
        (-score, len(piece), cut, piece[:cut], piece[cut:])
        for piece, score in normal.items()
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": processor.id_to_piece(processor.unk_id()),
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": vocab,
        "merges": [[left, right] for *_, left, right in sorted(merges)],
    }
    content = _around(model, names)
    content["decoder"] = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}
    _check_same(path, content, processor, len(names))
    return content


def _around(model: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_special(k, name) for k, name in enumerate(names)],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": _begin_of_document(names),
        "decoder": None,
        "model": dict(model),
    }


def _special(position: int, name: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": position, "content": name, **flags, "special": True}


def _begin_of_document(names: Sequence[str]) -> dict[str, Any]:
    """Every document of training begins with this token, so every prompt does."""
    bos = {"SpecialToken": {"id": names[1], "type_id": 0}}
    first, second = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [bos, first],
        "pair": [bos, first, second],
        "special_tokens": {names[1]: {"id": names[1], "ids": [1], "tokens": [names[1]]}},
    }


PROBES = (
    "The quick brown fox jumps over the lazy dog.\n\n  Two spaces, a\ttab.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. ¿Qué tal? Ça va? Ελληνικά, русский, العربية",
    "いろはにほへと 漢字 한국어 ไทย हिन्दी \u2581literal\u2581 e\u0301 \U0001f600\U0001f1e9\U0001f1ea",
    "def f(x):\n    return x**2 + 3.14159e-10  # <0x0A> </s> <unk>",
)


def _check_same(path: Path, content: Mapping[str, Any], processor: Any, first: int) -> None:
    """Refuse a model of another sort (unigram, normalising, with a dummy prefix): its ids would not be kept."""
    library = _library(path, content)
    bytes_of = {value: processor.piece_to_id(f"<0x{value:02X}>") for value in _SPACE.encode()}
    for text in (*PROBES, *(processor.id_to_piece(i) for i in range(0, processor.get_piece_size(), 7))):
        expected: list[int] = []
        for n, part in enumerate(text.split(_SPACE)):
            expected += [bytes_of[value] for value in _SPACE.encode()] if n else []
            expected += processor.encode(part)
        if library.encode(text, add_special_tokens=False).ids != [first + i for i in expected]:
            raise CheckpointError(
                f"{path}: transformers would split {text[:40]!r} otherwise than sentencepiece does; BPE models with "
                "byte fallback, without normalisation and dummy prefix are exported; leave it out with --no-tokenizer"
            )


def _library(path: Path, content: Mapping[str, Any]) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{path}: no tokenizer can be made of it ({' '.join(str(error).split())})") from error


def from_hub(path: Path, names: Sequence[str], size: int) -> dict[str, Any]:
    """A `tokenizer.json` with all its ids shifted past the special ids.

    Raises:
        CheckpointError: no such file, or a model whose ids have no table.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        model, shift = content["model"], len(names)
        if model.get("type", "BPE") == "Unigram":
            lowest = min((score for _, score in model["vocab"]), default=0.0)
            model["vocab"] = [*([name, lowest - 100.0] for name in names), *model["vocab"]]
            if model.get("unk_id") is not None:
                model["unk_id"] += shift
            count = len(model["vocab"]) - shift
        else:
            model["vocab"] = {piece: i + shift for piece, i in model["vocab"].items()}
            count = max(model["vocab"].values(), default=shift - 1) - shift + 1
            model["vocab"] |= {name: k for k, name in enumerate(names)}
        old = content.get("added_tokens") or []
        count = max([count, *(token["id"] + 1 for token in old)])
        content["added_tokens"] = [_special(k, name) for k, name in enumerate(names)]
        content["added_tokens"] += [{**token, "id": token["id"] + shift} for token in old]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a tokenizer.json whose ids can be shifted ({error})") from error
    if count > size:
        raise CheckpointError(f"{path}: has {count} ids, but the vocabulary has {size} text ids")
    content |= {"truncation": None, "padding": None, "post_processor": _begin_of_document(names)}
    _library(path, content)
    return content
