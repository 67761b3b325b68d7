"""``AppendList``: a list that only grows, so that a checkpoint costs what was appended to it.

Invariants:
1. Items are plain copies, frozen on the way in: what was captured is what the list still holds.
2. The array of one generation only grows; ``clear`` begins another one. So (array, length) is a snapshot for ever.
3. A captured prefix may be continued exactly if this list's items are known to begin with it: the same array, or an array that
   this one was copied from, up to the length at the copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn, overload

from .values import to_value

MAX_ANCESTRY = 8
"""copies of copies that are remembered; beyond it a capture writes the whole list once"""


class _FrozenDict(dict[str, Any]):
    """A map that raises on change. A ``dict`` to everyone who reads it; copies and pickles are plain."""

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise TypeError("an item of an AppendList cannot be changed: append a new one, or copy it first")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return (dict, (thaw(self),))


class _FrozenList(list[Any]):
    """A list that raises on change. A ``list`` to everyone who reads it; copies and pickles are plain."""

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise TypeError("an item of an AppendList cannot be changed: append a new one, or copy it first")

    __setitem__ = __delitem__ = __iadd__ = __imul__ = _refuse
    append = extend = insert = remove = pop = clear = sort = reverse = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return (list, (thaw(self),))


class _Token:
    """Names one generation of items; compared by identity."""

    __slots__ = ()


class AppendList(Sequence[Any]):
    """A list that only grows, is cleared as a whole, or is copied.

    Items are JSON's values plus bytes; dataclasses, tuples and pydantic models are converted as by ``to_value``. An item is
    copied when it is appended, and what is read back raises on change (``copy.deepcopy`` gives a plain copy). Equal to any
    sequence with the same items. Not thread-safe, like a list that is appended to while it is read.
    """

    __slots__ = ("_ancestry", "_items", "_token")

    def __init__(self, items: Iterable[Any] = ()) -> None:
        """Raises ``IncompatibleError`` (code ``not-encodable``) for an item that cannot be stored; ``append`` does too."""
        self._items: list[Any] = []
        self._token = _Token()
        self._ancestry: tuple[tuple[_Token, int], ...] = ()
        if isinstance(items, AppendList):
            self._items.extend(items._items)
            self._ancestry = ((items._token, len(items._items)), *items._ancestry)[:MAX_ANCESTRY]
        else:
            self.extend(items)

    @classmethod
    def from_plain(cls, items: Iterable[Any]) -> AppendList:
        """A list of items that are plain values already and that nobody else holds (a restore)."""
        made = cls()
        made._items.extend(_freeze(item) for item in items)
        return made

    def append(self, item: Any) -> None:
        self._items.append(_freeze(to_value(item, f"AppendList[{len(self._items)}]")))

    def extend(self, items: Iterable[Any]) -> None:
        for item in items:
            self.append(item)

    def __iadd__(self, items: Iterable[Any]) -> AppendList:
        self.extend(items)
        return self

    def clear(self) -> None:
        """Forget all items. What was captured of them stays captured."""
        self._items = []
        self._token = _Token()
        self._ancestry = ()

    def copy(self) -> AppendList:
        """An independent list; its next capture still costs only what was appended since."""
        return AppendList(self)

    __copy__ = copy

    def __deepcopy__(self, memo: dict[int, Any]) -> AppendList:
        return AppendList(self)

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, index: int) -> Any: ...

    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...

    def __getitem__(self, index: int | slice) -> Any:
        return self._items[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, AppendList):
            return self._items == other._items
        return self._items == list(other) if isinstance(other, list | tuple) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"AppendList({self._items!r})"

    def snapshot(self) -> Snapshot:
        """The list as it is now, whatever is appended later. O(1)."""
        return Snapshot(self._items, Prefix(self._token, len(self._items)), self._ancestry)


class Prefix(NamedTuple):
    """The first ``length`` items of a generation: what a capture has written."""

    token: _Token
    length: int


class Snapshot(NamedTuple):
    """A list as it was at one instant."""

    array: list[Any]
    prefix: Prefix
    ancestry: tuple[tuple[_Token, int], ...]

    def continues(self, earlier: Prefix) -> bool:
        """True if these items are known to begin with those of ``earlier``."""
        if earlier.token is self.prefix.token:
            return earlier.length <= self.prefix.length
        return any(earlier.token is token and earlier.length <= length for token, length in self.ancestry)

    def items(self, start: int) -> list[Any]:
        """Plain copies of the items from ``start`` on."""
        return [thaw(item) for item in self.array[start : self.prefix.length]]


def _freeze(item: Any) -> Any:
    if isinstance(item, dict):
        return _FrozenDict({name: _freeze(value) for name, value in item.items()})
    if isinstance(item, list):
        return _FrozenList([_freeze(value) for value in item])
    return item


def thaw(item: Any) -> Any:
    """A plain copy of a frozen item."""
    if isinstance(item, dict):
        return {name: thaw(value) for name, value in item.items()}
    if isinstance(item, list):
        return [thaw(value) for value in item]
    return item
