"""The real I/O does what the interface says, faults hit where the plan says, the recorder counts."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from agentckpt.errors import ConflictError
from agentckpt.store.io import IO, RealIO, exchange_paths, read_file
from agentckpt.testing.faults import Fault, FaultyIO, SimulatedCrash
from agentckpt.testing.posix_model import ALL_LOST, PosixModel
from agentckpt.testing.recorder import RecorderIO


@pytest.fixture(params=["real", "model", "wrapped"])
def io(request: pytest.FixtureRequest, tmp_path: Path) -> IO:
    if request.param == "real":
        return RealIO(tmp_path)
    if request.param == "model":
        return PosixModel()
    return FaultyIO(RecorderIO(PosixModel()))


def put(io: IO, path: str, data: bytes) -> None:
    file = io.write_new(path)
    file.pwritev(0, [data])
    file.fdatasync()
    file.close()


def test_files(io: IO) -> None:
    file = io.write_new("a", mode=0o600)
    assert (file.size(), file.pread(0, 10), bytes(file.map())) == (0, b"", b"")
    file.pwritev(0, [b"hello ", bytearray(b"big"), memoryview(b" world"), b""])
    file.pwritev(20, [b"far"])
    file.pwritev(5, [])
    file.fdatasync()
    whole = b"hello big world" + bytes(5) + b"far"
    assert file.size() == len(whole)
    assert file.pread(0, 100) == whole
    assert file.pread(6, 3) == b"big"
    assert file.pread(100, 3) == b""
    target = bytearray(6)
    assert file.pread_into(18, memoryview(target)) == 5
    assert bytes(target) == whole[18:] + b"\0"
    mapped = file.map()
    file.close()
    file.close()
    assert bytes(mapped) == whole
    with pytest.raises(OSError):
        file.pread(0, 1)
    again = io.open_append("a")
    again.pwritev(0, [b"J"])
    again.close()
    reader = io.open_read("a")
    assert reader.pread(0, 5) == b"Jello"
    with pytest.raises(OSError):
        reader.pwritev(0, [b"x"])
    reader.close()
    found = io.stat("a")
    assert (found.size_bytes, found.is_dir, found.mode) == (len(whole), False, 0o600)
    assert read_file(io, "a", 100)[:5] == b"Jello"
    with pytest.raises(OSError):
        read_file(io, "a", 22)


def test_names(io: IO) -> None:
    io.mkdir("d")
    io.mkdir("d/e")
    put(io, "d/one", b"1")
    put(io, "d/two", b"2")
    assert io.list("d") == ["e", "one", "two"]
    io.rename("d/one", "d/e/three")
    io.rename("d/two", "d/e/three")
    assert (io.list("d"), io.list("d/e"), read_file(io, "d/e/three", 9)) == (["e"], ["three"], b"2")
    put(io, "d/e/four", b"4")
    io.exchange("d/e/three", "d/e/four")
    assert (read_file(io, "d/e/three", 9), read_file(io, "d/e/four", 9)) == (b"4", b"2")
    io.mkdir("x")
    put(io, "x/inner", b"i")
    io.exchange("x", "d/e")
    assert (io.list("x"), io.list("d/e")) == (["four", "three"], ["inner"])
    io.unlink("d/e/inner")
    io.rmdir("d/e")
    assert (io.exists("d/e"), io.exists("x/four"), io.exists("x/four/no")) == (False, True, False)
    assert io.stat("x").is_dir
    io.fsync_dir("x")
    io.fsync_dir("")


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda io: io.open_read("none"), FileNotFoundError),
        (lambda io: io.open_read("d"), IsADirectoryError),
        (lambda io: io.open_append("d"), IsADirectoryError),
        (lambda io: io.open_append("none/x"), FileNotFoundError),
        (lambda io: io.write_new("f"), FileExistsError),
        (lambda io: io.mkdir("d"), FileExistsError),
        (lambda io: io.mkdir("f/x"), NotADirectoryError),
        (lambda io: io.unlink("none"), FileNotFoundError),
        (lambda io: io.unlink("d"), IsADirectoryError),
        (lambda io: io.rmdir("d"), OSError),
        (lambda io: io.rmdir("f"), NotADirectoryError),
        (lambda io: io.rename("none", "x"), FileNotFoundError),
        (lambda io: io.rename("f", "d"), IsADirectoryError),
        (lambda io: io.exchange("f", "none"), FileNotFoundError),
        (lambda io: io.list("none"), FileNotFoundError),
        (lambda io: io.list("f"), NotADirectoryError),
        (lambda io: io.stat("none"), FileNotFoundError),
        (lambda io: io.fsync_dir("none"), FileNotFoundError),
        (lambda io: io.fsync_dir("f"), NotADirectoryError),
        (lambda io: io.lock("none/lock"), FileNotFoundError),
    ],
)
def test_model_and_real_raise_alike(io: IO, call: Callable[[IO], object], error: type[OSError]) -> None:
    io.mkdir("d")
    put(io, "d/inner", b"")
    put(io, "f", b"")
    with pytest.raises(error):
        call(io)
    assert (io.list(""), io.list("d")) == (["d", "f"], ["inner"])


def test_locks(io: IO) -> None:
    first = io.lock("lock")
    assert first.held
    first.write(b"longer content")
    first.write(b"me")
    assert read_file(io, "lock", 99) == b"me"
    for shared in (False, True):
        with pytest.raises(ConflictError) as caught:
            io.lock("lock", shared=shared, blocking=False)
        assert caught.value.code == "locked"
    first.release()
    first.release()
    assert not first.held
    with io.lock("lock", shared=True, blocking=False), io.lock("lock", shared=True, blocking=False):
        with pytest.raises(ConflictError):
            io.lock("lock", blocking=False)
    assert io.lock("lock", blocking=False).held


def test_a_blocked_lock_waits(io: IO) -> None:
    held = io.lock("lock")
    order: list[str] = []

    def waiter() -> None:
        with io.lock("lock"):
            order.append("waiter")

    thread = threading.Thread(target=waiter)
    thread.start()
    thread.join(0.1)
    assert thread.is_alive()
    order.append("holder")
    held.release()
    thread.join(20)
    assert order == ["holder", "waiter"]


def test_a_lock_on_a_name_that_was_replaced_while_waiting_is_taken_anew(tmp_path: Path) -> None:
    io = RealIO(tmp_path)
    held = io.lock("lock")
    taken: list[bool] = []
    done = threading.Event()

    def waiter() -> None:
        with io.lock("lock") as lock:
            taken.append(lock.held)
            try:
                io.lock("lock", blocking=False)
            except ConflictError:
                taken.append(True)
        done.set()

    thread = threading.Thread(target=waiter)
    thread.start()
    thread.join(0.1)
    io.unlink("lock")
    put(io, "lock", b"")
    held.release()
    assert done.wait(20)
    assert taken == [True, True], "the lock must be on the file that the name means now"


HOLDER = """
import os, sys
from agentckpt.store.io import RealIO
lock = RealIO(sys.argv[1]).lock("lock")
pid = os.fork()
if pid == 0:
    os.write(1, f"child {lock.held} {os.getpid()}\\n".encode())
    sys.stdin.read()
    os._exit(0)
