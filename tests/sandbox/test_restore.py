"""A restore replaces the tree in one step or not at all."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentckpt.errors import CapacityError, ConflictError, NotFoundError
from agentckpt.sandbox import Plan, Workspace, restore, restore_tree
from agentckpt.types import PartReport, Ref, Staged

from .memory import MemoryStore
from .trees import snapshot


def beside(path: Path) -> list[str]:
    """What stands beside a workspace and is not it."""
    return sorted(name for name in os.listdir(path.parent) if name != path.name)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[MemoryStore, Workspace, Ref, Path]:
    (tmp_path / "base").mkdir()
    path = tmp_path / "base/w"
    workspace, store = Workspace(path), MemoryStore()
    for index in range(20):
        workspace.write_file(f"d{index % 4}/f{index}", os.urandom(600 * index))
    os.link(path / "d1/f1", path / "d2/hard")
    os.symlink("d1/f1", path / "link")
    (path / "empty").mkdir()
    time.sleep(0.03)
    return store, workspace, workspace.capture(store, None).write().ref, path


def test_a_changed_tree_comes_back_and_is_kept_until_the_next_cut_is_published(saved: tuple[MemoryStore, Workspace, Ref, Path]) -> None:
    store, workspace, ref, path = saved
    before = snapshot(path)
    (path / "d1/f5").write_text("changed")
    (path / "new").write_text("new")
    changed = snapshot(path)
    staged = workspace.prepare(store, ref)
    assert snapshot(path) == changed, "prepare leaves the live tree alone"
    report = staged.commit()
    assert snapshot(path) == before
    assert report.restored == 21
    assert report.displaced is not None
    assert snapshot(report.displaced) == changed
    assert staged.commit() == report
    assert snapshot(path) == before, "a second commit must not swap back"
    staged.abort()
    assert snapshot(report.displaced) == changed, "nor may an abort after it remove anything"

    first = workspace.capture(store, ref).write()
    assert first.facts["num_changed"] == 0, "a restored tree need not be read again"
    assert first.ref == ref
    assert os.path.exists(report.displaced), "not published yet, as far as we can know"
    workspace.write_file("more", b"more")
    second = workspace.capture(store, ref).write()
    workspace.capture(store, second.ref).write()
    assert beside(path) == []


def test_a_tree_that_is_as_it_should_be_stays(saved: tuple[MemoryStore, Workspace, Ref, Path]) -> None:
    store, workspace, ref, path = saved
    inode, before = os.stat(path).st_ino, snapshot(path)
    for one in (workspace, Workspace(path)):
        store.num_gets = 0
        report = one.prepare(store, ref).commit()
        assert (report.restored, report.displaced) == (21, None)
    os.utime(path / "d1/f5", ns=(1, 1))
    os.utime(path / "d1", ns=(2, 2))
    Workspace(path).prepare(store, ref).commit()
    assert snapshot(path) == before, "times alone are set, in place"
    assert os.stat(path).st_ino == inode
    assert beside(path) == []


@pytest.mark.parametrize("times_back", [False, True])
def test_a_change_that_keeps_size_and_time_is_found(times_back: bool, saved: tuple[MemoryStore, Workspace, Ref, Path]) -> None:
    """In a new process nothing vouches for a file but its bytes."""
    store, _, ref, path = saved
    before = snapshot(path)
    found = os.stat(path / "d3/f7")
    with open(path / "d3/f7", "r+b") as file:
        file.write(b"XX")
    if times_back:
        os.utime(path / "d3/f7", ns=(found.st_atime_ns, found.st_mtime_ns))
    assert Workspace(path).prepare(store, ref).commit().displaced is not None
    assert snapshot(path) == before


@pytest.mark.parametrize(
    "damage",
    [
        "rm -r d1",
        "chmod 600 d1/f5",
        "ln -sf other link",
        "rm d2/hard; cp -p d1/f1 d2/hard",
        "rm -r empty; touch empty",
        "ln d0/f4 d0/again",
        "chmod 700 .",
    ],
)
def test_every_kind_of_change_is_found(damage: str, saved: tuple[MemoryStore, Workspace, Ref, Path]) -> None:
    store, workspace, ref, path = saved
    before, mode = snapshot(path), os.stat(path).st_mode
    subprocess.run(damage, shell=True, cwd=path, check=True)
    report = workspace.prepare(store, ref).commit()
    assert report.displaced is not None
    assert (snapshot(path), os.stat(path).st_mode) == (before, mode)


def test_an_aborted_restore_leaves_nothing(saved: tuple[MemoryStore, Workspace, Ref, Path]) -> None:
    store, workspace, ref, path = saved
    (path / "new").write_text("new")
    changed = snapshot(path)
    staged = workspace.prepare(store, ref)
    staged.abort()
    staged.abort()
    assert snapshot(path) == changed
    assert beside(path) == []
    with pytest.raises(ConflictError, match="aborted"):
        staged.commit()


def test_an_absent_or_empty_target_is_filled(saved: tuple[MemoryStore, Workspace, Ref, Path], tmp_path: Path) -> None:
    store, _, ref, path = saved
    report = Workspace(tmp_path / "fresh").prepare(store, ref).commit()
    assert report.displaced is None
    assert snapshot(tmp_path / "fresh") == snapshot(path)
    assert not [name for name in os.listdir(tmp_path) if "agentckpt" in name]


def test_restore_tree_refuses_a_full_directory_and_plans(saved: tuple[MemoryStore, Workspace, Ref, Path], tmp_path: Path) -> None:
    store, _, ref, path = saved
    target = tmp_path / "out"
    plan = restore_tree(store, ref, str(target), dry_run=True)
    assert isinstance(plan, Plan)
    assert (plan.num_files, plan.num_directories, plan.num_symlinks) == (21, 5, 1)
    assert plan.num_bytes == sum(600 * index for index in range(20))
    assert not target.exists()
    target.mkdir()
    restore_tree(store, ref, str(target))
    assert snapshot(target) == snapshot(path)
    (target / "mine").write_text("mine")
    with pytest.raises(ConflictError) as caught:
        restore_tree(store, ref, str(target))
    assert caught.value.code == "target-not-empty"
    report = restore_tree(store, ref, str(target), overwrite=True)
    assert isinstance(report, PartReport)
    assert report.displaced is not None
    assert (Path(report.displaced) / "mine").read_text() == "mine"
    with pytest.raises(NotFoundError):
        restore_tree(store, ref, str(tmp_path / "no/such/parent"))


def test_the_working_directory_of_a_process_is_not_replaced(saved: tuple[MemoryStore, Workspace, Ref, Path]) -> None:
    store, workspace, ref, path = saved
    (path / "new").write_text("new")
    with subprocess.Popen(["sleep", "60"], cwd=path / "d1") as sleeper:
        with pytest.raises(ConflictError) as caught:
            workspace.prepare(store, ref)
        assert caught.value.code == "in-use"
        assert str(sleeper.pid) in str(caught.value)
        assert caught.value.hint
        (path / "new").unlink()
        workspace.prepare(store, ref).commit()  # nothing to exchange: nothing to refuse
        sleeper.kill()
    assert beside(path) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mount = tmp_path / "disk"
    mount.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "agentckpt-test", str(mount)], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"NOT RUN, mount is not permitted here: {done.stderr.strip()}")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


def test_a_full_disk_leaves_the_old_tree(small_disk: Path, tmp_path: Path) -> None:
    big, store = Workspace(tmp_path / "big"), MemoryStore()
    for index in range(30):
        big.write_file(f"f{index:02d}", os.urandom(100_000))
    ref = big.capture(store, None).write().ref
    workspace = Workspace(small_disk / "w")
    workspace.write_file("mine", b"mine" * 1000)
    before = snapshot(small_disk)
    with pytest.raises(CapacityError) as caught:
        workspace.prepare(store, ref)
    assert caught.value.code == "no-space"
    assert snapshot(small_disk) == before


def test_a_disk_that_fills_up_meanwhile_leaves_the_old_tree(small_disk: Path, tmp_path: Path) -> None:
    class Filling(MemoryStore):
        """Takes the space away after the free space was looked at."""

        def get(self, ref: Ref, max_bytes: int) -> bytes:
            if self.num_gets == 6:
                with open(small_disk / "filler", "wb", buffering=0) as file:
                    try:
                        while True:
                            file.write(bytes(65536))
                    except OSError:
                        pass
            return super().get(ref, max_bytes)

    big, store = Workspace(tmp_path / "big"), Filling()
    for index in range(10):
        big.write_file(f"f{index:02d}", os.urandom(100_000))
    ref = big.capture(store, None).write().ref
    workspace = Workspace(small_disk / "w")
    workspace.write_file("mine", b"mine" * 1000)
    store.num_gets = 0
    with pytest.raises(CapacityError):
        workspace.prepare(store, ref)
    assert workspace.read_file("mine") == b"mine" * 1000
    assert sorted(os.listdir(small_disk)) == ["filler", "w"]


def test_mount_points_are_refused(small_disk: Path, saved: tuple[MemoryStore, Workspace, Ref, Path], tmp_path: Path) -> None:
    store, workspace, ref, path = saved
    at = Workspace(small_disk)
    (small_disk / "x").write_text("x")
    with pytest.raises(ConflictError) as caught:
        at.prepare(store, ref)
    assert caught.value.code == "mount-point"
    (path / "mnt").mkdir()
    subprocess.run(["mount", "--bind", str(small_disk), str(path / "mnt")], check=True)
    try:
        captured = workspace.capture(store, ref).write()
        assert captured.facts["skipped"] == ["mnt (another filesystem)"]
        with pytest.raises(ConflictError) as caught:
            workspace.prepare(store, ref)
        assert caught.value.code == "mount-point"
    finally:
        subprocess.run(["umount", str(path / "mnt")], check=True)
    assert (small_disk / "x").exists()


def test_ignored_paths_stay_through_a_restore(tmp_path: Path) -> None:
    workspace, store = Workspace(tmp_path / "w", ignore=["*.o", "venv/", "/only/here/x"]), MemoryStore()
    for name in ("a.c", "src/b.c"):
        workspace.write_file(name, name)
    ref = workspace.capture(store, None).write().ref
    kept = {"a.o": b"1", "src/b.o": b"2", "venv/bin/python": b"3", "only/here/x": b"4", "new/c.o": b"5"}
    for name, data in kept.items():
        workspace.write_file(name, data)
    workspace.write_file("a.c", "changed")
    report = workspace.prepare(store, ref).commit()
    for name, data in kept.items():
        assert workspace.read_file(name) == data
    assert workspace.read_file("a.c") == b"a.c"
    assert report.displaced is not None
    assert report.lost == ()
    assert not os.path.exists(os.path.join(report.displaced, "venv"))


@pytest.mark.parametrize("again", ["this process", "the next one"])
def test_a_commit_that_was_cut_short_is_finished(again: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace, store = Workspace(tmp_path / "w", ignore=["*.o"]), MemoryStore()
    workspace.write_file("a.c", "a")
    ref = workspace.capture(store, None).write().ref
    workspace.write_file("a.o", "object")
    workspace.write_file("a.c", "changed")
    staged = workspace.prepare(store, ref)
    monkeypatch.setattr(restore, "_move_ignored", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        staged.commit()
    monkeypatch.undo()
    assert not (tmp_path / "w/a.o").exists()
    assert workspace.read_file("a.c") == b"a"
    if again == "this process":
        staged.commit()
    else:
        staged._staged._unlock()  # the process is dead: its lock is gone
        Workspace(tmp_path / "w", ignore=["*.o"]).prepare(store, ref).commit()
    assert workspace.read_file("a.c") == b"a", "a second commit must not swap back"
    assert workspace.read_file("a.o") == b"object"


def test_a_path_ignored_here_is_not_brought_back(tmp_path: Path) -> None:
    workspace, store = Workspace(tmp_path / "w"), MemoryStore()
    for name in ("a.c", "a.o"):
        workspace.write_file(name, name)
    os.link(tmp_path / "w/a.o", tmp_path / "w/b")
    os.link(tmp_path / "w/a.o", tmp_path / "w/c")
    ref = workspace.capture(store, None).write().ref
    other = Workspace(tmp_path / "v", ignore=["*.o"])
    report = other.prepare(store, ref).commit()
    assert sorted(os.listdir(other.path)) == ["a.c", "b", "c"]
    assert os.path.samefile(tmp_path / "v/b", tmp_path / "v/c"), "the first name that is brought back takes the place"
    assert other.read_file("b") == b"a.o"
    assert report.lost == ("1 paths that are ignored here",)
    assert Workspace(tmp_path / "v", ignore=["*.o"]).prepare(store, ref).commit().displaced is None


def test_a_half_built_tree_is_swept_and_one_being_built_is_not(saved: tuple[MemoryStore, Workspace, Ref, Path]) -> None:
    store, workspace, ref, path = saved
    dead, living = (path.parent / f".w.agentckpt-{digit * 16}" for digit in "01")
    for container in (dead, living):
        (container / "tree/half").mkdir(parents=True)
    fd = os.open(living, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    workspace.prepare(store, ref).commit()
    assert beside(path) == [living.name]
    os.close(fd)
    workspace.prepare(store, ref).commit()
    assert beside(path) == []


def test_without_exchange_two_renames_do(saved: tuple[MemoryStore, Workspace, Ref, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    store, workspace, ref, path = saved
    before = snapshot(path)
    (path / "new").write_text("new")
    monkeypatch.setattr(restore.linux, "exchange", lambda a, b: False)
    report = workspace.prepare(store, ref).commit()
    assert snapshot(path) == before
    assert report.displaced is not None
    assert (Path(report.displaced) / "new").exists()


def test_a_crash_between_the_two_renames_is_repaired(
    saved: tuple[MemoryStore, Workspace, Ref, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, workspace, ref, path = saved
    before = snapshot(path)
    (path / "new").write_text("new")
    staged: Staged = workspace.prepare(store, ref)
    monkeypatch.setattr(restore.linux, "exchange", lambda a, b: False)
    real, count = os.rename, 0

    def rename(a: str, b: str) -> None:
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt
        real(a, b)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        staged.commit()
    monkeypatch.undo()
    assert not path.exists()
    staged._staged._unlock()  # type: ignore[attr-defined]
    report = Workspace(path).prepare(store, ref).commit()
    assert snapshot(path) == before
    assert report.displaced is None
    assert [name for name in beside(path) if (path.parent / name / "old/new").exists()], "the changed tree must still be there"


CHILD = """
import pickle, sys
sys.path.insert(0, sys.argv[3])
from agentckpt.sandbox import Workspace
from tests.sandbox.memory import MemoryStore
import json
store = MemoryStore()
for line in open(sys.argv[2]):
    kind, data = json.loads(line)
    store.put(kind, bytes.fromhex(data))
