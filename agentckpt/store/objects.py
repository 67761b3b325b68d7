"""Objects on their way into packs: put, sync, seal. The store's ``Sink``; ``reading.py`` is the way back.

Invariants:
1. An object's stored bytes stay in memory from ``put`` until they are durable; until then only this process sees it.
2. ``put`` refers to what is already there only if that is durable, or waits in this process for the same sync.
3. ``sync`` returns when everything put before the call is durable. Who comes while a flush runs waits for the next,
   and that one serves all who wait (group commit).
4. A failed pack is left behind; what it held unsynced goes to a new pack at the next attempt.

Locks, in this order: ``_writing`` (the open pack), ``_lock`` (maps in memory). Hashing and compression hold neither.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeVar

from ..errors import CapacityError
from ..types import Buffer, Kind, Ref
from .catalog import Catalog
from .failures import io_errors
from .ids import IdKeys, check_ref
from .io import IO
from .pack import PackFiles, PackMark, PackWriter, Waiting
from .reading import Reader
from .record import (
    MAX_PLAIN_BYTES,
    Location,
    PackHeader,
    record_span,
    squeeze,
)

T = TypeVar("T")

WRITE_BYTES: Final = 4 << 20
"""buffered records are written to the open pack (not synced) when there are so many"""
MAX_WAITING_BYTES: Final = 256 << 20
"""un-synced bytes in memory; above it ``put`` syncs"""
INDEX_BATCH: Final = 4096
MISS_INTERVAL_S: Final = 0.05
"""``has`` looks at the packs of other processes at most this often"""


@dataclass(frozen=True, slots=True)
class ObjectStats:
    """What this ``Store`` object did since it was opened."""

    num_puts: int = 0
    num_new: int = 0
    new_bytes: int = 0
    """plaintext bytes of new objects"""
    stored_bytes: int = 0
    num_flushes: int = 0
    """fdatasync of packs"""
    num_sealed: int = 0


class Objects:
    """Thread-safe."""

    def __init__(self, io: IO, root: str, store_id: bytes, keys: IdKeys, catalog: Catalog, files: PackFiles) -> None:
        self._io, self._root, self._store_id, self._keys = io, root, store_id, keys
        self._catalog = catalog
        self._writing, self._lock = threading.RLock(), threading.Lock()
        self._writer_id = io.random(16)
        self._sequence = 0
        self._writer: PackWriter | None = None
        self._mark = PackMark("", 0)
        self._waiting: list[Waiting] = []
        """not durable, oldest first; the first ``_num_written`` stand in the open pack"""
        self._num_written = 0
        self._by_ref: dict[Ref, Waiting] = {}
        self._waiting_bytes, self._unwritten_bytes = 0, 0
        self._recent: dict[Ref, Location] = {}
        """durable, not yet in the index"""
        self._recent_rows: list[tuple[Ref, Location]] = []
        self._put_ordinal, self._durable_ordinal = 0, 0
        self.reader = Reader(io, root, keys, catalog, files, self)
        self.stats = ObjectStats()

    # --- Sink -------------------------------------------------------------------------------------------------------

    def put(self, kind: Kind, data: Buffer, *, compress: bool = False) -> Ref:
        """See ``types.Sink``. ``CapacityError`` above 16 MiB, or when waiting bytes had to be written and the disk is full."""
        view = memoryview(data).cast("B") if not isinstance(data, bytes) else data
        if len(view) > MAX_PLAIN_BYTES:
            raise CapacityError(
                "is too long", object=kind, expected=f"at most {MAX_PLAIN_BYTES} bytes", found=str(len(view)), code="object-too-long"
            )
        ref = self._keys.ref(kind, view)
        if self._is_there(ref):
            with self._lock:
                self.stats = replace(self.stats, num_puts=self.stats.num_puts + 1)
            return ref
        self._enter(ref, view, compress)
        return ref

    def write_again(self, kind: Kind, data: Buffer, *, compress: bool = False) -> Ref:
        """Like ``put``, but the object is written even if another pack has it (to move it out of that pack)."""
        view = memoryview(data).cast("B") if not isinstance(data, bytes) else data
        ref = self._keys.ref(kind, view)
        self._enter(ref, view, compress)
        return ref

    def sync(self) -> PackMark:
        """Make everything put before this call durable. ``CapacityError``, ``StoreError``: it is not; try again."""
        with self._lock:
            target = self._put_ordinal
        with self._writing, io_errors(f"{self._root}/packs"):
            if self._durable_ordinal < target:
                self._write_waiting()
                self._flush()
            return self._mark

    def seal(self) -> None:
        """Sync, then give the open pack its final name. The next record begins a new one."""
        with self._writing:
            self.sync()
            with io_errors(f"{self._root}/packs"):
                if self._writer is not None and self._writer.entries and not self._writer.failed:
                    self._seal()
            self._index_recent()

    def index_now(self) -> None:
        """Write the batch that waits for the index."""
        with self._writing:
            self._index_recent()

    def is_durable(self, ref: Ref) -> bool:
        """True if a head may name it."""
        with self._lock:
            if ref in self._by_ref:
                return False
            if ref in self._recent:
                return True
        return self._catalog.durable(ref) is not None or (self.reader.look_again() and self._catalog.durable(ref) is not None)

    # --- Source -----------------------------------------------------------------------------------------------------

    def has(self, ref: Ref) -> bool:
        """True if a ``put`` of it would write nothing. Another process's newest objects may be seen 0.05 s late."""
        ref = check_ref(ref)
        if self._is_there(ref):
            return True
        if 0 <= self._io.now() - self.reader.last_look_s < MISS_INTERVAL_S:
            return False
        return self.reader.look_again() and self._is_there(ref)

    def waiting(self, ref: Ref) -> Waiting | None:
        """See ``reading.Memory``."""
        with self._lock:
            return self._by_ref.get(ref)

    def recent(self, ref: Ref) -> Location | None:
        """See ``reading.Memory``."""
        with self._lock:
            return self._recent.get(ref)

    def close(self) -> None:
        """Sync and seal what this process wrote. Raises as ``sync`` does; the files are closed in any case."""
        try:
            self.seal()
        finally:
            with self._writing:
                self._drop_writer()

    def abandon(self) -> None:
        """Close the files and write nothing."""
        with self._writing:
            self._drop_writer()

    # --- putting ----------------------------------------------------------------------------------------------------

    def _is_there(self, ref: Ref) -> bool:
        with self._lock:
            if ref in self._by_ref or ref in self._recent:
                return ref not in self.reader.damaged
            if ref in self.reader.damaged:
                return False
        return self._catalog.durable(ref) is not None

    def _enter(self, ref: Ref, data: Buffer, compress: bool) -> None:
        codec, stored = squeeze(data, compress)
        if not isinstance(stored, bytes):
            stored = bytes(stored)  # the caller's buffer is the caller's again when put returns
        with self._lock:
            self.stats = replace(self.stats, num_puts=self.stats.num_puts + 1)
            if ref in self._by_ref:
                return
            self._put_ordinal += 1
            item = Waiting(self._put_ordinal, ref, codec, len(data), stored)
            self._waiting.append(item)
            self._by_ref[ref] = item
            self.reader.damaged.discard(ref)
            self._waiting_bytes += len(stored)
            self._unwritten_bytes += len(stored)
            self.stats = replace(
                self.stats,
                num_new=self.stats.num_new + 1,
                new_bytes=self.stats.new_bytes + len(data),
                stored_bytes=self.stats.stored_bytes + len(stored),
            )
            much, too_much = self._unwritten_bytes >= WRITE_BYTES, self._waiting_bytes >= MAX_WAITING_BYTES
        if too_much:
            self.sync()
        elif much and self._writing.acquire(blocking=False):
            try:
                with io_errors(f"{self._root}/packs"):
                    self._write_waiting()
            finally:
                self._writing.release()

    def _write_waiting(self) -> None:
        """Append all that is not written yet, beginning new packs as they fill. The caller holds ``_writing``."""
        while True:
            with self._lock:
                rest = self._waiting[self._num_written :]
            if not rest:
                return
            writer = self._ready_writer(len(rest[0].stored))
            batch = take_fitting(writer, rest)
            try:
                writer.write(batch)
            except OSError:
                self._drop_writer()
                raise
            with self._lock:
                self._num_written += len(batch)
                self._unwritten_bytes -= sum(len(item.stored) for item in batch)

    def _ready_writer(self, next_bytes: int) -> PackWriter:
        if self._writer is not None and self._writer.failed:
            self._drop_writer()
        if self._writer is not None and self._writer.entries and record_span(next_bytes) > self._writer.room_bytes:
            self._seal()
        if self._writer is None:
            self._sequence += 1
            header = PackHeader(self._store_id, self._writer_id, self._sequence)
            self._writer = PackWriter(self._io, self._root, header, self._keys)
            self._catalog.own = self._writer.name
        return self._writer

    def _flush(self) -> None:
        writer = self._writer
        if writer is None or writer.synced == writer.length:
            return
        try:
            writer.flush()
        except OSError:
            self._drop_writer()
            raise
        self.stats = replace(self.stats, num_flushes=self.stats.num_flushes + 1)
        self._mark = PackMark(writer.name, writer.synced)
        self._settle(writer)
        writer.mark()
        if len(self._recent_rows) >= INDEX_BATCH:
            self._index_recent()

    def _seal(self) -> None:
        writer = self._writer
        assert writer is not None
        old = writer.name
        try:
            name = writer.seal()
        except OSError:
            self._drop_writer()
            raise
        self.stats = replace(self.stats, num_flushes=self.stats.num_flushes + 1, num_sealed=self.stats.num_sealed + 1)
        self._mark = PackMark(name, writer.length)
        self._settle(writer)
        self._index_recent()
        self._catalog.renamed(old, name, writer.length)
        self._drop_writer()

    def _settle(self, writer: PackWriter) -> None:
        """What is written is durable now: it leaves memory and waits for the index."""
        with self._lock:
            done, self._waiting = self._waiting[: self._num_written], self._waiting[self._num_written :]
            self._num_written = 0
            if not done:
                return
            rows = writer.entries[len(writer.entries) - len(done) :]
            for item, (ref, at) in zip(done, rows, strict=True):
                self._waiting_bytes -= len(item.stored)
                self._by_ref.pop(ref, None)
                self._recent[ref] = at
                self._recent_rows.append((ref, at))
            self._durable_ordinal = done[-1].ordinal

    def _index_recent(self) -> None:
        """Move what is durable into the index. One pack at a time: all rows are of the present one."""
        rows = self._recent_rows
        if not rows:
            return
        by_pack: dict[str, list[tuple[Ref, Location]]] = {}
        for ref, at in rows:
            by_pack.setdefault(at.pack, []).append((ref, at))
        for pack, entries in by_pack.items():
            self._catalog.added(pack, entries, self._mark.length if pack == self._mark.name else 0)
        with self._lock:
            self._recent_rows = self._recent_rows[len(rows) :]
            for ref, at in rows:
                if self._recent.get(ref) == at:
                    del self._recent[ref]

    def _drop_writer(self) -> None:
        """Leave the open pack. What it held unsynced counts as not written."""
        writer, self._writer = self._writer, None
        if writer is None:
            return
        self._catalog.own = None
        with self._lock:
            self._unwritten_bytes += sum(len(item.stored) for item in self._waiting[: self._num_written])
            self._num_written = 0
        self._index_recent()
        writer.close()


def take_fitting(writer: PackWriter, waiting: Sequence[Waiting]) -> list[Waiting]:
    """The longest run from the start that the pack has room for: at least one record, at most 4 MiB a write."""
    taken: list[Waiting] = []
    size = 0
    for item in waiting:
        size += record_span(len(item.stored))
        if taken and (size > WRITE_BYTES or size > writer.room_bytes):
            break
        taken.append(item)
    return taken
