"""A wrapper around any ``IO`` through which every operation passes as (kind, path, bytes): the base of faults and recorder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from ..store.io import IO, File, FileStat, Lock, Names
from ..types import Buffer

T = TypeVar("T")

KINDS = (
    "open_read", "open_append", "write_new", "rename", "exchange", "fsync_dir", "unlink", "mkdir", "rmdir", "list", "exists",
    "stat", "lock", "pread", "pread_into", "pwritev", "fdatasync", "size", "map",
)  # fmt: skip
"""Every kind of operation. ``close``, ``now``, ``random`` and releasing a lock are not operations: they cannot fail."""


class WrappedFile:
    """Sends each operation of a file through its wrapper's ``around``."""

    def __init__(self, inner: File, wrapper: WrappedIO) -> None:
        self.inner = inner
        self.path = inner.path
        self._wrapper = wrapper

    def pread(self, offset: int, length: int) -> bytes:
        return self._wrapper.around("pread", self.path, 0, lambda: self.inner.pread(offset, length))

    def pread_into(self, offset: int, view: memoryview) -> int:
        return self._wrapper.around("pread_into", self.path, 0, lambda: self.inner.pread_into(offset, view))

    def pwritev(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self._wrapper.write(self.inner, offset, buffers)

    def fdatasync(self) -> None:
        self._wrapper.sync(self.inner)

    def size(self) -> int:
        return self._wrapper.around("size", self.path, 0, self.inner.size)

    def map(self) -> memoryview:
        return self._wrapper.around("map", self.path, 0, self.inner.map)

    def close(self) -> None:
        self.inner.close()


class WrappedIO:
    """An ``IO`` that does what ``inner`` does. A subclass overrides ``around`` (and ``write``, ``sync``)."""

    def __init__(self, inner: IO) -> None:
        self.inner = inner

    def around(self, kind: str, path: str, num_bytes: int, call: Callable[[], T]) -> T:
        """Run one operation. ``num_bytes`` is what it writes."""
        return call()

    def write(self, file: File, offset: int, buffers: Sequence[Buffer]) -> None:
        total = sum(memoryview(b).nbytes for b in buffers)
        self.around("pwritev", file.path, total, lambda: file.pwritev(offset, buffers))

    def sync(self, file: File) -> None:
        self.around("fdatasync", file.path, 0, file.fdatasync)

    def open_read(self, path: str) -> File:
        return WrappedFile(self.around("open_read", path, 0, lambda: self.inner.open_read(path)), self)

    def open_append(self, path: str, *, mode: int = 0o644) -> File:
        return WrappedFile(self.around("open_append", path, 0, lambda: self.inner.open_append(path, mode=mode)), self)

    def write_new(self, path: str, *, mode: int = 0o644) -> File:
        return WrappedFile(self.around("write_new", path, 0, lambda: self.inner.write_new(path, mode=mode)), self)

    def rename(self, source: str, target: str) -> None:
        self.around("rename", source, 0, lambda: self.inner.rename(source, target))

    def exchange(self, a: str, b: str) -> None:
        self.around("exchange", a, 0, lambda: self.inner.exchange(a, b))

    def fsync_dir(self, path: str) -> None:
        self.around("fsync_dir", path, 0, lambda: self.inner.fsync_dir(path))

    def unlink(self, path: str) -> None:
        self.around("unlink", path, 0, lambda: self.inner.unlink(path))

    def mkdir(self, path: str, *, mode: int = 0o755) -> None:
        self.around("mkdir", path, 0, lambda: self.inner.mkdir(path, mode=mode))

    def rmdir(self, path: str) -> None:
        self.around("rmdir", path, 0, lambda: self.inner.rmdir(path))

    def list(self, path: str) -> Names:
        return self.around("list", path, 0, lambda: self.inner.list(path))

    def exists(self, path: str) -> bool:
        return self.around("exists", path, 0, lambda: self.inner.exists(path))

    def stat(self, path: str) -> FileStat:
        return self.around("stat", path, 0, lambda: self.inner.stat(path))

    def lock(self, path: str, *, shared: bool = False, blocking: bool = True) -> Lock:
        return self.around("lock", path, 0, lambda: self.inner.lock(path, shared=shared, blocking=blocking))

    def now(self) -> float:
        return self.inner.now()

    def random(self, n: int) -> bytes:
        return self.inner.random(n)
