"""Extended tar headers of other writers: PAX records and GNU long names, which speak of the member that follows."""

from __future__ import annotations

import tarfile
from typing import NamedTuple

KINDS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME)
MOST = 1 << 20  # bytes of an extended header; more is taken for damage


class Extended(NamedTuple):
    """What the member that follows has instead of its own header's fields."""

    name: str | None = None
    size: int | None = None


def parse(kind: bytes, payload: bytes, before: Extended) -> Extended:
    """`before` with what an extended header of this kind adds; ValueError for what is no such header."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return before._replace(name=payload.rstrip(b"\0").decode())
    records: dict[bytes, bytes] = {}
    rest = payload
    while rest.strip(b"\0"):
        digits, _, _ = rest.partition(b" ")
        length = int(digits)
        if not len(digits) + 1 < length <= len(rest):
            raise ValueError(f"a record of {length} bytes where {len(rest)} are left")
        record = rest[len(digits) + 1 : length]
        keyword, equals, value = record.partition(b"=")
        if not equals or not value.endswith(b"\n"):
            raise ValueError(f"a malformed record {record[:40]!r}")
        records[keyword], rest = value[:-1], rest[length:]
    if kind == tarfile.XGLTYPE:  # of the whole archive: comments, and nothing that a member's place depends on
        if records.keys() & {b"path", b"size"}:
            raise ValueError("a global header with a path or size")
        return before
    if any(keyword.startswith(b"GNU.sparse") for keyword in records):
        raise ValueError("a sparse file")
    if b"path" in records:
        before = before._replace(name=records[b"path"].decode())
    return before._replace(size=int(records[b"size"])) if b"size" in records else before
