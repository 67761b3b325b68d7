"""The few Linux calls that Python lacks, and what ``/proc`` knows about a directory.

Nothing here follows a path that it was not given, and nothing raises for a process that went away meanwhile.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

_RENAME_EXCHANGE = 2
_FICLONE = 0x40049409
_AT_FDCWD = -100
_libc = ctypes.CDLL(None, use_errno=True)


def exchange(a: str, b: str) -> bool:
    """Swap two names in one step (renameat2, RENAME_EXCHANGE). False where kernel or filesystem cannot."""
    if not hasattr(_libc, "renameat2"):
        return False
    if _libc.renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), a, None, b)


def reflink(source_fd: int, target_fd: int) -> bool:
    """Share all extents of a file (FICLONE). False where the filesystem cannot."""
    try:
        fcntl.ioctl(target_fd, _FICLONE, source_fd)
    except OSError:
        return False
    return True


def mounts_at_or_below(path: str) -> list[str]:
    """Mount points at ``path`` (absolute, resolved) or beneath it."""
    found = []
    with open("/proc/self/mountinfo", "rb") as file:
        for line in file:
            point = line.split(b" ")[4]
            for code, char in ((b"\\040", b" "), (b"\\011", b"\t"), (b"\\012", b"\n"), (b"\\134", b"\\")):
                point = point.replace(code, char)
            if is_inside(os.fsdecode(point), path):
                found.append(os.fsdecode(point))
    return found


def is_inside(path: str, root: str) -> bool:
    """Whether ``path`` is ``root`` or beneath it; both absolute, resolved."""
    return path == root or path.startswith(root.rstrip("/") + "/")


@dataclass(frozen=True, slots=True)
class Holders:
    """Processes that stand in a tree or hold its files open."""

    cwd: tuple[int, ...] = ()
    """process ids whose working or root directory is inside"""
    open: tuple[int, ...] = ()
    """process ids with a file (not only a directory, for our own process) open inside"""
    num_unchecked: int = 0
    """processes that we may not look into"""


def cwd_holders(root: str) -> tuple[int, ...]:
    """Ids of live processes whose working or root directory is ``root`` or beneath it."""
    return tuple(pid for pid in _pids() if _stands_in(pid, root))


def holders(root: str) -> Holders:
    """Look through ``/proc`` for users of ``root`` (absolute, resolved)."""
    cwd, opened, num_unchecked = [], [], 0
    for pid in _pids():
        try:
            if _stands_in(pid, root, strict=True):
                cwd.append(pid)
            if _has_open(pid, root):
                opened.append(pid)
        except PermissionError:
            num_unchecked += 1
        except OSError:
            continue  # it ended
    return Holders(tuple(cwd), tuple(opened), num_unchecked)


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def _stands_in(pid: int, root: str, *, strict: bool = False) -> bool:
    try:
        return any(is_inside(os.readlink(f"/proc/{pid}/{link}"), root) for link in ("cwd", "root"))
    except OSError:
        if strict:
            raise
        return False


def _has_open(pid: int, root: str) -> bool:
    ours = pid == os.getpid()
    for number in os.listdir(f"/proc/{pid}/fd"):
        try:
            link = f"/proc/{pid}/fd/{number}"
            # Directory descriptors of our own process are those of a scan; nothing is written through them.
            if is_inside(os.readlink(link), root) and not (ours and stat.S_ISDIR(os.stat(link).st_mode)):
                return True
        except FileNotFoundError:
            continue
    return False
