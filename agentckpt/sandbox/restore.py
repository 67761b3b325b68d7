"""Puts a stored tree in the place of a live directory, in one step.

    <parent>/<name>                                   the live tree
    <parent>/.<name>.agentckpt-<16 hex>/tree          built here; after the exchange: the displaced tree
                                       /complete      the inode of what was built, written when it is whole

Invariants:
1. Until ``commit`` the live tree is untouched. ``commit`` exchanges two names in one step (renameat2, RENAME_EXCHANGE); where the
   filesystem cannot, by two renames: a crash between them leaves no live tree, and the next ``prepare_tree`` builds it again.
2. A container whose builder is alive is locked (flock). One that is not locked is: half-built or not yet exchanged (garbage, removed by the
   next ``prepare_tree``), or it holds a displaced tree, kept until ``discard_displaced``.
3. Ignored paths of the displaced tree are moved into the new one; a commit that was cut short is finished by the next.
4. Nothing is synced: whoever restores after a crash of the machine compares contents, not times, and builds again what was lost.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import stat
import time

from ..errors import CapacityError, ConflictError, NotFoundError, StoreError
from ..types import PartReport, Ref, Source
from . import linux
from .build import Builder
from .compare import Comparison, open_path, set_times
from .copying import remove_tree
from .dirs import Budget
from .entries import kept_mode
from .ignore import Ignore
from .scan import OPEN_DIRECTORY, Seen, join, list_names, show
from .tree import Tree, read_tree


def _container_pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(f".{name}.agentckpt-") + "[0-9a-f]{16}")


class StagedTree:
    """A restore that is ready: ``commit`` takes over, ``abort`` forgets it. Made by ``prepare_tree``."""

    def __init__(self, target: str, tree: Tree, kept: Ignore, seconds: dict[str, float]) -> None:
        self.target = target
        self.seen: Seen | None = None
        """what the next capture need not read again; set once this is prepared"""
        self.comparison: Comparison | None = None
        """set if the live tree equals the checkpoint already"""
        self.container: str | None = None
        self.num_files = 0
        self.num_left_out = 0
        self._lock_fd = -1
        self._tree = tree
        self._kept = kept
        self._seconds = seconds
        self._exchanged = False
        self._displaced: str | None = None
        self._report: PartReport | None = None

    def build(self, source: Source, left_out: Ignore) -> None:
        """Make the tree aside. After an error nothing of it is left."""
        parent, name = os.path.split(self.target)
        self.container = os.path.join(parent, f".{name}.agentckpt-{secrets.token_hex(8)}")
        try:
            os.mkdir(self.container, 0o700)
            self._lock_fd = os.open(self.container, OPEN_DIRECTORY)
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.mkdir("tree", 0o700, dir_fd=self._lock_fd)
            fd = os.open("tree", OPEN_DIRECTORY, dir_fd=self._lock_fd)
            try:
                builder = Builder(source, left_out, Budget(num_bytes=_free_bytes(fd)))
                self.seen = builder.root(fd, self._tree.root, self._tree.mode, self._tree.mtime_ns)
                mark = os.open("complete", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=self._lock_fd)
                with os.fdopen(mark, "w") as file:
                    file.write(str(os.fstat(fd).st_ino))
            finally:
                os.close(fd)
        except BaseException as error:
            self.abort()
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT) and not isinstance(error, CapacityError):
                raise CapacityError("no space left for the restored tree", code="no-space", object=self.target) from error
            raise
        self.num_files, self.num_left_out = builder.built.num_files, builder.built.num_left_out

    def commit(self) -> PartReport:
        """Take over; a second call returns the same report."""
        if self._report is None:
            started_s = time.monotonic()
            if self.comparison is not None:
                self._settle()
            elif not self._exchanged:
                self._displaced = self._exchange()
                self._exchanged = True
            displaced = self._displaced
            lost = _move_ignored(self.target, self._kept)
            if displaced is not None and _is_empty(displaced):
                remove_tree(os.path.dirname(displaced))
                displaced = None
            self._unlock()
            self._seconds["exchange"] = time.monotonic() - started_s
            left_out = [f"{self.num_left_out} paths that are ignored here"] * bool(self.num_left_out)
            self._report = PartReport(
                "sandbox", restored=self.num_files, consistency=self._tree.consistency, lost=(*left_out, *lost),
                displaced=displaced, seconds=self._seconds,
            )  # fmt: skip
        return self._report

    def abort(self) -> None:
        """Remove what was built. Does nothing after ``commit``."""
        if not self._exchanged and self.container is not None:
            with contextlib.suppress(FileNotFoundError):
                remove_tree(self.container)
            self.container = None
        self._unlock()

    def _unlock(self) -> None:
        fd, self._lock_fd = self._lock_fd, -1
        if fd >= 0:
            os.close(fd)

    def _settle(self) -> None:
        """The live tree stays; only times are set."""
        assert self.comparison is not None
        assert self.seen is not None
        fd = os.open(self.target, OPEN_DIRECTORY)
        try:
            set_times(fd, self.comparison.times, self.seen)
        finally:
            os.close(fd)

    def _exchange(self) -> str | None:
        """Path of the displaced tree, None if there was none."""
        if self.container is None:
            raise ConflictError("this restore was aborted", code="aborted", object=self.target)
        tree = os.path.join(self.container, "tree")
        if not os.path.lexists(self.target):
            os.rename(tree, self.target)
            remove_tree(self.container)
            return None
        if not linux.exchange(tree, self.target):
            old = os.path.join(self.container, "old")
            os.rename(self.target, old)
            os.rename(tree, self.target)
            os.rename(old, tree)
        return tree


def prepare_tree(source: Source, ref: Ref, target: str, ignore: Ignore, before: Seen | None = None) -> StagedTree:
    """Verify the tree ``ref`` and build it beside ``target`` (absolute, resolved), unless that equals it already.

    ``before`` is what this process knows of the live tree. Raises ``ConflictError`` (mount point, other filesystem, working directory of a
    live process), ``CapacityError``, ``CorruptionError``, ``NotFoundError``, ``StoreError``; then the target is as it was.
    """
    started_s = time.monotonic()
    tree = read_tree(source, ref)
    kept = ignore.joined(tree.ignored)
    staged = StagedTree(target, tree, kept, {})
    parent = os.path.dirname(target)
    if not os.path.isdir(parent):
        raise NotFoundError("the directory that should hold it does not exist", code="no-parent", object=target)
    _sweep(target)
    if os.path.lexists(target):
        _check_directory(target)
        fd = os.open(target, OPEN_DIRECTORY)
        try:
            comparison = Comparison(source, ignore, kept)
            same_mode = kept_mode(os.fstat(fd).st_mode) == tree.mode
            staged.seen = comparison.equal(fd, tree.root, before) if same_mode else None
        finally:
            os.close(fd)
        staged._seconds["compare"] = time.monotonic() - started_s
        if staged.seen is not None:
            staged.comparison, staged.num_files = comparison, comparison.num_files
            return staged
        check_replaceable(target)
    started_s = time.monotonic()
    staged.build(source, ignore)
    staged._seconds["build"] = time.monotonic() - started_s
    return staged


def _check_directory(target: str) -> None:
    if not stat.S_ISDIR(os.lstat(target).st_mode):
        raise ConflictError("is not a directory", code="not-a-directory", object=target, hint="name another place")


def check_replaceable(target: str) -> None:
    """Raises ``ConflictError`` if the directory ``target`` must not be exchanged."""
    if os.stat(target).st_dev != os.stat(os.path.dirname(target)).st_dev or target in (mounts := linux.mounts_at_or_below(target)):
        raise ConflictError(
            "is a mount point", code="mount-point", object=target, hint="use a directory inside the mounted filesystem as the workspace"
        )
    if mounts:
        raise ConflictError("a filesystem is mounted inside", code="mount-point", object=target, found=mounts[0], hint="unmount it first")
    pids = linux.cwd_holders(target)
    if pids:
        raise ConflictError(
            "is the working directory of a live process", code="in-use", object=target, found=f"process {', '.join(map(str, pids[:5]))}",
            hint="let that process leave the directory or end it, then restore again",
        )  # fmt: skip


def _free_bytes(fd: int) -> int:
    found = os.fstatvfs(fd)
    return found.f_bavail * found.f_frsize


def _is_empty(path: str) -> bool:
    return not os.listdir(path)


# --- what earlier restores left ----------------------------------------------------------------------------------------


def _containers(target: str) -> list[str]:
    """Containers beside ``target`` that no live builder holds."""
    parent, name = os.path.split(target)
    pattern = _container_pattern(name)
    found = []
    for other in sorted(os.listdir(parent)):
        path = os.path.join(parent, other)
        if pattern.fullmatch(other) and not _is_locked(path):
            found.append(path)
    return found


def _is_locked(container: str) -> bool:
    try:
        fd = os.open(container, OPEN_DIRECTORY)
    except OSError:
        return True  # gone, or not ours
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def displaced_in(container: str) -> str | None:
    """Path of the displaced tree in a container, None if there is none (yet)."""
    old, tree = os.path.join(container, "old"), os.path.join(container, "tree")
    if os.path.isdir(old):
        return old
    try:
        with open(os.path.join(container, "complete")) as file:
            built = int(file.read() or "-1")
        return None if os.lstat(tree).st_ino == built or built < 0 else tree
    except (FileNotFoundError, ValueError):
        return None


def _sweep(target: str) -> None:
    """Remove containers that hold nothing of worth."""
    for container in _containers(target):
        if displaced_in(container) is None:
            remove_tree(container)


def discard_displaced(target: str) -> int:
    """Remove the displaced trees beside ``target``: a later cut is published. Returns their number."""
    containers = _containers(target)
    for container in containers:
        remove_tree(container)
    return len(containers)


def _move_ignored(target: str, kept: Ignore) -> list[str]:
    """Bring ignored paths from displaced trees back into the live one. Returns, in words, what could not be."""
    lost: list[str] = []
    parent, name = os.path.split(target)
    pattern = _container_pattern(name)
    for container in sorted(other for other in os.listdir(parent) if kept and pattern.fullmatch(other)):
        displaced = displaced_in(os.path.join(parent, container))
        if displaced is None:
            continue
        source_fd, target_fd = os.open(displaced, OPEN_DIRECTORY), os.open(target, OPEN_DIRECTORY)
        try:
            for path in _ignored_paths(source_fd, b"", kept):
                if not _move(source_fd, target_fd, path):
                    lost.append(f"the ignored path {show(path)} stays in {displaced}")
        except OSError as error:
            raise StoreError(f"ignored paths could not be moved: {error.strerror}", code="not-restored", object=displaced) from error
        finally:
            os.close(source_fd)
            os.close(target_fd)
    return lost


def _ignored_paths(fd: int, path: bytes, kept: Ignore) -> list[bytes]:
    found = []
    for name in list_names(fd, path):
        here = join(path, name)
        is_directory = stat.S_ISDIR(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode)
        if kept(here, is_directory):
            found.append(here)
        elif is_directory:
            inner = os.open(name, OPEN_DIRECTORY, dir_fd=fd)
            try:
                found += _ignored_paths(inner, here, kept)
            finally:
                os.close(inner)
    return found


def _move(source_fd: int, target_fd: int, path: bytes) -> bool:
    """False if something stands in the way. Missing parents are made."""
    *parents, last = path.split(b"/")
    at, made = os.dup(target_fd), b""
    try:
        for name in parents:
            made = join(made, name)
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o755, dir_fd=at)
            try:
                inner = os.open(name, OPEN_DIRECTORY, dir_fd=at)
            except OSError:
                return False
            os.close(at)
            at = inner
        try:
            os.stat(last, dir_fd=at, follow_symlinks=False)
        except FileNotFoundError:
            parent = path.rpartition(b"/")[0]
            source = open_path(source_fd, parent, OPEN_DIRECTORY) if parent else os.dup(source_fd)
            try:
                os.rename(last, last, src_dir_fd=source, dst_dir_fd=at)
            finally:
                os.close(source)
            return True
        return False
    finally:
        os.close(at)
