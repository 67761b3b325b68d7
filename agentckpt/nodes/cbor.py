"""Deterministic CBOR (RFC 8949 section 4.2.1), restricted as FORMAT.md section 2 says.

Invariants:
1. One value has one encoding, and ``decode`` accepts that one alone: no second form of an integer, float, length or
   map order passes, no trailing byte. So ``encode(decode(data)) == data`` for all accepted data.
2. ``decode`` allocates nothing for a declared length before it has seen that so many bytes are there.
3. No value runs code: tags other than 2, 3 (integers) and 40900 (``ListSlot``) are refused unread.

It is written out here, and not left to a library, because ids depend on these bytes: a library's next release
must not change them. The tests compare it with cbor2.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import CorruptionError, IncompatibleError
from ..types import Buffer

MAX_DEPTH = 64
"""arrays, maps and tags inside one another"""
LIST_TAG = 40900

_UNSIGNED, _NEGATIVE, _BYTES, _TEXT, _ARRAY, _MAP, _TAG, _OTHER = range(8)
_BELOW = {24: 24, 25: 1 << 8, 26: 1 << 16, 27: 1 << 32}  # an argument below this has a shorter form
_WIDTH = {24: 1, 25: 2, 26: 4, 27: 8}


@dataclass(frozen=True, slots=True)
class ListSlot:
    """Stands in a value for the append-only list number ``position`` of the node that holds the value (tag 40900)."""

    position: int


class _Refused(Exception):
    """A value that has no encoding; ``encode`` says where it stands."""


def encode(value: object) -> bytes:
    """The one encoding of None, bool, int, finite float, str, bytes, list, dict with text keys, and ``ListSlot``.

    Tuples are written as arrays. Raises ``IncompatibleError`` (``not-encodable``) naming the path of anything else.
    """
    out = bytearray()
    try:
        _put(out, value, 0)
    except _Refused:
        path, reason = _locate(value, "value", 0) or ("value", "is not encodable")
        raise IncompatibleError(
            reason, object=path, code="not-encodable", hint="use None, bool, int, finite float, str, bytes, list, dict with str keys"
        ) from None
    return bytes(out)


def _head(out: bytearray, major: int, argument: int) -> None:
    if argument < 24:
        out.append(major << 5 | argument)
    elif argument < 1 << 8:
        out += bytes((major << 5 | 24, argument))
    elif argument < 1 << 16:
        out += struct.pack(">BH", major << 5 | 25, argument)
    elif argument < 1 << 32:
        out += struct.pack(">BI", major << 5 | 26, argument)
    else:
        out += struct.pack(">BQ", major << 5 | 27, argument)


def _put(out: bytearray, value: object, depth: int) -> None:
    put = _PUT.get(type(value))
    if put is None:
        raise _Refused
    put(out, value, depth)


def _put_text(out: bytearray, value: str, depth: int) -> None:
    try:
        data = value.encode()
    except UnicodeEncodeError:
        raise _Refused from None
    _head(out, _TEXT, len(data))
    out += data


def _put_bytes(out: bytearray, value: bytes, depth: int) -> None:
    _head(out, _BYTES, len(value))
    out += value


def _put_int(out: bytearray, value: int, depth: int) -> None:
    major, argument = (_UNSIGNED, value) if value >= 0 else (_NEGATIVE, -1 - value)
    if argument < 1 << 64:
        _head(out, major, argument)
    else:
        _head(out, _TAG, 2 if major == _UNSIGNED else 3)
        _put_bytes(out, argument.to_bytes((argument.bit_length() + 7) // 8, "big"), depth)


def _put_float(out: bytearray, value: float, depth: int) -> None:
    if not math.isfinite(value):
        raise _Refused
    for first, form in ((b"\xf9", ">e"), (b"\xfa", ">f")):
        try:
            short = struct.pack(form, value)
        except OverflowError:
            continue
        if struct.unpack(form, short)[0] == value:
            out += first + short
            return
    out += b"\xfb" + struct.pack(">d", value)


def _put_array(out: bytearray, value: list[object] | tuple[object, ...], depth: int) -> None:
    if depth >= MAX_DEPTH:
        raise _Refused
    _head(out, _ARRAY, len(value))
    for item in value:
        _put(out, item, depth + 1)


def _put_map(out: bytearray, value: dict[object, object], depth: int) -> None:
    if depth >= MAX_DEPTH:
        raise _Refused
    keys = []
    for key in value:
        if type(key) is not str:
            raise _Refused
        encoded = bytearray()
        _put_text(encoded, key, depth)
        keys.append((bytes(encoded), key))
    keys.sort()
    _head(out, _MAP, len(keys))
    for data, key in keys:
        out += data
        _put(out, value[key], depth + 1)


def _put_slot(out: bytearray, value: ListSlot, depth: int) -> None:
    if type(value.position) is not int or not 0 <= value.position < 1 << 32 or depth >= MAX_DEPTH:
        raise _Refused
    _head(out, _TAG, LIST_TAG)
    _head(out, _UNSIGNED, value.position)


_PUT: dict[type, Callable[[bytearray, Any, int], None]] = {
    type(None): lambda out, value, depth: out.append(0xF6),
    bool: lambda out, value, depth: out.append(0xF5 if value else 0xF4),
    int: _put_int,
    float: _put_float,
    str: _put_text,
    bytes: _put_bytes,
    list: _put_array,
    tuple: _put_array,
    dict: _put_map,
    ListSlot: _put_slot,
}


def _locate(value: object, path: str, depth: int) -> tuple[str, str] | None:
    """The first place that has no encoding, and why. Only called when there is one."""
    if isinstance(value, list | tuple | dict) and type(value) in _PUT:
        if depth >= MAX_DEPTH:
            return path, f"is nested deeper than {MAX_DEPTH}"
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            if isinstance(value, dict) and not _encodable(key if type(key) is str else object()):
                return path, f"has the key {key!r}, which is no plain text"
            found = _locate(item, f"{path}[{key!r}]", depth + 1)
            if found is not None:
                return found
        return None
    if _encodable(value):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return path, f"is {value}, which has no encoding"
    return path, f"is of type {type(value).__module__}.{type(value).__qualname__}, or not valid text; it has no encoding"


def _encodable(value: object) -> bool:
    try:
        _put(bytearray(), value, 0)
    except _Refused:
        return False
    return True


def decode(data: Buffer, *, max_bytes: int, max_depth: int = MAX_DEPTH) -> Any:
    """The value whose encoding is exactly ``data``; arrays become lists. The result may be changed by the caller.

    Raises ``CorruptionError`` for anything that ``encode`` would not have written, naming the offset, and for
    more than ``max_bytes``. The value takes at most about 100 times the memory of the data (empty maps).
    """
    view = bytes(data)
    if len(view) > max_bytes:
        raise CorruptionError("is too long", object="CBOR", code="too-long", expected=f"at most {max_bytes} bytes", found=f"{len(view)}")
    value, end = _get(view, 0, max_depth)
    if end != len(view):
        raise _bad(end, f"{len(view) - end} trailing bytes")
    return value


def _bad(offset: int, what: str) -> CorruptionError:
    return CorruptionError(what, object=f"CBOR at byte {offset}", code="not-canonical")


def _get_head(data: bytes, at: int) -> tuple[int, int, int, int]:
    """(major type, additional information, argument, offset after the head)."""
    if at >= len(data):
        raise _bad(at, "ends too early")
    first = data[at]
    major, short = first >> 5, first & 31
    if short < 24:
        return major, short, short, at + 1
    if short > 27:
        raise _bad(at, "indefinite length or reserved head")
    end = at + 1 + _WIDTH[short]
    if end > len(data):
        raise _bad(at, "ends too early")
    argument = int.from_bytes(data[at + 1 : end], "big")
    if major != _OTHER and argument < _BELOW[short]:
        raise _bad(at, "not the shortest form")
    return major, short, argument, end


def _get(data: bytes, at: int, depth: int) -> tuple[Any, int]:
    major, short, argument, end = _get_head(data, at)
    if major == _UNSIGNED:
        return argument, end
    if major == _NEGATIVE:
        return -1 - argument, end
    if major in (_BYTES, _TEXT):
        return _get_string(data, at, end, argument, major)
    if major == _OTHER:
        return _get_other(data, at, short, argument, end)
    if depth <= 0:
        raise _bad(at, "nested too deep")
    if major == _ARRAY:
        return _get_array(data, end, argument, depth)
    if major == _MAP:
        return _get_map(data, end, argument, depth)
    return _get_tag(data, at, argument, end)


def _get_string(data: bytes, at: int, start: int, length: int, major: int) -> tuple[Any, int]:
    end = start + length
    if end > len(data):
        raise _bad(at, "ends too early")
    if major == _BYTES:
        return data[start:end], end
    try:
        return data[start:end].decode(), end
    except UnicodeDecodeError:
        raise _bad(at, "text is not UTF-8") from None


def _get_array(data: bytes, at: int, count: int, depth: int) -> tuple[Any, int]:
    if count > len(data) - at:
        raise _bad(at, "ends too early")
    items = []
    for _ in range(count):
        item, at = _get(data, at, depth - 1)
        items.append(item)
    return items, at


def _get_map(data: bytes, at: int, count: int, depth: int) -> tuple[Any, int]:
    if count > (len(data) - at) // 2:
        raise _bad(at, "ends too early")
    items: dict[str, Any] = {}
    before = b""
    for _ in range(count):
        major, _short, length, end = _get_head(data, at)
        if major != _TEXT:
            raise _bad(at, "a map key is not text")
        key, end = _get_string(data, at, end, length, major)
        if data[at:end] <= before:
            raise _bad(at, "a map key is out of order or repeated")
        before = data[at:end]
        items[key], at = _get(data, end, depth - 1)
    return items, at


def _get_tag(data: bytes, at: int, tag: int, end: int) -> tuple[Any, int]:
    if tag not in (2, 3, LIST_TAG):
        raise _bad(at, f"tag {tag} is not allowed")
    major, _short, argument, after = _get_head(data, end)
    if tag == LIST_TAG:
        if major != _UNSIGNED or argument >= 1 << 32:
            raise _bad(end, "a list position is not an unsigned integer below 2^32")
        return ListSlot(argument), after
    if major != _BYTES:
        raise _bad(end, "a big integer is not a byte string")
    digits, after = _get_string(data, end, after, argument, major)
    if len(digits) <= 8 or digits[0] == 0:
        raise _bad(end, "not the shortest form")
    number = int.from_bytes(digits, "big")
    return (number if tag == 2 else -1 - number), after


def _get_other(data: bytes, at: int, short: int, argument: int, end: int) -> tuple[Any, int]:
    if short in (20, 21):
        return short == 21, end
    if short == 22:
        return None, end
    if short not in (25, 26, 27):
        raise _bad(at, f"simple value {argument} is not allowed")
    (value,) = struct.unpack({25: ">e", 26: ">f", 27: ">d"}[short], data[at + 1 : end])
    if not math.isfinite(value):
        raise _bad(at, "not a finite float")
    again = bytearray()
    _put_float(again, value, 0)
    if again != data[at:end]:
        raise _bad(at, "not the shortest form")
    return value, end
