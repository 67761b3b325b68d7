"""Where each object lies: a cache of footers and open packs that may be lost at any time.

Invariants:
1. It holds nothing that a scan of the packs cannot give again, and entries only for bytes already synced.
2. It is never in the commit path: entries are added in batches after the bytes that they name are durable.
3. An entry of a pack that was removed is void at once: packs have numbers here, which are never given twice.
4. An LMDB file is opened only if the stamp beside it says that it was made here: same store, boot, pid namespace, inode.
   A file that came with a copied or imported store, or from before a reboot, is thrown away and built again.
   So a power cut cannot leave a half-written one in use, and commits need no flush (``sync=False``).
5. One environment a process and path, never used across fork: a child gets a ``MemoryIndex``.
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any, Final, Protocol

import lmdb

from ..types import KIND_NAME, Ref
from .record import MAX_PLAIN_BYTES, Location

MAP_BYTES: Final = 1 << 36
"""address space only; the file grows as needed"""
MAX_READERS: Final = 1024
_ENTRY: Final = struct.Struct("<QQIIB")
_PACK: Final = struct.Struct("<QQ")
_NUMBER: Final = struct.Struct("<Q")


class Index(Protocol):
    """Thread-safe. ``scanned`` is how many bytes of a pack have their entries here."""

    def get(self, ref: Ref) -> Location | None: ...

    def add(self, pack: str, entries: Sequence[tuple[Ref, Location]], scanned: int) -> None:
        """Entries of one pack and its watermark, all or nothing."""
        ...

    def rename(self, old: str, new: str, scanned: int) -> None:
        """A pack was sealed: the same records at the same offsets under another name."""
        ...

    def remove(self, pack: str) -> None:
        """Forget a pack and what points into it."""
        ...

    def packs(self) -> dict[str, int]:
        """Name and ``scanned`` of each pack known."""
        ...

    def with_prefix(self, prefix: bytes) -> list[Ref]:
        """References that begin with these bytes (kind byte first)."""
        ...

    def num_objects(self) -> int: ...

    def clear(self) -> None: ...

    def close(self) -> None: ...


class MemoryIndex:
    """A dict: for the model, for read-only media, and where LMDB cannot be used."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._places: dict[Ref, Location] = {}
        self._packs: dict[str, int] = {}
        self._renamed: dict[str, str] = {}

    def get(self, ref: Ref) -> Location | None:
        at = self._places.get(ref)
        if at is None:
            return None
        name = self._renamed.get(at.pack, at.pack)
        if name not in self._packs:
            return None
        return at if name == at.pack else at._replace(pack=name)

    def add(self, pack: str, entries: Sequence[tuple[Ref, Location]], scanned: int) -> None:
        with self._lock:
            self._places.update(entries)
            self._packs[pack] = max(scanned, self._packs.get(pack, 0))

    def rename(self, old: str, new: str, scanned: int) -> None:
        with self._lock:
            if self._packs.pop(old, None) is not None:
                self._packs[new] = scanned
                self._renamed[old] = new

    def remove(self, pack: str) -> None:
        with self._lock:
            self._packs.pop(pack, None)

    def packs(self) -> dict[str, int]:
        with self._lock:
            return dict(self._packs)

    def with_prefix(self, prefix: bytes) -> list[Ref]:
        with self._lock:
            found = [ref for ref in self._places if ref.startswith(prefix)]
        return sorted(ref for ref in found if self.get(ref) is not None)

    def num_objects(self) -> int:
        return len(self._places)

    def clear(self) -> None:
        with self._lock:
            self._places, self._packs, self._renamed = {}, {}, {}

    def close(self) -> None:
        self.clear()


