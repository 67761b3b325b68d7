"""What a capture costs, what it says about itself, and what it never does."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from agentckpt.errors import ConflictError, IncompatibleError, NotFoundError, StoreError
from agentckpt.sandbox import Workspace, capture, linux, read_path, scan, walk_tree
from agentckpt.sandbox.capture import TreeWriter
from agentckpt.types import Buffer, Kind, Ref, Sandbox

from .memory import MemoryStore


def settle() -> None:
    """Let the clock of file times pass what a key could still hide (the racy rule)."""
    time.sleep(0.03)


def make_files(path: Path, count: int) -> None:
    for index in range(count):
        directory = path / f"package{index // 100:03d}"
        directory.mkdir(exist_ok=True)
        (directory / f"module{index % 100}.py").write_bytes(b"# %d\n" % index + b"x = 1\n" * 200)


def test_one_changed_file_of_ten_thousand_costs_its_chunk_and_the_nodes_on_its_path(tmp_path: Path) -> None:
    workspace, store = Workspace(tmp_path / "w"), MemoryStore()
    make_files(tmp_path / "w", 10_000)
    settle()
    first = workspace.capture(store, None).write()
    assert first.facts["num_files"] == first.facts["num_changed"] == 10_000
    settle()
    store.reset()
    same = workspace.capture(store, first.ref).write()
    assert same.ref == first.ref
    assert (same.facts["num_changed"], store.new) == (0, [])
    assert store.num_puts == 1, "only the part's own node is offered again"

    (tmp_path / "w/package042/module7.py").write_bytes(b"y" * 5000)
    store.reset()
    second = workspace.capture(store, first.ref).write()
    assert second.facts["num_changed"] == 1
    assert store.num_new("chunk") == 1
    assert store.num_new("node") <= 6, "leaf of the file, at most two nodes above it, the same for the root, the part"
    assert store.new_bytes() < 40_000
    assert second.facts["new_bytes"] >= store.new_bytes()
    assert read_path(store, second.ref, "package042/module7.py") == b"y" * 5000


def test_appending_to_a_large_file_writes_its_end(tmp_path: Path) -> None:
    workspace, store = Workspace(tmp_path / "w"), MemoryStore()
    data = os.urandom(8 << 20)
    workspace.write_file("log", data)
    first = workspace.capture(store, None).write()
    with open(tmp_path / "w/log", "ab") as file:
        file.write(b"one more line\n")
    store.reset()
    second = workspace.capture(store, first.ref).write()
    assert store.num_new("chunk") == 1
    assert store.new_bytes() < 300_000
    assert int(str(second.facts["new_bytes"])) < 300_000
    assert read_path(store, second.ref, "log") == data + b"one more line\n"


def test_a_change_within_the_clock_tick_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same size, same inode, same time, as on a filesystem that keeps whole seconds: only the racy rule can know."""
    exact = scan.stat_key

    def coarse(found: os.stat_result) -> scan.StatKey:
        mode, size, mtime_ns, ctime_ns, inode, device = exact(found)
        return (mode, size, mtime_ns - mtime_ns % 1_000_000_000, ctime_ns - ctime_ns % 1_000_000_000, inode, device)

    for module in (capture, scan):
        monkeypatch.setattr(module, "stat_key", coarse)
    workspace, store = Workspace(tmp_path / "w"), MemoryStore()
    previous = None
    for round_ in range(30):
        with open(tmp_path / "w/f", "r+b" if round_ else "wb") as file:
            file.write(b"%04d" % round_)
        captured = workspace.capture(store, previous).write()
        assert read_path(store, captured.ref, "f") == b"%04d" % round_
        previous = captured.ref


def test_a_key_is_racy_as_long_as_the_clock_may_not_have_ticked() -> None:
    def key(newest_ns: int) -> scan.StatKey:
        return (0, 0, 5, newest_ns, 1, 1)

    now_ns = 1_700_000_000_123_456_789
    assert scan.is_racy(key(now_ns), now_ns)
    assert scan.is_racy(key(now_ns - 4_000_000), now_ns)
    assert scan.is_racy(key(now_ns + 10**12), now_ns), "a time in the future proves nothing"
    assert not scan.is_racy(key(now_ns - 30_000_000), now_ns)


def test_a_table_is_not_used_for_another_reference(tmp_path: Path) -> None:
    """A capture that was never published may be gone from the store: the next one starts from the published one."""
    workspace, store = Workspace(tmp_path / "w"), MemoryStore()
    workspace.write_file("a", b"a" * 1000)
    settle()
    first = workspace.capture(store, None).write()
    workspace.write_file("b", b"b" * 1000)
    settle()
    lost_store = MemoryStore()
    workspace.capture(lost_store, first.ref).write()
    store.reset()
    third = workspace.capture(store, first.ref).write()
    assert read_path(store, third.ref, "b") == b"b" * 1000
    assert store.num_new("chunk") == 1


