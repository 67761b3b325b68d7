"""The journal: one ordered list of everything that may change, and the only commit point (FORMAT.md section 5).

Invariants:
1. Records are written only under ``journal/lock``, after everything that others appended was read and the drafts were
   checked against it. The flush comes outside of the lock and is shared by all who wait.
2. A segment appears under its name only when it is durable as a whole (temp file, fdatasync, rename, directory sync).
3. A segment is never truncated, and never synced again after a failed flush: a new one names the length that is valid
   and holds again, from memory, what was not durable.
4. ``durable`` is told to a caller only after fdatasync of the segment and a sync of its directory by this process:
   another process may have died between the rename and its own sync.

Locks, in this order: ``_flushing`` (one flush at a time), ``_mutex`` (state), ``journal/lock`` (other processes).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final, cast

from ..errors import CapacityError, CorruptionError, StoreError
from ..nodes import decode, encode
from .durable import write_durable
from .failures import io_errors
from .ids import ZERO_HASH, hash32
from .io import IO, File
from .replay import entry_of
from .segment import (
    CRITICAL,
    MAX_BODY_BYTES,
    MORE,
    SEGMENT_HEADER_BYTES,
    RawRecord,
    SegmentHeader,
    decode_segment_header,
    encode_record,
    encode_segment_header,
    proof_of_damage,
    records,
    segment_path,
)
from .view import KIND_NUMBER, NOT_CRITICAL, OF_SESSION, Draft, Entry, Undo, View, apply, check, check_body, undo

SEGMENT_BYTES: Final = 64 << 20
Build = Callable[[View], Sequence[Draft]]


class Journal:
    """Thread-safe. ``writable`` False: no file is created and no lock taken."""

    def __init__(self, io: IO, root: str, store_id: bytes, *, writable: bool) -> None:
        self._io, self._root, self._store_id, self._writable = io, root, store_id, writable
        self._flushing, self._mutex = threading.Lock(), threading.RLock()
        self._file: File | None = None
        self._retired: list[File] = []
        self._named = 0
        """number of the newest segment whose name this process made durable"""
        self.num_flushes = 0
        self._reset()
        with io_errors(f"{root}/journal"):
            self._catch_up(locked=False)

    def _reset(self) -> None:
        self._view = View()
        self._snapshot: View | None = None
        self._number, self._end, self._synced = 0, 0, 0
        self._last_seq, self._durable_seq = 0, 0
        """the last record that stands in a segment, and that is durable; the view may be ahead while drafts are checked"""
        self._undurable: list[RawRecord] = []
        self._failed = False
        """the present segment must not be written or synced any more"""
        self._tail_seen = (0, 0, 0)

    # --- what the store calls ---------------------------------------------------------------------------------------

    def append(self, build: Build, *, durable: bool = True) -> list[Entry]:
        """Let ``build`` see the newest state and append its drafts, in order; a crash keeps all of them or none.

        What ``build`` is given is live: valid until it returns.
        Raises what ``build`` raises and ``ConflictError`` (then nothing was written), ``StoreError``, ``CapacityError``.
        """
        with self._mutex:
            with io_errors(f"{self._root}/journal"), self._io.lock(f"{self._root}/journal/lock"):
                self._catch_up(locked=True)
                entries = self._write(build)
        if durable and entries:
            self.flush(entries[-1].seq)
        return entries

    def flush(self, seq: int | None = None) -> None:
        """Return when everything up to ``seq`` (or everything seen) is durable; waiters share one fdatasync."""
        seq = self._last_seq if seq is None else seq
        with self._flushing, io_errors(f"{self._root}/journal"):
            while self._durable_seq < seq:
                if self._last_seq < seq:
                    raise StoreError(
                        "a record that stood there is gone",
                        object=f"{self._root}/journal",
                        expected=f"record {seq}",
                        found=str(self._last_seq),
                        code="journal-lost",
                    )
                self._flush_once()
            self._close_retired()

    def view(self) -> View:
        """The newest state, as a value that nobody changes any more."""
        with self._mutex, io_errors(f"{self._root}/journal"):
            self._catch_up(locked=False)
            if self._snapshot is None:
                self._snapshot = self._view.copy()
            return self._snapshot

    def is_empty(self) -> bool:
        """True if no record was seen yet."""
        return self._last_seq == 0

    def pack_lengths(self) -> dict[str, int]:
        """For open packs, what heads say of their durable lengths."""
        return self._view.pack_lengths

    def num_bytes(self) -> int:
        """Bytes of all segments."""
        with self._mutex:
            return sum(self._io.stat(segment_path(self._root, number)).size_bytes for number in range(1, self._number + 1))

    def close(self) -> None:
        with self._flushing, self._mutex:
            self._close_retired()
            if self._file is not None:
                self._file.close()
                self._file = None

    # --- appending, under the lock ----------------------------------------------------------------------------------

    def _write(self, build: Build) -> list[Entry]:
        changes: Undo = []
        before = self._view.seq
        try:
            entries, raw = self._prepare(build(self._view), changes)
            if not entries:
                return []
            self._ready_segment()
            data = [encode_record(r.seq, r.kind, r.flags, self._synced, r.body) for r in raw]
            self._put(data)
        except BaseException:
            undo(changes)
            self._view.seq = before
            raise
        for record, piece in zip(raw, data, strict=True):
            self._took(record._replace(synced=self._synced, begin=self._end, end=self._end + len(piece)))
        return entries

    def _prepare(self, drafts: Sequence[Draft], changes: Undo) -> tuple[list[Entry], list[RawRecord]]:
        """Check each draft against the view with those before it applied, and give it its numbers."""
        entries: list[Entry] = []
        raw: list[RawRecord] = []
        for number, draft in enumerate(drafts, start=1):
            entry, body = self._number_draft(draft)
            check(self._view, draft)
            apply(self._view, entry, changes)
            entries.append(entry)
            flags = (0 if entry.kind in NOT_CRITICAL else CRITICAL) | (MORE if number < len(drafts) else 0)
            raw.append(RawRecord(entry.seq, KIND_NUMBER[entry.kind], flags, 0, body, 0, 0))
        return entries, raw

    def _number_draft(self, draft: Draft) -> tuple[Entry, bytes]:
        if draft.kind not in KIND_NUMBER:
            raise StoreError("is no kind of record", object=draft.kind, expected=", ".join(KIND_NUMBER), code="bad-record")
        body: dict[str, Any] = {**draft.body, "time": draft.body.get("time", self._io.now())}
        sid, sseq = None, 0
        if draft.kind in OF_SESSION:
            sid = draft.sid or b""
            session = self._view.sessions.get(sid)
            sseq = session.sseq + 1 if session else 1
            body |= {"sid": sid, "sseq": sseq, "prev": session.hash if session else ZERO_HASH}
        if wrong := check_body(draft.kind, body):
            raise StoreError(wrong, object="draft", code="bad-record")
        data = encode(body)
        if len(data) > MAX_BODY_BYTES:
            raise CapacityError(
                "is too long", object=f"{draft.kind} record", expected=f"at most {MAX_BODY_BYTES} bytes", found=str(len(data)),
                code="record-too-long", hint="store large values as chunks",
            )  # fmt: skip
        # Decoded again: what the view keeps is no longer the caller's to change, and equals what a replay will read.
        kept = cast(dict[str, Any], decode(data, max_bytes=MAX_BODY_BYTES))
        return Entry(self._view.seq + 1, draft.kind, sid, sseq, hash32(data), kept), data

    def _put(self, data: list[bytes]) -> None:
        file = self._opened()
        try:
            file.pwritev(self._end, data)
        except BaseException:
            # Whatever reached the file is made void at once by a segment that names the length before it. If that fails
            # too, an append that was written whole will count: the caller cannot know, and is told an error.
            self._failed = True
            with suppress(OSError):
                self._new_segment()
            raise

    def _took(self, record: RawRecord) -> None:
        """A record now stands in the present segment."""
        self._end = record.end
        self._last_seq = record.seq
        self._snapshot = None
        if self._writable:
            self._undurable.append(record)
            self._know_synced(record.synced)

    def _know_synced(self, length: int) -> None:
        if length > self._synced:
            self._synced = length
            self._undurable = [record for record in self._undurable if record.end > length]

    def _ready_segment(self) -> None:
        """Begin a new segment if the present one is full, torn or failed."""
        file = self._opened()
        torn = file.size() > self._end
        if torn and not self._failed:
            self._refuse_damage(file, self._end, file.size())
        if not (self._failed or torn or self._end > SEGMENT_BYTES):
            return
        if self._undurable and not self._failed:
            try:
                file.fdatasync()
                self.num_flushes += 1
                self._synced, self._undurable = self._end, []
            except OSError:
                self._failed = True
        self._new_segment()

    def _new_segment(self) -> None:
        """Write the next segment aside, with what is not durable yet, and publish it. Raises ``OSError``: nothing changed."""
        number, waiting, valid = self._number + 1, self._undurable, self._synced
        path, temporary = segment_path(self._root, number), f"{self._root}/journal/{number:016d}.tmp"
        first_seq = waiting[0].seq if waiting else self._last_seq + 1
        pieces = [encode_segment_header(SegmentHeader(self._store_id, number, valid, first_seq))]
        end = SEGMENT_HEADER_BYTES
        for record in waiting:
            pieces.append(encode_record(record.seq, record.kind, record.flags, end, record.body))
            end += len(pieces[-1])
        write_durable(self._io, temporary, path, pieces)
        self.num_flushes += 1
        self._open_segment(number)
        self._end = self._synced = end
        self._undurable, self._failed, self._named = [], False, number
        self._durable_seq = self._last_seq

    # --- flushing ---------------------------------------------------------------------------------------------------

    def _flush_once(self) -> None:
        with self._mutex:
            file, number, end, seq, failed = self._opened(), self._number, self._end, self._last_seq, self._failed
        if not failed:
            try:
                file.fdatasync()
                self.num_flushes += 1
                if self._named < number:
                    self._io.fsync_dir(f"{self._root}/journal")
                with self._mutex:
                    self._named = max(self._named, number)
                    self._durable_seq = max(self._durable_seq, seq)
                    if self._number == number:
                        self._know_synced(end)
                return
            except OSError:
                with self._mutex:
                    self._failed = self._failed or self._number == number
        with self._mutex, self._io.lock(f"{self._root}/journal/lock"):
            failed_number = self._number
            self._catch_up(locked=True)
            if self._number == failed_number:
                self._failed = True
                self._new_segment()

    def _close_retired(self) -> None:
        with self._mutex:
            for file in self._retired:
                file.close()
            self._retired.clear()

    # --- reading ----------------------------------------------------------------------------------------------------

    def _catch_up(self, *, locked: bool) -> None:
        """Read what was appended since the last call, through all new segments."""
        if self._number == 0:
            self._first_segment()
        while True:
            following = self._next_header()
            if following is None:
                file = self._opened()
                size = file.size()
                self._read(file, size)
                if locked:
                    return
                if self._next_header() is not None:
                    continue
                if self._end < size and self._tail_seen != (self._number, self._end, size):
                    self._refuse_damage(file, self._end, size)
                    self._tail_seen = (self._number, self._end, size)
                return
            if not self._advance(following):
                self._reload()

    def _first_segment(self) -> None:
        if not self._io.exists(segment_path(self._root, 1)):
            raise CorruptionError("its first segment is missing", object=f"{self._root}/journal", code="journal-damaged")
        self._open_segment(1)
        header = self._header(1)
        if header.first_seq != 1:
            raise CorruptionError("its first segment does not begin with record 1", object=f"{self._root}/journal", code="journal-damaged")
        self._end = self._synced = SEGMENT_HEADER_BYTES

    def _advance(self, following: SegmentHeader) -> bool:
        """Go to the next segment; False if what was read of the present one is not what became valid."""
        file, valid = self._opened(), following.previous_bytes
        if valid < self._end:
            return False
        self._read(file, valid)
        if self._end != valid:
            raise CorruptionError(
                "is damaged below the length that the next segment names", object=segment_path(self._root, self._number),
                expected=f"{valid} valid bytes", found=str(self._end), code="journal-damaged",
            )  # fmt: skip
        if following.first_seq != self._view.seq + 1:
            raise CorruptionError(
                "does not follow the one before", object=segment_path(self._root, following.number),
                expected=f"record {self._view.seq + 1}",
                found=str(following.first_seq), code="journal-damaged",
            )  # fmt: skip
        self._open_segment(following.number)
        self._end = self._synced = SEGMENT_HEADER_BYTES
        self._undurable, self._failed = [], False
        return True

    def _reload(self) -> None:
        """A segment was cut below what was read here: read everything again."""
        self._retire()
        self._reset()
        self._first_segment()

    def _next_header(self) -> SegmentHeader | None:
        if not self._io.exists(segment_path(self._root, self._number + 1)):
            return None
        return self._header(self._number + 1)

    def _header(self, number: int) -> SegmentHeader:
        path = segment_path(self._root, number)
        file = self._io.open_read(path)
        try:
            header = decode_segment_header(file.pread(0, SEGMENT_HEADER_BYTES), path)
        finally:
            file.close()
        if header.store_id != self._store_id or header.number != number:
            raise CorruptionError("belongs to another store or place", object=path, code="journal-damaged")
        return header

    def _read(self, file: File, size: int) -> None:
        for record in records(file, self._end, size):
            if record.seq != self._view.seq + 1:
                raise CorruptionError(
                    "a record is out of order", object=f"{file.path} at {record.begin}", expected=f"number {self._view.seq + 1}",
                    found=str(record.seq), code="journal-damaged",
                )  # fmt: skip
            apply(self._view, entry_of(self._view, record), [])
            self._took(record)

    def _refuse_damage(self, file: File, at: int, size: int) -> None:
        proof = proof_of_damage(file, at, size, self._last_seq)
        # Read the place again: it may have been written since, by a process that then wrote the proof.
        if proof is not None and next(records(file, at, file.size()), None) is None:
            raise CorruptionError(
                "a durable record is damaged", object=f"{file.path} at {at}", expected=f"record {self._last_seq + 1}",
                found=f"invalid bytes before record {proof.seq}", code="journal-damaged",
            )  # fmt: skip

    def _open_segment(self, number: int) -> None:
        path = segment_path(self._root, number)
        file = self._io.open_append(path) if self._writable else self._io.open_read(path)
        self._retire()
        self._file, self._number = file, number

    def _retire(self) -> None:
        # Another thread may be flushing it just now.
        if self._file is not None:
            self._retired.append(self._file)
            self._file = None

    def _opened(self) -> File:
        if self._file is None:
            raise StoreError("is closed", object=f"{self._root}/journal", code="closed")
        return self._file
