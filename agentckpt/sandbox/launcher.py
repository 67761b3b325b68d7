"""The program that starts commands for ``commands.py``. Runs alone: ``python -I -S launcher.py SOCKET_FD WORKER_PID``.

Why a program of its own: between fork and exec only a process with one thread may do what is needed here (namespaces,
parent-death signal, capabilities), and the worker has many threads. It is started once a worker; a command costs forks only.

    worker --socket--> launcher --fork--> supervisor --fork--> init (pid 1 of a new pid namespace) --fork--> command

Invariants:
1. No process of a command outlives the command: when it ends, everything it left behind is killed, also what called setsid.
   With a pid namespace the kernel does it; without one the supervisor is the subreaper and kills until none is left.
2. No command outlives its worker: each supervisor watches a pidfd of the worker and the worker's end of a pipe; init dies with its
   supervisor by parent-death signal, and the namespace with init.
3. The status pipe reaches its end only after every process of the command is gone.
4. A command sees no descriptor but 0, 1, 2.

Standard library only; it must not import its own package.
"""

from __future__ import annotations

import array
import ctypes
import fcntl
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
from typing import Any, NoReturn

_NEWNS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_PR_SET_PDEATHSIG, _PR_CAPBSET_DROP, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 24, 36, 38
_MS_REC_PRIVATE = (1 << 14) | (1 << 18)
_MS_NOSUID_NODEV_NOEXEC = 2 | 4 | 8
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1
# What a command that runs as root may keep: files and users of its own, no mounts, namespaces, devices or modules.
_KEPT_CAPABILITIES = {0, 1, 3, 4, 5, 6, 7, 10, 18, 31}
_LAST_CAPABILITY = 63
NUM_FDS = 6
"""stdin, stdout, stderr, working directory, status pipe (write end), life pipe (read end)"""

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _prctl(option: int, value: int) -> None:
    _check(_libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0), f"prctl {option}")


def die_with_parent() -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


# --- isolation -----------------------------------------------------------------------------------------------------


def unshare(*, pid: bool, net: bool, user: bool) -> None:
    """New namespaces for this process (its children, for pids). In a user namespace the ids stay what they are."""
    flags = (_NEWPID | _NEWNS | _NEWIPC if pid else 0) | (_NEWNET if net else 0) | (_NEWUSER if user else 0)
    if not flags:
        return
    uid, gid = os.geteuid(), os.getegid()
    _check(_libc.unshare(ctypes.c_int(flags)), "unshare")
    if user:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)


def private_proc() -> None:
    """A /proc that shows the new pid namespace, so that no process outside can be reached through it."""
    _check(_libc.mount(None, b"/", None, ctypes.c_ulong(_MS_REC_PRIVATE), None), "mount --make-rprivate /")
    _check(_libc.mount(b"proc", b"/proc", b"proc", ctypes.c_ulong(_MS_NOSUID_NODEV_NOEXEC), None), "mount /proc")


def loopback_up() -> None:
    """A new network namespace has only ``lo``, and it is down: tests that serve on 127.0.0.1 must work."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack("16sh14x", fcntl.ioctl(sock, _SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | _IFF_UP))


def probe() -> dict[str, bool]:
    """The strongest isolation that this kernel lets us use, found by trying."""
    for pid, net in ((True, True), (False, True), (True, False)):
        for user in (False, True):
            plan = {"pid": pid, "net": net, "user": user}
            if _works(plan):
                return plan
    return {"pid": False, "net": False, "user": False}


def _works(plan: dict[str, bool]) -> bool:
    child = os.fork()
    if child == 0:
        try:
            unshare(**plan)
            inner = os.fork()
            if inner == 0:
                _enter(plan)
                os._exit(0)
            os._exit(os.waitstatus_to_exitcode(os.waitpid(inner, 0)[1]) & 1)
        except BaseException:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def _enter(plan: dict[str, bool]) -> None:
    if plan["pid"]:
        private_proc()
    if plan["net"]:
        loopback_up()


# --- one command ---------------------------------------------------------------------------------------------------


def execute(request: dict[str, Any], fds: list[int]) -> NoReturn:
    """Become the command. Failure is reported as a shell does: a line on stderr and status 127 or 126."""
    status = 127
    try:
        os.setsid()
        for target, fd in enumerate(fds[:3]):
            os.dup2(fd, target)
        os.fchdir(fds[3])
        os.closerange(3, 1 << 16 if os.sysconf("SC_OPEN_MAX") < 0 else os.sysconf("SC_OPEN_MAX"))
        for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGCHLD, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        os.umask(0o022)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file in the workspace would be captured
        if request["confine"]:
            confine()
        argv = [text.encode("latin-1") for text in request["argv"]]
        env = {key.encode("latin-1"): value.encode("latin-1") for key, value in request["env"].items()}
        os.execvpe(argv[0], argv, env)
    except OSError as error:
        status = 126 if isinstance(error, PermissionError) else 127
        os.write(2, f"{request['argv'][0]}: {error.strerror or error}\n".encode("latin-1", "replace"))
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode("utf-8", "replace"))
    os._exit(status)


def confine() -> None:
    """Without this, root inside the namespaces could leave them (or load modules, mount, trace)."""
    for capability in set(range(_LAST_CAPABILITY + 1)) - _KEPT_CAPABILITIES:
        if _libc.prctl(_PR_CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0) != 0:
            break  # the first number that this kernel does not know, or no right to drop: then there is none to lose
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def init(request: dict[str, Any], fds: list[int], supervisor_alive: int) -> NoReturn:
    """Pid 1 of the namespace: start the command, reap everything, report the command's status, end (and kill the rest)."""
    code = 1
    try:
        die_with_parent()
        os.set_blocking(supervisor_alive, False)
        try:
            os.read(supervisor_alive, 1)
            os._exit(1)  # the supervisor died before the signal was set
        except BlockingIOError:
            pass
        _enter(request["plan"])
        command = os.fork()
        if command == 0:
            execute(request, fds)
        for fd in fds[:4]:
            os.close(fd)
        status = _reap_until(command)
        os.write(fds[4], b"S" + struct.pack("<i", status))
        code = 0
    except BaseException as error:
        os.write(fds[4], b"E" + f"{type(error).__name__}: {error}".encode())
    os._exit(code)


