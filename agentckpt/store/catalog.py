"""Where every object lies: the index kept in step with the packs on disk, and the tails that no index may hold.

Invariants:
1. ``durable`` answers only for objects whose bytes and whose pack's name are known to be durable; a writer may refer to
   these and to nothing else. ``find`` also answers for valid records above the last commit marker of a dead writer's pack.
2. The index may fail, vanish or lie: then it is built again from footers and open packs, in memory if need be.
   A wrong place is noticed when the object's hash does not fit.
3. Packs of other processes are followed by watermarks: what was read once is not read again.
4. If a pack vanished that was not merely sealed, everything is built again: another pack may hold what it held.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import lmdb

from ..errors import CorruptionError
from ..types import Ref
from .index import Index, MemoryIndex
from .io import IO
from .pack import PackFiles, list_packs, open_name
from .record import PACK_HEADER_BYTES, Location
from .scan import Scan, read_footer, read_pack_header, scan_pack

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Damage:
    """A place in a pack that is not what it should be. ``length`` 0: the whole file."""

    pack: str
    offset: int
    length: int
    what: str


class Catalog:
    """Thread-safe. ``floors`` tells, for open packs, lengths that heads name; ``own`` the pack that this process writes."""

    def __init__(self, io: IO, root: str, index: Index, files: PackFiles, floors: Callable[[], Mapping[str, int]]) -> None:
        self._io, self._root, self._files, self._floors = io, root, files, floors
        self.index = index
        self.own: str | None = None
        self._lock = threading.RLock()
        self._tails: dict[str, dict[Ref, Location]] = {}
        self._seen: dict[str, tuple[int, int]] = {}
        self._damage: dict[str, list[Damage]] = {}

    def durable(self, ref: Ref) -> Location | None:
        """The place of an object that a new checkpoint may refer to."""
        return self._indexed(lambda index: index.get(ref))

    def find(self, ref: Ref) -> Location | None:
        """The place of an object that can perhaps be read."""
        return self.durable(ref) or next((tail[ref] for tail in list(self._tails.values()) if ref in tail), None)

    def is_tail(self, ref: Ref, at: Location) -> bool:
        """True if the record lies above the last commit marker: it may be torn."""
        return self._tails.get(at.pack, {}).get(ref) == at

    def added(self, pack: str, entries: Sequence[tuple[Ref, Location]], scanned: int) -> None:
        """This process wrote and synced these."""
        self._indexed(lambda index: index.add(pack, entries, scanned))

    def renamed(self, old: str, new: str, scanned: int) -> None:
        """This process sealed its pack."""
        self._indexed(lambda index: index.rename(old, new, scanned))
        self._files.forget(old)

    def damage(self) -> list[Damage]:
        """What scans and footers showed so far."""
        with self._lock:
            return [item for items in self._damage.values() for item in items]

    def refresh(self) -> bool:
        """Look at the packs on disk; True if anything was learnt. Raises ``OSError``."""
        with self._lock:
            known = self._indexed(lambda index: index.packs())
            present = list_packs(self._io, self._root)
            gone = known.keys() - set(present) - {self.own}
            if any(name.endswith(".pack") for name in gone):
                self.rebuild()
                return True
            learnt = self._look_at([name for name in present if name != self.own], known)
            origins = {origin for name in present if name not in known and (origin := self._origin(name))}
            if gone - origins:
                self.rebuild()
                return True
            for name in gone:
                self._forget(name)
            return learnt or bool(gone)

    def rebuild(self) -> None:
        """Forget the index and read every footer and open pack again."""
        with self._lock:
            self._indexed(lambda index: index.clear())
            self._tails, self._seen, self._damage = {}, {}, {}
            self._look_at(list_packs(self._io, self._root), {})

    def all_places(self, ref: Ref) -> list[tuple[Location, bool]]:
        """Every place where footers and open packs show ``ref``, past the index, and whether it is known to be durable.

        Durable ones come first.
        """
        found: list[tuple[Location, bool]] = []
        for name in list_packs(self._io, self._root):
            scan = self._read(name, 0)
            found += [(at, True) for known, at in scan.entries if known == ref]
            found += [(at, False) for known, at in scan.tail if known == ref]
        return sorted(found, key=lambda row: not row[1])

    def entries(self, name: str, *, tail: bool = True) -> list[tuple[Ref, Location]]:
        """The records of one pack, read from the pack itself; with those of an open pack's unsynced tail, or without."""
        scan = self._read(name, 0)
        return scan.entries + (scan.tail if tail else [])

    def _look_at(self, present: Sequence[str], known: Mapping[str, int]) -> bool:
        learnt = False
        for name in present:
            if name.endswith(".pack") and name in known:
                continue
            try:
                learnt |= self._learn(name, known.get(name, 0))
            except FileNotFoundError:  # sealed or pruned since the listing
                self._files.forget(name)
        return learnt

    def _learn(self, name: str, scanned: int) -> bool:
        """Bring the index in step with one pack; True if it had something new."""
        if name.endswith(".open"):
            with self._files.open(name) as file:
                seen = (file.size(), self._floors().get(name, 0))
            if self._seen.get(name) == seen:
                return False
            self._seen[name] = seen
        scan = self._read(name, scanned)
        self._tails.pop(name, None)
        if scan.tail:
            self._tails[name] = dict(scan.tail)
        if scan.entries or scan.synced > scanned:
            self.added(name, scan.entries, scan.synced)
        return bool(scan.entries or scan.tail)

    def _read(self, name: str, scanned: int) -> Scan:
        """The entries of a pack from ``scanned`` on: by footer if it is sealed and sound, else record by record."""
        with self._files.open(name) as file:
            if name.endswith(".open"):
                floor = max(scanned, self._floors().get(name, 0))
                scan = scan_pack(file, name, start=max(PACK_HEADER_BYTES, scanned), floor=floor)
                return self._noted(name, scan, "damaged records below the last commit marker")
            size = file.size()
            try:
                return Scan(entries=read_footer(file, name), synced=size, end=size)
            except CorruptionError as error:
                scan = scan_pack(file, name, floor=size)
                scan.damage = scan.damage or [(scan.end, size)]
                return self._noted(name, scan, error.message)

    def _noted(self, name: str, scan: Scan, what: str) -> Scan:
        if scan.damage:
            self._damage[name] = [Damage(name, begin, end - begin, what) for begin, end in scan.damage]
        return scan

    def _origin(self, name: str) -> str | None:
        """The name that a sealed pack had when it was open."""
        if not name.endswith(".pack"):
            return None
        with self._files.open(name) as file:
            header = read_pack_header(file)
        return open_name(header.writer_id, header.sequence) if header else None

    def _forget(self, name: str) -> None:
        self._indexed(lambda index: index.remove(name))
        self._tails.pop(name, None)
        self._seen.pop(name, None)
        self._files.forget(name)

    def _indexed(self, call: Callable[[Index], T]) -> T:
        """``call`` on the index; if LMDB fails, on a new one in memory, built by a scan."""
        try:
            return call(self.index)
        except lmdb.Error:
            with self._lock:
                if not isinstance(self.index, MemoryIndex):
                    self.index.close()
                    self.index = MemoryIndex()
                    self.rebuild()
            return call(self.index)
