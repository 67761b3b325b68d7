"""Is everything there, and is it what its name says?

    quick      the journal was read; every pack's trailer and footer, every open pack record by record
    structure  and: from every checkpoint that is held, every reference leads to an object; manifests and nodes are hashed
    data       and: every object in every pack is read and hashed, whether anything refers to it or not

What is told apart: *corrupt* (bytes that are not what their name says), *missing* (a reference that leads nowhere),
*dropped* (weak data that prune removed on purpose; no problem). Nothing is changed and nothing is repaired.

Invariants:
1. The index is not believed: what exists is what footers and open packs show.
2. A report names every damaged pack, and for every problem the sessions, checkpoints and parts that it touches.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from ..errors import AgentckptError, CorruptionError, IncompatibleError, NotFoundError, StoreError
from ..types import Ref
from .closure import Reached, Walker, holders, journal_refs, live_sessions
from .failures import io_errors
from .ids import IdKeys, show_ref
from .record import HEADER_BYTES, MAX_PLAIN_BYTES, Location, decode_header, refuse_unknown, unsqueeze
from .store import Store
from .view import View

Level = Literal["quick", "structure", "data"]
LEVELS: tuple[Level, ...] = ("quick", "structure", "data")
MAX_LISTED = 1000
"""problems that are listed one by one; all are counted"""


class Touched(NamedTuple):
    """What a problem reaches: who holds it (``session NAME``, ``tag NAME``), which checkpoint (hex; empty: the session's
    records) and which part (empty: the checkpoint itself)."""

    holder: str
    checkpoint: str
    part: str


@dataclass(frozen=True, slots=True)
class Lost:
    """One object that is missing or corrupt. ``weak``: its checkpoints are whole without it (KV is computed again)."""

    object: str
    reason: str
    weak: bool
    pack: str | None
    touched: tuple[Touched, ...]


@dataclass(frozen=True, slots=True)
class DamagedPack:
    """``places`` are (offset, length in bytes, what); ``touched`` is what loses an object that lay, or may have lain, there."""

    pack: str
    places: tuple[tuple[int, int, str], ...]
    touched: tuple[Touched, ...]


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """``ok``: nothing is corrupt or missing. Lists hold at most 1,000 entries, the counts are complete."""

    level: Level
    num_packs: int
    num_objects: int
    """durable records in all packs, copies counted"""
    checked_bytes: int
    """plaintext bytes that were hashed"""
    num_sessions: int
    num_checkpoints: int
    num_dropped: int = 0
    num_missing: int = 0
    num_corrupt: int = 0
    num_skipped: int = 0
    """sessions and records of tenants whose key was not given"""
    damaged_packs: tuple[DamagedPack, ...] = ()
    missing: tuple[Lost, ...] = ()
    corrupt: tuple[Lost, ...] = ()

    @property
    def ok(self) -> bool:
        return not (self.damaged_packs or self.num_missing or self.num_corrupt)

    def describe(self) -> list[str]:
        """For people: a line each, the outcome last."""
        lines = [
            f"packs: {self.num_packs:,}, objects: {self.num_objects:,}, bytes hashed: {self.checked_bytes:,}; "
            f"sessions: {self.num_sessions:,}, checkpoints: {self.num_checkpoints:,} (level {self.level})"
        ]
        if self.num_dropped:
            lines.append(f"{self.num_dropped} objects were dropped by prune; these checkpoints are whole and restore by prefill")
        if self.num_skipped:
            lines.append(f"{self.num_skipped} sessions or records of other tenants were not checked: their keys were not given")
        for pack in self.damaged_packs:
            lines += [f"damaged: pack {pack.pack} at {offset} ({length} bytes): {what}" for offset, length, what in pack.places]
            lines += _touched_lines(pack.touched)
        for word, total, losses in (("corrupt", self.num_corrupt, self.corrupt), ("missing", self.num_missing, self.missing)):
            for lost in losses[:20]:
                lines.append(f"{word}: {lost.object}: {lost.reason}" + (" (weak: restores by prefill)" if lost.weak else ""))
                lines += _touched_lines(lost.touched)
            if total > 20:
                lines.append(f"... {total} {word} objects in all")
        lines.append(
            "ok" if self.ok else f"NOT ok: {self.num_corrupt} corrupt, {self.num_missing} missing, {len(self.damaged_packs)} damaged packs"
        )
        return lines


@dataclass(slots=True)
class _Findings:
    """What the passes over the packs showed."""

    num_packs: int = 0
    num_objects: int = 0
    checked_bytes: int = 0
    num_foreign: int = 0
    bad: dict[Ref, tuple[Location, str]] = field(default_factory=dict)
    """objects with a copy that is not what its name says"""
    packs: dict[str, list[tuple[int, int, str]]] = field(default_factory=dict)
    gaps: set[str] = field(default_factory=set)
    """packs with places where no record can be made out"""


def verify(store: Store, level: Level = "structure") -> VerifyReport:
    """Check ``store``, which may be in use by others. Raises ``IncompatibleError`` for what this version cannot judge, ``StoreError``."""
    if level not in LEVELS:
        raise IncompatibleError("is no level", object=repr(level), expected=", ".join(LEVELS), code="bad-option")
    view = store.view()
    absent: set[Ref] = set()
    walker, reached = Walker(store), Reached()
    num_skipped = 0
    if level != "quick":
        view, num_skipped = _own_tenant(store, view)
        reached = walker.walk(holders(view), journal_refs(view), unwanted=view.drops)
        absent = reached.all
    found = _look_at_packs(store, absent, hash_all=level == "data")
    if level == "quick":
        lost: dict[Ref, AgentckptError] = {}
    else:
        lost = {**walker.unreadable, **_absent(store, absent, found.gaps)}
        lost |= {ref: CorruptionError(what) for ref, (_, what) in found.bad.items() if not _readable(store, ref)}
    return _report(store, view, level, found, walker, reached, lost, num_skipped)


def _own_tenant(store: Store, view: View) -> tuple[View, int]:
    """The view less sessions whose tenant's key this store was not opened with, and how many these are."""
    keys = tenant_keys(store)
    tags = {name: keys_tag(entry) for name, entry in store.config.tenants.items()}
    mine = view.copy()
    mine.sessions = {sid: session for sid, session in view.sessions.items() if tags.get(session.tenant) == keys.tag}
    return mine, len(live_sessions(view)) - len(live_sessions(mine))


