"""A data set folder: manifest, tokenizer, codecs, shards and their indices, opened with every claim checked.

What a start needs is little: tokenizer, codecs and file systems are imported where they are first used.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import BadSampleError, DataError
from .files import is_url, sha256_file
from .index import BLOCK, ShardIndex, index_path
from .latents import LatentFormat, LatentRows, slot_counts, to_float
from .manifest import MANIFEST, codec_file, find_tokenizer, fingerprints, read_manifest
from .pread import ShardFiles
from .vocabulary import Vocabulary

if TYPE_CHECKING:
    from .codecs import Codec
    from .compose import Composer
    from .remote import RemoteFolder
    from .scan import TextReading
    from .tokenizer import Tokenizer


@dataclass
class Split:
    """One split as flat arrays over all its samples, in shard order.

    Attributes:
        name: e.g. "train".
        keys: bytes [n].
        lengths: int64 [n] tokens per document, bos and eos included.
        modality_lengths: int64 [n, M], summing to `lengths`.
        shard: int64 [n]; span_offset, span_bytes, token_offset, token_bytes int64 [n]; token_crc32 uint32 [n].
        files: the shards.
        root: folder or URL of the data set.
        encode: for adopted tars, whose "tokens" are text: text -> document.
        latent_format, latent_rows: what the continuous latents are, and where; None without a continuous modality.
    """

    name: str
    keys: np.ndarray
    lengths: np.ndarray
    modality_lengths: np.ndarray
    shard: np.ndarray
    span_offset: np.ndarray
    span_bytes: np.ndarray
    token_offset: np.ndarray
    token_bytes: np.ndarray
    token_crc32: np.ndarray
    files: ShardFiles = field(repr=False)
    root: str = ""
    encode: Callable[[str], np.ndarray] | None = field(default=None, repr=False)
    latent_format: LatentFormat | None = None
    latent_rows: LatentRows | None = field(default=None, repr=False)
    _last_meta: tuple[tuple[int, int], dict[str, Any]] | None = field(default=None, init=False, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """Workers open the data set again: its indices are in the page cache, not in a pipe."""
        return _reopen, (self.root, self.name)

    def __len__(self) -> int:
        return len(self.keys)

    def where(self, sample: int) -> str:
        """Shard, key and offset of a sample, for messages."""
        name = self.files.names[int(self.shard[sample])]
        return f"{name}: {self.key(sample)!r} at offset {self.token_offset[sample]}"

    def key(self, sample: int) -> str:
        """The sample's key."""
        return bytes(self.keys[sample]).decode()

    def tokens(self, sample: int) -> np.ndarray:
        """Unified tokens int64 [length] of one document: one read, crc checked (DataError names shard and offset)."""
        size = int(self.token_bytes[sample])
        data = self.files.read_checked(
            int(self.shard[sample]),
            int(self.token_offset[sample]),
            size,
            int(self.token_crc32[sample]),
            self.key(sample),
        )
        length = int(self.lengths[sample])
        if self.encode is None:
            return np.frombuffer(data, dtype=f"<u{size // length}").astype(np.int64)
        tokens = self.encode(data.decode())
        if len(tokens) != length:
            raise BadSampleError(
                "undecodable",
                f"{self.where(sample)} gives {len(tokens)} tokens, the index says {length}: it was made with another "
                "tokenizer; make it again with: polylepis data index",
            )
        return tokens

    def latents(self, sample: int) -> np.ndarray | None:
        """The latents' bits uint16 [n, width] of one document, crc checked; None if it has none."""
        rows, form = self.latent_rows, self.latent_format
        if rows is None or form is None or not rows.latent_bytes[sample]:
            return None
        where = (int(self.shard[sample]), int(rows.latent_offset[sample]), int(rows.latent_bytes[sample]))
        data = self.files.read_checked(*where, int(rows.latent_crc32[sample]), self.key(sample))
        return np.frombuffer(data, dtype="<u2").reshape(-1, form.width)

    def vectors(self, sample: int) -> np.ndarray | None:
        """`latents` as float32 [n, width]."""
        bits = self.latents(sample)
        return None if bits is None or self.latent_format is None else to_float(bits, self.latent_format)

    def members(self, sample: int) -> dict[str, bytes]:
        """All members of a sample by extension ("json", "tokens.npy", "png", …), in one read.

        Raises:
            BadSampleError: what lies there are no members of this sample.
        """
        start, size = int(self.span_offset[sample]), int(self.span_bytes[sample])
        shard = int(self.shard[sample])
        span = self.files.read(shard, start, size)
        members: dict[str, bytes] = {}
        at, more = 0, None
        # The scan that made the index has judged every header; here their sums need not be checked once more.
        while at < size:
            name = span[at : at + 100].partition(b"\0")[0]
            digits, kind = span[at + 124 : at + 136].strip(b" \0"), span[at + 156 : at + 157]
            if self.encode is not None and kind not in b"0\0" and digits.isdigit():  # an adopted tar
                from .extended import KINDS, Extended, parse

                length = int(digits, 8)
                if kind in KINDS:
                    more = parse(kind, span[at + BLOCK : at + BLOCK + length], more or Extended())
                at += BLOCK + -(-length // BLOCK) * BLOCK
                continue
            if more is not None:
                name, digits = (more.name or name.decode()).encode(), digits if more.size is None else b"%o" % more.size
                more = None
            extension = name.rpartition(b"/")[2].partition(b".")[2]
            if not extension or not digits.isdigit() or span[at + 257 : at + 262] != b"ustar":
                raise BadSampleError("corrupt", f"{self.where(sample)}: no tar header at offset {start + at}")
            length = int(digits, 8)
            members[extension.decode()] = span[at + BLOCK : at + BLOCK + length]
            at += BLOCK + -(-length // BLOCK) * BLOCK
        return members

    def meta(self, sample: int) -> dict[str, Any]:
        """The sample's `json` member: kind, digit, caption, spans, lengths, …; documents of a block share theirs."""
        place = (int(self.shard[sample]), int(self.span_offset[sample]))
        if self._last_meta is None or self._last_meta[0] != place:  # a block is read once for all its documents
            self._last_meta = place, json.loads(self.members(sample).get("json", b"{}"))
        return {"kind": "text", **self._last_meta[1]}


@dataclass
class Dataset:
    """An opened data set; see `open`.

    Attributes:
        path: the folder.
        manifest: contents of manifest.json.
        identity: 64 hexadecimal digits, the hash of the manifest; it goes into every checkpoint.
        vocabulary: what the tokens mean.
        splits: name -> `Split`.
    """

    path: Path
    manifest: dict[str, Any]
    identity: str
    vocabulary: Vocabulary
    splits: dict[str, Split]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Of the text modality."""
        from .tokenizer import load_tokenizer

        return load_tokenizer(self.path / find_tokenizer(self.path, self.manifest))

    @cached_property
    def codecs(self) -> dict[str, Codec]:
        """Modality -> codec, for all but text."""
        from .codecs import load_codec

        return {modality: load_codec(self.path / codec_file(modality)) for modality in self.vocabulary.modalities[1:]}

    @property
    def latent_format(self) -> LatentFormat | None:
        """What the continuous latents are; None where all modalities are discrete."""
        return LatentFormat.from_json(self.manifest["latents"]) if "latents" in self.manifest else None

    @property
    def composer(self) -> Composer:
        """Builds documents and prompts of this data set's vocabulary."""
        from .compose import Composer

        return Composer(self.vocabulary, self.tokenizer, self.codecs)

    def split(self, name: str) -> Split:
        """The split of that name; DataError lists those there are."""
        if name not in self.splits:
            raise DataError(f"{self.path} has no split {name!r}; it has {', '.join(self.splits)}")
        return self.splits[name]

    def documents(self, split: str) -> Iterator[tuple[str, dict[str, Any], np.ndarray]]:
        """(key, meta, tokens int64 [n]) of every sample of a split, in shard order."""
        samples = self.split(split)
        for i in range(len(samples)):
            yield samples.key(i), samples.meta(i), samples.tokens(i)

    @classmethod
    def open(cls, path: str | Path) -> Dataset:
        """Opens a folder and checks, without reading the shards, that everything in it belongs together.

        Raises:
            DataError: no or unreadable manifest; a tokenizer, codec or vocabulary whose fingerprint is another; a
                shard that is missing, truncated, foreign (its index tells of another tar, or other vocabularies, or
                the manifest does not list it) or without index.
        """
        remote = None
        if is_url(path):
            from .remote import RemoteFolder

            remote = RemoteFolder(str(path))
        root = remote.local if remote else Path(path)
        if remote:
            remote.fetch(MANIFEST, fresh=True)
        manifest, identity = read_manifest(root, shown=str(path))
        if remote:
            for file, entry in manifest["files"].items():
                remote.fetch(file, size=entry["bytes"], sha256=entry["sha256"])
        opened = cls(root, manifest, identity, Vocabulary.from_json(manifest["vocabulary"]), {})
        opened._check_meanings()
        expected, form = manifest["fingerprints"], opened.latent_format
        listed = {shard["name"] for shards in manifest["splits"].values() for shard in shards}
        stray = [] if remote else sorted(tar.name for tar in root.glob("*.tar") if tar.name not in listed)
        if stray:
            raise DataError(f"{root / stray[0]} is not in the manifest: a foreign shard; move it out of the folder")
        for name, shards in manifest["splits"].items():
            opened.splits[name] = _open_split(root, name, shards, expected, remote, form)
        if "text" in manifest:
            compose = opened.composer
            for split in opened.splits.values():
                split.encode = lambda text: compose.document([("text", text)])
        return opened

    def _check_meanings(self) -> None:
        """Refuses a vocabulary, tokenizer or codec other than those that the shards were made with.

        A file that hashes as it did when the manifest was written has the fingerprint that was written with it; it is
        loaded only when it does not.
        """
        expected, listed = self.manifest["fingerprints"], self.manifest["files"]
        files = {"text": find_tokenizer(self.path, self.manifest)}
        files |= {modality: codec_file(modality) for modality in self.vocabulary.modalities[1:]}
        paths = {self.path / file: listed.get(file, {}).get("sha256") for file in files.values()}
        changed = not all(path.is_file() and sha256_file(path) == sha256 for path, sha256 in paths.items())
        found = {"vocabulary": self.vocabulary.fingerprint}
        if changed:
            found = fingerprints(self.vocabulary, self.tokenizer, self.codecs)
        for name, value in found.items():
            if expected.get(name) != value:
                raise DataError(
                    f"{self.path / files.get(name, name)}: fingerprint {value[:12]} differs from "
                    f"{str(expected.get(name))[:12]} in the manifest: the shards were made with another one; restore "
                    "it or build the data set again"
                )
        if changed or "latents" in self.manifest:
            form, stated = LatentFormat.of(self.codecs), self.latent_format
            if form != stated:
                raise DataError(f"{self.path / MANIFEST}: its latents are {stated}, its codecs make {form}")

    def validate(self) -> Iterator[tuple[str, int]]:
        """Reads everything: hashes of all files, indices against the tars, every sample's tokens and spans.

        Yields:
            (shard name, number of samples), after each shard was found good.

        Raises:
            DataError: the first thing that is wrong.
        """
        from .remote import RemoteShards
        from .scan import scan_shard

        for name, entry in self.manifest["files"].items():
            if sha256_file(self.path / name) != entry["sha256"]:
                raise DataError(f"{self.path / name}: sha256 differs from the manifest")
        seen: set[bytes] = set()
        table = self.vocabulary.modality_table()
        for split_name, shards in self.manifest["splits"].items():
            split = self.splits[split_name]
            start = 0
            for shard in shards:
                tar = self.path / shard["name"]
                if isinstance(split.files, RemoteShards):
                    split.files.folder.fetch(shard["name"], size=shard["bytes"], sha256=shard["sha256"])
                scanned = scan_shard(tar, reading=text_reading(self.manifest, self.composer, split_name))
                stored = ShardIndex.load(index_path(tar))
                _compare(tar, stored, scanned)
                if scanned.header["sha256"] != shard["sha256"]:
                    raise DataError(f"{tar}: sha256 differs from the manifest: the shard was changed")
                counts = scanned.modality_lengths.sum(axis=0).tolist()
                tokens = dict(zip(self.vocabulary.modalities, counts, strict=True))
                if shard["tokens"] != tokens:
                    raise DataError(f"{tar}: the manifest says {shard['tokens']} tokens, the shard holds {tokens}")
                keys = set(scanned.keys.tolist())
                if keys & seen:
                    raise DataError(f"{tar}: duplicate key {min(keys & seen).decode()!r} also in another shard")
                seen |= keys
                for i in range(start, start + len(scanned)):
                    self._check_sample(split, i, table)
                start += len(scanned)
                yield shard["name"], len(scanned)

    def _check_sample(self, split: Split, sample: int, table: np.ndarray) -> None:
        where = f"{split.files.paths[int(split.shard[sample])].name}: {split.key(sample)!r}"
        tokens, meta = split.tokens(sample), split.meta(sample)
        if tokens.max() >= self.vocabulary.used:
            raise DataError(f"{where}: token {tokens.max()} is outside the vocabulary of {self.vocabulary.used}")
        counts = np.bincount(table[tokens], minlength=len(self.vocabulary.modalities))
        if not np.array_equal(counts, split.modality_lengths[sample]):
            raise DataError(f"{where}: tokens per modality {counts.tolist()} differ from the index")
        spans = self.composer.spans(tokens)
        if "spans" in meta and [name for name, _ in spans] != [name for name, _ in meta["spans"]]:
            raise DataError(f"{where}: spans {[name for name, _ in spans]} differ from those in its json")
        if split.latent_format is not None and split.latent_rows is not None:
            slots, rows = slot_counts(tokens, self.vocabulary, split.latent_format), split.latent_rows
            if slots != rows.latent_counts[sample].tolist():
                raise DataError(f"{where}: {slots} slots by modality, the index says {rows.latent_counts[sample]}")
        vectors = split.vectors(sample)
        if vectors is not None and not np.isfinite(vectors).all():
            raise DataError(f"{where}: its latents are not finite")
        self.composer.decode(tokens, vectors)


def text_reading(manifest: Mapping[str, Any], composer: Composer, split: str) -> TextReading | None:
    """How the tars of an adopted data set are read; None for one whose shards hold tokens."""
    text = manifest.get("text")
    if text is None:
        return None
    from .scan import TextReading

    return TextReading(
        extension=text["extension"],
        max_tokens=text["max_tokens"],
        split=split,
        fingerprints=manifest["fingerprints"],
        modalities=composer.vocabulary.modalities,
        encode=composer.tokenizer.encode,
    )


def _open_split(
    root: Path,
    name: str,
    shards: list[dict[str, Any]],
    expected: dict[str, str],
    remote: RemoteFolder | None,
    form: LatentFormat | None,
) -> Split:
    """Loads the indices of one split and checks them against manifest and files."""
    indices = []
    for shard in shards:
        tar = root / shard["name"]
        if remote:
            size = remote.size(shard["name"])
            file = remote.fetch(index_path(tar).name)
            if ShardIndex.load(file).header["sha256"] != shard["sha256"]:
                remote.fetch(file.name, fresh=True)
        elif not tar.is_file():
            raise DataError(f"shard {tar} is missing")
        else:
            size = tar.stat().st_size
        if size != shard["bytes"]:
            what = "truncated" if size < shard["bytes"] else "foreign or changed"
            raise DataError(f"shard {tar} is {what}: {size} bytes, the manifest says {shard['bytes']}")
        index = ShardIndex.load(index_path(tar))
        if index.header["sha256"] != shard["sha256"] or index.header["bytes"] != size:
            raise DataError(f"index {index_path(tar)} belongs to another tar: a foreign shard or index")
        if index.header["fingerprints"] != expected or index.header["split"] != name:
            raise DataError(f"shard {tar} is foreign: made with other vocabularies or for another split than {name!r}")
        if len(index) != shard["n_samples"]:
            raise DataError(f"index {index_path(tar)}: {len(index)} samples, the manifest says {shard['n_samples']}")
        kind = index.header.get("latents")
        if kind is not None and (form is None or kind != {"width": form.width, "dtype": form.dtype}):
            raise DataError(f"index {index_path(tar)}: latents {kind}, the manifest says {form}")
        indices.append(index)
    if not indices:
        raise DataError(f"{root}: split {name!r} has no shards")

    rows = [index.latents or LatentRows.none(len(index), index.modality_lengths.shape[1]) for index in indices]

    def join(attribute: str) -> np.ndarray:
        return np.concatenate([getattr(index, attribute) for index in indices])

    return Split(
        name=name,
        keys=join("keys"),
        lengths=join("lengths"),
        modality_lengths=join("modality_lengths"),
        shard=np.repeat(np.arange(len(indices)), [len(index) for index in indices]),
        span_offset=join("span_offset"),
        span_bytes=join("span_bytes"),
        token_offset=join("token_offset"),
        token_bytes=join("token_bytes"),
        token_crc32=join("token_crc32"),
        files=remote.shards(shards) if remote else ShardFiles([root / shard["name"] for shard in shards]),
        root=remote.url if remote else str(root),
        latent_format=form,
        latent_rows=LatentRows.join(rows) if form else None,
    )


def _reopen(root: str, split: str) -> Split:
    return Dataset.open(root).split(split)


def _compare(tar: Path, stored: ShardIndex, scanned: ShardIndex) -> None:
    """Refuses an index that is not what a scan of the tar gives, naming the first difference."""
    if stored.header != scanned.header:
        names = [*scanned.header, *stored.header]
        field_name = next(k for k in names if stored.header.get(k) != scanned.header.get(k))
        raise DataError(f"{tar}: its index differs from the tar in {field_name!r}: the shard was changed")
    there = stored.arrays()
    for array, found in scanned.arrays().items():
        if not np.array_equal(there[array], found):
            raise DataError(f"{tar}: its index differs from the tar in {array!r}; rebuild it with: data index {tar}")