os.write(1, f"parent {lock.held}\\n".encode())
os.waitpid(pid, 0)
"""


def test_a_lock_ends_with_its_process_and_not_with_its_forked_child(tmp_path: Path) -> None:
    io = RealIO(tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        said = sorted(holder.stdout.readline().split() for _ in range(2))
        assert [words[:2] for words in said] == [["child", "False"], ["parent", "True"]]
        with pytest.raises(ConflictError):
            io.lock("lock", blocking=False)
        os.kill(holder.pid, signal.SIGKILL)
        os.waitpid(holder.pid, 0)
        holder.returncode = -9
        os.kill(int(said[0][2]), 0)  # the child lives
        io.lock("lock", blocking=False).release()
        holder.stdin.close()


def test_short_writes_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwritev
    calls: list[int] = []

    def three_bytes(fd: int, views: list[memoryview], offset: int) -> int:
        calls.append(offset)
        return real(fd, [b"".join(views)[:3]], offset)

    monkeypatch.setattr(os, "pwritev", three_bytes)
    file = RealIO(tmp_path).write_new("a")
    file.pwritev(1, [b"0123", b"", b"45", memoryview(b"6789")])
    assert file.pread(0, 99) == b"\x000123456789"
    assert calls == [1, 4, 7, 10]
    monkeypatch.setattr(os, "pwritev", lambda *_: 0)
    with pytest.raises(OSError):
        file.pwritev(0, [b"x"])
    file.close()


def test_more_buffers_than_one_call_takes(tmp_path: Path) -> None:
    file = RealIO(tmp_path).write_new("a")
    file.pwritev(0, [bytes([i % 251]) for i in range(5000)])
    assert file.pread(0, 9999) == bytes(i % 251 for i in range(5000))
    file.close()


def test_exchange_says_why_it_cannot(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(FileNotFoundError) as caught:
        exchange_paths(str(tmp_path / "a"), str(tmp_path / "none"))
    assert caught.value.filename == str(tmp_path / "a")


def test_a_fifo_does_not_hang_the_reader(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for open_it in (RealIO(tmp_path).open_read, RealIO(tmp_path).open_append):
        with pytest.raises(OSError) as caught:
            open_it("pipe")
        assert caught.value.errno == errno.EINVAL


# --- faults and recorder


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EINTR, errno.EMFILE])
def test_the_nth_operation_fails_and_only_it(code: int) -> None:
    model = PosixModel()
    io = FaultyIO(model, [Fault("pwritev", code, nth=2, path="data*")])
    other, file = io.write_new("other"), io.write_new("data")
    for target in (other, other, file):
        target.pwritev(0, [b"one"])
    with pytest.raises(OSError) as caught:
        file.pwritev(0, [b"two"])
    assert caught.value.errno == code
    assert file.pread(0, 9) == b"one"
    file.pwritev(0, [b"three"])
    assert [(hit.kind, hit.path, hit.number) for hit in io.hits] == [("pwritev", "data", 6)]
    assert isinstance(caught.value, InterruptedError) == (code == errno.EINTR)


def test_a_short_write_leaves_half() -> None:
    io = FaultyIO(PosixModel(), [Fault("pwritev", "short")])
    file = io.write_new("a")
    with pytest.raises(OSError) as caught:
        file.pwritev(0, [b"0123", b"4567"])
    assert caught.value.errno == errno.ENOSPC
    assert file.pread(0, 99) == b"0123"


def test_a_failed_fsync_loses_the_data_for_good() -> None:
    model = PosixModel()
    io = FaultyIO(model, [Fault("fdatasync", errno.EIO)])
    file = io.write_new("a")
    io.fsync_dir("")
    file.pwritev(0, [b"lost"])
    with pytest.raises(OSError):
        file.fdatasync()
    file.pwritev(4, [b"kept"])
    file.fdatasync()  # answers success, as Linux does
    assert file.pread(0, 99) == b"lostkept"
    assert read_file(model.crash(ALL_LOST), "a", 99) == b"\0\0\0\0kept"


def test_a_skipped_flush_is_a_flush_that_was_forgotten() -> None:
    model = PosixModel()
    io = FaultyIO(model, [Fault("fdatasync", "skip", repeat=True), Fault("fsync_dir", "skip", path="d")])
    io.mkdir("d")
    io.fsync_dir("")
    put(io, "d/a", b"data")
    io.fsync_dir("d")
    assert read_file(model, "d/a", 9) == b"data"
    assert model.crash(ALL_LOST).list("d") == []
    io.fsync_dir("d")
    assert read_file(model.crash(ALL_LOST), "d/a", 9) == b""


def test_repeat_and_clear() -> None:
    io = FaultyIO(PosixModel(), [Fault("*", errno.EIO, nth=3, repeat=True)])
    io.mkdir("a")
    io.mkdir("b")
    for _ in range(2):
        with pytest.raises(OSError):
            io.mkdir("c")
    io.clear()
    io.mkdir("c")
    assert io.list("") == ["a", "b", "c"]


def test_nothing_happens_after_the_crash() -> None:
    def history(io: IO) -> None:
        io.mkdir("d")
        put(io, "d/a", b"data")
        io.fsync_dir("d")
        io.fsync_dir("")

    counter = FaultyIO(PosixModel())
    history(counter)
    assert counter.num_operations == len(counter.log) == 6
    for n in range(1, counter.num_operations + 1):
        model = PosixModel()
        io = FaultyIO(model, crash_at=n)
        with pytest.raises(SimulatedCrash):
            history(io)
        assert io.hits[-1].number == n == io.num_operations
        before = model.num_unsynced
        with pytest.raises(SimulatedCrash):
            io.mkdir("late")
        assert model.num_unsynced == before
    assert not issubclass(SimulatedCrash, Exception)


def test_a_fault_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError):
        Fault("fsync", errno.EIO)
    with pytest.raises(ValueError):
        Fault("list", "skip")


def test_the_recorder_counts_by_kind_and_thread() -> None:
    io = RecorderIO(PosixModel())
    io.mkdir("d")
    io.reset()
    put(io, "d/a", b"12345")
    thread = threading.Thread(target=put, args=(io, "d/b", b"678"))
    thread.start()
    ident = thread.ident
    thread.join()
    io.rename("d/a", "d/c")
    io.fsync_dir("d")
    assert (io.num_fdatasync, io.num_fsync_dir, io.num_renames, io.written_bytes) == (2, 1, 1, 8)
    assert io.counts() == {"write_new": 2, "pwritev": 2, "fdatasync": 2, "rename": 1, "fsync_dir": 1}
    assert io.threads("fdatasync") == {threading.get_ident(), ident}
    assert io.threads("rename", "fsync_dir") == {threading.get_ident()}
    assert {event.path for event in io.events if event.kind == "pwritev"} == {"d/a", "d/b"}