def test_a_hard_link_whose_first_name_moves_with_its_directory(tmp_path: Path) -> None:
    """The file's own key stays as it was: what changes is which of its names comes first."""
    workspace, store = Workspace(tmp_path / "w"), MemoryStore()
    workspace.write_file("a/f", b"x" * 1000)
    (tmp_path / "w/m").mkdir()
    os.link(tmp_path / "w/a/f", tmp_path / "w/m/g")
    settle()
    first = workspace.capture(store, None).write()
    assert dict(walk_tree(store, first.ref))[b"m/g"].link == b"a/f"
    os.rename(tmp_path / "w/a", tmp_path / "w/z")
    second = dict(walk_tree(store, workspace.capture(store, first.ref).write().ref))
    assert (second[b"m/g"].link, second[b"z/f"].link) == (None, b"m/g")


def test_special_files_are_named_and_never_opened(tmp_path: Path) -> None:
    workspace, store = Workspace(tmp_path / "w"), MemoryStore()
    os.mkfifo(tmp_path / "w/pipe")
    with socket.socket(socket.AF_UNIX) as sock:
        os.chdir(tmp_path / "w")
        try:
            sock.bind("sock")
        finally:
            os.chdir("/")
        done: list[object] = []
        thread = threading.Thread(target=lambda: done.append(workspace.capture(store, None).write()), daemon=True)
        thread.start()
        thread.join(20)
    assert done, "a FIFO made the capture hang"
    facts = done[0].facts  # type: ignore[attr-defined]
    assert facts["skipped"] == ["pipe (fifo)", "sock (socket)"]
    assert facts["num_files"] == 0


def test_set_uid_is_dropped(tmp_path: Path) -> None:
    workspace, store = Workspace(tmp_path / "w"), MemoryStore()
    workspace.write_file("su", b"x")
    os.chmod(tmp_path / "w/su", 0o6755)
    captured = workspace.capture(store, None).write()
    assert dict(walk_tree(store, captured.ref))[b"su"].mode == 0o755