def tenant_keys(store: Store) -> IdKeys:
    """The id keys that ``store`` was opened with."""
    return store._objects._keys


def keys_tag(entry: Mapping[str, bytes]) -> bytes:
    """What stands in the record headers of the tenant with this entry in the config."""
    return IdKeys(entry["secret"]).tag if "secret" in entry else entry["check"][:4]


def _look_at_packs(store: Store, absent: set[Ref], *, hash_all: bool) -> _Findings:
    """Read every footer and open pack; takes what is there out of ``absent``.

    Above the last commit marker of a dead writer's pack a record may be torn: it counts if it is sound, and is no damage if not.
    """
    found = _Findings()
    for name in store.packs():
        try:
            entries = store.pack_entries(name, tail=False)
            tail = store.pack_entries(name)[len(entries) :] if name.endswith(".open") else []
        except StoreError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                continue  # sealed or pruned since the listing: its objects stand in another pack
            raise
        found.num_packs += 1
        found.num_objects += len(entries)
        absent.difference_update(ref for ref, _ in entries)
        absent.difference_update(ref for ref, at in tail if ref in absent and sound_record(store, ref, at))
        if hash_all:
            _hash_entries(store, entries, found)
    for place in store.damage():
        found.packs.setdefault(place.pack, []).append((place.offset, place.length, place.what))
        found.gaps.add(place.pack)
    return found


def _hash_entries(store: Store, entries: Iterable[tuple[Ref, Location]], found: _Findings) -> None:
    keys = tenant_keys(store)
    for ref, at in entries:
        try:
            if not check_record(store, keys, ref, at):
                found.num_foreign += 1
        except CorruptionError as error:
            found.bad[ref] = (at, error.message)
            found.packs.setdefault(at.pack, []).append((at.offset, HEADER_BYTES + at.stored_bytes, f"{show_ref(ref)}: {error.message}"))
        else:
            found.checked_bytes += at.plain_bytes


def check_record(store: Store, keys: IdKeys, ref: Ref, at: Location) -> bool:
    """Read one record at its own place and hash it; False if it belongs to another tenant.

    Raises ``CorruptionError``, or ``IncompatibleError`` for a record that this version must not interpret.
    """
    with io_errors(at.pack), store._files.open(at.pack) as file:
        data = file.pread(at.offset, HEADER_BYTES + at.stored_bytes)
    header = decode_header(data)
    if header is None or header.ref != ref or (header.plain_bytes, header.stored_bytes, header.codec) != at[2:]:
        raise CorruptionError("its record header is damaged", code="bad-header")
    refuse_unknown(header, f"{show_ref(ref)} in {at.pack}")
    if header.tenant != keys.tag:
        return False
    if not keys.matches(ref, unsqueeze(data[HEADER_BYTES:], at.codec, at.plain_bytes)):
        raise CorruptionError("its bytes do not match its id", code="hash-mismatch")
    return True


def sound_record(store: Store, ref: Ref, at: Location) -> bool:
    """True if the record at this place is what ``ref`` names (and this tenant's)."""
    try:
        return check_record(store, tenant_keys(store), ref, at)
    except CorruptionError:
        return False


def _absent(store: Store, absent: Collection[Ref], gaps: Collection[str]) -> dict[Ref, AgentckptError]:
    """References without a record. Corrupt if the bytes may have stood in a damaged place, else missing."""
    lost: dict[Ref, AgentckptError] = {}
    for ref in absent:
        at = store.location(ref)
        if _readable(store, ref):
            continue  # moved to another pack since the listing
        if at is not None or gaps:
            where = f"pack {at.pack}" if at else f"one of the damaged packs ({len(gaps)})"
            lost[ref] = CorruptionError(f"has no record any more; it was damaged in {where}", code="corrupt")
        else:
            lost[ref] = NotFoundError("is not in the store", code="no-object")
    return lost


