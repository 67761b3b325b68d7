"""Writes a live tree into a sink: reads what changed, reuses the rest.

Invariants:
1. Every entry written is either unchanged since the table that the capture starts from (same key, not racy) or was read now.
2. A file that changes while it is read is read again; if it does not come to rest it is named in ``unstable``, never torn silently.
3. The instant is the call of ``Workspace.capture``. What changed after it, as far as file times show, is named in ``unstable``, and
   then the capture calls itself ``per-file``: no single instant is claimed.
4. Special files and other filesystems are named, never opened.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ..errors import AgentckptError
from ..types import Ref, Sink
from .content import Content, write_content
from .dirs import write_directory
from .entries import Entry, kept_mode
from .ignore import Ignore
from .scan import OPEN_FILE, Seen, check_depth, is_racy, join, list_names, open_directory, special_name, stat_at, stat_key, unreadable

_ATTEMPTS = 3


@dataclass(slots=True)
class Totals:
    """What a capture met. Paths are bytes, from the root."""

    num_files: int = 0
    num_changed: int = 0
    """files that were read"""
    logical_bytes: int = 0
    """sum of the sizes of all files"""
    new_bytes: int = 0
    """objects given to the sink that the table did not know, before compression"""
    num_ignored: int = 0
    skipped: list[tuple[bytes, str]] = field(default_factory=list)
    unstable: set[bytes] = field(default_factory=set)


class TreeWriter:
    """One capture. ``instant_ns`` is the wall-clock time of the cut."""

    def __init__(self, sink: Sink, ignore: Ignore, instant_ns: int) -> None:
        self.totals = Totals()
        self._sink = sink
        self._ignore = ignore
        self._instant_ns = instant_ns
        self._known: set[Ref] = set()
        self._device = -1
        self._links: dict[tuple[int, int], tuple[bytes, Content]] = {}
        self._chunks: list[Ref] = []

    def root(self, fd: int, before: Seen | None) -> Seen:
        self._device = os.fstat(fd).st_dev
        return self._directory(fd, b"", before, 0)

    def _directory(self, fd: int, path: bytes, before: Seen | None, depth: int) -> Seen:
        check_depth(depth, path)
        seen = Seen(Ref(b""))
        old = before.by_name() if before is not None else {}
        entries = []
        for name in list_names(fd, path):
            here = join(path, name)
            taken_ns = time.time_ns()
            found = stat_at(fd, name)
            if found is None:
                self.totals.unstable.add(here)
                continue
            if self._ignore(here, stat.S_ISDIR(found.st_mode)):
                self.totals.num_ignored += 1
                continue
            key = seen.keys[name] = stat_key(found)
            if self._instant_ns < key[3] <= taken_ns:
                self.totals.unstable.add(here)
            entry = self._entry(fd, here, found, taken_ns, seen, before, old.get(name), depth)
            if entry is not None:
                entries.append(entry)
        seen.entries = tuple(entries)
        if before is not None and before.entries == seen.entries:
            seen.ref, seen.leaves, seen.entries = before.ref, before.leaves, before.entries
        else:
            leaves = before.leaves if before is not None else ()
            self._known.update(ref for _, ref in leaves)
            seen.ref, seen.leaves = write_directory(self._put_node, seen.entries, leaves)
        return seen

    def _entry(
        self, fd: int, path: bytes, found: os.stat_result, taken_ns: int, seen: Seen, before: Seen | None, old: Entry | None, depth: int
    ) -> Entry | None:
        name = path.rpartition(b"/")[2]
        if stat.S_ISREG(found.st_mode):
            return self._file(fd, path, found, taken_ns, seen, before, old)
        if stat.S_ISLNK(found.st_mode):
            return self._symlink(fd, name, path, found, old)
        if not stat.S_ISDIR(found.st_mode):
            self.totals.skipped.append((path, special_name(found.st_mode)))
            return None
        if found.st_dev != self._device:
            self.totals.skipped.append((path, "another filesystem"))
            return None
        inner = open_directory(fd, name, path)
        if inner is None:
            self.totals.unstable.add(path)
            return None
        try:
            child = self._directory(inner, path, before.dirs.get(name) if before is not None else None, depth + 1)
        finally:
            os.close(inner)
        seen.dirs[name] = child
        return _same(old, Entry(name, "d", kept_mode(found.st_mode), found.st_mtime_ns, node=child.ref))

    def _symlink(self, fd: int, name: bytes, path: bytes, found: os.stat_result, old: Entry | None) -> Entry | None:
        try:
            target = os.readlink(name, dir_fd=fd)
        except OSError:
            self.totals.unstable.add(path)
            return None
        return _same(old, Entry(name, "l", 0o777, found.st_mtime_ns, inline=os.fsencode(target)))

    def _file(
        self, fd: int, path: bytes, found: os.stat_result, taken_ns: int, seen: Seen, before: Seen | None, old: Entry | None
    ) -> Entry | None:
        name = path.rpartition(b"/")[2]
        key = stat_key(found)
        identity = (found.st_dev, found.st_ino)
        first = self._links.get(identity) if found.st_nlink > 1 else None
        link = first[0] if first is not None else None
        if before is not None and old is not None and before.keys.get(name) == key and name not in before.racy and old.link == link:
            content, entry = Content(old.size, old.inline, old.chunks, old.node), old
            if name in before.big:
                seen.big[name] = before.big[name]
        elif first is not None:
            content = first[1]
            entry = _file_entry(name, found, content, link)
        else:
            read = self._read(fd, name, path, before, old)
            if read is None:
                return None
            content, found, taken_ns = read
            key = seen.keys[name] = stat_key(found)
            entry = _same(old, _file_entry(name, found, content, None))
            if content.node is not None:
                seen.big[name] = tuple(self._chunks)
        if found.st_nlink > 1 and first is None:
            self._links[identity] = (path, content)
        if is_racy(key, taken_ns) or path in self.totals.unstable:
            seen.racy.add(name)
        self.totals.num_files += 1
        self.totals.logical_bytes += content.size
        return entry

    def _read(
        self, fd: int, name: bytes, path: bytes, before: Seen | None, old: Entry | None
    ) -> tuple[Content, os.stat_result, int] | None:
        """Content, the stat that belongs to it, and when that was taken; None if the name is no regular file any more."""
        if old is not None:
            self._known.update(old.chunks if old.node is None else (old.node,))
            self._known.update(before.big.get(name, ()) if before is not None else ())
        self.totals.num_changed += 1
        for _ in range(_ATTEMPTS):
            try:
                file = os.open(name, OPEN_FILE, dir_fd=fd)
            except FileNotFoundError:
                break
            except OSError as error:
                if error.errno == 40:  # ELOOP: a symbolic link now
                    break
                raise unreadable(path, error) from error
            try:
                taken_ns = time.time_ns()
                start = os.fstat(file)
                if not stat.S_ISREG(start.st_mode):
                    break
                self._chunks = []
                content = write_content(self._put_chunk, self._put_node, reader(file, start.st_size))
                end = os.fstat(file)
            except AgentckptError:
                raise  # the sink's, not the file's
            except OSError as error:
                raise unreadable(path, error) from error
            finally:
                os.close(file)
            if stat_key(start) == stat_key(end) and content.size == end.st_size:
                return content, end, taken_ns
        else:
            self.totals.unstable.add(path)
            return content, end, taken_ns
        self.totals.unstable.add(path)
        return None

    def _put_chunk(self, data: bytes, compress: bool) -> Ref:
        ref = self._sink.put("chunk", data, compress=compress)
        self._chunks.append(ref)
        return self._count(ref, len(data))

    def _put_node(self, data: bytes) -> Ref:
        return self._count(self._sink.put("node", data, compress=True), len(data))

    def _count(self, ref: Ref, num_bytes: int) -> Ref:
        if ref not in self._known:
            self._known.add(ref)
            self.totals.new_bytes += num_bytes
        return ref


def reader(fd: int, size: int) -> Callable[[memoryview], int]:
    """Reads the first ``size`` bytes of an open file: one that grows as fast as it is read must come to an end."""
    offset = 0

    def read(view: memoryview) -> int:
        nonlocal offset
        count = os.preadv(fd, [view[: size - offset]], offset) if offset < size else 0
        offset += count
        return count

    return read


def _file_entry(name: bytes, found: os.stat_result, content: Content, link: bytes | None) -> Entry:
    mode = kept_mode(found.st_mode)
    return Entry(name, "f", mode, found.st_mtime_ns, content.size, content.inline, content.chunks, content.node, link)


def _same(old: Entry | None, new: Entry) -> Entry:
    """The old object if it is equal: comparisons of whole directories then end at the first look."""
    return old if old == new else new
