"""Runs one command of a workspace and collects what it said. ``launcher.py`` holds the processes' side.

Invariants:
1. When ``run_command`` returns or raises, no process of the command is alive (a launcher that cannot kill one within
   ``_GRACE_S`` is reported as an error, never passed over).
2. Memory is bounded: of each stream the first and the last half of ``max_output_bytes`` are kept.
3. A sequence is never given to a shell.
"""

from __future__ import annotations

import array
import atexit
import json
import os
import selectors
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import IncompatibleError, StoreError
from ..types import ExecResult
from . import launcher as _launcher

_GRACE_S = 10.0
_PIECE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Isolation:
    """What the kernel lets us enforce: own pid, mount and ipc namespaces; own network; through a user namespace."""

    pid: bool
    net: bool
    user: bool

    def without_net(self) -> Isolation:
        return Isolation(self.pid, False, self.user and self.pid)


class _Launcher:
    """The launcher process of this worker process: started at the first use, again if it dies, never shared over a fork."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._isolation: Isolation | None = None

    def isolation(self) -> Isolation:
        with self._lock:
            return self._started()[1]

    def send(self, request: Mapping[str, object], fds: Sequence[int]) -> None:
        body = json.dumps(request).encode()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        with self._lock:
            for attempt in (1, 2):
                sock, _ = self._started()
                try:
                    sock.sendmsg([struct.pack("<I", len(body))], rights)
                    sock.sendall(body)
                    return
                except OSError:
                    self._stop()
                    if attempt == 2:
                        raise

    def _started(self) -> tuple[socket.socket, Isolation]:
        if self._process is not None and self._process.poll() is not None:
            self._stop()
        if self._socket is None or self._isolation is None:
            ours, theirs = socket.socketpair()
            with theirs:
                argv = [sys.executable, "-I", "-S", _launcher.__file__, str(theirs.fileno()), str(os.getpid())]
                self._process = subprocess.Popen(
                    argv, pass_fds=(theirs.fileno(),), cwd="/", start_new_session=True,
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                )  # fmt: skip
            line = b""
            while not line.endswith(b"\n"):
                piece = ours.recv(4096)
                if not piece:
                    ours.close()
                    raise IncompatibleError(
                        "the launcher of commands did not start", code="launcher", object=sys.executable, hint="it needs Linux 5.4 or newer"
                    )
                line += piece
            self._socket, self._isolation = ours, Isolation(**json.loads(line))
        return self._socket, self._isolation

    def _stop(self) -> None:
        if self._socket is not None:
            self._socket.close()
        if self._process is not None:
            self._process.wait()
        self._socket = self._process = None

    def stop(self) -> None:
        with self._lock:
            self._stop()

    def forget(self) -> None:
        """In a forked child: the launcher belongs to the parent."""
        if self._socket is not None:
            self._socket.close()
        if self._process is not None:
            self._process.returncode = 0  # it is not our child; without this Popen would warn at collection
        self.__init__()  # type: ignore[misc]


_LAUNCHER = _Launcher()
atexit.register(_LAUNCHER.stop)
os.register_at_fork(after_in_child=_LAUNCHER.forget)


def isolation() -> Isolation:
    """What commands can be isolated from here; starts the launcher and tries at the first call."""
    return _LAUNCHER.isolation()


class _Kept:
    """The first and the last half of a stream."""

    def __init__(self, max_bytes: int) -> None:
        self._half = max(1, max_bytes // 2)
        self._head = bytearray()
        self._tail = bytearray()
        self._num_cut = 0

    def add(self, data: bytes) -> None:
        room = self._half - len(self._head)
        self._head += data[:room]
        self._tail += data[room:] if room > 0 else data
        if len(self._tail) > 2 * self._half + _PIECE_BYTES:
            self._trim()

    def _trim(self) -> None:
        extra = max(0, len(self._tail) - self._half)
        del self._tail[:extra]
        self._num_cut += extra

    def text(self) -> str:
        self._trim()
        head, tail = self._head.decode("utf-8", "replace"), self._tail.decode("utf-8", "replace")
        return f"{head}\n[... {self._num_cut} bytes left out ...]\n{tail}" if self._num_cut else head + tail


def run_command(
    argv: Sequence[str | bytes],
    *,
    cwd_fd: int,
    env: Mapping[str, str],
    timeout_s: float,
    input: bytes | None,
    max_output_bytes: int,
    plan: Isolation,
    confine: bool,
) -> ExecResult:
    """Run ``argv`` in the directory ``cwd_fd`` and wait for it and all that it started; see ``Workspace.run``."""
    request = {
        "argv": [_text(word) for word in argv],
        "env": {_text(key): _text(value) for key, value in env.items()},
        "plan": {"pid": plan.pid, "net": plan.net, "user": plan.user},
        "confine": confine,
    }
    with _Fds() as fds:
        stdin_r, stdin_w = fds.pipe()
        out_r, out_w = fds.pipe()
        err_r, err_w = fds.pipe()
        status_r, status_w = fds.pipe()
        life_r, life_w = fds.pipe()
        _LAUNCHER.send(request, [stdin_r, out_w, err_w, cwd_fd, status_w, life_r])
        fds.close(stdin_r, out_w, err_w, status_w, life_r)
        kept = {out_r: _Kept(max_output_bytes), err_r: _Kept(max_output_bytes)}
        talk = _Talk(fds, kept, status_r, stdin_w, input or b"")
        timed_out = not talk.until(time.monotonic() + timeout_s)
        fds.close(life_w)  # kills what is left
        if not talk.until(time.monotonic() + _GRACE_S):
            raise StoreError("processes of this command could not be killed", code="command-alive", object=repr(argv)[:200])
        return ExecResult(
            exit_code=None if timed_out else _exit_code(bytes(talk.status), argv),
            stdout=kept[out_r].text(), stderr=kept[err_r].text(), timed_out=timed_out,
        )  # fmt: skip


def _text(value: str | bytes) -> str:
    """Bytes as JSON can carry them: one character a byte."""
    return os.fsencode(value).decode("latin-1")


def _exit_code(status: bytes, argv: Sequence[str | bytes]) -> int:
    if len(status) == 5 and status[:1] == b"S":
        return os.waitstatus_to_exitcode(struct.unpack("<i", status[1:])[0])
    found = status[1:].decode("utf-8", "replace") if status else "the launcher died"
    raise StoreError("this command could not be started", code="command-start", object=repr(argv)[:200], found=found)


class _Fds:
    """Descriptors that are closed at the end, or earlier by ``close``."""

    def __init__(self) -> None:
        self._open: set[int] = set()

    def __enter__(self) -> _Fds:
        return self

    def __exit__(self, *_: object) -> None:
        self.close(*self._open)

    def pipe(self) -> tuple[int, int]:
        ends = os.pipe()
        self._open.update(ends)
        return ends

    def close(self, *fds: int) -> None:
        for fd in fds:
            if fd in self._open:
                self._open.remove(fd)
                os.close(fd)


class _Talk:
    """Feeds stdin and drains stdout, stderr and the status pipe; over when the status pipe ends."""

    def __init__(self, fds: _Fds, kept: dict[int, _Kept], status_r: int, stdin_w: int, data: bytes) -> None:
        self.status = bytearray()
        self._fds, self._kept, self._status_r, self._stdin_w = fds, kept, status_r, stdin_w
        self._data = memoryview(data)
        self._selector = selectors.DefaultSelector()
        for fd in (*kept, status_r):
            self._selector.register(fd, selectors.EVENT_READ)
        os.set_blocking(stdin_w, False)
        self._selector.register(stdin_w, selectors.EVENT_WRITE)

    def until(self, deadline_s: float) -> bool:
        """False if the time ran out first. The streams have ended when the status has: their writers are gone."""
        while self._selector.get_map():
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                return False
            for key, _ in self._selector.select(left_s):
                self._step(key.fd)
        self._selector.close()
        return True

    def _step(self, fd: int) -> None:
        if fd == self._stdin_w:
            try:
                self._data = self._data[os.write(fd, self._data[:_PIECE_BYTES]) :] if self._data else self._data
            except BlockingIOError:
                return
            except BrokenPipeError:
                self._data = self._data[:0]
            if not self._data:
                self._end(fd)
            return
        data = os.read(fd, _PIECE_BYTES)
        if not data:
            self._end(fd)
        elif fd == self._status_r:
            self.status += data
        else:
            self._kept[fd].add(data)

    def _end(self, fd: int) -> None:
        self._selector.unregister(fd)
        self._fds.close(fd)
