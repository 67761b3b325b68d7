"""A workspace in the real store: written, synced, opened again, verified, restored."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from agentckpt.errors import AgentckptError
from agentckpt.sandbox import Workspace, read_path, restore_tree
from agentckpt.store import Store

from .trees import snapshot


def test_a_tree_survives_the_store(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "w")
    for index in range(50):
        workspace.write_file(f"d{index % 7}/f{index}", os.urandom(50 * index) + b"text " * 40 * index)
    workspace.write_file("big", os.urandom(9 << 20))
    time.sleep(0.03)
    with Store.open(tmp_path / "store", create=True) as store:
        first = workspace.capture(store, None).write()
        workspace.write_file("d1/f1", b"changed" * 300)
        second = workspace.capture(store, first.ref).write()
        store.sync()
    with Store.open(tmp_path / "store") as store:
        assert read_path(store, second.ref, "d1/f1") == b"changed" * 300
        restore_tree(store, second.ref, str(tmp_path / "out"))
        assert snapshot(tmp_path / "out") == snapshot(tmp_path / "w")
        report = workspace.prepare(store, first.ref).commit()
        assert report.displaced is not None
        assert workspace.read_file("d1/f1") != b"changed" * 300


def test_a_damaged_store_restores_nothing(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "w")
    workspace.write_file("a", b"a" * 600)
    workspace.write_file("b", os.urandom(40_000))
    with Store.open(tmp_path / "store", create=True) as store:
        ref = workspace.capture(store, None).write().ref
        store.sync()
    (pack,) = [path for path in (tmp_path / "store/packs").rglob("*") if path.is_file()]
    data = bytearray(pack.read_bytes())
    data[len(data) // 2] ^= 1
    pack.chmod(0o600)
    pack.write_bytes(data)
    workspace.write_file("a", b"live")
    before = snapshot(tmp_path / "w")
    with pytest.raises(AgentckptError), Store.open(tmp_path / "store") as store:
        workspace.prepare(store, ref)
    assert snapshot(tmp_path / "w") == before
    assert sorted(os.listdir(tmp_path)) == ["store", "w"]
