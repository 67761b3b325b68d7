"""Makes chosen operations of an ``IO`` fail, vanish, or be the last before the machine dies.

A plan is a list of ``Fault``. Each counts the operations that fit its ``kind`` and ``path`` and acts on the ``nth``
(from 1), or on all from there on if ``repeat``. What it does:

    an errno            EIO, ENOSPC, EINTR, EMFILE ...: the operation does nothing and raises ``OSError``; a failing
                        ``fdatasync`` also drops the un-synced pages where the inner file can (Linux does)
    "short"             ``pwritev`` writes half of its bytes, then raises ENOSPC (other kinds: just ENOSPC)
    "skip"              the operation does nothing and succeeds: a mutation (a forgotten flush)
    "crash"             raises ``SimulatedCrash``; every later operation of any thread does too
"""

from __future__ import annotations

import errno
import fnmatch
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, cast

from ..store.io import IO, File
from ..types import Buffer
from ._wrap import KINDS, WrappedIO

T = TypeVar("T")

Action = int | Literal["short", "skip", "crash"]
SKIPPABLE = frozenset({"fdatasync", "fsync_dir", "rename", "exchange", "unlink", "pwritev", "mkdir", "rmdir"})
"""operations without a result; the others cannot be skipped"""


class SimulatedCrash(BaseException):
    """The machine died here. Not an ``Exception``: no handler of the code under test may swallow it."""


@dataclass(frozen=True, slots=True)
class Fault:
    """``kind`` is an operation's name or ``"*"``; ``path`` a pattern of ``fnmatch`` (of the source, for a rename)."""

    kind: str
    action: Action
    nth: int = 1
    repeat: bool = False
    path: str = "*"

    def __post_init__(self) -> None:
        if self.kind != "*" and self.kind not in KINDS:
            raise ValueError(f"no operation is called {self.kind!r}; there are {', '.join(KINDS)}")
        if self.action == "skip" and self.kind not in SKIPPABLE:
            raise ValueError(f"{self.kind!r} has a result and cannot be skipped")


@dataclass(frozen=True, slots=True)
class Hit:
    """One operation on which a fault acted; ``number`` counts all operations from 1."""

    number: int
    kind: str
    path: str
    action: Action


class FaultyIO(WrappedIO):
    """An ``IO`` in which a plan of faults comes true. Thread-safe.

    ``num_operations`` counts everything asked for, so that a first run without faults says how many crash points
    there are: ``FaultyIO(model, crash_at=n)`` for n in 1..num_operations. ``log`` names them.
    """

    def __init__(self, inner: IO, plan: Sequence[Fault] = (), *, crash_at: int | None = None) -> None:
        super().__init__(inner)
        self.plan = list(plan)
        self.crash_at = crash_at
        self.num_operations = 0
        self.log: list[tuple[str, str]] = []
        self.hits: list[Hit] = []
        self.crashed = False
        self._seen = [0] * len(self.plan)
        self._mutex = threading.Lock()

    def clear(self) -> None:
        """No more faults (a crash stays one)."""
        with self._mutex:
            self.plan, self._seen, self.crash_at = [], [], None

    def around(self, kind: str, path: str, num_bytes: int, call: Callable[[], T]) -> T:
        action = self._next(kind, path)
        if action is None:
            return call()
        if action == "skip":
            return cast(T, None)
        raise _failure(action, path)

    def write(self, file: File, offset: int, buffers: Sequence[Buffer]) -> None:
        action = self._next("pwritev", file.path)
        if action == "skip":
            return
        if action is None:
            file.pwritev(offset, buffers)
            return
        if action == "short":
            data = b"".join(buffers)
            file.pwritev(offset, [data[: len(data) // 2]])
        raise _failure(action, file.path)

    def sync(self, file: File) -> None:
        action = self._next("fdatasync", file.path)
        if action == "skip":
            return
        if action is None:
            file.fdatasync()
            return
        lose = getattr(file, "lose_unsynced", None)
        if lose is not None and action != "crash":
            lose()
        raise _failure(action, file.path)

    def _next(self, kind: str, path: str) -> Action | None:
        """Count this operation and say what becomes of it."""
        with self._mutex:
            if self.crashed:
                raise SimulatedCrash(f"{kind} {path} after the crash")
            self.num_operations += 1
            self.log.append((kind, path))
            action: Action | None = "crash" if self.crash_at == self.num_operations else None
            for i, fault in enumerate(self.plan):
                if fault.kind not in ("*", kind) or not fnmatch.fnmatchcase(path, fault.path):
                    continue
                self._seen[i] += 1
                if action is None and (self._seen[i] == fault.nth or (fault.repeat and self._seen[i] > fault.nth)):
                    action = fault.action
            if action is not None:
                self.hits.append(Hit(self.num_operations, kind, path, action))
            self.crashed = action == "crash"
            return action


def _failure(action: Action, path: str) -> BaseException:
    if action == "crash":
        return SimulatedCrash(path)
    code = errno.ENOSPC if action == "short" else cast(int, action)
    return OSError(code, os.strerror(code), path)
