"""Values of user code as plain values, and back: what a record or a state can hold.

Invariants:
1. ``to_value`` gives a fresh copy that shares nothing mutable with its argument, and is what decoding its encoding gives,
   down to the order of keys in maps: that of the encoding (by length, then by bytes), because the encoding keeps no other.
2. Whatever cannot be stored is refused with the path to it; nothing is stored by its ``repr``.
3. ``from_value(to_value(x))`` has one type for one ``x``: a first run and a replay cannot be told apart.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from ..errors import IncompatibleError
from ..types import Value

MAX_DEPTH = 60
"""Below the 64 of the format: a value stands inside a node or a record, which add a few levels of their own."""

Special = Callable[[Any], Any]
"""Replaces an object of a kind of its own (an append-only list), or returns None to leave it to the rules."""


class Result(dict[str, Any]):
    """A recorded map with attribute access: ``turn.call(session.sandbox.run, ...).exit_code``.

    The first run and a replay both return it, and it shows itself as the plain map that it is. A key that is also the name of a
    dict method is read as ``result["items"]``. What a state keeps of it comes back from a checkpoint as a plain map: read that by
    key.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the recorded value has no field {name!r}; it has {sorted(self)}") from None


def to_value(item: Any, path: str = "value", *, special: Special | None = None, keep_order: bool = False) -> Value:
    """A fresh plain copy of ``item``.

    Kept: None, bool, int, float, str, bytes, lists and text-keyed maps of these. Converted: tuples to lists, other mappings to
    dicts, ``bytearray`` and ``memoryview`` to bytes, subclasses of the scalars to the scalar, dataclasses to the dict of their
    fields, pydantic models to ``model_dump(mode="json")``. Raises ``IncompatibleError`` (code ``not-encodable``) naming the
    path: NaN and infinities, sets, other objects, keys that are not text, lone surrogates, nesting beyond ``MAX_DEPTH``.

    Keys stand in the order of the encoding, unless ``keep_order``: a caller that records the order beside the value.
    """
    converted: Value = _convert(item, path, 0, _Rules(special, keep_order))
    return converted


def key_order(name: str) -> tuple[int, bytes]:
    """Sorts keys as the encoding does: a text's encoding starts with its length in bytes."""
    data = name.encode()
    return (len(data), data)


def from_value(value: Value) -> Any:
    """What user code gets for a recorded value: maps as ``Result``, all else as it is."""
    if isinstance(value, dict):
        return Result({name: from_value(item) for name, item in value.items()})
    if isinstance(value, list):
        return [from_value(item) for item in value]
    return value


class _Rules(NamedTuple):
    special: Special | None
    keep_order: bool


def _convert(item: Any, path: str, depth: int, rules: _Rules) -> Any:
    if rules.special is not None and (replaced := rules.special(item)) is not None:
        return replaced
    if item is None or isinstance(item, bool | int | float | str | bytes | bytearray | memoryview):
        return _scalar(item, path)
    if depth >= MAX_DEPTH:
        _refuse(path, f"at most {MAX_DEPTH} levels", "deeper nesting, or a cycle")
    if isinstance(item, Mapping):
        return _map(((_key(name, path), f"{path}[{name!r}]", value) for name, value in item.items()), depth, rules)
    if isinstance(item, list | tuple):
        return [_convert(value, f"{path}[{index}]", depth + 1, rules) for index, value in enumerate(item)]
    fields = _fields_of(item)
    if fields is not None:
        return _map(((name, f"{path}.{name}", value) for name, value in fields.items()), depth, rules)
    if isinstance(item, Sequence):
        return [_convert(value, f"{path}[{index}]", depth + 1, rules) for index, value in enumerate(item)]
    return _refuse(path, "None, bool, int, float, str, bytes, lists and text-keyed maps", type(item).__name__)


def _map(entries: Iterable[tuple[str, str, Any]], depth: int, rules: _Rules) -> dict[str, Any]:
    made = {name: _convert(value, path, depth + 1, rules) for name, path, value in entries}
    return made if rules.keep_order else {name: made[name] for name in sorted(made, key=key_order)}


def _fields_of(item: Any) -> dict[str, Any] | None:
    if dataclasses.is_dataclass(item) and not isinstance(item, type):
        return {field.name: getattr(item, field.name) for field in dataclasses.fields(item)}
    dump = getattr(item, "model_dump", None)
    if callable(dump) and not isinstance(item, type):
        dumped = dump(mode="json")
        return dumped if isinstance(dumped, dict) else None
    return None


def _scalar(item: Any, path: str) -> Value:
    # Subclasses (enums, numpy scalars that are floats) are reduced: the encoding knows only the plain types.
    if item is None or isinstance(item, bool):
        return item
    if isinstance(item, int):
        return int.__int__(item)
    if isinstance(item, float):
        number = float.__float__(item)
        return number if math.isfinite(number) else _refuse(path, "a finite number", str(number))
    if isinstance(item, str):
        return _text(str.__str__(item), path)
    return bytes(item)


def _key(name: Any, path: str) -> str:
    if not isinstance(name, str):
        _refuse(path, "text keys", f"a key of type {type(name).__name__}")
    return _text(str.__str__(name), path)


def _text(text: str, path: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        _refuse(path, "text that is valid Unicode", "a lone surrogate", hint="decode with errors='replace', or keep the bytes")
    return text


def _refuse(path: str, expected: str, found: str, hint: str | None = None) -> NoReturn:
    raise IncompatibleError("cannot be stored", code="not-encodable", object=path, expected=expected, found=found, hint=hint)
