"""The store: a directory of immutable packs and one journal (FORMAT.md). The calls that session and cli use.

Invariants:
1. A head names only a manifest that is durable; ``append`` refuses any other.
2. One ``Store`` belongs to the process that opened it; a forked child must open its own.
3. Every writing store holds the writers' lease shared, so that prune, which needs it alone, meets none.
4. ``mode="ro"`` creates, locks and writes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final, Literal

import lmdb

from ..errors import AmbiguousIdError, ConflictError, NotFoundError, StoreError
from ..types import KIND_BYTE, Buffer, Kind, Ref
from .catalog import Catalog, Damage
from .config import STORE_ID_BYTES, StoreConfig, encode_config, new_config, read_config
from .durable import create_journal, write_durable
from .failures import io_errors
from .ids import SECRET_BYTES, IdKeys, make_ref
from .index import Index, LmdbIndex, MemoryIndex
from .io import IO, RealIO
from .journal import Build, Journal
from .leases import Lease, boot_id, take_lease, take_writers
from .objects import Objects, ObjectStats
from .pack import PackFiles, PackMark, list_packs, pack_path
from .record import Location
from .unflushed import UnflushedIO
from .view import Draft, Entry, SessionView, View

__all__ = ["Draft", "Entry", "Lease", "PackMark", "SessionView", "Store", "StoreStats", "View"]

Mode = Literal["rw", "ro"]
Durability = Literal["commit", "none"]
MIN_PREFIX: Final = 4
_SKELETON: Final = ("packs", "journal", "leases", "index")


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Sizes on disk are of the whole store; ``objects`` is what this ``Store`` object did."""

    num_packs: int
    num_open_packs: int
    pack_bytes: int
    num_objects: int
    num_sessions: int
    num_checkpoints: int
    journal_bytes: int
    num_journal_flushes: int
    objects: ObjectStats


