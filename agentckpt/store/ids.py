"""Ids, references and short checks: the one hash of the store, BLAKE3-256 (FORMAT.md section 2).

Ids are keyed by (tenant secret, kind) and always of plaintext. Checks of headers are plain BLAKE3, cut short.
"""

from __future__ import annotations

from typing import Final

from blake3 import blake3

from ..errors import CorruptionError
from ..types import ID_BYTES, KIND_BYTE, KIND_NAME, REF_BYTES, Buffer, Kind, Ref

CONTEXT: Final = "agentckpt v1 "
SECRET_BYTES: Final = 32
ZERO_HASH: Final = bytes(ID_BYTES)


def hash32(data: Buffer) -> bytes:
    """BLAKE3-256, not keyed."""
    return blake3(data).digest()


def check16(data: Buffer) -> bytes:
    """The first 16 bytes of the hash."""
    return blake3(data).digest(16)


def check8(data: Buffer) -> bytes:
    """The first 8 bytes of the hash."""
    return blake3(data).digest(8)


def make_ref(kind: Kind, id: bytes) -> Ref:
    """Kind byte and 32-byte id."""
    return Ref(bytes((KIND_BYTE[kind],)) + id)


def check_ref(ref: bytes) -> Ref:
    """``ref`` if it has the form of a reference, else ``CorruptionError``."""
    if len(ref) != REF_BYTES or ref[0] not in KIND_NAME:
        raise CorruptionError(
            "is not a reference", object=repr(bytes(ref[:REF_BYTES])), expected=f"{REF_BYTES} bytes, kind 1-3", code="bad-ref"
        )
    return Ref(bytes(ref))


def show_ref(ref: bytes) -> str:
    """For messages: kind and the first 12 hex digits."""
    return f"{KIND_NAME.get(ref[0], '?')} {ref[1:7].hex()}" if ref else "empty reference"


class IdKeys:
    """The three id keys of one tenant."""

    def __init__(self, secret: bytes) -> None:
        self._keys = {kind: blake3(secret, derive_key_context=CONTEXT + kind).digest() for kind in KIND_BYTE}
        self.tag = check16(secret)[:4]
        """what stands in the record headers of this tenant"""

    def ref(self, kind: Kind, data: Buffer) -> Ref:
        """The reference of ``data``."""
        return Ref(bytes((KIND_BYTE[kind],)) + blake3(data, key=self._keys[kind]).digest())

    def matches(self, ref: Ref, data: Buffer) -> bool:
        """True if ``data`` is what ``ref`` names."""
        return blake3(data, key=self._keys[KIND_NAME[ref[0]]]).digest() == ref[1:]