class LmdbIndex:
    """LMDB in a directory of its own. Any ``lmdb.Error`` means: throw it away and use another index."""

    def __init__(self, directory: str, identity: bytes) -> None:
        """``identity`` names store, boot and pid namespace. Raises ``lmdb.Error`` or ``OSError``."""
        self._directory = os.path.realpath(directory)
        self._shared = _acquire(self._directory, identity)
        self._closed = False

    def get(self, ref: Ref) -> Location | None:
        with self._shared.env.begin(db=self._shared.places) as txn:
            row = txn.get(ref)
            if row is None or len(row) != _ENTRY.size:
                return None
            number, offset, plain, stored, codec = _ENTRY.unpack(row)
            name = txn.get(_NUMBER.pack(number), db=self._shared.names)
            if name is None or plain > MAX_PLAIN_BYTES or stored > MAX_PLAIN_BYTES:
                return None
            return Location(bytes(name).decode(), offset, plain, stored, codec)

    def add(self, pack: str, entries: Sequence[tuple[Ref, Location]], scanned: int) -> None:
        with self._shared.env.begin(write=True) as txn:
            number, known = self._number(txn, pack)
            rows = sorted((ref, _ENTRY.pack(number, at.offset, at.plain_bytes, at.stored_bytes, at.codec)) for ref, at in entries)
            with txn.cursor(db=self._shared.places) as cursor:
                cursor.putmulti(rows)
            txn.put(pack.encode(), _PACK.pack(number, max(scanned, known)), db=self._shared.packs)

    def rename(self, old: str, new: str, scanned: int) -> None:
        with self._shared.env.begin(write=True) as txn:
            row = txn.pop(old.encode(), db=self._shared.packs)
            if row is None:
                return
            number = _PACK.unpack(row)[0]
            other = txn.get(new.encode(), db=self._shared.packs)
            if other is None:
                txn.put(new.encode(), _PACK.pack(number, scanned), db=self._shared.packs)
            # Entries under either number mean the same records, so both numbers lead to the new name.
            txn.put(_NUMBER.pack(number), new.encode(), db=self._shared.names)

    def remove(self, pack: str) -> None:
        with self._shared.env.begin(write=True) as txn:
            txn.delete(pack.encode(), db=self._shared.packs)
            with txn.cursor(db=self._shared.names) as cursor:
                for number in [key for key, name in cursor if bytes(name) == pack.encode()]:
                    txn.delete(number, db=self._shared.names)

    def packs(self) -> dict[str, int]:
        with self._shared.env.begin() as txn, txn.cursor(db=self._shared.packs) as cursor:
            return {bytes(name).decode(): _PACK.unpack(row)[1] for name, row in cursor if len(row) == _PACK.size}

    def with_prefix(self, prefix: bytes) -> list[Ref]:
        found: list[Ref] = []
        with self._shared.env.begin() as txn, txn.cursor(db=self._shared.places) as cursor:
            if cursor.set_range(prefix):
                for key in _keys_while(cursor, prefix):
                    found.append(Ref(key))
        return [ref for ref in found if self.get(ref) is not None]

    def num_objects(self) -> int:
        with self._shared.env.begin() as txn:
            return int(txn.stat(db=self._shared.places)["entries"])

    def clear(self) -> None:
        with self._shared.env.begin(write=True) as txn:
            for database in (self._shared.places, self._shared.names, self._shared.packs):
                txn.drop(database, delete=False)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            _release(self._shared)

    def _number(self, txn: Any, pack: str) -> tuple[int, int]:
        """(number, scanned so far) of a pack; a new number is one above all ever given."""
        row = txn.get(pack.encode(), db=self._shared.packs)
        if row is not None:
            number, scanned = _PACK.unpack(row)
            return number, scanned
        last = txn.get(b"next", db=self._shared.meta)
        number = _NUMBER.unpack(last)[0] if last else 1
        txn.put(b"next", _NUMBER.pack(number + 1), db=self._shared.meta)
        txn.put(_NUMBER.pack(number), pack.encode(), db=self._shared.names)
        return number, 0


def _keys_while(cursor: Any, prefix: bytes) -> Iterable[bytes]:
    for key in cursor.iternext(keys=True, values=False):
        if not bytes(key).startswith(prefix):
            return
        if key[0] in KIND_NAME:
            yield bytes(key)


class _Shared:
    """One open environment, shared by all stores of this process on the same path."""

    def __init__(self, directory: str, env: Any) -> None:
        self.directory = directory
        self.pid = os.getpid()
        self.num_users = 0
        self.env = env
        self.places = env.open_db(b"places")
        self.names = env.open_db(b"names")
        self.packs = env.open_db(b"packs")
        self.meta = env.open_db(b"meta")