def _readable(store: Store, ref: Ref) -> bool:
    try:
        store.get(ref, MAX_PLAIN_BYTES)
    except (CorruptionError, NotFoundError):
        return False
    return True


def _report(
    store: Store,
    view: View,
    level: Level,
    found: _Findings,
    walker: Walker,
    reached: Reached,
    lost: Mapping[Ref, AgentckptError],
    num_skipped: int,
) -> VerifyReport:
    held, recorded = holders(view), journal_refs(view)
    who = _Attribution(walker, reached, held, recorded)
    places = {ref: place.pack for ref in lost if (place := store.location(ref)) is not None}
    places |= {ref: at.pack for ref, (at, _) in found.bad.items()}
    wanted = reached.all
    losses = [(ref, error) for ref, error in sorted(lost.items()) if ref in wanted or level == "data"]
    missing = [(ref, error) for ref, error in losses if isinstance(error, NotFoundError)]
    corrupt = [(ref, error) for ref, error in losses if not isinstance(error, NotFoundError)]

    def listed(items: Sequence[tuple[Ref, AgentckptError]]) -> tuple[Lost, ...]:
        return tuple(
            Lost(show_ref(ref), error.message, ref in reached.weak, places.get(ref), who.touched([ref]))
            for ref, error in items[:MAX_LISTED]
        )

    damaged = []
    for pack, at in sorted(found.packs.items()):
        inside = [ref for ref, _ in corrupt if places.get(ref) == pack or (ref not in places and pack in found.gaps)]
        damaged.append(DamagedPack(pack, tuple(sorted(set(at)))[:MAX_LISTED], who.touched(inside)))
    return VerifyReport(
        level=level,
        num_packs=found.num_packs,
        num_objects=found.num_objects,
        checked_bytes=found.checked_bytes,
        num_sessions=len(live_sessions(view)),
        num_checkpoints=len(held),
        num_dropped=_num_dropped(store, view, walker, reached) if level != "quick" else 0,
        num_missing=len(missing),
        num_corrupt=len(corrupt),
        num_skipped=num_skipped + found.num_foreign,
        damaged_packs=tuple(damaged),
        missing=listed(missing),
        corrupt=listed(corrupt),
    )


def _num_dropped(store: Store, view: View, walker: Walker, reached: Reached) -> int:
    """Weak objects below dropped parts alone that are gone."""
    below: set[Ref] = set()
    for key, _, ref in reached.parts():
        if key in view.drops:
            below |= walker.weak_below(ref)
    return sum(not store.has(ref) for ref in below - reached.all)


class _Attribution:
    """From objects up to the parts, checkpoints and holders that reach them."""

    def __init__(self, walker: Walker, reached: Reached, held: Mapping[bytes, list[str]], recorded: Mapping[Ref, list[str]]) -> None:
        self._walker, self._reached, self._held, self._recorded = walker, reached, held, recorded
        self._parents = _parents(reached)

    def touched(self, bad: Collection[Ref]) -> tuple[Touched, ...]:
        if not bad:
            return ()
        above = self._walker.touched_by(bad)
        found: set[Touched] = set()
        for key, _, ref in self._reached.parts():
            if ref in above:
                found.update(Touched(holder, key.manifest.hex(), key.part) for holder in self._holders(key.manifest))
        for ref in bad:
            if ref[1:] in self._reached.manifests:
                found.update(Touched(holder, ref[1:].hex(), "") for holder in self._holders(ref[1:]))
        for ref, names in self._recorded.items():
            if ref in above:
                found.update(Touched(name, "", "") for name in names)
        return tuple(sorted(found))

    def _holders(self, manifest: bytes) -> list[str]:
        """Who holds a checkpoint; that of a child is held through the one that pins it."""
        seen: set[bytes] = set()
        names: set[str] = set()
        waiting = [manifest]
        while waiting:
            manifest = waiting.pop()
            if manifest not in seen:
                seen.add(manifest)
                names.update(self._held.get(manifest, ()))
                waiting.extend(self._parents.get(manifest, ()))
        return sorted(names)


def _parents(reached: Reached) -> dict[bytes, list[bytes]]:
    pinned: dict[bytes, list[bytes]] = {}
    for manifest, links in reached.manifests.items():
        for child in links.children:
            pinned.setdefault(child[1:], []).append(manifest)
    return pinned


def _touched_lines(touched: Sequence[Touched]) -> list[str]:
    lines = [
        f"  touches {item.holder}"
        + (f", checkpoint {item.checkpoint[:12]}" if item.checkpoint else ", its records")
        + (f", part {item.part}" if item.part else "")
        for item in touched[:20]
    ]
    return lines + [f"  ... and {len(touched) - 20} more"] * (len(touched) > 20)
