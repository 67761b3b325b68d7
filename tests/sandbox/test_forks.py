"""Forks, promotion and single files."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from agentckpt.errors import ConflictError, IncompatibleError, NotFoundError
from agentckpt.sandbox import Workspace
from agentckpt.sandbox.copying import remove_tree

from .memory import MemoryStore
from .trees import snapshot


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    (tmp_path / "base").mkdir()
    workspace = Workspace(tmp_path / "base/w", ignore=["*.o"])
    for index in range(8):
        workspace.write_file(f"d{index % 3}/f{index}", os.urandom(700 * index))
    workspace.write_file("x.o", b"object")
    path = Path(workspace.path)
    os.link(path / "d1/f1", path / "d2/hard")
    os.symlink("/etc/passwd", path / "link")
    os.mkfifo(path / "pipe")
    os.chmod(path / "d1", 0o750)
    os.chmod(path / "d0/f3", 0o500)
    os.utime(path / "d1", ns=(1, 1_234_567_890_123_456_789))
    time.sleep(0.03)
    return workspace


def without_special(path: str) -> dict[bytes, tuple[object, ...]]:
    return {name: item for name, item in snapshot(path).items() if item[0] != "special"}


def test_a_fork_is_the_same_tree_and_shares_nothing(workspace: Workspace) -> None:
    before = without_special(workspace.path)
    forks = workspace.fork(3)
    assert len({fork.path for fork in forks}) == 3
    assert all(os.path.dirname(fork.path) == os.path.dirname(workspace.path) for fork in forks)
    assert [without_special(fork.path) for fork in forks] == [before] * 3
    forks[0].run("echo changed > d1/f1; rm -r d2; echo new > new")
    assert without_special(workspace.path) == before
    assert without_special(forks[1].path) == before
    for fork in forks:
        fork.close()
        fork.close()
    assert os.listdir(os.path.dirname(workspace.path)) == ["w"]
    workspace.close()
    assert without_special(workspace.path) == before, "closing the workspace itself removes nothing"


def test_a_fork_knows_what_its_parent_had_captured(workspace: Workspace) -> None:
    store = MemoryStore()
    first = workspace.capture(store, None).write()
    (fork,) = workspace.fork(1)
    time.sleep(0.03)
    store.reset()
    same = fork.capture(store, first.ref).write()
    assert (same.facts["num_changed"], same.ref, store.new) == (0, first.ref, [])
    fork.write_file("d1/f4", b"z" * 1000)
    second = fork.capture(store, first.ref).write()
    assert second.facts["num_changed"] == 1
    fork.close()


def test_promote_exchanges_the_trees(workspace: Workspace) -> None:
    store = MemoryStore()
    first = workspace.capture(store, None).write()
    (fork,) = workspace.fork(1)
    fork.write_file("result", b"better")
    mine, theirs = snapshot(workspace.path), snapshot(fork.path)
    time.sleep(0.03)
    workspace.exchange(fork)
    assert (snapshot(workspace.path), snapshot(fork.path)) == (theirs, mine)
    store.reset()
    captured = workspace.capture(store, first.ref).write()
    assert captured.facts["num_changed"] == 1, "the table went with the tree"
    fork.close()
    assert workspace.read_file("result") == b"better"


def test_an_exchange_is_refused_while_somebody_stands_in_it(workspace: Workspace) -> None:
    (fork,) = workspace.fork(1)
    with subprocess.Popen(["sleep", "60"], cwd=fork.path) as sleeper:
        with pytest.raises(ConflictError, match="working directory"):
            workspace.exchange(fork)
        sleeper.kill()
    with pytest.raises(IncompatibleError):
        workspace.exchange(object())  # type: ignore[arg-type]


def test_a_fork_that_fails_leaves_nothing(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    from agentckpt.sandbox import copying

    calls = 0

    def failing(source: int, target: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 10:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(copying, "reflink", lambda a, b: False)
    monkeypatch.setattr(copying, "_copy_bytes", failing)
    with pytest.raises(OSError, match="no space left") as caught:
        workspace.fork(3)
    assert type(caught.value).__name__ == "CapacityError"
    assert os.listdir(os.path.dirname(workspace.path)) == ["w"]


def test_copying_without_copy_file_range(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    (fork,) = workspace.fork(1)
    assert without_special(fork.path) == without_special(workspace.path)
    fork.close()


def test_files_stay_inside(workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("outside")
    os.symlink(tmp_path, os.path.join(workspace.path, "up"))
    os.symlink("d1/f1", os.path.join(workspace.path, "near"))
    for path in (
        "../outside",
        "/etc/passwd",
        "d1/../../outside",
        "up/outside",
        "near",
        "",
        ".",
        "a\0b",
        workspace.path,
        workspace.path + "x/y",
    ):
        with pytest.raises(IncompatibleError):
            workspace.read_file(path)
        with pytest.raises(IncompatibleError):
            workspace.write_file(path, "evil")
    assert (tmp_path / "outside").read_text() == "outside"
    for path in ("d1", "pipe"):
        with pytest.raises(IncompatibleError) as caught:
            workspace.read_file(path)
        assert caught.value.code == "not-a-file"
        with pytest.raises(IncompatibleError):
            workspace.write_file(path, b"")
    with pytest.raises(NotFoundError):
        workspace.read_file("d1/none")


def test_files_are_written_and_read(workspace: Workspace) -> None:
    workspace.write_file("new/deep/file", "text ä")
    assert workspace.read_file("new/deep/file") == "text ä".encode()
    workspace.write_file("new/deep/file", b"")
    assert workspace.read_file(os.path.join(workspace.path, "new/deep/file")) == b""
    assert os.stat(os.path.join(workspace.path, "new/deep/file")).st_mode & 0o777 == 0o644
    os.chmod(os.path.join(workspace.path, "new/deep/file"), 0o755)
    workspace.write_file("new//deep/./file", b"again")
    assert os.stat(os.path.join(workspace.path, "new/deep/file")).st_mode & 0o777 == 0o755


def test_removing_a_tree_follows_no_link_and_minds_no_mode(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/f").write_text("x")
    (tmp_path / "t/d/e").mkdir(parents=True)
    os.symlink(tmp_path / "outside", tmp_path / "t/d/link")
    os.chmod(tmp_path / "t/d/e", 0)
    os.chmod(tmp_path / "t/d", 0)
    remove_tree(str(tmp_path / "t"))
    remove_tree(str(tmp_path / "t"))
    assert sorted(os.listdir(tmp_path)) == ["outside"]
    assert (tmp_path / "outside/f").exists()
    os.symlink(tmp_path / "outside", tmp_path / "alias")
    with pytest.raises(OSError, match="alias"):
        remove_tree(str(tmp_path / "alias"))
    assert (tmp_path / "outside/f").exists()