def _reap_until(command: int) -> int:
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == command:
            return status


def supervise(request: dict[str, Any], fds: list[int], worker: int, launcher: int) -> None:
    """Run one command to its end, or to the end of the worker's interest in it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    plan = request["plan"]
    unshare(**plan)
    if plan["pid"]:
        die_with_parent()  # after unshare: a change of credentials clears it
        if os.getppid() != launcher:
            return
        _supervise_namespace(request, fds, worker)
    else:
        if plan["net"]:
            loopback_up()
        _supervise_tree(request, fds, worker)


def _supervise_namespace(request: dict[str, Any], fds: list[int], worker: int) -> None:
    alive_read, alive_write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(alive_write)
        init(request, fds, alive_read)
    for fd in [*fds[:4], alive_read]:
        os.close(fd)
    _wait_for(child, [fds[5], worker])
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def _supervise_tree(request: dict[str, Any], fds: list[int], worker: int) -> None:
    """Without a pid namespace: orphans come to us, and we kill until there is no child left."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    command = os.fork()
    if command == 0:
        execute(request, fds)
    for fd in fds[:4]:
        os.close(fd)
    finished = _wait_for(command, [fds[5], worker])
    status = os.waitpid(command, 0)[1] if finished else None
    while True:
        for pid in _children():
            os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            break
        select.select([], [], [], 0.001)
    if status is not None:
        os.write(fds[4], b"S" + struct.pack("<i", status))


def _children() -> list[int]:
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            return [int(pid) for pid in file.read().split()]
    except FileNotFoundError:  # a kernel without CONFIG_PROC_CHILDREN
        return [int(name) for name in os.listdir("/proc") if name.isdigit() and _parent_of(name) == os.getpid()]


def _parent_of(pid: str) -> int:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[1])
    except OSError:
        return -1


def _wait_for(pid: int, others: list[int]) -> bool:
    """True when the child ``pid`` ended, False when one of the descriptors fired first. Does not reap."""
    pidfd = os.pidfd_open(pid)
    poller = select.poll()
    for fd in [pidfd, *others]:
        poller.register(fd, select.POLLIN | select.POLLHUP)
    ready = {fd for fd, _ in poller.poll()}
    os.close(pidfd)
    return pidfd in ready


# --- the launcher --------------------------------------------------------------------------------------------------


def receive(sock: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """One request: length, JSON, and its descriptors. None at the end."""
    fds = array.array("i")
    head, ancillary, _, _ = sock.recvmsg(4, socket.CMSG_SPACE(NUM_FDS * fds.itemsize), socket.MSG_WAITALL)
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    if len(head) < 4:
        return None
    (length,) = struct.unpack("<I", head)
    body = bytearray()
    while len(body) < length:
        piece = sock.recv(min(1 << 16, length - len(body)))
        if not piece:
            return None
        body += piece
    return json.loads(body), list(fds)


def serve(sock: socket.socket, worker_pid: int) -> None:
    worker = os.pidfd_open(worker_pid)
    if os.getppid() != worker_pid:
        return
    plan = probe()
    sock.sendall(json.dumps(plan).encode() + b"\n")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # supervisors are reaped by the kernel
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    poller.register(worker, select.POLLIN)
    launcher = os.getpid()
    while worker not in {fd for fd, _ in poller.poll()}:
        received = receive(sock)
        if received is None:
            break
        request, fds = received
        if os.fork() == 0:
            sock.close()
            try:
                supervise(request, fds, worker, launcher)
            except BaseException as error:
                os.write(fds[4], b"E" + f"{type(error).__name__}: {error}".encode())
            os._exit(0)
        for fd in fds:
            os.close(fd)


if __name__ == "__main__":
    os.chdir("/")
    serve(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))
