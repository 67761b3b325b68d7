"""``durability="none"``: the same I/O without a flush. For throw-away runs, and to prove that the crash tests notice."""

from __future__ import annotations

from collections.abc import Sequence

from ..types import Buffer
from .io import IO, File, FileStat, Lock, Names


class _UnflushedFile:
    def __init__(self, inner: File) -> None:
        self.inner = inner
        self.path = inner.path

    def pread(self, offset: int, length: int) -> bytes:
        return self.inner.pread(offset, length)

    def pread_into(self, offset: int, view: memoryview) -> int:
        return self.inner.pread_into(offset, view)

    def pwritev(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self.inner.pwritev(offset, buffers)

    def fdatasync(self) -> None:
        pass

    def size(self) -> int:
        return self.inner.size()

    def map(self) -> memoryview:
        return self.inner.map()

    def close(self) -> None:
        self.inner.close()


class UnflushedIO:
    """An ``IO`` whose ``fdatasync`` and ``fsync_dir`` do nothing."""

    def __init__(self, inner: IO) -> None:
        self.inner = inner

    def open_read(self, path: str) -> File:
        return self.inner.open_read(path)

    def open_append(self, path: str, *, mode: int = 0o644) -> File:
        return _UnflushedFile(self.inner.open_append(path, mode=mode))

    def write_new(self, path: str, *, mode: int = 0o644) -> File:
        return _UnflushedFile(self.inner.write_new(path, mode=mode))

    def rename(self, source: str, target: str) -> None:
        self.inner.rename(source, target)

    def exchange(self, a: str, b: str) -> None:
        self.inner.exchange(a, b)

    def fsync_dir(self, path: str) -> None:
        pass

    def unlink(self, path: str) -> None:
        self.inner.unlink(path)

    def mkdir(self, path: str, *, mode: int = 0o755) -> None:
        self.inner.mkdir(path, mode=mode)

    def rmdir(self, path: str) -> None:
        self.inner.rmdir(path)

    def list(self, path: str) -> Names:
        return self.inner.list(path)

    def exists(self, path: str) -> bool:
        return self.inner.exists(path)

    def stat(self, path: str) -> FileStat:
        return self.inner.stat(path)

    def lock(self, path: str, *, shared: bool = False, blocking: bool = True) -> Lock:
        return self.inner.lock(path, shared=shared, blocking=blocking)

    def now(self) -> float:
        return self.inner.now()

    def random(self, n: int) -> bytes:
        return self.inner.random(n)
