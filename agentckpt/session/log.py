"""One session's records in the store's journal, written under its epoch.

Invariants:
1. The segments recorded so far stand before the next intent, in the same append.
2. Every record names this owner's epoch; the store refuses a stale one in the critical section of the append.
3. An outcome that is refused because a newer owner exists is appended once more, marked ``late``: evidence is never destroyed.
4. The ledger in memory holds an entry only after the journal holds it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from blake3 import blake3

from ..errors import ConflictError
from ..ledger import Ledger, LedgerEntry
from ..ledger.values import pack_value
from ..store import Draft, Store, View
from ..types import Mark, Ref, Value
from .segments import Segment, Segments

BodyOf = tuple[str, Mapping[str, Any]]
"""(kind, body) of a record"""
ENTRY_KINDS = frozenset({"segment", "intent", "outcome", "resolve", "restore"})
"""what ``SessionView.entries`` holds"""


class Log(Protocol):
    """Where a session's records go: ``JournalLog``, or ``MemoryLog`` for branches that write nothing."""

    epoch: int

    @property
    def durable(self) -> bool: ...

    @property
    def mark(self) -> Mark: ...

    def append(self, drafts: Sequence[BodyOf], *, segments: bool = False, durable: bool = True) -> Sequence[LedgerEntry]:
        """Append records (kind, body) in order; with ``segments`` the recorded ones stand before them."""
        ...

    def append_outcome(self, body: Mapping[str, Any], *, durable: bool) -> bool:
        """Append an outcome; True if it had to be marked late."""
        ...

    def pack(self, value: Value) -> Value:
        """``value``, or ``{"$ref": reference}`` of a chunk that is durable before this returns, if it is over 64 KiB."""
        ...


class JournalLog:
    """Records of one session in the store's journal. Blocking and thread-safe."""

    durable = True

    def __init__(
        self, store: Store, sid: bytes, *, epoch: int, num_entries: int, ledger: Ledger, segments: Segments, lock: threading.RLock
    ) -> None:
        """``num_entries``: how many of the session's ``SessionView.entries`` the ledger holds already."""
        self._store = store
        self._sid = sid
        self.epoch = epoch
        self._num_entries = num_entries
        self._ledger = ledger
        self._segments = segments
        self._lock = lock
        self._unwritten: list[BodyOf] = []
        """outcomes whose append failed: the effects happened, so they are written before anything else"""
        self._order = threading.Lock()  # held over the write, not over the flush: the ledger learns in the journal's order

    @property
    def mark(self) -> Mark:
        with self._lock:
            return self._ledger.mark

    def append(
        self,
        drafts: Sequence[BodyOf],
        *,
        segments: bool = False,
        durable: bool = True,
        expect: Callable[[View], None] = lambda view: None,
    ) -> Sequence[LedgerEntry]:
        """Raises ``ConflictError`` (a newer owner, a moved head), ``StoreError``, ``CapacityError``.

        ``expect`` runs in the critical section and may refuse.
        """
        with self._order:
            entries = self._write(drafts, segments, expect)
        if durable:
            self._store.flush_journal()
        return entries

    def _write(self, drafts: Sequence[BodyOf], segments: bool, expect: Callable[[View], None]) -> Sequence[LedgerEntry]:
        taken: list[Segment] = []
        owed: list[BodyOf] = []
        others: list[LedgerEntry] = []

        def build(view: View) -> list[Draft]:
            expect(view)
            # What other processes wrote about this session (a person's resolution, say) comes with the critical section.
            others[:] = view.sessions[self._sid].entries[self._num_entries :] if self._sid in view.sessions else []
            if not owed:
                owed[:], self._unwritten = self._unwritten, []
            if segments and not taken:
                taken.extend(self._segments.take_fresh())
            bodies = [*owed, *(("segment", segment.body(self.epoch)) for segment in taken)]
            return [Draft(kind, self._sid, dict(body)) for kind, body in [*bodies, *drafts]]

        try:
            entries = self._store.append(build, durable=False)
        except BaseException:
            self._segments.give_back(taken)
            self._unwritten = [*owed, *self._unwritten]
            raise
        with self._lock:
            for entry in [*others, *entries]:
                if entry.kind in ENTRY_KINDS:
                    self._num_entries += 1
                    self._ledger.add(entry)
        return entries

    def append_outcome(self, body: Mapping[str, Any], *, durable: bool) -> bool:
        try:
            self.append([("outcome", body)], durable=durable)
            return False
        except ConflictError:
            late = {**body, "late": True}
            self._store.append(lambda view: [Draft("outcome", self._sid, late)])
            return True
        except Exception:
            with self._order, self._lock:
                record = self._ledger.get(body["key"])
                if record is not None and record.state == "intended":  # else it stands in the journal and only the flush failed
                    self._unwritten.append(("outcome", body))
            raise

    def pack(self, value: Value) -> Value:
        return pack_value(value, self._put)

    def _put(self, data: bytes) -> Ref:
        reference = self._store.put("chunk", data, compress=True)
        self._store.sync()
        return reference


@dataclass(frozen=True, slots=True)
class MemoryEntry:
    """An entry of a log that is never written."""

    kind: str
    sseq: int
    hash: bytes
    body: Mapping[str, Any]


class MemoryLog:
    """The records of a branch that writes nothing: a crash loses them, and the turn makes the branch again."""

    durable = False

    def __init__(self, *, ledger: Ledger, segments: Segments, lock: threading.RLock) -> None:
        self.epoch = 1
        self._ledger = ledger
        self._segments = segments
        self._lock = lock
        self._mark = Mark(0, bytes(32))

    @property
    def mark(self) -> Mark:
        return self._mark

    def append(self, drafts: Sequence[BodyOf], *, segments: bool = False, durable: bool = True) -> Sequence[LedgerEntry]:
        entries = []
        with self._lock:
            for kind, body in drafts:
                number = self._mark.seq + 1
                entry = MemoryEntry(kind, number, blake3(self._mark.hash + number.to_bytes(8, "little")).digest(), body)
                self._mark = Mark(number, entry.hash)
                entries.append(entry)
                if kind in ENTRY_KINDS:
                    self._ledger.add(entry)
        return entries

    def append_outcome(self, body: Mapping[str, Any], *, durable: bool) -> bool:
        self.append([("outcome", body)])
        return False

    def pack(self, value: Value) -> Value:
        return value  # stays in memory, whatever its size
