"""Bytes of packs: header, records, commit markers, footer, trailer (FORMAT.md section 3). Pure functions.

Invariants:
1. A header is used only if its check fits; a length from a header is used only if it is within the limits here.
2. A zstd frame is decompressed only after its declared size was compared with the header's, and is consumed exactly.
   (python-zstandard ignores ``max_output_size`` for frames that declare a size, and trailing bytes by default.)
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

import zstandard

from ..errors import CorruptionError, IncompatibleError
from ..nodes import decode, encode
from ..types import KIND_NAME, Buffer, Ref, Value
from .ids import check8, hash32

PACK_MAGIC: Final = b"AGCKPACK"
RECORD_MAGIC: Final = b"\x89AKR"
FOOT_MAGIC: Final = b"AGCKFOOT"
VERSION: Final = 1
ALIGN: Final = 64
HEADER_BYTES: Final = 64
PACK_HEADER_BYTES: Final = 64
TRAILER_BYTES: Final = 64
MAX_PLAIN_BYTES: Final = 16 << 20
KIND_MARKER: Final = 16
KIND_FOOTER: Final = 17
CODEC_RAW: Final = 0
CODEC_ZSTD: Final = 1
MIN_GAIN: Final = 0.05
"""compression is kept only if it saves this share"""

_PACK: Final = struct.Struct("<8sHHI16s16sQ")
_RECORD: Final = struct.Struct("<4sBBBB32sIII4s")
_TRAILER: Final = struct.Struct("<8sQQ32s")
_MARKER: Final = struct.Struct("<QQ")


class PackHeader(NamedTuple):
    """Who wrote a pack."""

    store_id: bytes
    writer_id: bytes
    sequence: int


class RecordHeader(NamedTuple):
    """The 64 bytes before a payload."""

    version: int
    kind: int
    codec: int
    flags: int
    id: bytes
    plain_bytes: int
    stored_bytes: int
    key_id: int
    tenant: bytes

    @property
    def ref(self) -> Ref | None:
        """None for markers, footers and kinds that this version does not know."""
        return Ref(bytes((self.kind,)) + self.id) if self.kind in KIND_NAME else None


class Location(NamedTuple):
    """Where the payload of one object lies. ``offset`` is that of its record header; sizes are bytes."""

    pack: str
    offset: int
    plain_bytes: int
    stored_bytes: int
    codec: int


def padding(length: int) -> int:
    """Zero bytes from ``length`` to the next multiple of 64."""
    return -length % ALIGN


def record_span(stored_bytes: int) -> int:
    """Bytes that a record takes in its pack, padding included."""
    return HEADER_BYTES + stored_bytes + padding(stored_bytes)


def encode_pack_header(header: PackHeader) -> bytes:
    head = _PACK.pack(PACK_MAGIC, VERSION, 0, 0, header.store_id, header.writer_id, header.sequence)
    return head + check8(head)


def decode_pack_header(data: bytes) -> PackHeader | None:
    """None if these are not 64 valid bytes; ``IncompatibleError`` for a newer version."""
    if len(data) < PACK_HEADER_BYTES or data[:8] != PACK_MAGIC or check8(data[:56]) != data[56:64]:
        return None
    _, version, _, _, store_id, writer_id, sequence = _PACK.unpack_from(data)
    if version != VERSION:
        raise IncompatibleError("is of a newer version", object="pack", expected=str(VERSION), found=str(version), code="newer-format")
    return PackHeader(store_id, writer_id, sequence)


def encode_header(kind: int, codec: int, id: bytes, plain_bytes: int, stored_bytes: int, tenant: bytes) -> bytes:
    head = _RECORD.pack(RECORD_MAGIC, VERSION, kind, codec, 0, id, plain_bytes, stored_bytes, 0, tenant)
    return head + check8(head)


def decode_header(data: Buffer, at: int = 0) -> RecordHeader | None:
    """The header at ``data[at:]``, or None if its magic, check or sizes are wrong."""
    head = bytes(data[at : at + HEADER_BYTES])
    if len(head) < HEADER_BYTES or head[:4] != RECORD_MAGIC or check8(head[:56]) != head[56:]:
        return None
    header = RecordHeader(*_RECORD.unpack_from(head)[1:])
    if header.plain_bytes > MAX_PLAIN_BYTES or header.stored_bytes > MAX_PLAIN_BYTES:
        return None
    return header


def refuse_unknown(header: RecordHeader, where: str) -> None:
    """``IncompatibleError`` for a record that this version must not interpret."""
    if header.version != VERSION:
        raise IncompatibleError(
            "is of a newer version", object=where, expected=str(VERSION), found=str(header.version), code="newer-format"
        )
    if header.flags & 0x80:
        raise IncompatibleError("has an unknown critical flag", object=where, found=f"flags {header.flags:#x}", code="unknown-feature")
    if header.key_id:
        raise IncompatibleError("is encrypted", object=where, expected="key id 0", found=str(header.key_id), code="encrypted")
    if header.codec not in (CODEC_RAW, CODEC_ZSTD):
        raise IncompatibleError(
            "is coded in an unknown way", object=where, expected="codec 0 or 1", found=str(header.codec), code="unknown-codec"
        )


def squeeze(data: Buffer, compress: bool) -> tuple[int, Buffer]:
    """(codec, stored bytes): zstd level 1 if asked for and if it saves at least 5 %."""
    if compress and len(data) >= 64:
        packed = zstandard.ZstdCompressor(level=1, write_content_size=True).compress(data)
        if len(packed) <= len(data) * (1 - MIN_GAIN):
            return CODEC_ZSTD, packed
    return CODEC_RAW, data


def unsqueeze(stored: bytes, codec: int, plain_bytes: int) -> bytes:
    """The plaintext of ``stored``. ``CorruptionError`` if it is not exactly one frame of ``plain_bytes``."""
    if plain_bytes > MAX_PLAIN_BYTES:
        raise CorruptionError(
            "declares too many bytes", object="record", expected=f"at most {MAX_PLAIN_BYTES}", found=str(plain_bytes), code="too-long"
        )
    if codec == CODEC_RAW:
        if len(stored) != plain_bytes:
            raise CorruptionError(
                "has another length than its header says", object="record", expected=str(plain_bytes), found=str(len(stored))
            )
        return stored
    if codec != CODEC_ZSTD:
        raise IncompatibleError(
            "is coded in an unknown way", object="record", expected="codec 0 or 1", found=str(codec), code="unknown-codec"
        )
    try:
        declared = zstandard.frame_content_size(stored)
        if declared != plain_bytes:
            raise CorruptionError(
                "its frame declares another size", object="record", expected=str(plain_bytes), found=str(declared), code="bad-frame"
            )
        plain: bytes = zstandard.ZstdDecompressor().decompress(stored, max_output_size=max(1, plain_bytes), allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CorruptionError(f"cannot be decompressed ({error})", object="record", code="bad-frame") from error
    if len(plain) != plain_bytes:
        raise CorruptionError(
            "decompresses to another size", object="record", expected=str(plain_bytes), found=str(len(plain)), code="bad-frame"
        )
    return plain


def encode_marker(synced: int, num_records: int, tenant: bytes) -> bytes:
    """A whole commit marker record."""
    payload = _MARKER.pack(synced, num_records)
    return (
        encode_header(KIND_MARKER, CODEC_RAW, hash32(payload), len(payload), len(payload), tenant) + payload + bytes(padding(len(payload)))
    )


def decode_marker(header: RecordHeader, payload: bytes) -> int | None:
    """``synced`` of a marker, or None if the payload is damaged."""
    if len(payload) != _MARKER.size or hash32(payload) != header.id:
        return None
    return int(_MARKER.unpack(payload)[0])


def encode_footer(entries: Sequence[tuple[Ref, Location]], offset: int, tenant: bytes) -> tuple[bytes, bytes]:
    """(footer record with its padding and the trailer, pack name) for a pack whose footer will lie at ``offset``."""
    payload = encode([[bytes(ref), at.offset, at.plain_bytes, at.stored_bytes, at.codec] for ref, at in entries])
    name = hash32(payload)
    record = encode_header(KIND_FOOTER, CODEC_RAW, name, len(payload), len(payload), tenant) + payload + bytes(padding(len(payload)))
    trailer = _TRAILER.pack(FOOT_MAGIC, offset, len(entries), name)
    return record + trailer + check8(trailer), name


def decode_trailer(data: bytes) -> tuple[int, int, bytes] | None:
    """(footer offset, number of entries, pack name), or None if it is no valid trailer."""
    if len(data) != TRAILER_BYTES or data[:8] != FOOT_MAGIC or check8(data[:56]) != data[56:]:
        return None
    _, offset, num_entries, name = _TRAILER.unpack_from(data)
    return offset, num_entries, name


def decode_footer(payload: bytes, pack: str, num_entries: int, end: int) -> list[tuple[Ref, Location]]:
    """The entries of a footer that lies at offset ``end``. ``CorruptionError`` if one is out of bounds."""
    rows = decode(payload, max_bytes=MAX_PLAIN_BYTES)
    if not isinstance(rows, list) or len(rows) != num_entries:
        raise CorruptionError(
            "its footer has another number of entries", object=f"pack {pack}", expected=str(num_entries), code="bad-footer"
        )
    return [_entry(row, pack, end) for row in rows]


def _entry(row: Value, pack: str, end: int) -> tuple[Ref, Location]:
    if isinstance(row, list) and len(row) == 5:
        ref, offset, plain, stored, codec = row
        if (
            isinstance(ref, bytes)
            and len(ref) == 33
            and isinstance(offset, int)
            and isinstance(plain, int)
            and isinstance(stored, int)
            and isinstance(codec, int)
        ):
            inside = offset >= PACK_HEADER_BYTES and 0 <= stored <= MAX_PLAIN_BYTES and offset + HEADER_BYTES + stored <= end
            if inside and 0 <= plain <= MAX_PLAIN_BYTES and offset % ALIGN == 0 and ref[0] in KIND_NAME:
                return Ref(ref), Location(pack, offset, plain, stored, codec)
    raise CorruptionError("its footer has an impossible entry", object=f"pack {pack}", code="bad-footer")
