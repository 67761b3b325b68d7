"""Reading packs without an index: footers of sealed ones, record by record through open ones (FORMAT.md section 3).

Invariants:
1. Damage below ``synced`` (the largest commit marker, or a length that a head names) is reported and stepped over;
   at the first invalid place above it the pack ends: a torn tail.
2. Nothing here trusts a length: every record must end within the file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from ..errors import CorruptionError
from ..types import Ref
from .ids import hash32
from .io import File
from .record import (
    ALIGN,
    HEADER_BYTES,
    KIND_FOOTER,
    KIND_MARKER,
    PACK_HEADER_BYTES,
    RECORD_MAGIC,
    TRAILER_BYTES,
    Location,
    PackHeader,
    RecordHeader,
    decode_footer,
    decode_header,
    decode_marker,
    decode_pack_header,
    decode_trailer,
    record_span,
)

WINDOW_BYTES: Final = 256 << 10


@dataclass(slots=True)
class Scan:
    """What a walk through one pack found."""

    entries: list[tuple[Ref, Location]] = field(default_factory=list)
    """records that lie below ``synced``, in file order"""
    tail: list[tuple[Ref, Location]] = field(default_factory=list)
    """valid records above it: readable, not known to be durable"""
    synced: int = 0
    end: int = PACK_HEADER_BYTES
    """where the last valid record ends"""
    damage: list[tuple[int, int]] = field(default_factory=list)
    """(from, to) in bytes: invalid places below ``synced``"""


class _Window:
    """Small reads of a file through a buffer."""

    def __init__(self, file: File, size: int) -> None:
        self._file, self.size = file, size
        self._start, self._data = 0, b""

    def at(self, offset: int, length: int) -> bytes:
        inside = offset - self._start
        if not 0 <= inside <= len(self._data) - length:
            self._start, self._data = offset, self._file.pread(offset, max(length, WINDOW_BYTES))
            inside = 0
        return self._data[inside : inside + length]


def read_pack_header(file: File) -> PackHeader | None:
    """Who wrote the pack; None if the header is damaged."""
    return decode_pack_header(file.pread(0, PACK_HEADER_BYTES))


def read_footer(file: File, name: str) -> list[tuple[Ref, Location]]:
    """The entries of the sealed pack called ``name``. ``CorruptionError`` if trailer or footer is damaged."""
    size = file.size()
    trailer = decode_trailer(file.pread(size - TRAILER_BYTES, TRAILER_BYTES)) if size >= TRAILER_BYTES else None
    if trailer is None or f"{trailer[2].hex()}.pack" != name:
        raise CorruptionError("its trailer is damaged", object=f"pack {name}", code="bad-trailer")
    offset, num_entries, digest = trailer
    header = decode_header(file.pread(offset, HEADER_BYTES)) if offset + HEADER_BYTES <= size else None
    if header is None or header.kind != KIND_FOOTER or offset + record_span(header.stored_bytes) + TRAILER_BYTES != size:
        raise CorruptionError("its footer is damaged", object=f"pack {name}", code="bad-footer")
    payload = file.pread(offset + HEADER_BYTES, header.stored_bytes)
    if hash32(payload) != digest:
        raise CorruptionError("its footer does not match its name", object=f"pack {name}", code="bad-footer")
    return decode_footer(payload, name, num_entries, offset)


def scan_pack(file: File, name: str, *, start: int = PACK_HEADER_BYTES, floor: int = 0) -> Scan:
    """Walk the records from ``start``. ``floor``: bytes known from elsewhere to be durable."""
    window = _Window(file, file.size())
    found = Scan(synced=floor, end=start)
    records: list[tuple[Ref, Location]] = []
    gaps: list[tuple[int, int]] = []
    offset = start
    while offset < window.size:
        header = _record_at(window, offset)
        if header is None:
            resume = _next_record(window, offset + ALIGN)
            gaps.append((offset, resume))
            offset = resume
            continue
        after = offset + record_span(header.stored_bytes)
        if header.kind == KIND_MARKER:
            synced = decode_marker(header, window.at(offset + HEADER_BYTES, header.stored_bytes))
            if synced is not None and synced <= offset:
                found.synced = max(found.synced, synced)
        elif (ref := header.ref) is not None:
            records.append((ref, Location(name, offset, header.plain_bytes, header.stored_bytes, header.codec)))
        offset = after
        if header.kind == KIND_FOOTER:
            break
        if not gaps or gaps[-1][0] < found.synced:
            found.end = after
    _sort(found, records, gaps)
    return found


def _sort(found: Scan, records: list[tuple[Ref, Location]], gaps: list[tuple[int, int]]) -> None:
    """Divide what was met into durable, tail and void."""
    found.damage = [gap for gap in gaps if gap[0] < found.synced]
    torn = min((gap[0] for gap in gaps if gap[0] >= found.synced), default=None)
    for ref, at in records:
        end = at.offset + HEADER_BYTES + at.stored_bytes
        if end <= found.synced:
            found.entries.append((ref, at))
        elif torn is None or at.offset < torn:
            found.tail.append((ref, at))


def _record_at(window: _Window, offset: int) -> RecordHeader | None:
    if offset + HEADER_BYTES > window.size:
        return None
    header = decode_header(window.at(offset, HEADER_BYTES))
    if header is None or offset + HEADER_BYTES + header.stored_bytes > window.size:
        return None
    return header


def _next_record(window: _Window, offset: int) -> int:
    """The next offset, a multiple of 64, with a valid record header; the file's size if there is none."""
    while offset + HEADER_BYTES <= window.size:
        block = window.at(offset, min(WINDOW_BYTES, window.size - offset))
        at = block.find(RECORD_MAGIC)
        while at >= 0:
            if (offset + at) % ALIGN == 0 and _record_at(window, offset + at) is not None:
                return offset + at
            at = block.find(RECORD_MAGIC, at + 1)
        offset += max(ALIGN, (len(block) - 3) // ALIGN * ALIGN)
    return window.size