def test_a_link_out_of_the_workspace_is_a_link(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    workspace, store = Workspace(tmp_path / "w"), MemoryStore()
    os.symlink("../secret", tmp_path / "w/link")
    os.symlink(tmp_path, tmp_path / "w/dir")
    captured = workspace.capture(store, None).write()
    assert [(p, e.type, e.inline) for p, e in walk_tree(store, captured.ref)] == [
        (b"dir", "l", os.fsencode(tmp_path)), (b"link", "l", b"../secret"),
    ]  # fmt: skip
    assert not any(data == b"secret" for data in store.objects.values())


class Touching(MemoryStore):
    """Changes a file whenever a chunk arrives: the file is being read then."""

    def __init__(self, path: Path, times: int) -> None:
        super().__init__()
        self.path, self.left = path, times

    def put(self, kind: Kind, data: Buffer, *, compress: bool = False) -> Ref:
        if kind == "chunk" and self.left:
            self.left -= 1
            with open(self.path, "r+b") as file:
                file.write(os.urandom(8))
            time.sleep(0.03)
        return super().put(kind, data, compress=compress)


def test_a_file_that_changes_once_while_it_is_read_is_read_again(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "w")
    workspace.write_file("f", bytes(1000))
    store = Touching(tmp_path / "w/f", 1)
    captured = workspace.capture(store, None).write()
    assert read_path(store, captured.ref, "f") == (tmp_path / "w/f").read_bytes()


def test_a_file_that_never_rests_is_named_and_read_again_next_time(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "w")
    workspace.write_file("f", bytes(300_000))
    workspace.write_file("g", b"g" * 1000)
    store = Touching(tmp_path / "w/f", 1000)
    captured = workspace.capture(store, None).write()
    assert captured.facts["unstable"] == ["f"]
    assert captured.facts["consistency"] == "per-file"
    store.left = 0
    settle()
    calm = workspace.capture(store, captured.ref).write()
    assert calm.facts["consistency"] == "quiescent"
    assert read_path(store, calm.ref, "f") == (tmp_path / "w/f").read_bytes()


def test_a_file_that_changes_after_it_was_scanned_is_named(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "w")
    workspace.write_file("a", b"inline")
    workspace.write_file("sub/a", b"inline")
    workspace.write_file("z", b"z" * 1000)
    settle()
    for changed in ("a", "sub/a"):
        captured = workspace.capture(Touching(tmp_path / "w" / changed, 1), None).write()
        assert captured.facts["unstable"] == [changed]
        assert captured.facts["consistency"] == "per-file"


def test_what_changes_after_the_instant_is_named(tmp_path: Path) -> None:
    workspace, store = Workspace(tmp_path / "w"), MemoryStore()
    workspace.write_file("early", b"e")
    settle()
    pending = workspace.capture(store, None)
    settle()
    (tmp_path / "w/late").write_text("written behind the gate's back")
    captured = pending.write()
    assert captured.facts["unstable"] == ["late"]
    assert captured.facts["consistency"] == "per-file"


def test_a_process_in_the_workspace_takes_quiescence_away(tmp_path: Path) -> None:
    workspace, store = Workspace(tmp_path / "w"), MemoryStore()
    workspace.write_file("f", b"x")
    settle()
    assert workspace.capture(store, None).write().facts["consistency"] == "quiescent"
    with subprocess.Popen(["sleep", "60"], cwd=tmp_path / "w") as sleeper:
        assert workspace.capture(store, None).write().facts["consistency"] == "per-file"
        sleeper.kill()
    with open(tmp_path / "w/f"):
        assert workspace.capture(store, None).write().facts["consistency"] == "per-file"
    assert workspace.capture(store, None).write().facts["consistency"] == "quiescent"


def test_commands_and_writes_wait_for_an_open_capture(tmp_path: Path) -> None:
    workspace, store = Workspace(tmp_path / "w", wait_s=0.2), MemoryStore()
    pending = workspace.capture(store, None)
    for action in (lambda: workspace.run("true"), lambda: workspace.write_file("f", b""), lambda: workspace.fork(1)):
        with pytest.raises(ConflictError) as caught:
            action()
        assert caught.value.code == "capture-open"
    pending.cancel()
    pending.cancel()
    assert workspace.run("true").exit_code == 0
    lost = workspace.capture(store, None)
    workspace.wait_s = 30
    del lost  # nobody can write it any more
    assert workspace.run("true").exit_code == 0


def test_a_command_in_flight_is_recorded(tmp_path: Path) -> None:
    workspace, store = Workspace(tmp_path / "w"), MemoryStore()
    thread = threading.Thread(target=lambda: workspace.run("touch started; sleep 1.5"))
    thread.start()
    while not (tmp_path / "w/started").exists():
        time.sleep(0.01)
    assert workspace.capture(store, None).write().facts["consistency"] == "per-file"
    with pytest.raises(ConflictError, match="command is running"):
        workspace.fork(1)
    thread.join()


def test_ignored_paths_are_counted_and_not_read(tmp_path: Path) -> None:
    workspace, store = Workspace(tmp_path / "w", ignore=["*.o", "cache/"]), MemoryStore()
    for name in ("a.c", "a.o", "cache/deep/x", "sub/b.o", "sub/cache"):
        workspace.write_file(name, name)
    captured = workspace.capture(store, None).write()
    assert {path for path, _ in walk_tree(store, captured.ref)} == {b"a.c", b"sub", b"sub/cache"}
    assert captured.facts["num_ignored"] == 3


UNREADABLE = """
import os, sys
sys.path.insert(0, sys.argv[2])
from agentckpt.errors import StoreError
from agentckpt.sandbox import Workspace
from tests.sandbox.memory import MemoryStore
os.seteuid(65534)
try:
    Workspace(sys.argv[1]).capture(MemoryStore(), None).write()
except StoreError as error:
    print(error.code, error.object)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="drops root's rights to read everything")
@pytest.mark.parametrize("what", ["file", "directory"])
def test_an_unreadable_path_is_named(what: str, tmp_path: Path) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as base:
        os.chmod(base, 0o755)
        path = Path(base) / "w"
        path.mkdir()
        (path / "sub").mkdir()
        target = path / "sub" / "secret"
        target.mkdir() if what == "directory" else target.write_text("x")
        os.chmod(target, 0)
        root = str(Path(__file__).parents[2])
        done = subprocess.run([sys.executable, "-c", UNREADABLE, str(path), root], capture_output=True, text=True)
        assert done.stdout.split() == ["unreadable", "sub/secret"], done.stderr


def test_an_error_of_the_sink_stays_its_own(tmp_path: Path) -> None:
    class Full(MemoryStore):
        def put(self, kind: Kind, data: Buffer, *, compress: bool = False) -> Ref:
            raise StoreError("disk says no", code="io")

    workspace = Workspace(tmp_path / "w")
    workspace.write_file("f", b"x" * 1000)
    with pytest.raises(StoreError) as caught:
        workspace.capture(Full(), None).write()
    assert caught.value.code == "io"
    assert workspace.run("true").exit_code == 0, "a failed capture must not leave the workspace locked"


def test_a_workspace_that_went_away_and_trees_too_deep(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "w")
    fd = os.open(tmp_path / "w", os.O_RDONLY)
    for _ in range(230):
        os.mkdir("d", dir_fd=fd)
        inner = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.close(fd)
    with pytest.raises(IncompatibleError, match="too deep"):
        workspace.capture(MemoryStore(), None).write()
    from agentckpt.sandbox.copying import remove_tree

    remove_tree(str(tmp_path / "w"))
    with pytest.raises(NotFoundError):
        workspace.capture(MemoryStore(), None)


def swap_race(base: Path, num_swaps: int) -> tuple[int, set[bytes]]:
    """Swap a directory and a link to the outside as fast as we can while captures run; return captures and all content captured."""
    workspace, store = Workspace(base / "w"), MemoryStore()
    outside = base / "outside"
    outside.mkdir()
    (outside / "f").write_bytes(b"SECRET" * 200)
    workspace.write_file("d/f", b"inside" * 200)
    os.symlink(outside, base / "w/link")
    program = (
        "import ctypes, sys, time\nlibc = ctypes.CDLL(None)\na, b = (p.encode() for p in sys.argv[1:3])\n"
        "for _ in range(int(sys.argv[3])):\n    assert libc.renameat2(-100, a, -100, b, 2) == 0\n    time.sleep(0.0002)\n"
    )
    swapper = subprocess.Popen([sys.executable, "-c", program, str(base / "w/d"), str(base / "w/link"), str(num_swaps)])
    captures = 0
    while swapper.poll() is None or captures < 3:
        writer = TreeWriter(store, workspace.ignore, 0)
        fd = os.open(base / "w", os.O_RDONLY)
        writer.root(fd, None)
        os.close(fd)
        captures += 1
    assert swapper.returncode == 0
    return captures, set(store.objects.values())


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_a_link_swapped_in_between_look_and_open_is_not_followed(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The race at its worst moment, every time."""
    workspace, store = Workspace(tmp_path / "w"), MemoryStore()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/f").write_bytes(b"SECRET" * 200)
    workspace.write_file("d/f", b"inside" * 200)
    victim, link = ("w/d", "outside") if kind == "directory" else ("w/d/f", "outside/f")
    os.symlink(tmp_path / link, tmp_path / "link")
    real, swaps = scan.stat_at, 0

    def swapping(fd: int, name: bytes) -> os.stat_result | None:
        nonlocal swaps
        found = real(fd, name)
        if name == os.fsencode(os.path.basename(victim)) and found is not None and not stat.S_ISLNK(found.st_mode) and not swaps:
            swaps += 1
            assert linux.exchange(str(tmp_path / victim), str(tmp_path / "link"))
        return found

    monkeypatch.setattr(capture, "stat_at", swapping)
    captured = workspace.capture(store, None).write()
    assert swaps == 1
    assert captured.facts["consistency"] == "per-file"
    assert not any(b"SECRET" in data for data in store.objects.values())


def test_a_link_swapped_in_is_never_followed(tmp_path: Path) -> None:
    captures, contents = swap_race(tmp_path, 2000)
    assert captures >= 3
    assert not any(b"SECRET" in data for data in contents)


@pytest.mark.slow
def test_a_link_swapped_in_is_never_followed_long(tmp_path: Path) -> None:
    captures, contents = swap_race(tmp_path, 100_000)
    assert captures >= 3
    assert not any(b"SECRET" in data for data in contents)


def test_construction(tmp_path: Path) -> None:
    workspace: Sandbox = Workspace(tmp_path / "new")
    assert stat.S_ISDIR(os.stat(workspace.path).st_mode)
    assert os.listdir(tmp_path) == ["new"]
    (tmp_path / "file").write_text("")
    for path, error in ((tmp_path / "file", IncompatibleError), (tmp_path / "no/new", NotFoundError)):
        with pytest.raises(error):
            Workspace(path)
    with pytest.raises(IncompatibleError):
        Workspace(tmp_path / "new", network="maybe")  # type: ignore[arg-type]


def test_contains_resolves_links(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "w")
    os.symlink(tmp_path / "w", tmp_path / "alias")
    assert workspace.contains(tmp_path / "w")
    assert workspace.contains(tmp_path / "w/not/there/yet")
    assert workspace.contains(tmp_path / "alias/store")
    assert not workspace.contains(tmp_path / "w2")
    assert not workspace.contains(tmp_path)
    assert not workspace.contains(tmp_path / "w/../other")
