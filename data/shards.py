"""Shards: plain webdataset tars, written through `webdataset.TarWriter`.

A tar appears under its final name only when it is complete and durable, and its index with it.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from .errors import DataError
from .files import fsync_folder
from .index import ShardIndex, energon_path, index_path, save_energon
from .latents import MEMBER, LatentFormat, slot_counts, slot_table, to_bits, to_member
from .scan import scan_shard
from .vocabulary import Vocabulary


@dataclass(frozen=True)
class Sample:
    """One document, ready to be written.

    Attributes:
        key: unique in the data set; no dot and no slash.
        kind: e.g. "text" or "image-caption".
        tokens: unified ids int64 [n], beginning with bos.
        spans: (modality, number of tokens with begin and end) in order; bos and eos are not in a span.
        text, png, wav: what the document was made from, where it has any.
        meta: further JSON-able facts (digit, caption, ...).
        latents: float [n, width], one vector per slot among the tokens, where there are any.
    """

    key: str
    kind: str
    tokens: np.ndarray
    spans: list[tuple[str, int]]
    text: str | None = None
    png: bytes | None = None
    wav: bytes | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    latents: np.ndarray | None = None


class ShardWriter:
    """Writes the samples of one split into `{folder}/{split}-{00000}.tar` and their indices.

    Use it as a context manager: leaving it normally finishes the last shard; leaving it by an exception removes the
    unfinished `.tar.part`. A killed process leaves at most that `.part` file behind.

    Args:
        folder: existing folder.
        split: e.g. "train".
        vocabulary: table that the tokens belong to.
        fingerprints: name -> fingerprint of the vocabulary, tokenizer and codecs, stored with every sample.
        samples_per_shard: shards are cut after this many documents.
        first: number of the first shard.
        latents: what the latents of continuous modalities are, where there are such.

    Raises:
        DataError: a shard of that name exists already (nothing is overwritten).
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        vocabulary: Vocabulary,
        fingerprints: Mapping[str, str],
        *,
        samples_per_shard: int = 4096,
        first: int = 0,
        latents: LatentFormat | None = None,
    ) -> None:
        self.folder, self.split, self.vocabulary = folder, split, vocabulary
        self.fingerprints = dict(fingerprints)
        self.samples_per_shard, self.first = samples_per_shard, first
        self.latents = latents
        self._slots = slot_table(vocabulary, latents) if latents else np.zeros(vocabulary.size, dtype=bool)
        self.indices: list[ShardIndex] = []
        self._table = vocabulary.modality_table()
        self._dtype = np.dtype("<u2") if vocabulary.size <= 1 << 16 else np.dtype("<u4")
        self._file: io.BufferedWriter | None = None
        self._tar: Any = None
        self._count = 0
        self._keys: set[str] = set()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish()
        elif self._file is not None:
            self._tar.close()
            self._file.close()
            self._part.unlink(missing_ok=True)

    @property
    def _tar_path(self) -> Path:
        return self.folder / f"{self.split}-{self.first + len(self.indices):05d}.tar"

    @property
    def _part(self) -> Path:
        return self._tar_path.with_name(self._tar_path.name + ".part")

    def write(self, sample: Sample) -> None:
        """Appends one sample; DataError for a bad or repeated key, or tokens outside the vocabulary."""
        tokens = np.asarray(sample.tokens)
        self._accept(sample.key, tokens)
        self._append(sample.key, self._members(sample, tokens), 1)

    def _accept(self, key: str, tokens: np.ndarray) -> None:
        if not key or "." in key or "/" in key:
            raise DataError(f"sample key {key!r} must be non-empty, without dots and slashes")
        if key in self._keys:
            raise DataError(f"duplicate sample key {key!r}")
        if tokens.ndim != 1 or not tokens.size or tokens.min() < 0 or tokens.max() >= self.vocabulary.used:
            raise DataError(f"sample {key!r}: tokens must be 1-D ids in 0..{self.vocabulary.used - 1}")
        if tokens[0] != Vocabulary.BOS:
            raise DataError(f"sample {key!r}: a document begins with bos ({Vocabulary.BOS}), got {tokens[0]}")

    def _append(self, key: str, members: dict[str, bytes], documents: int) -> None:
        self._keys.add(key)
        if self._file is None:
            self._start()
        self._tar.write({"__key__": key, **members})
        self._count += documents
        if self._count >= self.samples_per_shard:
            self._finish()

    def _common(self, tokens: np.ndarray) -> dict[str, Any]:
        counts = np.bincount(self._table[tokens], minlength=len(self.vocabulary.modalities))
        return {
            "split": self.split,
            "modalities": list(self.vocabulary.modalities),
            "lengths": dict(zip(self.vocabulary.modalities, counts.tolist(), strict=True)),
            "fingerprints": self.fingerprints,
        }

    def write_block(self, key: str, documents: Sequence[np.ndarray], meta: Mapping[str, Any] | None = None) -> None:
        """Appends many text documents as one sample: one tar member of tokens instead of one per document.

        Args:
            key: of the block; document i becomes "KEY/i".
            documents: unified text tokens int64 [n] each, beginning with bos.
            meta: further JSON-able facts.

        Raises:
            DataError: a bad or repeated key, no documents, or tokens that are not text.
        """
        if not documents or any(len(document) < 1 or document[0] != Vocabulary.BOS for document in documents):
            raise DataError(f"block {key!r}: at least one document is needed, and each begins with bos")
        tokens = np.concatenate(documents).astype(np.int64)
        self._accept(key, tokens)
        if self._table[tokens].any():
            raise DataError(f"block {key!r}: all tokens of a block are text; write other documents as samples")
        off = np.cumsum([0, *map(len, documents)])
        meta = {**self._common(tokens), "kind": "text", "documents": len(documents), **(meta or {})}
        members = {
            "json": json.dumps(meta, separators=(",", ":")).encode(),
            "tok.npy": _npy(tokens.astype(self._dtype)),
            "off.npy": _npy(off.astype("<u4" if off[-1] < 1 << 32 else "<u8")),
        }
        self._append(key, members, len(documents))

    def _members(self, sample: Sample, tokens: np.ndarray) -> dict[str, bytes]:
        common = self._common(tokens)
        # The order of these fields is part of the bytes of every data set built so far.
        meta = {
            "kind": sample.kind,
            **{name: common[name] for name in ("split", "modalities", "lengths")},
            "spans": [list(span) for span in sample.spans],
            "fingerprints": self.fingerprints,
            **sample.meta,
        }
        vectors = self._vectors(sample, tokens)
        if vectors and self.latents:
            counts = slot_counts(tokens, self.vocabulary, self.latents)
            meta["latents"] = {name: n for name, n in zip(self.vocabulary.modalities, counts, strict=True) if n}
        members = {
            "json": json.dumps(meta, separators=(",", ":")).encode(),
            "tokens.npy": _npy(tokens.astype(self._dtype)),
            **vectors,
        }
        if sample.text is not None:
            members["txt"] = sample.text.encode()
        if sample.png is not None:
            members["png"] = sample.png
        if sample.wav is not None:
            members["wav"] = sample.wav
        return members

    def _vectors(self, sample: Sample, tokens: np.ndarray) -> dict[str, bytes]:
        """The member that holds a sample's latents, if it has any; DataError unless there is one for each slot."""
        slots = int(self._slots[tokens].sum())
        given = 0 if sample.latents is None else len(sample.latents)
        if slots != given:
            raise DataError(f"sample {sample.key!r}: {slots} slots among its tokens, but {given} latents")
        if not given or sample.latents is None or self.latents is None:
            return {}
        bits = to_bits(sample.latents, self.latents, f"sample {sample.key!r}")
        return {MEMBER: to_member(bits, self.latents)}

    def _start(self) -> None:
        from webdataset.writer import TarWriter  # its import takes a second: only writers pay it

        if self._tar_path.exists():
            raise DataError(f"{self._tar_path} exists; shards are never overwritten")
        self._file = open(self._part, "wb")
        # mtime and owner are fixed: the same samples make the same bytes.
        self._tar = TarWriter(self._file, user="polylepis", group="polylepis", mtime=0, encoder=False, compress=False)

    def _finish(self) -> None:
        if self._file is None:
            return
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file, self._count = None, 0
        # Indexing what lies on the disk, not what we meant to write, is the first check of the shard.
        tar, part = self._tar_path, self._part
        index = scan_shard(part, name=tar.name)
        index.save(index_path(tar))
        save_energon(energon_path(tar), index)
        os.replace(part, tar)
        fsync_folder(self.folder)
        self.indices.append(index)


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()
