"""Removes and copies directories of ours by descriptors: links are removed or copied, never followed."""

from __future__ import annotations

import errno
import os
import stat

from ..errors import CapacityError, ConflictError, StoreError
from .entries import kept_mode
from .linux import reflink
from .scan import OPEN_DIRECTORY, OPEN_FILE, Seen, check_depth, join, list_names, show, stat_key, unreadable

_COPY_BYTES = 1 << 30


def remove_tree(path: str) -> None:
    """Remove a directory and all in it, whatever its modes. A path that is absent is fine. Another filesystem beneath is refused."""
    parent, name = os.path.split(path)
    fd = os.open(parent or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _remove(fd, os.fsencode(name), None)
    finally:
        os.close(fd)


def _remove(parent_fd: int, name: bytes, device: int | None) -> None:
    try:
        fd = _open_anyway(parent_fd, name)
    except FileNotFoundError:
        return
    try:
        found = os.fstat(fd)
        if device is not None and found.st_dev != device:
            raise ConflictError("another filesystem is mounted in a directory to be removed", code="mount-point", object=show(name))
        os.fchmod(fd, stat.S_IRWXU)
        for child in map(os.fsencode, os.listdir(fd)):
            if stat.S_ISDIR(os.stat(child, dir_fd=fd, follow_symlinks=False).st_mode):
                _remove(fd, child, found.st_dev)
            else:
                os.unlink(child, dir_fd=fd)
    finally:
        os.close(fd)
    os.rmdir(name, dir_fd=parent_fd)


def _open_anyway(parent_fd: int, name: bytes) -> int:
    try:
        return os.open(name, OPEN_DIRECTORY, dir_fd=parent_fd)
    except PermissionError:
        handle = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent_fd)
        try:
            os.chmod(f"/proc/self/fd/{handle}", stat.S_IRWXU)
        finally:
            os.close(handle)
        return os.open(name, OPEN_DIRECTORY, dir_fd=parent_fd)


class Copier:
    """Copies a live directory: contents (shared extents where the filesystem can), modes, mtimes, links, hard links.

    Special files and other filesystems are left out. What the table knew of a file is carried over to its copy.
    """

    def __init__(self) -> None:
        self._links: dict[tuple[int, int], bytes] = {}
        self._linked: dict[bytes, os.stat_result] = {}
        self._root_fd = -1
        self._reflinks = True

    def root(self, source_fd: int, target_fd: int, seen: Seen | None) -> Seen | None:
        """Fill the empty directory ``target_fd``. Raises ``CapacityError``, ``StoreError``."""
        self._root_fd = target_fd
        carried = self._directory(source_fd, target_fd, b"", seen, 0)
        for path, found in self._linked.items() if carried is not None else ():
            assert carried is not None
            carried.set_key(path, stat_key(found))  # a further name changed the ctime of the first
        return carried

    def _directory(self, source_fd: int, target_fd: int, path: bytes, seen: Seen | None, depth: int) -> Seen | None:
        check_depth(depth, path)
        device = os.fstat(source_fd).st_dev
        carried = Seen(seen.ref, seen.entries, leaves=seen.leaves, big=dict(seen.big)) if seen is not None else None
        for name in list_names(source_fd, path):
            here = join(path, name)
            try:
                found = os.stat(name, dir_fd=source_fd, follow_symlinks=False)
                if found.st_dev != device:
                    continue
                inner = seen.dirs.get(name) if seen is not None else None
                child = self._one(source_fd, target_fd, name, here, found, inner, depth)
                copied = os.stat(name, dir_fd=target_fd, follow_symlinks=False)
            except FileNotFoundError:
                continue  # it went away, or was not copied
            except (CapacityError, StoreError):
                raise
            except OSError as error:
                raise _failed(here, error) from error
            if seen is not None and carried is not None and name in seen.keys:
                unchanged = seen.keys[name] == stat_key(found) and name not in seen.racy
                carried.keys[name] = stat_key(copied)
                if not unchanged:
                    carried.racy.add(name)
                if child is not None:
                    carried.dirs[name] = child
        found = os.fstat(source_fd)
        os.fchmod(target_fd, kept_mode(found.st_mode))
        os.utime(target_fd, ns=(found.st_mtime_ns, found.st_mtime_ns))
        return carried

    def _one(
        self, source_fd: int, target_fd: int, name: bytes, path: bytes, found: os.stat_result, seen: Seen | None, depth: int
    ) -> Seen | None:
        if stat.S_ISDIR(found.st_mode):
            os.mkdir(name, 0o700, dir_fd=target_fd)
            a, b = os.open(name, OPEN_DIRECTORY, dir_fd=source_fd), os.open(name, OPEN_DIRECTORY, dir_fd=target_fd)
            try:
                return self._directory(a, b, path, seen, depth + 1)
            finally:
                os.close(a)
                os.close(b)
        if stat.S_ISLNK(found.st_mode):
            os.symlink(os.readlink(name, dir_fd=source_fd), name, dir_fd=target_fd)
            os.utime(name, ns=(found.st_mtime_ns, found.st_mtime_ns), dir_fd=target_fd, follow_symlinks=False)
        elif stat.S_ISREG(found.st_mode):
            first = self._links.setdefault((found.st_dev, found.st_ino), path) if found.st_nlink > 1 else path
            if first != path:
                os.link(first, name, src_dir_fd=self._root_fd, dst_dir_fd=target_fd, follow_symlinks=False)
                self._linked[first] = self._linked[path] = os.stat(name, dir_fd=target_fd, follow_symlinks=False)
            else:
                self._file(source_fd, target_fd, name, path)
        return None

    def _file(self, source_fd: int, target_fd: int, name: bytes, path: bytes) -> None:
        try:
            source = os.open(name, OPEN_FILE, dir_fd=source_fd)
        except PermissionError as error:
            raise unreadable(path, error) from error
        try:
            found = os.fstat(source)
            if not stat.S_ISREG(found.st_mode):
                return
            target = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=target_fd)
            try:
                self._reflinks = self._reflinks and reflink(source, target)
                if not self._reflinks:
                    _copy_bytes(source, target)
                os.fchmod(target, kept_mode(found.st_mode))
                os.utime(target, ns=(found.st_mtime_ns, found.st_mtime_ns))
            finally:
                os.close(target)
        finally:
            os.close(source)


def _copy_bytes(source: int, target: int) -> None:
    try:
        while os.copy_file_range(source, target, _COPY_BYTES):
            pass
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        while data := os.read(source, 1 << 20):
            view = memoryview(data)
            while view:
                view = view[os.write(target, view) :]


def _failed(path: bytes, error: OSError) -> CapacityError | StoreError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CapacityError("no space left for the copy", code="no-space", object=show(path))
    return StoreError(f"could not be copied: {error.strerror}", code="not-copied", object=show(path))
