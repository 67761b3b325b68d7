"""Large values of records: up to 64 KiB a value stands in the record, beyond it ``{"$ref": reference}`` to a chunk.

A user's own map with the single key ``$ref`` is stored as a chunk whatever its size, so that the two cannot be confused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from ..errors import CapacityError, CorruptionError
from ..nodes import check_ref, decode, encode
from ..types import Ref, Value

INLINE_BYTES: Final = 64 << 10
MAX_VALUE_BYTES: Final = 16 << 20
"""of the encoding: the format's limit of one object"""
REF_FIELD: Final = "$ref"


def is_reference(value: Any) -> bool:
    """True for what ``pack_value`` makes of a large value."""
    return isinstance(value, Mapping) and len(value) == 1 and REF_FIELD in value


def pack_value(value: Value, put: Callable[[bytes], Ref], *, name: str = "value") -> Value:
    """``value`` itself, or ``{"$ref": put(encoding)}`` where it is large or would be taken for a reference.

    ``put`` stores one chunk; it must be durable before the record is appended. Raises ``CapacityError`` (code
    ``value-too-long``) above 16 MiB and ``IncompatibleError`` for what cannot be encoded.
    """
    data = encode(value)
    if len(data) <= INLINE_BYTES and not is_reference(value):
        return value
    if len(data) > MAX_VALUE_BYTES:
        raise CapacityError(
            "is too long for one record", code="value-too-long", object=name, expected=f"at most {MAX_VALUE_BYTES} bytes",
            found=str(len(data)), hint="write it to a file of the sandbox and return its path",
        )  # fmt: skip
    return {REF_FIELD: bytes(put(data))}


def load_value(value: Value, get: Callable[[Ref, int], bytes]) -> Value:
    """The inverse. ``get(reference, max_bytes)`` is the store's verified read. Raises ``CorruptionError``, or as ``get``."""
    if not is_reference(value):
        return value
    assert isinstance(value, Mapping)
    ref = check_ref(value[REF_FIELD])
    if ref[0] != 1:
        raise CorruptionError("is no chunk", code="bad-reference", object="large value of a record", found=ref.hex()[:14])
    loaded: Value = decode(get(ref, MAX_VALUE_BYTES), max_bytes=MAX_VALUE_BYTES)
    return loaded
