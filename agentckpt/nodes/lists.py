"""Append-only Merkle lists with fan-out 16 (FORMAT.md section 4).

A list of n items is the number n in base 16: the last digit counts the items that stand in the owner's own node (the
edge), the digit before it the full level-0 nodes (16 items each) not yet gathered into a level-1 node, and so on.

Invariants:
1. A node is written once, when it is full. Appending writes 1/16 + 1/256 + ... nodes an item, at most one a level.
2. The root, which stands in the owner's body, holds at most 15 items and 15 references a level.
3. The same items give the same nodes and the same root, however they were appended or truncated.
4. Items own references: those of the edge are the owner's, those of a full level-0 node that node's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ..errors import CorruptionError
from ..types import Ref, Sink, Source
from .node import Node, get_node, put_node, ref_kind

FAN_OUT = 16
_MAX_LEVELS = 16


class Item(NamedTuple):
    """One item: a value, and the references that it owns. A value names them by position in these."""

    value: Any
    strong: tuple[Ref, ...] = ()
    weak: tuple[Ref, ...] = ()


class MerkleList:
    """An append-only list, opened at its right edge: nothing but the root was read. Not thread-safe.

    ``copy`` is cheap: full nodes are shared by reference.
    """

    def __init__(self) -> None:
        self._edge: list[Item] = []
        self._levels: list[list[Ref]] = []

    @classmethod
    def open(cls, root: object, strong: Sequence[Ref], weak: Sequence[Ref]) -> MerkleList:
        """The list whose ``root`` stands in an owner with these references. Raises ``CorruptionError``."""
        opened = cls()
        try:
            opened._edge, opened._levels = _parse_root(root, strong, weak)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            if isinstance(error, CorruptionError):
                raise
            raise _bad_root(f"{type(error).__name__}: {error}") from None
        return opened

    def __len__(self) -> int:
        return len(self._edge) + sum(len(refs) * _capacity(level) for level, refs in enumerate(self._levels))

    def copy(self) -> MerkleList:
        twin = MerkleList()
        twin._edge = list(self._edge)
        twin._levels = [list(refs) for refs in self._levels]
        return twin

    def append(self, sink: Sink, value: Any, strong: Sequence[Ref] = (), weak: Sequence[Ref] = ()) -> None:
        """Add one item; ``value`` must be encodable and must not be changed afterwards. Full nodes go to ``sink``.

        If ``sink`` raises, the item is not in the list.
        """
        edge = [*self._edge, Item(value, tuple(strong), tuple(weak))]
        if len(edge) < FAN_OUT:
            self._edge = edge
            return
        levels = [list(refs) for refs in self._levels]
        full = _put_leaf(sink, edge)
        for level in range(_MAX_LEVELS):
            if level == len(levels):
                levels.append([])
            levels[level].append(full)
            if len(levels[level]) < FAN_OUT:
                break
            full = put_node(sink, Node("list", tuple(levels[level]), (), {"l": level + 1}))
            levels[level] = []
        self._edge, self._levels = [], levels

    def truncate(self, source: Source, length: int) -> None:
        """Keep the first ``length`` items. Reads at most one node a level, writes nothing."""
        if not 0 <= length <= len(self):
            raise IndexError(f"cannot truncate a list of {len(self)} items to {length}")
        left = length
        for level in reversed(range(len(self._levels))):
            kept, left_in = divmod(left, _capacity(level))
            if kept < len(self._levels[level]):
                self._cut(source, level, kept, left_in)
                return
            left -= len(self._levels[level]) * _capacity(level)
        self._edge = self._edge[:left]

    def _cut(self, source: Source, level: int, kept: int, left: int) -> None:
        """Keep ``kept`` nodes of ``level``, and ``left`` items of the next one, opened down to the edge."""
        ref = self._levels[level][kept]
        levels = [list(refs) for refs in self._levels]
        levels[level] = levels[level][:kept]
        for below in range(level):
            levels[below] = []
        edge: list[Item] = []
        while left:
            node = _read(source, ref, level)
            if level == 0:
                edge = _leaf_items(node)[:left]
                break
            level -= 1
            kept, left = divmod(left, _capacity(level))
            levels[level] = list(node.strong[:kept])
            ref = node.strong[kept] if left else ref
        while levels and not levels[-1]:
            levels.pop()
        self._edge, self._levels = edge, levels

    def root(self, strong_out: list[Ref], weak_out: list[Ref]) -> dict[str, Any]:
        """The root for the owner's body; its references are appended to the owner's, which must not be reordered."""
        root: dict[str, Any] = {
            "n": len(self),
            "e": [item.value for item in self._edge],
            "k": [len(refs) for refs in self._levels],
            "s": len(strong_out),
            "w": len(weak_out),
        }
        pairs = _pairs(self._edge)
        if pairs is not None:
            root["t"] = pairs
        for item in self._edge:
            strong_out.extend(item.strong)
            weak_out.extend(item.weak)
        for refs in self._levels:
            strong_out.extend(refs)
        return root

    def items(self, source: Source, start: int = 0, stop: int | None = None) -> Iterator[Item]:
        """Items ``start`` to ``stop`` (default: the end), reading nodes as they are reached. Raises as ``source.get``."""
        total = len(self)
        stop = total if stop is None else min(stop, total)
        if start < 0 or start > total:
            raise IndexError(f"no item {start} in a list of {total}")
        base = 0
        for level in reversed(range(len(self._levels))):
            for ref in self._levels[level]:
                yield from _items_below(source, ref, level, start - base, stop - base)
                base += _capacity(level)
        yield from self._edge[max(0, start - base) : max(0, stop - base)]

    def new_items(self, source: Source, previous: MerkleList) -> Iterator[Item]:
        """The items after those of ``previous``, which must be a prefix of this list (not checked)."""
        return self.items(source, len(previous))


def _capacity(level: int) -> int:
    """Items below one full node of ``level``."""
    return int(FAN_OUT ** (level + 1))


def _pairs(items: Sequence[Item]) -> list[list[int]] | None:
    """How many references each item owns, or None if none owns any."""
    if not any(item.strong or item.weak for item in items):
        return None
    return [[len(item.strong), len(item.weak)] for item in items]


def _put_leaf(sink: Sink, items: Sequence[Item]) -> Ref:
    body: dict[str, Any] = {"l": 0, "e": [item.value for item in items]}
    pairs = _pairs(items)
    if pairs is not None:
        body["t"] = pairs
    strong = tuple(ref for item in items for ref in item.strong)
    weak = tuple(ref for item in items for ref in item.weak)
    return put_node(sink, Node("list", strong, weak, body), compress=not strong and not weak)


def _read(source: Source, ref: Ref, level: int) -> Node:
    node = get_node(source, ref, type="list")
    if type(node.body) is not dict or node.body.get("l") != level or type(node.body["l"]) is not int:
        raise CorruptionError("is not of the level that its parent says", object=f"list node {ref.hex()[:14]}", code="bad-list")
    if level > 0 and (len(node.strong) != FAN_OUT or any(ref_kind(child) != "node" for child in node.strong)):
        raise CorruptionError("has not 16 children", object=f"list node {ref.hex()[:14]}", code="bad-list")
    return node


def _leaf_items(node: Node) -> list[Item]:
    values = node.body.get("e")
    if type(values) is not list or len(values) != FAN_OUT:
        raise CorruptionError("has not 16 values", object="list node", code="bad-list")
    items, num_strong, num_weak = _own(values, node.body.get("t"), node.strong, node.weak)
    if num_strong != len(node.strong) or num_weak != len(node.weak):
        raise CorruptionError("has references that no item owns", object="list node", code="bad-list")
    return items


def _own(values: list[Any], pairs: Any, strong: Sequence[Ref], weak: Sequence[Ref]) -> tuple[list[Item], int, int]:
    """The items, and how many strong and weak references they took from the front of these."""
    counts = [[0, 0]] * len(values) if pairs is None else pairs
    if type(counts) is not list or len(counts) != len(values):
        raise CorruptionError("has not one pair a value", object="list", code="bad-list")
    items = []
    s = w = 0
    for value, pair in zip(values, counts, strict=True):
        if type(pair) is not list or len(pair) != 2 or any(type(n) is not int or n < 0 for n in pair):
            raise CorruptionError("has a bad pair", object="list", code="bad-list")
        if s + pair[0] > len(strong) or w + pair[1] > len(weak):
            raise CorruptionError("owns more references than there are", object="list", code="bad-list")
        items.append(Item(value, tuple(strong[s : s + pair[0]]), tuple(weak[w : w + pair[1]])))
        s, w = s + pair[0], w + pair[1]
    return items, s, w


def _items_below(source: Source, ref: Ref, level: int, start: int, stop: int) -> Iterator[Item]:
    """Items ``start`` to ``stop`` counted from the first one below ``ref``; nothing is read if none is there."""
    if stop <= 0 or start >= _capacity(level) or stop <= start:
        return
    node = _read(source, ref, level)
    if level == 0:
        yield from _leaf_items(node)[max(0, start) : stop]
        return
    step = _capacity(level - 1)
    for i, child in enumerate(node.strong):
        yield from _items_below(source, child, level - 1, start - i * step, stop - i * step)


def _bad_root(what: str) -> CorruptionError:
    return CorruptionError(what, object="list root", code="bad-list")


def _digits(count: int) -> list[int]:
    """``count`` in base 16, lowest digit first; empty for 0."""
    digits = []
    while count:
        count, digit = divmod(count, FAN_OUT)
        digits.append(digit)
    return digits


def _parse_root(root: Any, strong: Sequence[Ref], weak: Sequence[Ref]) -> tuple[list[Item], list[list[Ref]]]:
    if type(root) is not dict or not {"n", "e", "k", "s", "w"} <= root.keys() or root.keys() - {"n", "e", "k", "s", "w", "t"}:
        raise _bad_root("is no list root")
    n, values, counts, s, w = (root[key] for key in "neksw")
    if any(type(number) is not int or number < 0 for number in (n, s, w)) or type(values) is not list or type(counts) is not list:
        raise _bad_root("has fields of the wrong type")
    if len(values) != n % FAN_OUT or counts != _digits(n // FAN_OUT) or len(counts) > _MAX_LEVELS:
        raise _bad_root(f"does not hold the edge of a list of {n} items")
    edge, num_strong, _ = _own(values, root.get("t"), strong[s:], weak[w:])
    at = s + num_strong
    levels = []
    for count in counts:
        refs = list(strong[at : at + count])
        if len(refs) != count or any(ref_kind(ref) != "node" for ref in refs):
            raise _bad_root("names nodes that its owner does not refer to")
        levels.append(refs)
        at += count
    return edge, levels
