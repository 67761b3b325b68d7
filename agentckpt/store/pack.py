"""Packs: the one that this process writes, and open files of all (FORMAT.md section 3).

Invariants:
1. One writer a pack; it only appends. Bytes below ``synced`` are durable, and so is the file's name.
2. A failed write or flush is final for the file: ``failed`` is set, nothing is written or synced there again, and what it
   held unsynced is written again from memory to another pack.
3. The name ``*.open`` is durable before ``*.pack`` can be seen: whoever finds a sealed pack may rely on it.
4. A commit marker is appended after its flush returned, never before.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final

from ..errors import StoreError
from ..types import Buffer, Ref, Value
from .ids import IdKeys
from .io import IO, File
from .record import (
    PACK_HEADER_BYTES,
    Location,
    PackHeader,
    encode_footer,
    encode_header,
    encode_marker,
    encode_pack_header,
    padding,
    record_span,
)

TARGET_BYTES: Final = 16 << 20
"""a pack is sealed before the record that would make it longer"""
_ZEROS: Final = bytes(64)


@dataclass(frozen=True, slots=True)
class PackMark:
    """How far one pack is durable: its file name, and bytes from its start. Name "" and 0: nothing was written."""

    name: str
    length: int

    @property
    def value(self) -> list[Value] | None:
        """As it stands in a head record's ``pack``."""
        return [self.name, self.length] if self.name else None


@dataclass(slots=True)
class Waiting:
    """One object that is not durable yet; its stored bytes stay in memory until it is."""

    ordinal: int
    ref: Ref
    codec: int
    plain_bytes: int
    stored: Buffer


def open_name(writer_id: bytes, sequence: int) -> str:
    return f"{writer_id.hex()}-{sequence}.open"


def pack_path(root: str, name: str) -> str:
    """Where the pack of this file name lies."""
    return f"{root}/packs/{name}" if name.endswith(".open") else f"{root}/packs/{name[:2]}/{name}"


def list_packs(io: IO, root: str) -> list[str]:
    """File names of all packs, open and sealed."""
    found: list[str] = []
    for name in io.list(f"{root}/packs"):
        if name.endswith(".open"):
            found.append(name)
        elif len(name) == 2:
            found += [inner for inner in io.list(f"{root}/packs/{name}") if inner.endswith(".pack")]
    return found


