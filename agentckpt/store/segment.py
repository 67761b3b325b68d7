"""Bytes of the journal: segment headers and records (FORMAT.md section 5). No state.

Invariants:
1. A record is used only if its check fits and its length is within the limit.
2. An invalid place is a torn tail, unless a later valid record proves that the bytes there were durable.
3. The records of one append count together or not at all: all but the last have ``MORE``, and without the last none is used.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from ..errors import CorruptionError, IncompatibleError
from .ids import check8, check16, hash32
from .io import File

SEGMENT_MAGIC: Final = b"AGCKJRNL"
RECORD_MAGIC: Final = b"\x89AKJ"
VERSION: Final = 1
SEGMENT_HEADER_BYTES: Final = 64
RECORD_HEADER_BYTES: Final = 48
MAX_BODY_BYTES: Final = 1 << 20
CRITICAL: Final = 1
MORE: Final = 2
"""flag: the next record belongs to the same append"""
_SEGMENT: Final = struct.Struct("<8sHHI16sQQQ")
_RECORD: Final = struct.Struct("<4sBBBBIIQQ")
_WINDOW_BYTES: Final = 256 << 10


class SegmentHeader(NamedTuple):
    """``previous_bytes``: the valid length of the segment before; ``first_seq``: number of the first record here."""

    store_id: bytes
    number: int
    previous_bytes: int
    first_seq: int


class RawRecord(NamedTuple):
    """A record as it lies in a segment, from ``begin`` to ``end``."""

    seq: int
    kind: int
    flags: int
    synced: int
    body: bytes
    begin: int
    end: int

    @property
    def hash(self) -> bytes:
        return hash32(self.body)


def segment_path(root: str, number: int) -> str:
    return f"{root}/journal/{number:016d}.log"


def encode_segment_header(header: SegmentHeader) -> bytes:
    head = _SEGMENT.pack(SEGMENT_MAGIC, VERSION, 0, 0, *header)
    return head + check8(head)


def decode_segment_header(data: bytes, path: str) -> SegmentHeader:
    """Raises ``CorruptionError``; a segment appears under its name only when it is durable, so it cannot be torn."""
    if len(data) < SEGMENT_HEADER_BYTES or data[:8] != SEGMENT_MAGIC or check8(data[:56]) != data[56:64]:
        raise CorruptionError("its header is damaged", object=path, code="journal-damaged")
    _, version, _, _, store_id, number, previous, first = _SEGMENT.unpack_from(data)
    if version != VERSION:
        raise IncompatibleError("is of a newer version", object=path, expected=str(VERSION), found=str(version), code="newer-format")
    return SegmentHeader(store_id, number, previous, first)


def encode_record(seq: int, kind: int, flags: int, synced: int, body: bytes) -> bytes:
    head = _RECORD.pack(RECORD_MAGIC, VERSION, kind, flags, 0, len(body), 0, seq, synced)
    return head + check16(head + body) + body + bytes(-len(body) % 16)


def record_bytes(body_bytes: int) -> int:
    """What a record takes in its segment."""
    return RECORD_HEADER_BYTES + body_bytes + -body_bytes % 16


def decode_record(file: File, at: int, size: int, window: bytes = b"", window_at: int = 0) -> RawRecord | None:
    """The record at offset ``at``, or None if there is no whole valid one before ``size``."""
    if at + RECORD_HEADER_BYTES > size:
        return None
    head = _bytes(file, at, RECORD_HEADER_BYTES, window, window_at)
    if len(head) < RECORD_HEADER_BYTES or head[:4] != RECORD_MAGIC:
        return None
    _, version, kind, flags, _, length, _, seq, synced = _RECORD.unpack_from(head)
    end = at + record_bytes(length)
    if length > MAX_BODY_BYTES or end > size:
        return None
    body = _bytes(file, at + RECORD_HEADER_BYTES, length, window, window_at)
    if len(body) < length or check16(head[:32] + body) != head[32:]:
        return None
    if version != VERSION:
        raise IncompatibleError(
            "is of a newer version", object=f"{file.path} at {at}", expected=str(VERSION), found=str(version), code="newer-format"
        )
    return RawRecord(seq, kind, flags, synced, body, at, end)


def records(file: File, begin: int, size: int) -> Iterator[RawRecord]:
    """The valid records of whole appends from ``begin`` on; ends at the first append that is not whole."""
    window, window_at = b"", 0
    waiting: list[RawRecord] = []
    while True:
        if begin + RECORD_HEADER_BYTES > window_at + len(window) and begin < size:
            window, window_at = file.pread(begin, min(_WINDOW_BYTES, size - begin)), begin
        record = decode_record(file, begin, size, window, window_at)
        if record is None:
            return
        waiting.append(record)
        if not record.flags & MORE:
            yield from waiting
            waiting = []
        begin = record.end


def proof_of_damage(file: File, at: int, size: int, seq: int) -> RawRecord | None:
    """A later record which says that the invalid bytes at ``at`` had been durable; ``seq`` is the last good record's."""
    offset = at + 16
    while offset + RECORD_HEADER_BYTES <= size:
        block = file.pread(offset, min(_WINDOW_BYTES, size - offset))
        found = block.find(RECORD_MAGIC)
        while found >= 0:
            place = offset + found
            record = decode_record(file, place, size) if place % 16 == 0 else None
            if record is not None and record.seq > seq and at < record.synced <= place:
                return record
            found = block.find(RECORD_MAGIC, found + 1)
        offset += max(16, len(block) - 3)
    return None


def _bytes(file: File, at: int, length: int, window: bytes, window_at: int) -> bytes:
    inside = at - window_at
    if inside >= 0 and inside + length <= len(window):
        return window[inside : inside + length]
    return file.pread(at, length)