_open: dict[str, _Shared] = {}
_open_lock = threading.Lock()
os.register_at_fork(after_in_child=lambda: _open_lock._at_fork_reinit() if hasattr(_open_lock, "_at_fork_reinit") else None)


def _acquire(directory: str, identity: bytes) -> _Shared:
    with _open_lock:
        shared = _open.get(directory)
        if shared is not None and shared.pid != os.getpid():
            raise lmdb.Error("this environment was inherited from the parent process")
        if shared is not None and not _stamp_fits(directory, identity):
            raise lmdb.Error("the files were replaced while they are in use")
        if shared is None:
            shared = _open[directory] = _Shared(directory, _open_env(directory, identity))
        shared.num_users += 1
        return shared


def _release(shared: _Shared) -> None:
    with _open_lock:
        shared.num_users -= 1
        if shared.num_users == 0 and shared.pid == os.getpid():
            _open.pop(shared.directory, None)
            shared.env.close()


_LOCK_FILE_BYTES = 128 * 1024
"""more than LMDB's reader table needs; a larger file means more slots"""


def _reserve_lock_file(directory: str) -> None:
    """Give LMDB's lock file its blocks before LMDB maps it: on a full disk a page that has none kills the process (SIGBUS).

    Raises ``OSError`` (ENOSPC).
    """
    handle = os.open(os.path.join(directory, "lock.mdb"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if os.fstat(handle).st_size == 0:
            os.posix_fallocate(handle, 0, _LOCK_FILE_BYTES)
    finally:
        os.close(handle)


def _open_env(directory: str, identity: bytes) -> Any:
    os.makedirs(directory, mode=0o700, exist_ok=True)
    if not _stamp_fits(directory, identity):
        wipe(directory)
    _reserve_lock_file(directory)
    env = _environment(directory)
    try:
        env.reader_check()
        _write_stamp(directory, identity)
    except BaseException:
        env.close()
        raise
    return env


def _environment(directory: str) -> Any:
    return lmdb.open(
        directory, map_size=MAP_BYTES, max_dbs=4, max_readers=MAX_READERS, sync=False, metasync=False, mode=0o600, readahead=False
    )


def wipe(directory: str) -> None:
    """Throw the files away. A process that has them open goes on with its own, unlinked copy."""
    for name in ("stamp", "data.mdb", "lock.mdb"):
        with suppress(FileNotFoundError):
            os.unlink(os.path.join(directory, name))


def _stamp_fits(directory: str, identity: bytes) -> bool:
    """True if the data file is the one that this family of processes made, and is whole as far as can be seen."""
    try:
        with open(os.path.join(directory, "stamp"), "rb") as file:
            if file.read(4096) != _stamp(directory, identity):
                return False
        return _looks_whole(os.path.join(directory, "data.mdb"))
    except OSError:
        return False


def _looks_whole(path: str) -> bool:
    """LMDB maps the file: a meta page that points beyond its end would be SIGBUS. Offsets: lmdb 0.9 ``MDB_meta``."""
    page_bytes = os.sysconf("SC_PAGE_SIZE")
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        pages = [file.read(page_bytes), file.read(page_bytes)]
    if size < 2 * page_bytes or any(struct.unpack_from("<I", page, 16)[0] != 0xBEEFC0DE for page in pages):
        return False
    last_page = max(struct.unpack_from("<Q", page, 16 + 24 + 2 * 48)[0] for page in pages)
    return bool((last_page + 1) * page_bytes <= size)


def _stamp(directory: str, identity: bytes) -> bytes:
    found = os.stat(os.path.join(directory, "data.mdb"))
    return identity + struct.pack("<QQ", found.st_dev, found.st_ino) + repr(lmdb.version()).encode()


def _write_stamp(directory: str, identity: bytes) -> None:
    path = os.path.join(directory, "stamp")
    data = _stamp(directory, identity)
    temporary = f"{path}.{os.getpid()}"
    with open(temporary, "wb") as file:
        file.write(data)
    os.replace(temporary, path)
