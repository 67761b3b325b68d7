"""Stored trees are untrusted: whatever they say, nothing outside the target is touched."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentckpt.errors import AgentckptError, CapacityError, CorruptionError, IncompatibleError, NotFoundError
from agentckpt.nodes import Node, encode, put_node
from agentckpt.sandbox import Workspace, plan_tree, read_path, restore_tree, walk_tree
from agentckpt.types import Ref

from .memory import MemoryStore
from .trees import snapshot

FILE: dict[str, Any] = {"t": "f", "m": 0o644, "mt": 0, "s": 4, "x": b"evil"}
DIR: dict[str, Any] = {"t": "d", "m": 0o755, "mt": 0, "d": 0}
LINK: dict[str, Any] = {"t": "l", "m": 0o777, "mt": 0}


def tree(store: MemoryStore, items: list[Any], strong: tuple[Ref, ...] = (), **body: Any) -> Ref:
    root = put_node(store, Node("dir", strong, (), {"l": 0, "e": items}))
    base = {"v": 1, "backend": "workspace", "consistency": "quiescent", "root": 0, "m": 0o755, "mt": 0, "ignored": [], "facts": {}}
    return put_node(store, Node("tree", [root], (), base | body))


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A live workspace with something precious beside it."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "precious").write_text("precious")
    workspace = Workspace(tmp_path / "w")
    workspace.write_file("mine", b"mine")
    return tmp_path / "w"


def refused(store: MemoryStore, ref: Ref, target: Path, error: type[AgentckptError] = CorruptionError) -> None:
    """Refused by every way in, and nothing anywhere is another one afterwards."""
    before = snapshot(target.parent)
    workspace = Workspace(target)
    with pytest.raises(error):
        workspace.prepare(store, ref)
    with pytest.raises(error):
        restore_tree(store, ref, str(target.parent / "elsewhere"))
    assert snapshot(target.parent) == before
    assert not (target.parent / "elsewhere").exists()


BAD_NAMES: list[Any] = [b"..", b".", b"", b"/etc/x", b"a/b", b"../outside/precious", b"a\0b", b"x" * 256, "text", 7, None]


@pytest.mark.parametrize("name", BAD_NAMES, ids=lambda name: repr(name)[:20])
def test_a_name_that_is_no_name(name: Any, target: Path) -> None:
    store = MemoryStore()
    refused(store, tree(store, [{"n": name, **FILE}]), target)


@pytest.mark.parametrize("first", [b"f", b"g"])
def test_names_that_repeat_or_descend(first: bytes, target: Path) -> None:
    store = MemoryStore()
    refused(store, tree(store, [{"n": first, **FILE}, {"n": b"f", **FILE}]), target)


def test_a_link_and_then_a_directory_of_the_same_name(target: Path) -> None:
    """Write-through: if the second were made, its files would land where the link points."""
    store = MemoryStore()
    inner = put_node(store, Node("dir", (), (), {"l": 0, "e": [{"n": b"precious", **FILE}]}))
    items = [{"n": b"a", **LINK, "x": os.fsencode(target.parent / "outside")}, {"n": b"a", **DIR}]
    refused(store, tree(store, items, (inner,)), target)


def test_a_hard_link_through_a_link_or_to_the_outside(target: Path) -> None:
    store = MemoryStore()
    link = {"n": b"a", **LINK, "x": os.fsencode(target.parent / "outside")}
    size = len("precious")
    hard = {"n": b"b", "t": "f", "m": 0o644, "mt": 0, "s": size, "x": b"12345678", "h": b"a/precious"}
    refused(store, tree(store, [link, hard]), target)
    for path in (b"../outside/precious", b"/etc/passwd", b"a/../../outside/precious", b"", b"b", b"a"):
        refused(store, tree(store, [link, {**hard, "h": path}]), target)


@pytest.mark.parametrize(
    "change",
    [
        {"m": 0o10000}, {"m": -1}, {"m": "rwx"}, {"mt": 1 << 70}, {"s": 5}, {"s": -4}, {"x": b"evil" * 200}, {"t": "p"}, {"t": "f", "d": 0},
        {"c": [0, 0]}, {"extra": 1}, {"x": None}, {"h": 5}, {"n": None},
    ],
    ids=repr,
)  # fmt: skip
def test_an_entry_of_another_shape(change: dict[str, Any], target: Path) -> None:
    store = MemoryStore()
    refused(store, tree(store, [{"n": b"f", **FILE} | change]), target)


def test_set_uid_never_comes_back(target: Path) -> None:
    store = MemoryStore()
    ref = tree(store, [{"n": b"su", **FILE, "m": 0o6755}])
    Workspace(target).prepare(store, ref).commit()
    assert os.stat(target / "su").st_mode & 0o7777 == 0o755


def test_chunks_that_do_not_fit(target: Path) -> None:
    store = MemoryStore()
    chunk, empty = store.put("chunk", b"12345678"), store.put("chunk", b"")
    node = put_node(store, Node("dir", (), (), {"l": 0, "e": []}))

    def with_chunks(size: int, span: Any, strong: tuple[Ref, ...] = (chunk,)) -> Ref:
        return tree(store, [{"n": b"f", "t": "f", "m": 0o644, "mt": 0, "s": size, "c": span}], strong)

    for size, span, strong in [
        (7, [0, 1], (chunk,)), (9, [0, 1], (chunk,)), (8, [0, 2], (chunk, chunk)), (8, [1, 1], (chunk,)), (8, [-1, 1], (chunk,)),
        (0, [0, 1], (chunk,)), (8, [0, 1, 2], (chunk,)), (8, [0, 65], (chunk,) * 65), (8, [0, 1], (node,)), (8, [0, 2], (empty, chunk)),
    ]:  # fmt: skip
        refused(store, with_chunks(size, span, strong), target)
    refused(store, with_chunks(8, [0, 1], (Ref(b"\x01" + bytes(32)),)), target, NotFoundError)


def test_file_nodes_of_another_shape(target: Path) -> None:
    store = MemoryStore()
    chunk = store.put("chunk", b"12345678")

    def with_node(node: Ref) -> Ref:
        return tree(store, [{"n": b"f", "t": "f", "m": 0o644, "mt": 0, "s": 8, "b": 0}], (node,))

    level0 = put_node(store, Node("file", [chunk], (), {"l": 0}))
    for node in (
        put_node(store, Node("file", [], (), {"l": 0})),
        put_node(store, Node("file", [level0], (), {"l": 0})),
        put_node(store, Node("file", [level0], (), {"l": 2})),
        put_node(store, Node("file", [chunk], (), {"l": 99})),
        put_node(store, Node("dir", [chunk], (), {"l": 0, "e": []})),
    ):
        refused(store, with_node(node), target)
    assert read_path(store, with_node(level0), "f") == b"12345678"


def test_a_file_larger_than_the_disk_is_refused_before_it_is_written(target: Path) -> None:
    store = MemoryStore()
    chunk = store.put("chunk", bytes(1 << 20))
    ref = tree(store, [{"n": b"f", "t": "f", "m": 0o644, "mt": 0, "s": 1 << 59, "c": [0, 1]}], (chunk,))
    store.num_gets = 0
    refused(store, ref, target, CapacityError)
    assert store.num_gets == 5, "the two nodes by two ways (and once to compare), no content"


def test_endless_and_circular_looking_trees(target: Path) -> None:
    store = MemoryStore()
    node = put_node(store, Node("dir", (), (), {"l": 0, "e": []}))
    for _ in range(300):
        node = put_node(store, Node("dir", [node], (), {"l": 0, "e": [{"n": b"d", **DIR}]}))
    refused(store, tree(store, [{"n": b"d", **DIR}], (node,)), target, IncompatibleError)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"v": 2}, IncompatibleError), ({"v": "1"}, CorruptionError), ({"root": 1}, CorruptionError), ({"m": 0o10000}, CorruptionError),
        ({"ignored": [1]}, CorruptionError), ({"facts": None}, CorruptionError), ({"mt": None}, CorruptionError),
    ],
    ids=repr,
)  # fmt: skip
def test_a_part_of_another_shape(change: dict[str, Any], error: type[AgentckptError], target: Path) -> None:
    store = MemoryStore()
    refused(store, tree(store, [], **change), target, error)


def test_patterns_from_a_checkpoint_cannot_pull_the_live_tree_apart(target: Path) -> None:
    """A checkpoint may say that everything is ignored: then nothing of the live tree is lost by restoring it."""
    store = MemoryStore()
    ref = tree(store, [{"n": b"f", **FILE}], ignored=["*"])
    Workspace(target).prepare(store, ref).commit()
    assert (target / "mine").read_bytes() == b"mine"


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_random_damage_is_a_typed_error_or_a_tree(data: st.DataObject) -> None:
    """Random bodies in place of entries: a typed error, or something that reads."""
    store = MemoryStore()
    value: st.SearchStrategy[Any] = st.recursive(
        st.none() | st.integers(-5, 1 << 65) | st.binary(max_size=5) | st.sampled_from(["f", "d", "l", "x"]),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ntmsxcdbh") | st.just("mt"), inner, max_size=6),
        max_leaves=8,
    )
    chunk = store.put("chunk", b"1234")
    entry = {"n": b"f", **FILE}
    entry |= data.draw(st.dictionaries(st.sampled_from([*entry, "c", "h", "b", "d"]), value, max_size=3))
    body: Any = {"l": 0, "e": [entry]}
    if data.draw(st.booleans()):
        body |= data.draw(st.dictionaries(st.sampled_from("le"), value, max_size=2))
    encode(body)
    root = put_node(store, Node("dir", [chunk], (), body))
    base = {"v": 1, "backend": "workspace", "consistency": "quiescent", "root": 0, "m": 0o755, "mt": 0, "ignored": [], "facts": {}}
    ref = put_node(store, Node("tree", [root], (), base))
    try:
        for path, item in walk_tree(store, ref):
            if item.type == "f":
                read_path(store, ref, path)
        plan_tree(store, ref, "/nowhere")
    except AgentckptError:
        pass