class Store:
    """An open store. Thread-safe; also a context manager. Made by ``Store.init`` and ``Store.open``."""

    def __init__(self, io: IO, root: str, config: StoreConfig, secret: bytes, mode: Mode) -> None:
        """Use ``Store.open``."""
        self.path, self.config, self.mode = root, config, mode
        self._io, self._pid, self._closed = io, os.getpid(), False
        self._writers: Lease | None = take_writers(io, root, exclusive=False) if mode == "rw" else None
        try:
            self._files = PackFiles(io, root)
            self._journal = Journal(io, root, config.store_id, writable=mode == "rw")
            self._catalog = Catalog(io, root, _open_index(io, root, config, mode), self._files, self._journal.pack_lengths)
            self._objects = Objects(io, root, config.store_id, IdKeys(secret), self._catalog, self._files)
            with io_errors(root):
                if mode == "rw" and self._journal.is_empty():
                    # Whoever made the store may have died before its names were durable.
                    io.fsync_dir(root)
                    io.fsync_dir(os.path.dirname(root) or ".")
                self._catalog.refresh()
        except BaseException:
            if self._writers is not None:
                self._writers.release()
            raise

    # --- making and opening -----------------------------------------------------------------------------------------

    @classmethod
    def init(
        cls, path: str | os.PathLike[str], *, secret: bytes | None = None, tenants: Mapping[str, bytes] | None = None, io: IO | None = None
    ) -> Store:
        """Make a store in an absent or empty directory and open it.

        ``secret`` (32 bytes) is drawn unless given; ``tenants`` names further tenants with their secrets, which are not kept.
        Raises ``ConflictError`` (there is a store), ``StoreError`` (something else is there).
        """
        root, io = os.fspath(path), io or RealIO()
        with io_errors(root):
            _make_skeleton(io, root)
            config = new_config(store_id=io.random(STORE_ID_BYTES), secret=secret or io.random(SECRET_BYTES), tenants=tenants or {})
            create_journal(io, root, config.store_id)
            io.fsync_dir(root)
            write_durable(io, f"{root}/config.tmp", f"{root}/config", [encode_config(config)])
        return cls.open(root, io=io)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        create: bool = False,
        mode: Mode = "rw",
        durability: Durability = "commit",
        io: IO | None = None,
        tenant: str = "local",
        tenant_keys: Mapping[str, bytes] | None = None,
    ) -> Store:
        """Open a store. ``durability="none"`` flushes nothing: a power cut may damage what was written since.

        Raises ``NotFoundError`` (nothing there, unknown tenant), ``StoreError`` (not a store, unreadable),
        ``IncompatibleError`` (newer format, unknown feature, wrong tenant key), ``CorruptionError``, ``ConflictError`` (prune runs).
        """
        root, io = os.fspath(path), io or RealIO()
        if mode not in ("rw", "ro") or durability not in ("commit", "none"):
            raise StoreError(
                "bad option", object=f"mode={mode!r}, durability={durability!r}", expected="rw or ro, commit or none", code="bad-option"
            )
        with io_errors(root):
            if create and mode == "rw" and _is_free(io, root):
                cls.init(root, io=io).close()
            config = read_config(io, root)
            config.require("read", *(["write"] if mode == "rw" else []))
            secret = config.secret_of(tenant, tenant_keys)
            if durability == "none":
                io = UnflushedIO(io)
            return cls(io, root, config, secret, mode)

    def close(self) -> None:
        """Sync what waits, seal the open pack, release the locks. Idempotent. Raises as ``sync`` does, closed in any case."""
        if self._closed or self._pid != os.getpid():
            return
        self._closed = True
        try:
            if self.mode == "rw":
                self._journal.flush()
                self._objects.close()
        finally:
            self._objects.abandon()
            self._journal.close()
            self._files.close()
            self._catalog.index.close()
            if self._writers is not None:
                self._writers.release()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # --- objects ----------------------------------------------------------------------------------------------------

    def put(self, kind: Kind, data: Buffer, compress: bool = False) -> Ref:
        """Store ``data`` (at most 16 MiB) unless it is known; durable after the next ``sync``."""
        self._check(write=True)
        return self._objects.put(kind, data, compress=compress)

    def get(self, ref: Ref, max_bytes: int) -> bytes:
        """The object, verified. ``NotFoundError``, ``CorruptionError`` (damaged, or longer than ``max_bytes``)."""
        self._check()
        return self._objects.reader.get(ref, max_bytes)

    def read_into(self, ref: Ref, target: memoryview) -> None:
        """A verified read of exactly ``len(target)`` bytes; after an error ``target`` may hold anything."""
        self._check()
        self._objects.reader.read_into(ref, target)

    def has(self, ref: Ref) -> bool:
        """True if a ``put`` of this object would write nothing."""
        self._check()
        return self._objects.has(ref)

    def sync(self) -> PackMark:
        """Return when everything put before this call is durable. Threads that wait together share one flush."""
        self._check(write=True)
        return self._objects.sync()

    def find_manifest(self, prefix: str) -> bytes:
        """The 32-byte id of the checkpoint that a tag or at least 4 hex digits name. ``NotFoundError``, ``AmbiguousIdError``."""
        view = self.view()
        if prefix in view.tags:
            return view.tags[prefix]
        text = prefix.lower()
        if len(text) < MIN_PREFIX or len(text) > 64 or any(digit not in "0123456789abcdef" for digit in text):
            raise NotFoundError(
                "is no tag and no id", object=prefix, expected=f"a tag, or {MIN_PREFIX} to 64 hex digits", code="no-checkpoint"
            )
        heads = {head["manifest"] for session in view.sessions.values() if not session.removed for head in session.heads}
        found = sorted(id for id in heads if id.hex().startswith(text)) or self._stored_manifests(text)
        if not found:
            raise NotFoundError("there is no such checkpoint", object=prefix, code="no-checkpoint", hint="`agentckpt log` lists them")
        if len(found) > 1:
            few = ", ".join(id.hex()[: max(12, len(text) + 4)] for id in found[:5])
            raise AmbiguousIdError(f"fits {len(found)} checkpoints", object=prefix, found=few, hint="give more digits")
        return found[0]

    # --- journal ----------------------------------------------------------------------------------------------------

    def append(self, build: Build, durable: bool = True) -> list[Entry]:
        """Let ``build(view)`` see the newest state and append the drafts that it returns; durable on return.

        ``build`` runs under the journal's lock: it must be short, and its view is valid until it returns. The journal adds
        ``sid, sseq, prev, time``. Raises ``ConflictError`` (epoch, head or name moved; nothing was written), what ``build``
        raises, ``StoreError`` and ``CapacityError``. After an I/O error the outcome is not known: look at the view.
        """
        self._check(write=True)

        def checked(view: View) -> Sequence[Draft]:
            drafts = list(build(view))
            for draft in drafts:
                if draft.kind == "head":
                    self._require_durable(draft)
            return drafts

        return self._journal.append(checked, durable=durable)

    def flush_journal(self) -> None:
        """Make what ``append(durable=False)`` left durable."""
        self._check(write=True)
        self._journal.flush()

    def view(self) -> View:
        """The newest state, what other processes appended included; a value that the caller may keep."""
        self._check()
        return self._journal.view()

    def lease(self, name: str) -> Lease:
        """Own ``name`` until ``release`` or death. ``ConflictError`` names the holder."""
        self._check(write=True)
        return take_lease(self._io, self.path, name)

    def random(self, n: int) -> bytes:
        """``n`` random bytes for ids and nonces, from the I/O interface: the model's are reproducible."""
        return self._io.random(n)

    # --- for maintenance --------------------------------------------------------------------------------------------

    def stats(self) -> StoreStats:
        """Counts and sizes. Reads sizes of all packs."""
        view = self.view()
        kept = [session for session in view.sessions.values() if not session.removed]
        self._objects.index_now()
        with io_errors(self.path):
            names = list_packs(self._io, self.path)
            sizes = [self._io.stat(pack_path(self.path, name)).size_bytes for name in names]
            return StoreStats(
                num_packs=len(names),
                num_open_packs=sum(name.endswith(".open") for name in names),
                pack_bytes=sum(sizes),
                num_objects=self._catalog.index.num_objects(),
                num_sessions=len(kept),
                num_checkpoints=len({head["manifest"] for session in kept for head in session.heads}),
                journal_bytes=self._journal.num_bytes(),
                num_journal_flushes=self._journal.num_flushes,
                objects=self._objects.stats,
            )

    def seal(self) -> None:
        """Sync, and give this process's open pack its final name."""
        self._check(write=True)
        self._objects.seal()

    def packs(self) -> list[str]:
        """File names of all packs on disk, ``*.open`` and ``*.pack``."""
        self._check()
        with io_errors(self.path):
            return list_packs(self._io, self.path)

    def pack_entries(self, name: str, *, tail: bool = True) -> list[tuple[Ref, Location]]:
        """Every object in one pack, read from the pack itself, in file order.

        With ``tail`` also the records above an open pack's last commit marker: readable, not known to be durable.
        """
        self._check()
        with io_errors(self.path):
            return self._catalog.entries(name, tail=tail)

    def location(self, ref: Ref) -> Location | None:
        """Where ``get`` would read this object; None if it is unknown or not yet durable."""
        self._check()
        return self._objects.reader.place(ref)

    def damage(self) -> list[Damage]:
        """Damaged places that reading footers and open packs showed so far."""
        self._check()
        return self._catalog.damage()

    def write_again(self, kind: Kind, data: Buffer, compress: bool = False) -> Ref:
        """Put an object even if a pack has it already: to move it out of a pack that will be removed."""
        self._check(write=True)
        return self._objects.write_again(kind, data, compress=compress)

    def remove_packs(self, names: Sequence[str]) -> None:
        """Delete packs, sync their directories and build the index again. Call it only inside ``exclusive``."""
        self._check(write=True)
        with io_errors(self.path):
            for name in names:
                self._files.forget(name)
                with suppress(FileNotFoundError):
                    self._io.unlink(pack_path(self.path, name))
            for folder in sorted({pack_path(self.path, name).rpartition("/")[0] for name in names}):
                self._io.fsync_dir(folder)
            self._catalog.rebuild()

    def reindex(self) -> None:
        """Build the index again from footers and open packs."""
        self._check()
        with io_errors(self.path):
            self._catalog.rebuild()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Nobody else writes inside the block. ``ConflictError`` if another writing store is open, in any process."""
        self._check(write=True)
        assert self._writers is not None
        self._writers.release()
        try:
            with take_writers(self._io, self.path, exclusive=True):
                self._catalog.refresh()
                yield
        finally:
            self._writers = take_writers(self._io, self.path, exclusive=False)

    # --- leaves -----------------------------------------------------------------------------------------------------

    def _check(self, *, write: bool = False) -> None:
        if self._closed:
            raise StoreError("is closed", object=self.path, code="closed")
        if self._pid != os.getpid():
            raise StoreError("was opened by the parent process", object=self.path, code="forked", hint="open the store again in the child")
        if write and self.mode == "ro":
            raise StoreError("is open read-only", object=self.path, code="read-only")

    def _require_durable(self, draft: Draft) -> None:
        manifest = draft.body.get("manifest")
        if isinstance(manifest, bytes) and len(manifest) == 32 and not self._objects.is_durable(make_ref("manifest", manifest)):
            raise StoreError(
                "a head would name a manifest that is not durable",
                object=manifest.hex()[:12],
                code="not-durable",
                hint="call sync() before append()",
            )

    def _stored_manifests(self, text: str) -> list[bytes]:
        prefix = bytes((KIND_BYTE["manifest"],)) + bytes.fromhex(text[: len(text) // 2 * 2])
        return [ref[1:] for ref in self._catalog.index.with_prefix(prefix) if ref[1:].hex().startswith(text)]


def _is_free(io: IO, root: str) -> bool:
    """True for an absent or empty directory, and for what an ``init`` that did not finish left behind."""
    if not io.exists(root):
        return True
    if not io.stat(root).is_dir or io.exists(f"{root}/config"):
        return False
    names = io.list(root)
    if not set(names) <= {*_SKELETON, "config.tmp"}:
        return False
    first = {f"{1:016d}.log", f"{1:016d}.tmp"}
    return not any(name in names and set(io.list(f"{root}/{name}")) - (first if name == "journal" else set()) for name in _SKELETON)


def _make_skeleton(io: IO, root: str) -> None:
    if io.exists(f"{root}/config"):
        raise ConflictError("there is a store already", object=root, code="store-exists")
    if not _is_free(io, root):
        raise StoreError("is not empty", object=root, expected="an absent or empty directory", code="not-empty")
    for path in (root, *(f"{root}/{name}" for name in _SKELETON)):
        if not io.exists(path):
            io.mkdir(path, mode=0o700)


def _open_index(io: IO, root: str, config: StoreConfig, mode: Mode) -> Index:
    """LMDB on a real filesystem, else a dict. A directory for each pid namespace: their process numbers collide."""
    real = _real_path(io, root)
    if mode == "ro" or real is None:
        return MemoryIndex()
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
        identity = b"agentckpt index 1\n" + config.store_id + f"{boot_id()} {namespace}".encode()
        return LmdbIndex(os.path.join(real, "index", str(namespace)), identity)
    except (lmdb.Error, OSError):
        return MemoryIndex()


def _real_path(io: IO, root: str) -> str | None:
    """Where the store lies on a real filesystem, seen through wrappers of ``RealIO``; None for a model."""
    inner: object = io
    while not isinstance(inner, RealIO):
        inner = getattr(inner, "inner", None)
        if inner is None:
            return None
    return os.path.join(inner.root, root)
