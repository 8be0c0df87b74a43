"""Ten thousand damaged tars and indices: each is read right or refused in one line that names the place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from polylepis.data.errors import DataError
from polylepis.data.index import ShardIndex, index_path
from polylepis.data.scan import scan_shard
from polylepis.data.shards import ShardWriter
from polylepis.data.vocabulary import Vocabulary

TARS, INDICES = 7000, 3000


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """One to four damages: bits, bytes, cuts, repeats, blocks that change places, digits that grow."""
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        at = int(rng.integers(0, max(1, len(out))))
        kind = int(rng.integers(0, 7))
        if not out:
            break
        if kind == 0:
            out[at] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1:
            n = int(rng.integers(1, 9))
            out[at : at + n] = rng.bytes(len(out[at : at + n]))
        elif kind == 2:
            del out[at:]
        elif kind == 3:
            n = int(rng.integers(1, 1025))
            out[at:at] = out[at : at + n]
        elif kind == 4:
            a, b = (int(x) * 512 for x in rng.integers(0, max(1, len(out) // 512), 2))
            out[a : a + 512], out[b : b + 512] = out[b : b + 512], out[a : a + 512]
        elif kind == 5:
            out[at : at + 12] = rng.choice([b"77777777777\0", b"\x80" + b"\xff" * 11, b"\xff" * 12])[: len(out) - at]
        else:
            out[at : at + 3] = rng.choice([b"999", b"\0\0\0", b"---", b"[[[", b'"":'])
    return bytes(out)


def fix_checksum(data: bytes, rng: np.random.Generator) -> bytes:
    """Makes one damaged header's checksum right again, so that the damage gets past it."""
    out = bytearray(data)
    at = int(rng.integers(0, max(1, len(out) // 512))) * 512
    if len(out) >= at + 512:
        total = 256 + sum(out[at : at + 148]) + sum(out[at + 156 : at + 512])
        out[at + 148 : at + 156] = b"%06o\0 " % total
    return bytes(out)


def same(a: ShardIndex, b: ShardIndex) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ShardIndex._ARRAYS)


def test_damaged_tars(tmp_path: Path, write_shard: Callable[..., Path]) -> None:
    vocabulary = Vocabulary(("text", "image"), (300, 16))
    with ShardWriter(tmp_path, "b", vocabulary, {}) as writer:
        writer.write_block("block", [np.array([1, 40, 2]), np.array([1, 50, 51, 2])])
    originals = [write_shard(2).read_bytes(), (tmp_path / "b-00000.tar").read_bytes()]
    # The padding that tar adds to 10,240 bytes would take most of the damage.
    originals = [data.rstrip(b"\0")[: len(data)] for data in originals]
    originals = [data + bytes(-len(data) % 512 + 1024) for data in originals]
    victim = tmp_path / "fuzz.tar"
    rng, refused = np.random.default_rng(0), 0
    for i in range(TARS):
        data = mutate(originals[i % 2], rng)
        victim.write_bytes(fix_checksum(data, rng) if i % 3 == 0 else data)
        try:
            index = scan_shard(victim)
        except DataError as error:
            refused += 1
            text = str(error)
            assert "\n" not in text and "fuzz.tar" in text, text
            assert "offset" in text or "holds no sample" in text, text
            continue
        # What is accepted is consistent, and all of it lies in the file.
        assert index.lengths.min() > 0 and np.array_equal(index.modality_lengths.sum(axis=1), index.lengths)
        ends = index.token_offset + index.token_bytes
        assert index.token_offset.min() >= 512 and ends.max() <= victim.stat().st_size
        assert np.isin(index.token_bytes // index.lengths, (2, 4)).all()
    assert refused > TARS // 2


def test_damaged_indices(write_shard: Callable[..., Path]) -> None:
    tar = write_shard(3)
    path = index_path(tar)
    good, original = ShardIndex.load(path), path.read_bytes()
    rng, refused = np.random.default_rng(1), 0
    for _ in range(INDICES):
        path.write_bytes(mutate(original, rng))
        try:
            found = ShardIndex.load(path)
        except DataError as error:
            refused += 1
            assert "\n" not in str(error) and path.name in str(error)
            continue
        assert same(found, good) or found.header["bytes"] >= int((found.token_offset + found.token_bytes).max())
    assert refused > INDICES // 2