class PackWriter:
    """The open pack of this process. Not thread-safe: the caller holds the writing lock."""

    def __init__(self, io: IO, root: str, header: PackHeader, keys: IdKeys) -> None:
        self.name = open_name(header.writer_id, header.sequence)
        self.length = 0
        """bytes written"""
        self.synced = 0
        """bytes known to be durable"""
        self.entries: list[tuple[Ref, Location]] = []
        self.failed = False
        self._io, self._root, self._keys = io, root, keys
        self._header = header
        self._num_records = 0
        self._name_synced = False
        self._file: File | None = None

    @property
    def path(self) -> str:
        return pack_path(self._root, self.name)

    @property
    def room_bytes(self) -> int:
        """What the pack takes before it should be sealed; one record always goes into an empty pack."""
        return TARGET_BYTES - max(self.length, PACK_HEADER_BYTES)

    def write(self, waiting: Sequence[Waiting]) -> list[Location]:
        """Append records, with one write. Raises ``OSError``; then the pack has ``failed``."""
        buffers: list[Buffer] = []
        places: list[Location] = []
        end = self.length
        if self._file is None:
            buffers.append(encode_pack_header(self._header))
            end = PACK_HEADER_BYTES
        for item in waiting:
            size = len(item.stored)
            buffers += [encode_header(item.ref[0], item.codec, item.ref[1:], item.plain_bytes, size, self._keys.tag), item.stored]
            if gap := padding(size):
                buffers.append(_ZEROS[:gap])
            places.append(Location(self.name, end, item.plain_bytes, size, item.codec))
            end += record_span(size)
        self._append(buffers, end)
        self.entries += [(item.ref, place) for item, place in zip(waiting, places, strict=True)]
        self._num_records += len(places)
        return places

    def flush(self) -> None:
        """Make everything written durable, and the file's name at the first time. Raises ``OSError``."""
        file, end = self._opened(), self.length
        try:
            file.fdatasync()
            self._sync_name()
        except BaseException:
            self.failed = True
            raise
        self.synced = end

    def mark(self) -> None:
        """Append the commit marker of the last flush. An error costs only the marker, and the rest of this pack."""
        marker = encode_marker(self.synced, self._num_records, self._keys.tag)
        with suppress(OSError):
            self._append([marker], self.length + len(marker))
            self._num_records += 1

    def seal(self) -> str:
        """Footer, flush, rename: returns the sealed file name. Raises ``OSError``; then the pack has ``failed``."""
        footer, name = encode_footer(self.entries, self.length, self._keys.tag)
        sealed = f"{name.hex()}.pack"
        try:
            self._append([footer], self.length + len(footer))
            self.flush()
            folder = f"{self._root}/packs/{sealed[:2]}"
            if not self._io.exists(folder):
                with suppress(FileExistsError):
                    self._io.mkdir(folder)
            self._io.fsync_dir(f"{self._root}/packs")
            self._io.rename(self.path, pack_path(self._root, sealed))
            self._io.fsync_dir(folder)
            self._io.fsync_dir(f"{self._root}/packs")
        except BaseException:
            self.failed = True
            raise
        self.name = sealed
        self.entries = [(ref, at._replace(pack=sealed)) for ref, at in self.entries]
        return sealed

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _append(self, buffers: Sequence[Buffer], end: int) -> None:
        if self.failed:
            raise StoreError("failed before and takes no more records", object=self.path, code="pack-failed")
        try:
            if self._file is None:
                self._file = self._io.write_new(self.path, mode=0o600)
            self._file.pwritev(self.length, buffers)
        except BaseException:
            self.failed = True
            raise
        self.length = end

    def _opened(self) -> File:
        if self.failed or self._file is None:
            raise StoreError("has nothing that could be synced", object=self.path, code="pack-failed")
        return self._file

    def _sync_name(self) -> None:
        if not self._name_synced:
            self._io.fsync_dir(f"{self._root}/packs")
            self._name_synced = True


class PackFiles:
    """Open files of packs for reading; the least recently used are closed. Thread-safe."""

    def __init__(self, io: IO, root: str, *, max_open: int = 64) -> None:
        self._io, self._root, self._max_open = io, root, max_open
        self._lock = threading.Lock()
        self._files: OrderedDict[str, _Shared] = OrderedDict()

    @contextmanager
    def open(self, name: str) -> Iterator[File]:
        """The file of a pack, kept open for the block. Raises ``OSError`` if there is none."""
        shared = self._take(name)
        try:
            yield shared.file
        finally:
            self._give(shared)

    def forget(self, name: str) -> None:
        """The file of this name was renamed or removed."""
        with self._lock:
            shared = self._files.pop(name, None)
            if shared is not None:
                shared.drop()

    def close(self) -> None:
        with self._lock:
            for shared in self._files.values():
                shared.drop()
            self._files.clear()

    def _take(self, name: str) -> _Shared:
        with self._lock:
            shared = self._files.get(name)
            if shared is None:
                shared = self._files[name] = _Shared(self._io.open_read(pack_path(self._root, name)))
            self._files.move_to_end(name)
            shared.num_users += 1
            while len(self._files) > self._max_open:
                self._files.popitem(last=False)[1].drop()
            return shared

    def _give(self, shared: _Shared) -> None:
        with self._lock:
            shared.num_users -= 1
            shared.close_if_free()


class _Shared:
    """A file that is closed when it was dropped and nobody uses it: never under a reader's feet."""

    def __init__(self, file: File) -> None:
        self.file = file
        self.num_users = 0
        self._dropped = False

    def drop(self) -> None:
        self._dropped = True
        self.close_if_free()

    def close_if_free(self) -> None:
        if self._dropped and self.num_users == 0:
            self.file.close()
