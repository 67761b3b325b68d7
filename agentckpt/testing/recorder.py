"""Counts what an ``IO`` is asked to do, and on which thread: flushes a checkpoint, bytes a turn, nothing on the event loop."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from ..store.io import IO
from ._wrap import WrappedIO

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Event:
    """One operation: ``thread`` is ``threading.get_ident()`` of its caller, ``num_bytes`` what it wrote."""

    kind: str
    path: str
    num_bytes: int
    thread: int


class RecorderIO(WrappedIO):
    """An ``IO`` that remembers each operation in ``events`` before it passes it on. Thread-safe."""

    def __init__(self, inner: IO) -> None:
        super().__init__(inner)
        self.events: list[Event] = []
        self._mutex = threading.Lock()

    def around(self, kind: str, path: str, num_bytes: int, call: Callable[[], T]) -> T:
        with self._mutex:
            self.events.append(Event(kind, path, num_bytes, threading.get_ident()))
        return call()

    def reset(self) -> None:
        with self._mutex:
            self.events = []

    def counts(self) -> Counter[str]:
        """Number of operations by kind."""
        with self._mutex:
            return Counter(event.kind for event in self.events)

    @property
    def num_fdatasync(self) -> int:
        return self.counts()["fdatasync"]

    @property
    def num_fsync_dir(self) -> int:
        return self.counts()["fsync_dir"]

    @property
    def num_renames(self) -> int:
        return self.counts()["rename"]

    @property
    def written_bytes(self) -> int:
        with self._mutex:
            return sum(event.num_bytes for event in self.events)

    def threads(self, *kinds: str) -> set[int]:
        """Idents of the threads that did an operation (of one of ``kinds``, or any)."""
        with self._mutex:
            return {event.thread for event in self.events if not kinds or event.kind in kinds}
