"""Directories as sorted lists with content-defined node boundaries (``store/FORMAT.md`` section 6).

A boundary depends on the hash of a name alone, so that a changed entry rewrites its own node and the nodes above it, and an
inserted one splits or joins at most two: a directory of any size costs what changed in it.

Invariants:
1. One set of entries has one encoding, in whatever order and by whatever edits it came about.
2. Read or written, names are strictly ascending over the whole directory.
3. What is read is bounded by a ``Budget`` before it is used: nodes can be shared, so few bytes may spell an endless tree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import blake3

from ..errors import CapacityError, CorruptionError
from ..nodes import Node, encode_node, get_node, ref_kind
from ..types import Ref, Source
from .entries import Entry, check_name, decode_entry, encode_entry

MAX_ENTRIES_A_NODE = 512
_BOUNDARY = 64
_MAX_LEVEL = 8
_HASHED_LEVELS = 4

Put = Callable[[bytes], Ref]
"""stores a node's bytes"""
Leaves = tuple[tuple[tuple[Entry, ...], Ref], ...]
"""the level-0 nodes of a directory as last written: entries and reference"""


class Budget:
    """How much a tree may unfold to. Raises ``CapacityError`` when it is used up."""

    def __init__(self, num_entries: int = 20_000_000, num_bytes: int | None = None) -> None:
        self.num_entries = num_entries
        self.num_bytes = num_bytes
        self._limits = (num_entries, num_bytes)

    def entries(self, count: int) -> None:
        self.num_entries -= count
        if self.num_entries < 0:
            raise CapacityError("the tree has too many entries", code="tree-too-big", expected=f"at most {self._limits[0]}")

    def bytes(self, count: int, where: str) -> None:
        if self.num_bytes is None:
            return
        self.num_bytes -= count
        if self.num_bytes < 0:
            raise CapacityError(
                "the tree is larger than the free space", code="no-space", object=where, expected=f"at most {self._limits[1]} bytes"
            )


def ends_node(name: bytes, level: int) -> bool:
    """Whether a node of ``level`` ends after an item with this (first) name."""
    if level >= _HASHED_LEVELS:
        return False
    digest = blake3.blake3(name).digest()
    return int.from_bytes(digest[8 * level : 8 * level + 8], "little") % _BOUNDARY == 0


def _groups(names: Sequence[bytes], level: int) -> Iterator[tuple[int, int]]:
    """[start, stop) of each node."""
    start = 0
    for index, name in enumerate(names):
        if index + 1 - start >= MAX_ENTRIES_A_NODE or ends_node(name, level):
            yield start, index + 1
            start = index + 1
    if start < len(names) or not names:
        yield start, len(names)


def write_directory(put: Put, entries: Sequence[Entry], before: Leaves = ()) -> tuple[Ref, Leaves]:
    """Store a directory whose entries are sorted by name; leaves equal to those of ``before`` are not written again."""
    known = {leaf[0][0].name if leaf[0] else b"": leaf for leaf in before}
    leaves: list[tuple[tuple[Entry, ...], Ref]] = []
    for start, stop in _groups([entry.name for entry in entries], 0):
        part = tuple(entries[start:stop])
        old = known.get(part[0].name if part else b"")
        ref = old[1] if old is not None and old[0] == part else put(_leaf(part))
        leaves.append((part, ref))
    children = [(part[0].name if part else b"", ref) for part, ref in leaves]
    level = 1
    while len(children) > 1:
        children = [
            (children[start][0], put(_inner(children[start:stop], level))) for start, stop in _groups([name for name, _ in children], level)
        ]
        level += 1
    return children[0][1], tuple(leaves)


def _leaf(entries: Sequence[Entry]) -> bytes:
    strong: list[Ref] = []
    items = [encode_entry(entry, strong) for entry in entries]
    return encode_node(Node("dir", strong, (), {"l": 0, "e": items}))


def _inner(children: Sequence[tuple[bytes, Ref]], level: int) -> bytes:
    return encode_node(Node("dir", [ref for _, ref in children], (), {"l": level, "e": [[n, i] for i, (n, _) in enumerate(children)]}))


def read_directory(source: Source, ref: Ref, budget: Budget, where: str = "") -> Iterator[Entry]:
    """The entries of a directory in order. Raises ``CorruptionError``, ``NotFoundError``, ``CapacityError``."""
    for part, _ in read_leaves(source, ref, budget, where):
        yield from part


def read_leaves(source: Source, ref: Ref, budget: Budget, where: str = "") -> Iterator[tuple[tuple[Entry, ...], Ref]]:
    """As ``read_directory``, node by node of level 0."""
    where = where or "/"
    last: bytes | None = None
    for part, leaf in _leaves(source, ref, None, None, budget, where):
        for entry in part:
            if last is not None and entry.name <= last:
                raise CorruptionError("names are not in ascending order", code="bad-order", object=where, found=repr(entry.name)[:80])
            last = entry.name
        yield part, leaf


def _leaves(
    source: Source, ref: Ref, level: int | None, first: bytes | None, budget: Budget, where: str
) -> Iterator[tuple[tuple[Entry, ...], Ref]]:
    node = get_node(source, ref, type="dir")
    body = node.body
    if not isinstance(body, dict) or set(body) != {"l", "e"} or type(body["l"]) is not int or not isinstance(body["e"], list):
        raise CorruptionError("a directory node has another shape", code="bad-directory", object=where)
    found, items = body["l"], body["e"]
    if not 0 <= found <= _MAX_LEVEL or (level is not None and found != level) or len(items) > MAX_ENTRIES_A_NODE or (found and not items):
        raise CorruptionError("a directory node has a wrong level or length", code="bad-directory", object=where)
    # An inner item is charged too: a chain of shared nodes must not unfold for nothing.
    budget.entries(len(items))
    if found == 0:
        part = tuple(decode_entry(item, node.strong, where) for item in items)
        _check_first(part[0].name if part else None, first, where)
        yield part, ref
        return
    for index, item in enumerate(items):
        name, child = _child(item, node, where)
        if index == 0:
            _check_first(name, first, where)
        yield from _leaves(source, child, found - 1, name, budget, where)


def _check_first(name: bytes | None, first: bytes | None, where: str) -> None:
    if first is not None and name != first:
        raise CorruptionError("a directory node begins with another name", code="bad-directory", object=where)


def _child(item: object, node: Node, where: str) -> tuple[bytes, Ref]:
    if not isinstance(item, list) or len(item) != 2 or type(item[1]) is not int or not 0 <= item[1] < len(node.strong):
        raise CorruptionError("an item is not [name, position]", code="bad-directory", object=where)
    child = node.strong[item[1]]
    if ref_kind(child) != "node":
        raise CorruptionError("a reference of the wrong kind", code="bad-directory", object=where)
    return check_name(item[0], where), child
