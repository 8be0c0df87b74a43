"""Foreign webdataset tars as a data set: they are only read, and what is made lies beside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from .codecs import Codec
from .compose import Composer
from .dataset import Dataset, text_reading
from .errors import DataError
from .index import ShardIndex, energon_path, index_path, save_energon
from .manifest import MANIFEST, codec_file, fingerprints, write_manifest
from .scan import scan_shard
from .tokenizer import Tokenizer, load_tokenizer
from .vocabulary import Vocabulary

MIN_TOKENS = 16


def meaning(like: Path | None, tokenizer: Path | None) -> Composer:
    """Vocabulary, tokenizer and codecs: those of another data set, or of a tokenizer alone (text only).

    Raises:
        DataError: not exactly one of the two is given, or it cannot be read.
    """
    if (like is None) == (tokenizer is None):
        raise DataError("give either a tokenizer (text only) or a data set whose tokenizer and codecs to use")
    if like is not None:
        return Dataset.open(like).composer
    assert tokenizer is not None
    loaded = load_tokenizer(tokenizer)
    return Composer(Vocabulary(("text",), (loaded.vocab_size,)), loaded, {})


def save_meaning(folder: Path, composer: Composer) -> None:
    """Writes tokenizer and codecs into a folder; DataError where other ones lie there."""
    parts: dict[str, Tokenizer | Codec] = {composer.tokenizer.file: composer.tokenizer}
    parts |= {codec_file(modality): codec for modality, codec in composer.codecs.items()}
    for name, part in parts.items():
        target, aside = folder / name, folder / (name + ".new")
        part.save(aside)
        if target.exists() and target.read_bytes() != aside.read_bytes():
            aside.unlink()
            raise DataError(f"{target} is there already, and another one; nothing was overwritten")
        aside.replace(target)


def adopt(
    tars: Sequence[Path],
    *,
    tokenizer: Path | None = None,
    like: Path | None = None,
    extension: str = "txt",
    max_tokens: int = 2048,
    split: str = "train",
) -> Iterator[tuple[Path, ShardIndex]]:
    """Indexes foreign tars by their text members, and makes the folder that they lie in a data set.

    Args:
        tars: all the tars of one folder that holds no data set yet.
        tokenizer: a sentencepiece model or tokenizer.json; or
        like: a data set, so that both can be mixed.
        extension: of the member with the text, UTF-8.
        max_tokens: longer texts become several documents, cut between words.
        split: its name.

    Yields:
        (tar, index) after each tar; the manifest is written after the last.

    Raises:
        DataError: tars that are missing, of several folders or unsound, a folder that is a data set already, or one
            that holds further tars.
    """
    missing = [str(tar) for tar in tars if not tar.is_file()]
    if missing:
        raise DataError(f"no such shard: {', '.join(missing)}")
    folders = {tar.parent for tar in tars}
    if len(folders) != 1:
        raise DataError(f"the tars lie in {len(folders)} folders; adopt one folder at a time, and mix them as sources")
    (folder,) = folders
    if (folder / MANIFEST).exists():
        raise DataError(f"{folder} is a data set already; leave out --tokenizer and --like to rebuild its indices")
    others = sorted({path.name for path in folder.glob("*.tar")} - {tar.name for tar in tars})
    if others:
        raise DataError(f"{folder} also holds {others[0]}; adopt all tars of a folder together")
    if max_tokens < MIN_TOKENS:
        raise DataError(f"max_tokens must be at least {MIN_TOKENS}, got {max_tokens}")
    composer = meaning(like, tokenizer)
    text = {"extension": extension, "max_tokens": max_tokens}
    marks = fingerprints(composer.vocabulary, composer.tokenizer, composer.codecs)
    reading = text_reading({"text": text, "fingerprints": marks}, composer, split)
    indices = []
    for tar in sorted(tars):
        index = scan_shard(tar, reading=reading)
        index.save(index_path(tar))
        if not energon_path(tar).exists():  # Energon's own may lie there
            save_energon(energon_path(tar), index)
        indices.append(index)
        yield tar, index
    save_meaning(folder, composer)
    write_manifest(
        folder,
        name=folder.name,
        generator={"name": "adopted", "version": 1, **text},
        provenance={"text": f"foreign tars, adopted as they are: {len(tars)} files"},
        composer=composer,
        splits={split: indices},
        text=text,
    )
