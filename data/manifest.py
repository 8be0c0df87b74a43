"""manifest.json: what a data set holds and what gives its tokens their meaning; its hash is the data set's identity."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import DataError
from .files import sha256_file, write_atomic
from .latents import LatentFormat
from .vocabulary import Vocabulary

if TYPE_CHECKING:
    from .codecs import Codec
    from .compose import Composer
    from .index import ShardIndex
    from .tokenizer import Tokenizer

TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")
MANIFEST = "manifest.json"
MANIFEST_VERSION = 1


def codec_file(modality: str) -> str:
    """Name of a modality's codec inside the folder."""
    return f"{modality}.codec.npz"


def find_tokenizer(root: Path, manifest: Mapping[str, Any]) -> str:
    """Name of the tokenizer's file that a manifest lists; DataError when it lists none."""
    for name in TOKENIZER_FILES:
        if name in manifest["files"]:
            return name
    raise DataError(f"{root / MANIFEST} lists no tokenizer ({' or '.join(TOKENIZER_FILES)})")


def fingerprints(vocabulary: Vocabulary, tokenizer: Tokenizer, codecs: Mapping[str, Codec]) -> dict[str, str]:
    """Name -> fingerprint of all that gives tokens their meaning."""
    return {
        "vocabulary": vocabulary.fingerprint,
        "text": tokenizer.fingerprint,
        **{modality: codec.fingerprint for modality, codec in codecs.items()},
    }


def read_manifest(root: Path, *, shown: str | None = None) -> tuple[dict[str, Any], str]:
    """The manifest of a folder and its hash; DataError when there is none or it is of another version.

    Args:
        shown: how messages call the folder, where `root` is the copy of a remote one.
    """
    file = f"{str(shown or root).rstrip('/')}/{MANIFEST}"
    if not (root / MANIFEST).is_file():
        begun = (root / "encode.json").exists()
        how = "go on with: polylepis data encode" if begun else "make one with: polylepis data build quickstart"
        raise DataError(f"{shown or root} is no data set: {MANIFEST} is missing; {how}")
    raw = (root / MANIFEST).read_bytes()
    try:
        manifest = json.loads(raw)
        version = manifest["version"]
        missing = {"vocabulary", "fingerprints", "splits", "files", "generator"} - set(manifest)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is not a manifest ({error!r})") from error
    if version != MANIFEST_VERSION or missing:
        raise DataError(f"{file}: version {version}, fields missing: {sorted(missing)}; this reads {MANIFEST_VERSION}")
    shards = {"name": str, "bytes": int, "sha256": str, "n_samples": int, "tokens": dict}
    listed = [("files", "an entry", entry, {"bytes": int, "sha256": str}) for entry in _values(file, manifest, "files")]
    for entries in _values(file, manifest, "splits"):
        listed += [("splits", "a shard", entry, shards) for entry in (entries if isinstance(entries, list) else [None])]
    for section, what, entry, fields in listed:
        wrong = [k for k, kind in fields.items() if not isinstance(entry, dict) or not isinstance(entry.get(k), kind)]
        if wrong:
            raise DataError(f"{file}: {what} of {section} lacks {', '.join(wrong)} (or has another type): {entry}")
    return manifest, hashlib.sha256(raw).hexdigest()


def _values(file: str, manifest: Mapping[str, Any], section: str) -> list[Any]:
    """The entries of a section that must be a table."""
    if not isinstance(manifest[section], dict):
        raise DataError(f"{file}: {section} must be a table by name, got {manifest[section]!r}")
    return list(manifest[section].values())


def write_manifest(
    root: Path,
    *,
    name: str,
    generator: Mapping[str, Any],
    provenance: Mapping[str, Any],
    composer: Composer,
    splits: Mapping[str, list[ShardIndex]],
    text: Mapping[str, Any] | None = None,
) -> None:
    """Writes manifest.json, the last file of a build: a folder without it is no data set.

    `text` says how adopted tars are read; see `TextReading`.
    """
    shards = {
        split: [
            {
                "name": index.header["tar"],
                "bytes": index.header["bytes"],
                "sha256": index.header["sha256"],
                "n_samples": len(index),
                "tokens": dict(
                    zip(composer.vocabulary.modalities, index.modality_lengths.sum(axis=0).tolist(), strict=True)
                ),
            }
            for index in indices
        ]
        for split, indices in splits.items()
    }
    form = LatentFormat.of(composer.codecs)
    names = [composer.tokenizer.file, *(codec_file(modality) for modality in composer.codecs)]
    manifest = {
        "version": MANIFEST_VERSION,
        "name": name,
        "generator": dict(generator),
        "provenance": dict(provenance),
        "modalities": list(composer.vocabulary.modalities),
        "vocabulary": composer.vocabulary.to_json(),
        "fingerprints": fingerprints(composer.vocabulary, composer.tokenizer, composer.codecs),
        "files": {f: {"bytes": (root / f).stat().st_size, "sha256": sha256_file(root / f)} for f in names},
        "splits": shards,
        **({"text": dict(text)} if text is not None else {}),
        **({"latents": form.to_json()} if form is not None else {}),
    }
    write_atomic(root / MANIFEST, (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode())
