"""Single files of a workspace by name: never outside it, never through a symbolic link."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress

from ..errors import CapacityError, IncompatibleError, NotFoundError, StoreError
from .compare import open_path
from .scan import OPEN_DIRECTORY, OPEN_FILE


def read_file(root: str, path: str) -> bytes:
    """Raises ``NotFoundError``, ``IncompatibleError`` (``outside``, ``not-a-file``)."""
    root_fd = os.open(root, OPEN_DIRECTORY)
    try:
        fd = _open(root_fd, relative(root, path), OPEN_FILE, path)
    finally:
        os.close(root_fd)
    _check_regular(fd, path)
    with os.fdopen(fd, "rb") as file:
        return file.read()


def write_file(root: str, path: str, data: bytes) -> None:
    """Create or replace; missing parents are made. Raises as ``read_file``, and ``CapacityError``."""
    *parents, last = relative(root, path).split(b"/")
    at = os.open(root, OPEN_DIRECTORY)
    try:
        for name in parents:
            with suppress(FileExistsError):
                os.mkdir(name, 0o755, dir_fd=at)
            inner = _open(at, name, OPEN_DIRECTORY, path)
            os.close(at)
            at = inner
        fd = _open(at, last, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, path)
    finally:
        os.close(at)
    _check_regular(fd, path)
    try:
        with os.fdopen(fd, "wb") as file:
            os.ftruncate(fd, 0)
            file.write(data)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CapacityError("no space left", code="no-space", object=path) from error
        raise


def relative(root: str, path: str) -> bytes:
    """``path`` from the root on. An absolute path must begin with the root. Raises ``IncompatibleError`` (``outside``)."""
    text = os.fsencode(path)
    if text.startswith(b"/"):
        prefix = os.fsencode(root) + b"/"
        if not text.startswith(prefix):
            raise IncompatibleError("is outside the workspace", code="outside", object=path, expected=f"a path in {root}")
        text = text[len(prefix) :]
    parts = [part for part in text.split(b"/") if part not in (b"", b".")]
    if not parts or b".." in parts or b"\0" in text:
        raise IncompatibleError("is no path inside the workspace", code="outside", object=path)
    return b"/".join(parts)


def _open(root_fd: int, path: bytes, flags: int, shown: str) -> int:
    try:
        return open_path(root_fd, path, flags, mode=0o644)
    except FileNotFoundError as error:
        raise NotFoundError("no such file in the workspace", code="no-path", object=shown) from error
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise IncompatibleError(
                "leads through something that is no directory", code="outside", object=shown, hint="symbolic links are not followed"
            ) from error
        if error.errno in (errno.EISDIR, errno.ENXIO):
            raise IncompatibleError("is no regular file", code="not-a-file", object=shown) from error
        raise StoreError(f"could not be opened: {error.strerror}", code="not-opened", object=shown) from error


def _check_regular(fd: int, shown: str) -> None:
    """Closes ``fd`` if it raises."""
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise IncompatibleError("is no regular file", code="not-a-file", object=shown)
