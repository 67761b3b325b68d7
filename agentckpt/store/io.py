"""The one small I/O interface on which the whole store runs, and its real form.

Paths are ``str`` with ``/``; a relative path is taken from the implementation's root, an absolute one stands as it is.

Invariants:
1. Every call either did all that it says or raised ``OSError`` (``FileNotFoundError``, ``FileExistsError`` ... included).
   Only ``lock`` raises ``ConflictError``. Translation into the typed errors of the store is the store's matter.
2. ``File`` has no position: every read and write names its offset, so a file may be used from several threads.
3. Nothing is durable before ``fdatasync`` (data and size of that file) and ``fsync_dir`` (names in that directory)
   returned. ``fdatasync`` promises nothing about the file's name.
4. A file whose ``fdatasync`` raised must not be synced again: the kernel may have dropped the dirty pages and would
   answer success the next time.
5. A lock lives as long as its ``Lock`` object and its process; it is never inherited by a forked child.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import stat as stat_module
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ..errors import ConflictError
from ..types import Buffer

Names = list[str]
_IOV_MAX = 1024
_RENAME_EXCHANGE = 2


@dataclass(frozen=True, slots=True)
class FileStat:
    """What ``IO.stat`` tells of one path."""

    size_bytes: int
    mtime_s: float
    inode: int
    is_dir: bool
    mode: int
    """permission bits"""


class File(Protocol):
    """One open file. Reads stop early only at its end."""

    path: str

    def pread(self, offset: int, length: int) -> bytes: ...

    def pread_into(self, offset: int, view: memoryview) -> int:
        """Fill ``view`` from ``offset``; returns the bytes read, fewer than ``len(view)`` only at the end of the file."""
        ...

    def pwritev(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Write all buffers, one after the other, from ``offset``. After an error any part may have been written."""
        ...

    def fdatasync(self) -> None: ...

    def size(self) -> int: ...

    def map(self) -> memoryview:
        """The file's present bytes, read-only; empty for an empty file. Valid after ``close``."""
        ...

    def close(self) -> None:
        """Idempotent. Does not sync."""
        ...


class Lock(Protocol):
    """A held lock. Also a context manager."""

    path: str

    @property
    def held(self) -> bool:
        """False after ``release`` and in a forked child."""
        ...

    def write(self, data: bytes) -> None:
        """Replace the content of the lock file: information for people, never synced, never trusted."""
        ...

    def release(self) -> None:
        """Idempotent. The file stays."""
        ...

    def __enter__(self) -> Lock: ...

    def __exit__(self, *exc: object) -> None: ...


class IO(Protocol):
    """Everything the store does to the outside world, its index and read-only maps excepted."""

    def open_read(self, path: str) -> File: ...

    def open_append(self, path: str, *, mode: int = 0o644) -> File:
        """Open for reading and writing; created if absent. Existing bytes stay."""
        ...

    def write_new(self, path: str, *, mode: int = 0o644) -> File:
        """Create for reading and writing; ``FileExistsError`` if the name is taken."""
        ...

    def rename(self, source: str, target: str) -> None:
        """Atomic; replaces ``target``."""
        ...

    def exchange(self, a: str, b: str) -> None:
        """Swap two names atomically (``RENAME_EXCHANGE``)."""
        ...

    def fsync_dir(self, path: str) -> None: ...

    def unlink(self, path: str) -> None: ...

    def mkdir(self, path: str, *, mode: int = 0o755) -> None:
        """One directory; ``FileExistsError`` if the name is taken."""
        ...

    def rmdir(self, path: str) -> None: ...

    def list(self, path: str) -> Names:
        """Names in a directory, sorted."""
        ...

    def exists(self, path: str) -> bool: ...

    def stat(self, path: str) -> FileStat: ...

    def lock(self, path: str, *, shared: bool = False, blocking: bool = True) -> Lock:
        """Take an advisory lock on a file, which is created if absent (its directory must exist).

        Two locks conflict also within one process. ``ConflictError`` if ``blocking`` is false and it is held.
        """
        ...

    def now(self) -> float:
        """Wall clock, seconds since 1970. Information only: no decision may rest on it."""
        ...

    def random(self, n: int) -> bytes: ...


def read_file(io: IO, path: str, max_bytes: int) -> bytes:
    """The whole of a small file. ``OSError`` with ``EFBIG`` if it is longer than ``max_bytes``."""
    file = io.open_read(path)
    try:
        data = file.pread(0, max_bytes + 1)
    finally:
        file.close()
    if len(data) > max_bytes:
        raise OSError(errno.EFBIG, f"longer than {max_bytes} bytes", path)
    return data


def busy(path: str) -> ConflictError:
    """What ``lock`` raises when somebody else holds it."""
    return ConflictError("is locked by somebody else", object=path, code="locked")


