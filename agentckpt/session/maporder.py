"""The order of keys in maps, which the encoding does not keep and a program may show its model.

An order list is ``[[ordinal, [positions]], ...]``: the maps of a value are numbered in depth-first order, keys taken in the order of
the encoding; for each map whose keys stand otherwise, the list gives for each of its keys the position that it has in the encoding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

from ..errors import CorruptionError
from .values import key_order


def order_of(value: Any) -> list[list[Any]]:
    """The order list of ``value``; empty if all its maps stand in the encoding's order."""
    orders: list[list[Any]] = []
    for ordinal, found in enumerate(_maps(value)):
        names = list(found)
        encoded = sorted(names, key=key_order)
        if names != encoded:
            position = {name: index for index, name in enumerate(encoded)}
            orders.append([ordinal, [position[name] for name in names]])
    return orders


def put_in_order(value: Any, orders: Any) -> None:
    """Give the maps of a decoded ``value`` the order that ``orders`` says. Raises ``CorruptionError`` (code ``bad-state``)."""
    if type(orders) is not list:
        _refuse("a list", type(orders).__name__)
    wanted: dict[int, list[int]] = {}
    for entry in orders:
        if type(entry) is not list or len(entry) != 2 or type(entry[0]) is not int or type(entry[1]) is not list:
            _refuse("[ordinal, positions]", repr(entry)[:40])
        wanted[entry[0]] = entry[1]
    if len(wanted) != len(orders):
        _refuse("each map once", "one twice")
    # The walk reads a map's keys by their encoded order, so that a map may be turned as soon as it was numbered.
    for ordinal, found in enumerate(_maps(value)):
        positions = wanted.pop(ordinal, None)
        if positions is None:
            continue
        items = [(name, found[name]) for name in sorted(found, key=key_order)]
        if any(type(position) is not int for position in positions) or sorted(positions) != list(range(len(items))):
            _refuse(f"a permutation of {len(items)} keys", repr(positions)[:40])
        found.clear()
        found.update(items[position] for position in positions)
    if wanted:
        _refuse("ordinals of maps", f"no map {min(wanted)}")


def _maps(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        for name in sorted(value, key=key_order):
            yield from _maps(value[name])
    elif isinstance(value, list):
        for item in value:
            yield from _maps(item)


def _refuse(expected: str, found: str) -> NoReturn:
    raise CorruptionError(code="bad-state", object="state: order", expected=expected, found=found)
