"""Whatever stands in a directory comes back: names of any bytes, modes, links, hard links, empty directories, times."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentckpt.sandbox import Workspace, read_path, restore_tree, tree_diff, walk_tree

from .memory import MemoryStore
from .trees import snapshot

OWNER = 0 if os.geteuid() == 0 else 0o700  # only root reads what has no mode bits
NAME = st.binary(min_size=1, max_size=20).filter(lambda name: name not in (b".", b"..") and not {47, 0} & set(name))
SIZES = st.sampled_from([0, 1, 511, 512, 513, 4096, 65_535, 65_536, 65_537, 300_000])
FILE = st.tuples(st.just("f"), st.integers(0, 2**20), SIZES, st.integers(0, 0o777) | st.just(0o1644))
LINK = st.tuples(st.just("l"), st.sampled_from([b"target", b"/etc/passwd", b"../..", b"\xff\xfe", b"x" * 300]))
HARD = st.tuples(st.just("h"), st.integers(0, 100))
TREE = st.recursive(
    st.dictionaries(NAME, FILE | LINK | HARD, max_size=4),
    lambda inner: st.dictionaries(
        NAME, FILE | LINK | HARD | st.tuples(st.just("d"), inner, st.integers(0, 0o777) | st.just(0o2770)), max_size=5
    ),
    max_leaves=8,
)


def make(root: bytes, tree: dict[bytes, Any], files: list[bytes]) -> None:
    for index, (name, item) in enumerate(tree.items()):
        path = os.path.join(root, name)
        if item[0] == "d":
            os.mkdir(path)
            make(path, item[1], files)
            os.utime(path, ns=(1, 1_600_000_000_123_456_789 + index))
            os.chmod(path, item[2] | OWNER)
        elif item[0] == "l":
            os.symlink(item[1], path)
            os.utime(path, ns=(1, 1_500_000_000_987_654_321), follow_symlinks=False)
        elif item[0] == "h" and files:
            os.link(files[item[1] % len(files)], path)
        elif item[0] == "f":
            with open(path, "wb") as file:
                file.write((b"%d " % item[1] * (item[2] // 2 + 1))[: item[2]])
            os.chmod(path, item[3] | OWNER)
            os.utime(path, ns=(1, 1_700_000_000_000_000_001 + item[1]))
            files.append(path)


@settings(max_examples=60, deadline=None)
@given(TREE, st.integers(0, 0o777))
def test_a_random_tree_comes_back(tree: dict[bytes, Any], mode: int) -> None:
    base = tempfile.mkdtemp()
    try:
        path = os.path.join(base, "work")
        workspace = Workspace(path)
        make(os.fsencode(path), tree, [])
        os.chmod(path, mode | OWNER)
        before, store = snapshot(path), MemoryStore()
        captured = workspace.capture(store, None).write()
        assert captured.facts["consistency"] == "quiescent"
        restore_tree(store, captured.ref, os.path.join(base, "other"))
        assert snapshot(os.path.join(base, "other")) == before
        assert os.stat(os.path.join(base, "other")).st_mode == os.stat(path).st_mode
        again = Workspace(os.path.join(base, "other")).capture(store, None).write()
        assert again.ref == captured.ref, "the same tree must have the same id"
        for name, entry in walk_tree(store, captured.ref):
            if entry.type == "f":
                assert read_path(store, captured.ref, name) == before[name][2]
        assert {name for name, _ in walk_tree(store, captured.ref)} == set(before)
    finally:
        shutil.rmtree(base)


@pytest.fixture
def captured(tmp_path: Path) -> Callable[[dict[str, bytes]], Any]:
    store = MemoryStore()

    def capture(files: dict[str, bytes]) -> Any:
        shutil.rmtree(tmp_path / "w", ignore_errors=True)
        workspace = Workspace(tmp_path / "w")
        for name, data in files.items():
            workspace.write_file(name, data)
            os.utime(tmp_path / "w" / name, ns=(5, 5))
        return store, workspace.capture(store, None).write().ref

    return capture


def test_a_diff_names_what_differs_and_reads_nothing_else(captured: Callable[[dict[str, bytes]], Any]) -> None:
    files = {f"d{i}/e/f{j}": b"%d" % j for i in range(20) for j in range(5)}
    store, a = captured(files)
    changed = {**files, "d7/e/f1": b"other", "d8/new/x": b"n"} | {}
    del changed["d9/e/f2"]
    _, b = captured(changed)
    store.num_gets = 0
    kinds = {
        change.path: change.kind
        for change in tree_diff(store, a, b)
        if change.before is None or change.after is None or change.after.type == "f"
    }
    assert kinds == {b"d7/e/f1": "changed", b"d8/new": "added", b"d8/new/x": "added", b"d9/e/f2": "removed"}
    assert tree_diff(store, a, a) == []
    assert store.num_gets < 60


def test_a_large_file_goes_through_file_nodes(tmp_path: Path) -> None:
    store, workspace = MemoryStore(), Workspace(tmp_path / "w")
    data = os.urandom(1 << 20) * 12
    workspace.write_file("big", data[: (12 << 20) - 7])
    captured = workspace.capture(store, None).write()
    entry = dict(walk_tree(store, captured.ref))[b"big"]
    assert entry.node is not None
    assert entry.chunks == ()
    assert read_path(store, captured.ref, "big") == data[: (12 << 20) - 7]