class RealFile:
    """A file descriptor."""

    def __init__(self, path: str, fd: int) -> None:
        self.path = path
        self._fd = fd

    def pread(self, offset: int, length: int) -> bytes:
        data = os.pread(self._fd, length, offset)
        if len(data) in (0, length):
            return data
        pieces = [data]  # a signal or the 2 GiB limit of one call; an empty answer is the end of the file
        done = len(data)
        while done < length and (data := os.pread(self._fd, length - done, offset + done)):
            pieces.append(data)
            done += len(data)
        return b"".join(pieces)

    def pread_into(self, offset: int, view: memoryview) -> int:
        target = view.cast("B")
        done = 0
        while done < len(target):
            got = os.preadv(self._fd, [target[done:]], offset + done)
            if got == 0:
                break
            done += got
        return done

    def pwritev(self, offset: int, buffers: Sequence[Buffer]) -> None:
        waiting = [view for view in (memoryview(b).cast("B") for b in buffers) if len(view)]
        while waiting:
            done = os.pwritev(self._fd, waiting[:_IOV_MAX], offset)
            if done == 0:
                raise OSError(errno.EIO, "the write made no progress", self.path)
            offset += done
            waiting = _after(waiting, done)

    def fdatasync(self) -> None:
        os.fdatasync(self._fd)

    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def map(self) -> memoryview:
        if self.size() == 0:
            return memoryview(b"")
        return memoryview(mmap.mmap(self._fd, 0, prot=mmap.PROT_READ))

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _after(views: list[memoryview], done: int) -> list[memoryview]:
    """What is left of ``views`` when their first ``done`` bytes are gone."""
    for i, view in enumerate(views):
        if done < len(view):
            return [view[done:], *views[i + 1 :]]
        done -= len(view)
    return []


class RealLock:
    """``flock`` on an open file of its own."""

    def __init__(self, path: str, fd: int) -> None:
        self.path = path
        self._fd = fd
        _locks.add(self)

    @property
    def held(self) -> bool:
        return self._fd >= 0

    def write(self, data: bytes) -> None:
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, data, 0)

    def release(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> RealLock:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

    def __del__(self) -> None:
        self.release()


_locks: weakref.WeakSet[RealLock] = weakref.WeakSet()


def _forget_locks_in_child() -> None:
    # Closing the copy leaves the parent's lock alone; keeping it would outlive the parent's death.
    for lock in list(_locks):
        lock.release()


os.register_at_fork(after_in_child=_forget_locks_in_child)


class RealIO:
    """POSIX. ``root`` is where relative paths begin; the empty root is the working directory."""

    def __init__(self, root: str | os.PathLike[str] = "") -> None:
        self.root = os.fspath(root)

    def _at(self, path: str) -> str:
        return os.path.join(self.root, path) or "."

    def open_read(self, path: str) -> File:
        return self._open(path, os.O_RDONLY, 0)

    def open_append(self, path: str, *, mode: int = 0o644) -> File:
        return self._open(path, os.O_RDWR | os.O_CREAT, mode)

    def write_new(self, path: str, *, mode: int = 0o644) -> File:
        return self._open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)

    def _open(self, path: str, flags: int, mode: int) -> RealFile:
        # Without O_NONBLOCK a FIFO that somebody put in the store would hang the reader.
        fd = os.open(self._at(path), flags | os.O_CLOEXEC | os.O_NONBLOCK, mode)
        kind = os.fstat(fd).st_mode
        if stat_module.S_ISREG(kind):
            return RealFile(path, fd)
        os.close(fd)
        code = errno.EISDIR if stat_module.S_ISDIR(kind) else errno.EINVAL
        raise OSError(code, f"{os.strerror(code)} (not a regular file)", path)

    def rename(self, source: str, target: str) -> None:
        os.rename(self._at(source), self._at(target))

    def exchange(self, a: str, b: str) -> None:
        exchange_paths(self._at(a), self._at(b))

    def fsync_dir(self, path: str) -> None:
        fd = os.open(self._at(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def unlink(self, path: str) -> None:
        os.unlink(self._at(path))

    def mkdir(self, path: str, *, mode: int = 0o755) -> None:
        os.mkdir(self._at(path), mode)

    def rmdir(self, path: str) -> None:
        os.rmdir(self._at(path))

    def list(self, path: str) -> Names:
        return sorted(os.listdir(self._at(path)))

    def exists(self, path: str) -> bool:
        return os.path.lexists(self._at(path))

    def stat(self, path: str) -> FileStat:
        found = os.stat(self._at(path))
        return FileStat(
            size_bytes=found.st_size,
            mtime_s=found.st_mtime,
            inode=found.st_ino,
            is_dir=stat_module.S_ISDIR(found.st_mode),
            mode=stat_module.S_IMODE(found.st_mode),
        )

    def lock(self, path: str, *, shared: bool = False, blocking: bool = True) -> Lock:
        how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if blocking else fcntl.LOCK_NB)
        while True:
            fd = os.open(self._at(path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(fd, how)
                if self._is_file_at(path, fd):
                    return RealLock(path, fd)
            except BlockingIOError:
                os.close(fd)
                raise busy(path) from None
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)

    def _is_file_at(self, path: str, fd: int) -> bool:
        """False if the name was unlinked or replaced while we waited: such a lock would exclude nobody."""
        try:
            named = os.stat(self._at(path))
        except FileNotFoundError:
            return False
        opened = os.fstat(fd)
        return (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino)

    def now(self) -> float:
        return time.time()

    def random(self, n: int) -> bytes:
        return os.urandom(n)


def exchange_paths(a: str, b: str) -> None:
    """``renameat2(a, b, RENAME_EXCHANGE)``. ``OSError`` with ``ENOSYS`` or ``EINVAL`` where it is not supported."""
    at_fdcwd = -100
    libc = ctypes.CDLL(None, use_errno=True)
    renameat2 = getattr(libc, "renameat2", None)
    if renameat2 is None:
        raise OSError(errno.ENOSYS, "this C library has no renameat2", a, None, b)
    arguments = (at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), ctypes.c_uint(_RENAME_EXCHANGE))
    if renameat2(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), a, None, b)
