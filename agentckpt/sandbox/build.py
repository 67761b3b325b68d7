"""Makes a directory from a stored tree, which is untrusted input.

Invariants:
1. Nothing outside the target directory is created, changed or opened: every name is one component, created with O_EXCL or mkdir
   relative to a descriptor of a directory that this code made, opened with O_NOFOLLOW.
2. Sizes are bounded by a ``Budget`` before they are written; content was verified by the source.
3. A hard link only ever joins regular files within the target.
4. After an error the half-built tree is still only in the target; who called removes it.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass

from ..errors import AgentckptError, CapacityError, CorruptionError, StoreError
from ..types import Ref, Source
from .content import read_content
from .dirs import Budget, read_leaves
from .entries import Entry
from .ignore import Ignore, LinkNames
from .scan import OPEN_DIRECTORY, Seen, check_depth, join, show, stat_key

_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(slots=True)
class Built:
    """What was made."""

    num_files: int = 0
    num_bytes: int = 0
    num_left_out: int = 0
    """paths of the checkpoint that are ignored here"""


class Builder:
    """Builds into an empty directory that this process made."""

    def __init__(self, source: Source, ignore: Ignore, budget: Budget) -> None:
        self.built = Built()
        self._source = source
        self._ignore = ignore
        self._names = LinkNames(ignore)
        self._budget = budget
        self._root_fd = -1
        self._linked: dict[bytes, os.stat_result] = {}

    def root(self, fd: int, ref: Ref, mode: int, mtime_ns: int) -> Seen:
        """Fill the open directory ``fd`` and set its mode and mtime. Raises ``CorruptionError``, ``CapacityError``, ``StoreError``."""
        self._root_fd = fd
        seen = self._directory(fd, ref, b"", 0)
        for path, found in self._linked.items():  # a further name changed the ctime of the first
            seen.set_key(path, stat_key(found))
        _finish(fd, mode, mtime_ns)
        return seen

    def _directory(self, fd: int, ref: Ref, path: bytes, depth: int) -> Seen:
        check_depth(depth, path)
        seen = Seen(ref)
        entries: list[Entry] = []
        leaves = []
        for leaf in read_leaves(self._source, ref, self._budget, show(path)):
            entries += [entry for entry in leaf[0] if self._make(fd, entry, join(path, entry.name), depth, seen)]
            leaves.append(leaf)
        seen.entries, seen.leaves = tuple(entries), tuple(leaves)
        return seen

    def _make(self, fd: int, entry: Entry, path: bytes, depth: int, seen: Seen) -> bool:
        """False if the path is ignored here."""
        if self._ignore(path, entry.type == "d"):
            self.built.num_left_out += 1
            return False
        try:
            found = self._entry(fd, entry, path, depth, seen)
        except AgentckptError:
            raise
        except OSError as error:
            raise _failed(path, error) from error
        # Not racy: the directory stands aside until it is complete, and whoever writes into it later does so a tick later.
        seen.keys[entry.name] = stat_key(found)
        return True

    def _entry(self, fd: int, entry: Entry, path: bytes, depth: int, seen: Seen) -> os.stat_result:
        if entry.type == "d":
            os.mkdir(entry.name, 0o700, dir_fd=fd)
            inner = os.open(entry.name, OPEN_DIRECTORY, dir_fd=fd)
            try:
                assert entry.node is not None
                seen.dirs[entry.name] = self._directory(inner, entry.node, path, depth + 1)
                return _finish(inner, entry.mode, entry.mtime_ns)
            finally:
                os.close(inner)
        if entry.type == "l":
            assert entry.inline is not None
            os.symlink(entry.inline, entry.name, dir_fd=fd)
            os.utime(entry.name, ns=(entry.mtime_ns, entry.mtime_ns), dir_fd=fd, follow_symlinks=False)
            return os.stat(entry.name, dir_fd=fd, follow_symlinks=False)
        self.built.num_files += 1
        first = self._names.first(entry, path)
        if first is not None:
            self._hard_link(fd, entry, first, path)
            found = os.stat(entry.name, dir_fd=fd, follow_symlinks=False)
            self._linked[path] = self._linked[first] = found
            return found
        return self._file(fd, entry, path)

    def _file(self, fd: int, entry: Entry, path: bytes) -> os.stat_result:
        self._budget.bytes(entry.size, show(path))
        file = os.open(entry.name, _CREATE, 0o600, dir_fd=fd)
        try:
            for data in read_content(self._source, entry, show(path)):
                view = memoryview(data)
                while view:
                    view = view[os.write(file, view) :]
                self.built.num_bytes += len(data)
            return _finish(file, entry.mode, entry.mtime_ns)
        finally:
            os.close(file)

    def _hard_link(self, fd: int, entry: Entry, first: bytes, path: bytes) -> None:
        """The first name is looked up from our own root, one real directory at a time."""
        *parents, last = first.split(b"/")
        at = os.dup(self._root_fd)
        try:
            for name in parents:
                inner = os.open(name, OPEN_DIRECTORY, dir_fd=at)
                os.close(at)
                at = inner
            found = os.stat(last, dir_fd=at, follow_symlinks=False)
            if not stat.S_ISREG(found.st_mode) or found.st_size != entry.size:
                raise CorruptionError("a hard link to something else", code="bad-link", object=show(path), found=show(first))
            os.link(last, entry.name, src_dir_fd=at, dst_dir_fd=fd, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise CorruptionError("a hard link to nothing", code="bad-link", object=show(path), found=show(first)) from error
        finally:
            os.close(at)


def _finish(fd: int, mode: int, mtime_ns: int) -> os.stat_result:
    os.fchmod(fd, mode)
    os.utime(fd, ns=(mtime_ns, mtime_ns))
    return os.fstat(fd)


def _failed(path: bytes, error: OSError) -> AgentckptError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return CapacityError(
            "no space left for the restored tree", code="no-space", object=show(path), hint="nothing was changed; free some space"
        )
    if error.errno == errno.ELOOP or isinstance(error, FileExistsError | NotADirectoryError):
        return StoreError(
            "somebody else writes into the tree being built", code="disturbed", object=show(path), hint="nothing was changed; try again"
        )
    return StoreError(f"could not be restored: {error.strerror}", code="not-restored", object=show(path))
