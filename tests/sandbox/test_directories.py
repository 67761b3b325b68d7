"""Directory nodes: one encoding for one set of entries, and a cost that follows what changed."""

from __future__ import annotations

import random

import blake3
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentckpt.errors import CapacityError, CorruptionError
from agentckpt.nodes import Node, get_node, put_node
from agentckpt.sandbox.dirs import Budget, read_directory, write_directory
from agentckpt.sandbox.entries import Entry

from .memory import MemoryStore


def entry(name: bytes, content: bytes = b"") -> Entry:
    return Entry(name, "f", 0o644, 1, len(content), content)


def names(count: int, seed: int = 0) -> list[bytes]:
    rng = random.Random(seed)
    return sorted({b"file-%d.py" % rng.randrange(10 * count) for _ in range(count)})


@settings(max_examples=40, deadline=None)
@given(st.sets(st.binary(min_size=1, max_size=12).filter(lambda n: n not in (b".", b"..") and not {47, 0} & set(n)), max_size=300))
def test_what_is_written_is_read(found: set[bytes]) -> None:
    store = MemoryStore()
    entries = [entry(name, name) for name in sorted(found)]
    ref, _ = write_directory(lambda data: store.put("node", data), entries)
    assert list(read_directory(store, ref, Budget())) == entries


@pytest.mark.parametrize("count", [0, 1, 63, 1000, 20_000])
def test_boundaries_are_those_of_the_format(count: int) -> None:
    store = MemoryStore()
    entries = [entry(name) for name in names(count)]
    ref, leaves = write_directory(lambda data: store.put("node", data), entries)
    assert sum(len(part) for part, _ in leaves) == len(entries)
    for part, _ in leaves[:-1]:
        for item in part:
            ends = int.from_bytes(blake3.blake3(item.name).digest()[:8], "little") % 64 == 0
            assert ends == (item is part[-1]) or (item is part[-1] and len(part) == 512)
    level, refs = get_node(store, ref).body["l"], [ref]
    while level:
        nodes = [get_node(store, one) for one in refs]
        for node in nodes[:-1] if level < 4 else ():
            last = node.body["e"][-1][0]
            where = int.from_bytes(blake3.blake3(last).digest()[8 * level : 8 * level + 8], "little") % 64
            assert where == 0 or len(node.body["e"]) == 512
        refs = [node.strong[position] for node in nodes for _, position in node.body["e"]]
        level -= 1
    assert refs == [leaf for _, leaf in leaves]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 30))
def test_edits_lead_to_the_encoding_of_a_fresh_write(seed: int, num_edits: int) -> None:
    store, rng = MemoryStore(), random.Random(seed)
    known = {name: entry(name) for name in names(1500, seed)}
    ref, leaves = write_directory(lambda data: store.put("node", data), [known[name] for name in sorted(known)])
    for _ in range(num_edits):
        name = rng.choice(sorted(known))
        if rng.random() < 0.4:
            del known[name]
        else:
            name = name if rng.random() < 0.5 else b"new-%d" % rng.randrange(1000)
            known[name] = entry(name, rng.randbytes(4))
        ref, leaves = write_directory(lambda data: store.put("node", data), [known[name] for name in sorted(known)], leaves)
    fresh, _ = write_directory(lambda data: store.put("node", data), [known[name] for name in sorted(known)])
    assert fresh == ref


def test_one_changed_entry_of_twenty_thousand_writes_one_node_a_level() -> None:
    store = MemoryStore()
    entries = [entry(name) for name in names(20_000)]
    ref, leaves = write_directory(lambda data: store.put("node", data), entries)
    height = get_node(store, ref).body["l"] + 1
    store.reset()
    entries[7000] = entry(entries[7000].name, b"changed")
    write_directory(lambda data: store.put("node", data), entries, leaves)
    assert len(store.new) == height
    assert store.num_puts <= height + len(leaves) // 16
    assert store.new_bytes() < 40_000


def test_a_tree_that_unfolds_without_end_is_refused() -> None:
    """Each level names the level below 500 times: 4 small nodes, 62,500,000,000 files."""
    store = MemoryStore()
    node = put_node(
        store,
        Node("dir", (), (), {"l": 0, "e": [{"n": b"f%03d" % i, "t": "f", "m": 0o644, "mt": 0, "s": 0, "x": b""} for i in range(500)]}),
    )
    for _ in range(3):
        items = [{"n": b"d%03d" % i, "t": "d", "m": 0o755, "mt": 0, "d": 0} for i in range(500)]
        node = put_node(store, Node("dir", [node], (), {"l": 0, "e": items}))
    budget = Budget(10_000)

    def walk(ref: bytes) -> int:
        return sum(1 + (walk(item.node) if item.node is not None else 0) for item in read_directory(store, ref, budget))  # type: ignore[arg-type]

    with pytest.raises(CapacityError, match="too many entries"):
        walk(node)


def test_an_inner_node_over_a_leaf_of_the_wrong_level_is_refused() -> None:
    store = MemoryStore()
    leaf = put_node(store, Node("dir", (), (), {"l": 0, "e": [{"n": b"a", "t": "f", "m": 0, "mt": 0, "s": 0, "x": b""}]}))
    two = put_node(store, Node("dir", [leaf], (), {"l": 2, "e": [[b"a", 0]]}))
    other = put_node(store, Node("dir", [leaf], (), {"l": 1, "e": [[b"b", 0]]}))
    for ref in (two, other):
        with pytest.raises(CorruptionError):
            list(read_directory(store, ref, Budget()))
