"""What a live tree looks like, by directory descriptors alone, and what was seen of it last time.

Invariants:
1. No symbolic link is followed and no path of more than one name is opened: each step is relative to an open directory, with O_NOFOLLOW.
   So nothing outside the workspace is read, whatever is swapped meanwhile.
2. A FIFO, socket or device is never waited for: everything is opened O_NONBLOCK and checked after opening.
3. A key is trusted only if the file could not have changed again within the clock's granularity after it was taken (git's racy rule).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field

from ..errors import IncompatibleError, StoreError
from ..types import Ref
from .dirs import Leaves
from .entries import MAX_DEPTH, Entry
from .ignore import Ignore

StatKey = tuple[int, int, int, int, int, int]
"""(mode, size, mtime in ns, ctime in ns, inode, device)"""

OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_TICK_NS = 20_000_000  # two ticks of a 100 Hz kernel: file times come from the clock of the last tick
_COARSE_TICK_NS = 2_000_000_000  # filesystems that keep whole (or even) seconds


def stat_key(found: os.stat_result) -> StatKey:
    # The access to a directory's own size says nothing; its mtime does.
    return (found.st_mode, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev)


def is_racy(key: StatKey, taken_ns: int) -> bool:
    """Whether a later change could leave the key as it is; ``taken_ns`` is the time just before the key was taken."""
    newest = max(key[2], key[3])
    coarse = key[2] % 1_000_000_000 == 0 and key[3] % 1_000_000_000 == 0
    return newest >= taken_ns - (_COARSE_TICK_NS if coarse else _TICK_NS)


@dataclass(slots=True)
class Seen:
    """One directory as it was captured or restored: what the next capture need not read again."""

    ref: Ref
    entries: tuple[Entry, ...] = ()
    keys: dict[bytes, StatKey] = field(default_factory=dict)
    """all names but ignored ones, directories and special files included"""
    racy: set[bytes] = field(default_factory=set)
    """files whose key is not to be trusted"""
    dirs: dict[bytes, Seen] = field(default_factory=dict)
    leaves: Leaves = ()
    big: dict[bytes, tuple[Ref, ...]] = field(default_factory=dict)
    """chunks of the files that have a node"""

    def at(self, directory: bytes) -> Seen | None:
        """The table of a directory below this one."""
        inner: Seen | None = self
        for name in directory.split(b"/") if directory else ():
            inner = inner.dirs.get(name) if inner is not None else None
        return inner

    def set_key(self, path: bytes, key: StatKey) -> None:
        """Take over a key that changed by our own doing (a link made, a time set)."""
        directory, _, name = path.rpartition(b"/")
        inner = self.at(directory)
        if inner is not None and name in inner.keys:
            inner.keys[name] = key

    def by_name(self) -> dict[bytes, Entry]:
        return {entry.name: entry for entry in self.entries}


def show(path: bytes) -> str:
    """A path for people and for JSON: bytes that are not UTF-8 stand as escapes."""
    return path.decode("utf-8", "backslashreplace")


def join(path: bytes, name: bytes) -> bytes:
    return path + b"/" + name if path else name


def list_names(fd: int, path: bytes) -> list[bytes]:
    """Sorted names of an open directory."""
    try:
        return sorted(os.fsencode(name) for name in os.listdir(fd))
    except OSError as error:
        raise unreadable(path, error) from error


def stat_at(fd: int, name: bytes) -> os.stat_result | None:
    """lstat relative to a directory; None if the name is gone."""
    try:
        return os.stat(name, dir_fd=fd, follow_symlinks=False)
    except FileNotFoundError:
        return None


def open_directory(fd: int, name: bytes, path: bytes) -> int | None:
    """A descriptor of a subdirectory; None if the name is gone or is no directory any more."""
    try:
        return os.open(name, OPEN_DIRECTORY, dir_fd=fd)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno == 40:  # ELOOP: it became a symbolic link
            return None
        raise unreadable(path, error) from error


def unreadable(path: bytes, error: OSError) -> StoreError:
    return StoreError(
        f"could not be read: {error.strerror}", code="unreadable", object=show(path) or "/",
        hint="make it readable, remove it, or name it in ignore=",
    )  # fmt: skip


def check_depth(depth: int, path: bytes) -> None:
    if depth > MAX_DEPTH:
        raise IncompatibleError(
            "directories are nested too deep", code="too-deep", object=show(path)[:200], expected=f"at most {MAX_DEPTH}"
        )


def special_name(mode: int) -> str:
    kinds: dict[Callable[[int], bool], str] = {
        stat.S_ISFIFO: "fifo", stat.S_ISSOCK: "socket", stat.S_ISBLK: "block device", stat.S_ISCHR: "character device",
    }  # fmt: skip
    return next((name for test, name in kinds.items() if test(mode)), "unknown type")


def changed_since(fd: int, seen: Seen, ignore: Ignore, path: bytes = b"") -> list[bytes]:
    """Paths whose stat differs from what was seen, or that came or went: a walk of stat calls alone."""
    changed = []
    names = list_names(fd, path)
    present = set(names)
    changed += [join(path, name) for name in seen.keys if name not in present]
    for name in names:
        here = join(path, name)
        found = stat_at(fd, name)
        if found is None or ignore(here, stat.S_ISDIR(found.st_mode)):
            continue
        if seen.keys.get(name) != stat_key(found):
            changed.append(here)
        if name in seen.dirs and stat.S_ISDIR(found.st_mode):
            inner = open_directory(fd, name, here)
            if inner is None:
                changed.append(here)
                continue
            try:
                changed += changed_since(inner, seen.dirs[name], ignore, here)
            finally:
                os.close(inner)
    return changed
