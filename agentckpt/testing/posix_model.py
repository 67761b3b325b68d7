"""An in-memory POSIX filesystem that implements the store's ``IO`` and can crash.

It keeps what the process sees (volatile) apart from what the disk would have after a power cut (durable), as a list
of the operations in between. ``crash(seed)`` draws one of the states that POSIX allows.

Rules of a crash:
1. Data written after the file's last ``fdatasync`` is cut at sector boundaries (512 or 4096 bytes); any subset of the
   pieces may have reached the disk, later ones without earlier ones. A hole reads as zeros, seldom as garbage.
2. The file's size is any of: the durable one, the end of the last piece that survived, the volatile one, or between.
3. A created, renamed or removed name survives surely only after ``fsync_dir`` of its directory; un-synced name
   operations survive in any subset. ``fdatasync`` of a file does nothing for its name.
4. A rename is atomic within one directory. Between two, the new name may appear and the old one stay until both are
   synced; the file is never lost.
5. ``lose_unsynced`` (a failed fsync) makes the pages clean: visible to readers, never durable, whatever is synced later.
6. Locks end with the crash. A 512-byte sector that is not written to keeps its bytes.
"""

from __future__ import annotations

import errno
import os
import random as random_module
import threading
from collections.abc import Sequence

from ..store.io import File, FileStat, Lock, Names, busy
from ..types import Buffer
from ._crash import (
    ALL_KEPT,
    ALL_LOST,
    LAST_ONLY,
    Inode,
    NameOp,
    Write,
    after_crash,
    apply_write,
    set_name,
    settle,
    surviving_names,
    written,
)

__all__ = ["ALL_KEPT", "ALL_LOST", "LAST_ONLY", "ModelFile", "ModelLock", "PosixModel"]


class ModelFile:
    """A ``File`` of the model."""

    def __init__(self, model: PosixModel, path: str, inode: Inode, writable: bool) -> None:
        self.path = path
        self._model = model
        self._inode = inode
        self._writable = writable
        self._closed = False

    def pread(self, offset: int, length: int) -> bytes:
        with self._model.mutex:
            self._check()
            return bytes(memoryview(self._inode.data)[offset : offset + length])

    def pread_into(self, offset: int, view: memoryview) -> int:
        target = view.cast("B")
        data = self.pread(offset, len(target))
        target[: len(data)] = data
        return len(data)

    def pwritev(self, offset: int, buffers: Sequence[Buffer]) -> None:
        data = b"".join(buffers)
        with self._model.mutex:
            self._check()
            if not self._writable:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF), self.path)
            if not data:
                return
            apply_write(self._inode.data, offset, data)
            self._inode.pending.append(Write(offset, data))
            self._inode.mtime_s = self._model.clock_s

    def fdatasync(self) -> None:
        with self._model.mutex:
            self._check()
            kept = [write for write in self._inode.pending if not write.lost]
            self._inode.pending = [write for write in self._inode.pending if write.lost]
            self._inode.durable = written(self._inode.durable, kept)

    def lose_unsynced(self) -> None:
        """What a failed fsync does: the dirty pages become clean without having been written."""
        with self._model.mutex:
            for write in self._inode.pending:
                write.lost = True

    def size(self) -> int:
        with self._model.mutex:
            self._check()
            return len(self._inode.data)

    def map(self) -> memoryview:
        return memoryview(self.pread(0, self.size()))

    def close(self) -> None:
        self._closed = True

    def _check(self) -> None:
        if self._closed:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF), self.path)


class ModelLock:
    """A ``Lock`` of the model."""

    def __init__(self, model: PosixModel, path: str, inode: Inode, shared: bool) -> None:
        self.path = path
        self.shared = shared
        self._model = model
        self._inode = inode
        self._held = True

    @property
    def held(self) -> bool:
        return self._held

    def write(self, data: bytes) -> None:
        with self._model.mutex:
            self._inode.data[:] = data

    def release(self) -> None:
        with self._model.mutex:
            if self._held:
                self._held = False
                self._model.holders[self._inode.number].remove(self)
                self._model.mutex.notify_all()

    def __enter__(self) -> ModelLock:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()


