"""Leases: who may write (FORMAT.md: a file whose lock is held for its owner's life).

Invariants:
1. The kernel's lock decides, never the content, a time or a process number: death releases it.
2. Lease files are never removed: two owners could otherwise lock two files of the same name.
"""

from __future__ import annotations

import json
import os
import re
from typing import Final

from ..errors import ConflictError, StoreError
from .failures import io_errors
from .io import IO, Lock, read_file

WRITERS: Final = "_writers"
"""held shared by each writing store, exclusively by prune"""
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_MAX_CONTENT_BYTES: Final = 4096


class Lease:
    """A held lease; also a context manager."""

    def __init__(self, name: str, lock: Lock) -> None:
        self.name = name
        self._lock = lock

    @property
    def held(self) -> bool:
        """False after ``release`` and in a forked child."""
        return self._lock.held

    def release(self) -> None:
        """Idempotent."""
        self._lock.release()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()


def take_lease(io: IO, root: str, name: str) -> Lease:
    """The lease ``name``. ``ConflictError`` names the holder; ``StoreError`` for a name that is no file name."""
    if not _NAME.fullmatch(name):
        raise StoreError("is no name for a lease", object=name, expected="letters, digits, . _ -", code="bad-lease-name")
    return _take(io, root, name, shared=False)


def take_writers(io: IO, root: str, *, exclusive: bool) -> Lease:
    """The lease that all writers share, or that prune has alone."""
    return _take(io, root, WRITERS, shared=not exclusive)


def host_identity() -> dict[str, str | int]:
    """Host name, process number, boot id: what a lease file and an owner record say of their owner."""
    return {"host": os.uname().nodename, "pid": os.getpid(), "boot": boot_id()}


def boot_id() -> str:
    """The kernel's id of this boot; empty where there is none."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


def _take(io: IO, root: str, name: str, *, shared: bool) -> Lease:
    path = f"{root}/leases/{name}"
    with io_errors(path):
        try:
            lock = io.lock(path, shared=shared, blocking=False)
        except ConflictError:
            what, who = ("lease", name) if name != WRITERS else ("store", root)
            raise ConflictError(
                "is held by somebody else", object=f"{what} {who}", expected="nobody", found=_holder(io, path), code="leased",
                hint="stop that process, or wait for it",
            ) from None  # fmt: skip
        if not shared:
            lock.write(json.dumps({**host_identity(), "since": io.now()}).encode() + b"\n")
        return Lease(name, lock)


def _holder(io: IO, path: str) -> str:
    try:
        found = json.loads(read_file(io, path, _MAX_CONTENT_BYTES))
        return f"process {int(found['pid'])} on {str(found['host'])[:64]}"
    except (OSError, ValueError, KeyError, TypeError):
        return "an unknown process"