ref = bytes.fromhex(sys.argv[4])
print("ready", flush=True)
Workspace(sys.argv[1]).prepare(store, ref).commit()
print("done", flush=True)
"""


def kill_rounds(saved: tuple[MemoryStore, Workspace, Ref, Path], tmp_path: Path, rounds: int) -> tuple[int, int]:
    import json

    store, _, ref, path = saved
    good = snapshot(path)
    with open(tmp_path / "objects", "w") as file:
        for one, data in store.objects.items():
            file.write(json.dumps([{1: "chunk", 2: "node"}[one[0]], data.hex()]) + "\n")
    root, rng, old, new = str(Path(__file__).parents[2]), random.Random(11), 0, 0
    for round_ in range(rounds):
        (path / "d1/f5").write_text(f"changed {round_}")
        changed = snapshot(path)
        argv = [sys.executable, "-c", CHILD, str(path), str(tmp_path / "objects"), root, ref.hex()]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            time.sleep(rng.random() * 0.02)
            os.kill(child.pid, signal.SIGKILL)
        now = snapshot(path)
        assert now in (good, changed)
        old, new = old + (now == changed), new + (now == good)
        Workspace(path).prepare(store, ref).commit()
        assert snapshot(path) == good
        for name in beside(path):  # only whole displaced trees are left, nothing half-built
            assert restore.displaced_in(str(path.parent / name)) is not None
        assert restore.discard_displaced(str(path)) >= 1
        assert beside(path) == []
    return old, new


def test_kill_9_during_a_restore_leaves_the_old_or_the_new_tree(saved: tuple[MemoryStore, Workspace, Ref, Path], tmp_path: Path) -> None:
    old, new = kill_rounds(saved, tmp_path, 12)
    assert old + new == 12


@pytest.mark.slow
def test_kill_9_during_a_restore_long(saved: tuple[MemoryStore, Workspace, Ref, Path], tmp_path: Path) -> None:
    old, new = kill_rounds(saved, tmp_path, 400)
    assert old > 0
    assert new > 0