class PosixModel:
    """The model. ``"/a"`` and ``"a"`` are the same path. Thread-safe; deterministic: clock and randomness follow ``seed``."""

    def __init__(self, seed: int = 0) -> None:
        self.mutex = threading.Condition(threading.RLock())
        self.clock_s = 1_700_000_000.0
        self.holders: dict[int, list[ModelLock]] = {}
        self._random = random_module.Random(seed)
        self._seed = seed
        self._num_inodes = 0
        self._root = self._new_inode(0o755, is_dir=True)
        self._name_ops: list[NameOp] = []

    # --- IO ---------------------------------------------------------------------------------------------------------

    def open_read(self, path: str) -> File:
        with self.mutex:
            inode = self._find(path)
            if inode.is_dir:
                raise _error(errno.EISDIR, path)
            return ModelFile(self, path, inode, writable=False)

    def open_append(self, path: str, *, mode: int = 0o644) -> File:
        with self.mutex:
            if not self.exists(path):
                return self.write_new(path, mode=mode)
            inode = self._find(path)
            if inode.is_dir:
                raise _error(errno.EISDIR, path)
            return ModelFile(self, path, inode, writable=True)

    def write_new(self, path: str, *, mode: int = 0o644) -> File:
        with self.mutex:
            inode = self._create(path, mode, is_dir=False)
            return ModelFile(self, path, inode, writable=True)

    def mkdir(self, path: str, *, mode: int = 0o755) -> None:
        with self.mutex:
            self._create(path, mode, is_dir=True)

    def rename(self, source: str, target: str) -> None:
        with self.mutex:
            from_dir, from_name = self._parent(source)
            to_dir, to_name = self._parent(target)
            inode = self._entry(from_dir, from_name, source)
            replaced = to_dir.names.get(to_name)
            if replaced is inode:
                return
            self._check_replace(inode, replaced, target)
            appears = self._name(to_dir, to_name, inode)
            self._name(from_dir, from_name, None, after=appears, together=from_dir is to_dir)

    def exchange(self, a: str, b: str) -> None:
        with self.mutex:
            a_dir, a_name = self._parent(a)
            b_dir, b_name = self._parent(b)
            a_inode, b_inode = self._entry(a_dir, a_name, a), self._entry(b_dir, b_name, b)
            first = self._name(a_dir, a_name, b_inode)
            self._name(b_dir, b_name, a_inode, after=first, together=True)

    def unlink(self, path: str) -> None:
        with self.mutex:
            directory, name = self._parent(path)
            if self._entry(directory, name, path).is_dir:
                raise _error(errno.EISDIR, path)
            self._name(directory, name, None)

    def rmdir(self, path: str) -> None:
        with self.mutex:
            directory, name = self._parent(path)
            inode = self._entry(directory, name, path)
            if not inode.is_dir:
                raise _error(errno.ENOTDIR, path)
            if inode.names:
                raise _error(errno.ENOTEMPTY, path)
            self._name(directory, name, None)

    def fsync_dir(self, path: str) -> None:
        with self.mutex:
            directory = self._find(path)
            if not directory.is_dir:
                raise _error(errno.ENOTDIR, path)
            for op in self._name_ops:
                op.synced = op.synced or op.directory is directory
            self._name_ops = settle(self._name_ops)

    def list(self, path: str) -> Names:
        with self.mutex:
            inode = self._find(path)
            if not inode.is_dir:
                raise _error(errno.ENOTDIR, path)
            return sorted(inode.names)

    def exists(self, path: str) -> bool:
        with self.mutex:
            try:
                self._find(path)
            except (FileNotFoundError, NotADirectoryError):
                return False
            return True

    def stat(self, path: str) -> FileStat:
        with self.mutex:
            inode = self._find(path)
            return FileStat(len(inode.data), inode.mtime_s, inode.number, inode.is_dir, inode.mode)

    def lock(self, path: str, *, shared: bool = False, blocking: bool = True) -> Lock:
        with self.mutex:
            while True:
                if not self.exists(path):
                    self._create(path, 0o644, is_dir=False)
                inode = self._find(path)
                holders = self.holders.setdefault(inode.number, [])
                if not holders or (shared and all(holder.shared for holder in holders)):
                    lock = ModelLock(self, path, inode, shared)
                    holders.append(lock)
                    return lock
                if not blocking:
                    raise busy(path)
                self.mutex.wait()

    def now(self) -> float:
        with self.mutex:
            self.clock_s += 0.001
            return self.clock_s

    def random(self, n: int) -> bytes:
        with self.mutex:
            return self._random.randbytes(n)

    # --- crash ------------------------------------------------------------------------------------------------------

    @property
    def num_unsynced(self) -> int:
        """Writes and name operations that a crash may lose."""
        with self.mutex:
            seen: set[int] = set()
            total = len(self._name_ops)
            stack = [self._root]
            while stack:
                inode = stack.pop()
                if inode.number not in seen:
                    seen.add(inode.number)
                    total += len(inode.pending)
                    stack.extend(inode.names.values())
            return total

    def crash(self, seed: int) -> PosixModel:
        """One state that the disk may be in after a power cut now, as a new model; this one is left as it is.

        Seeds ``ALL_LOST``, ``ALL_KEPT`` and ``LAST_ONLY`` are the extremes, every other seed draws at random; the
        same seed on the same history gives the same state.
        """
        with self.mutex:
            rng = random_module.Random(f"{seed} {self._seed}")
            fresh = PosixModel(seed)
            fresh.clock_s = self.clock_s + 1.0
            names = surviving_names(self._name_ops, self._all_dirs(), rng, seed)
            made: dict[int, Inode] = {self._root.number: fresh._root}
            stack = [self._root]
            while stack:
                directory = stack.pop()
                copy = made[directory.number]
                for name, inode in sorted(names.get(directory, directory.durable_names).items()):
                    if inode.number not in made:
                        made[inode.number] = after_crash(inode, fresh._new_inode(inode.mode, inode.is_dir), rng, seed)
                        stack.extend([inode] if inode.is_dir else [])
                    copy.names[name] = copy.durable_names[name] = made[inode.number]
            return fresh

    def _all_dirs(self) -> Sequence[Inode]:
        """Every directory that any crash could show: reachable by durable, volatile or pending names."""
        found: dict[int, Inode] = {}
        stack = [self._root, *(op.inode for op in self._name_ops if op.inode is not None), *(op.directory for op in self._name_ops)]
        while stack:
            inode = stack.pop()
            if inode.is_dir and inode.number not in found:
                found[inode.number] = inode
                stack.extend([*inode.names.values(), *inode.durable_names.values()])
        return tuple(found.values())

    # --- leaves -----------------------------------------------------------------------------------------------------

    def _new_inode(self, mode: int, is_dir: bool) -> Inode:
        self._num_inodes += 1
        return Inode(self._num_inodes, mode, is_dir)

    def _find(self, path: str) -> Inode:
        inode = self._root
        for name in _split(path):
            if not inode.is_dir:
                raise _error(errno.ENOTDIR, path)
            inode = self._entry(inode, name, path)
        return inode

    def _parent(self, path: str) -> tuple[Inode, str]:
        names = _split(path)
        if not names:
            raise _error(errno.EBUSY, path)
        parent = self._find("/".join(names[:-1]))
        if not parent.is_dir:
            raise _error(errno.ENOTDIR, path)
        return parent, names[-1]

    def _entry(self, directory: Inode, name: str, path: str) -> Inode:
        if name not in directory.names:
            raise _error(errno.ENOENT, path)
        return directory.names[name]

    def _create(self, path: str, mode: int, is_dir: bool) -> Inode:
        directory, name = self._parent(path)
        if name in directory.names:
            raise _error(errno.EEXIST, path)
        inode = self._new_inode(mode, is_dir)
        inode.mtime_s = self.clock_s
        self._name(directory, name, inode)
        return inode

    def _name(self, directory: Inode, name: str, inode: Inode | None, after: NameOp | None = None, together: bool = False) -> NameOp:
        op = NameOp(directory, name, inode, after, together)
        set_name(directory.names, op)
        self._name_ops.append(op)
        return op

    def _check_replace(self, inode: Inode, replaced: Inode | None, target: str) -> None:
        if replaced is None:
            return
        if replaced.is_dir and not inode.is_dir:
            raise _error(errno.EISDIR, target)
        if inode.is_dir and not replaced.is_dir:
            raise _error(errno.ENOTDIR, target)
        if replaced.names:
            raise _error(errno.ENOTEMPTY, target)


def _split(path: str) -> list[str]:
    names = [name for name in path.split("/") if name not in ("", ".")]
    if ".." in names:
        raise _error(errno.EINVAL, path)
    return names


def _error(code: int, path: str) -> OSError:
    return OSError(code, os.strerror(code), path)
