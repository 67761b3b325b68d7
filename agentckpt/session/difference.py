"""Where two plain values differ, in words that a person can act on."""

from __future__ import annotations

from typing import Any, Final

MAX_SHOWN_CHARS: Final = 160
_ABSENT: Final = object()


def first_difference(recorded: Any, found: Any, path: str = "") -> tuple[str, str]:
    """The first place where the values differ: (``path = recorded``, ``path = found``), a missing field as ``nothing``.

    Maps are compared key by key in order of their names, lists item by item, then by length.
    """
    if isinstance(recorded, dict) and isinstance(found, dict):
        for name in sorted({*recorded, *found}):
            ours, theirs = recorded.get(name, _ABSENT), found.get(name, _ABSENT)
            if ours is _ABSENT or theirs is _ABSENT or not _same(ours, theirs):
                return first_difference(ours, theirs, f"{path}[{name!r}]" if path else name)
    if isinstance(recorded, list) and isinstance(found, list):
        for index, (ours, theirs) in enumerate(zip(recorded, found)):
            if not _same(ours, theirs):
                return first_difference(ours, theirs, f"{path}[{index}]")
        if len(recorded) != len(found):
            path = f"{path}[{min(len(recorded), len(found))}]"
            return (_shown(path, _item(recorded, len(found))), _shown(path, _item(found, len(recorded))))
    return _shown(path, recorded), _shown(path, found)


def _same(ours: Any, theirs: Any) -> bool:
    # 1, 1.0 and True are equal to Python and different values in a record.
    return type(ours) is type(theirs) and bool(ours == theirs)


def _item(items: list[Any], length: int) -> Any:
    return items[length] if len(items) > length else _ABSENT


def _shown(path: str, value: Any) -> str:
    text = "nothing" if value is _ABSENT else repr(value)
    if len(text) > MAX_SHOWN_CHARS:
        text = f"{text[: MAX_SHOWN_CHARS // 2]} ... {text[-MAX_SHOWN_CHARS // 2 :]}"
    return f"{path} = {text}" if path else text
