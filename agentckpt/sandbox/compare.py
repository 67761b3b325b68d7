"""Whether a live directory already equals a stored tree, content included.

Names, types, modes, sizes, link targets and hard links first, by stat alone; then every byte of every file that the table does not
vouch for: after a crash nothing else proves that a file is what it was. Modification times may differ: they are listed, to be set.
"""

from __future__ import annotations

import os
import stat
import time

from ..types import Ref, Source
from . import cdc
from .capture import reader
from .content import read_content
from .dirs import Budget, read_leaves
from .entries import Entry, content_of, kept_mode
from .ignore import Ignore, LinkNames
from .scan import OPEN_DIRECTORY, OPEN_FILE, Seen, check_depth, is_racy, join, list_names, open_directory, show, stat_at, stat_key


class Differs(Exception):
    """The first difference ends the comparison; its path is the message."""


class Comparison:
    """Compares once. ``left_out`` are patterns not brought back, ``kept`` those of live paths to leave alone."""

    def __init__(self, source: Source, left_out: Ignore, kept: Ignore) -> None:
        self.times: list[tuple[bytes, int]] = []
        """(path, mtime in ns) of what differs in nothing else; insides before their directory"""
        self.num_files = 0
        self._source = source
        self._left_out = left_out
        self._kept = kept
        self._names = LinkNames(left_out)
        self._links: dict[tuple[int, int], bytes] = {}
        self._unread: list[tuple[bytes, Entry, Seen]] = []

    def equal(self, fd: int, ref: Ref, before: Seen | None) -> Seen | None:
        """The table of the live directory ``fd`` if it equals the directory node ``ref``, else None."""
        try:
            seen = self._directory(fd, ref, b"", before, 0)
            for path, entry, inner in self._unread:
                self._read(fd, path, entry, inner)
        except Differs:
            return None
        return seen

    def _directory(self, fd: int, ref: Ref, path: bytes, before: Seen | None, depth: int) -> Seen:
        check_depth(depth, path)
        seen = Seen(ref)
        live = {}
        for name in list_names(fd, path):
            found = stat_at(fd, name)
            special = found is None or not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode) or stat.S_ISLNK(found.st_mode))
            if found is None or special or self._kept(join(path, name), stat.S_ISDIR(found.st_mode)):
                continue
            live[name] = found
        entries: list[Entry] = []
        leaves = []
        for part, leaf in read_leaves(self._source, ref, Budget(), show(path)):
            leaves.append((part, leaf))
            entries += [entry for entry in part if not self._left_out(join(path, entry.name), entry.type == "d")]
        if [entry.name for entry in entries] != list(live):
            raise Differs(show(path))
        old = before.by_name() if before is not None else {}
        for entry in entries:
            seen.keys[entry.name] = stat_key(live[entry.name])
            vouched = content_of(old.get(entry.name)) == content_of(entry)
            self._entry(fd, entry, join(path, entry.name), live[entry.name], seen, before, vouched, depth)
        seen.entries, seen.leaves = tuple(entries), tuple(leaves)
        return seen

    def _entry(
        self, fd: int, entry: Entry, path: bytes, found: os.stat_result, seen: Seen, before: Seen | None, vouched: bool, depth: int
    ) -> None:
        kind = {stat.S_IFREG: "f", stat.S_IFDIR: "d", stat.S_IFLNK: "l"}[stat.S_IFMT(found.st_mode)]
        if kind != entry.type or (kind != "l" and kept_mode(found.st_mode) != entry.mode) or (kind == "f" and found.st_size != entry.size):
            raise Differs(show(path))
        if kind == "d":
            assert entry.node is not None
            inner = open_directory(fd, entry.name, path)
            if inner is None or os.fstat(inner).st_dev != os.fstat(fd).st_dev:
                raise Differs(show(path))
            try:
                child = before.dirs.get(entry.name) if before is not None else None
                seen.dirs[entry.name] = self._directory(inner, entry.node, path, child, depth + 1)
            finally:
                os.close(inner)
        elif kind == "l":
            if os.fsencode(os.readlink(entry.name, dir_fd=fd)) != entry.inline:
                raise Differs(show(path))
        else:
            self._file(entry, path, found, seen, before, vouched)
        if found.st_mtime_ns != entry.mtime_ns:
            self.times.append((path, entry.mtime_ns))

    def _file(self, entry: Entry, path: bytes, found: os.stat_result, seen: Seen, before: Seen | None, vouched: bool) -> None:
        self.num_files += 1
        first = self._links.setdefault((found.st_dev, found.st_ino), path) if found.st_nlink > 1 else path
        if first != (self._names.first(entry, path) or path):
            raise Differs(show(path))
        name = entry.name
        if vouched and before is not None and before.keys.get(name) == seen.keys[name] and name not in before.racy:
            if name in before.big:
                seen.big[name] = before.big[name]
        elif first == path:
            self._unread.append((path, entry, seen))

    def _read(self, root_fd: int, path: bytes, entry: Entry, seen: Seen) -> None:
        taken_ns = time.time_ns()
        try:
            file = open_path(root_fd, path, OPEN_FILE)
        except OSError as error:
            raise Differs(show(path)) from error
        try:
            read = reader(file, entry.size)
            for data in read_content(self._source, entry, show(path)):
                if _exactly(read, len(data)) != data:
                    raise Differs(show(path))
            key = stat_key(os.fstat(file))
        finally:
            os.close(file)
        if key != seen.keys[entry.name]:
            raise Differs(show(path))
        if is_racy(key, taken_ns):
            seen.racy.add(entry.name)


def _exactly(read: cdc.ReadInto, count: int) -> bytes:
    buffer = bytearray(count)
    view, filled = memoryview(buffer), 0
    while filled < count:
        got = read(view[filled:])
        if not got:
            return b""
        filled += got
    return bytes(buffer)


def open_path(root_fd: int, path: bytes, flags: int, *, mode: int = 0o600) -> int:
    """Open ``path`` below ``root_fd``, one real directory at a time. Raises ``OSError`` (ELOOP, ENOTDIR for a symbolic link on the way)."""
    *parents, last = path.split(b"/")
    at = os.dup(root_fd)
    try:
        for name in parents:
            inner = os.open(name, OPEN_DIRECTORY, dir_fd=at)
            os.close(at)
            at = inner
        return os.open(last, flags, mode, dir_fd=at)
    finally:
        os.close(at)


def set_times(root_fd: int, times: list[tuple[bytes, int]], seen: Seen) -> None:
    """Set modification times found to differ, and take the new keys over into the table."""
    for path, mtime_ns in times:
        parent, _, name = path.rpartition(b"/")
        fd = open_path(root_fd, parent, OPEN_DIRECTORY) if parent else os.dup(root_fd)
        try:
            os.utime(name, ns=(mtime_ns, mtime_ns), dir_fd=fd, follow_symlinks=False)
            found = os.stat(name, dir_fd=fd, follow_symlinks=False)
        finally:
            os.close(fd)
        seen.set_key(path, stat_key(found))
