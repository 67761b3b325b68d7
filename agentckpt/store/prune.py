"""Delete what nothing needs: objects that no held checkpoint reaches, and KV that the policy gives up.

Invariants:
1. Prune is alone: it holds the writers' lease exclusively, and no session is owned.
2. Order: drop records durable; live objects of sparse packs written again and durable; ``gc begin`` naming the packs
   durable; only then files are deleted; ``gc swept``. A crash at any place loses nothing; the next prune goes on.
3. What cannot be judged is kept: a damaged pack, an object that does not verify.
   If the closure of a held checkpoint cannot be read, nothing is deleted at all.
4. A copy is deleted as superfluous only after the other copy was read and hashed.
5. A pack is deleted only if every live object that it held was read back from its place in another one just before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Final, Literal

from ..errors import CorruptionError, IncompatibleError
from ..nodes import ref_kind
from ..types import Ref
from .closure import PartKey, Reached, Walker, holders, journal_refs, live_sessions
from .failures import io_errors
from .ids import show_ref
from .pack import pack_path
from .policy import DEFAULT, Policy, kept_kv, parse_policy
from .record import CODEC_ZSTD, MAX_PLAIN_BYTES, Location, record_span
from .store import Draft, Store, View
from .verify import keys_tag, sound_record, tenant_keys

MAX_UNUSED: Final = 0.25
"""a pack whose dead share is larger is rewritten"""
BATCH_BYTES: Final = 256 << 20
"""live bytes that are moved before the packs that they came from are deleted"""
BATCH_PACKS: Final = 500
DROPS_PER_APPEND: Final = 200

Fate = Literal["keep", "delete", "rewrite"]


@dataclass(frozen=True, slots=True)
class Dropped:
    """KV that goes. ``num_objects`` is what the part reaches weakly, of which other checkpoints may keep some."""

    checkpoint: str
    part: str
    holders: tuple[str, ...]
    num_objects: int


@dataclass(frozen=True, slots=True)
class PackFate:
    """What becomes of one pack, and why. Sizes are bytes in the file."""

    pack: str
    fate: Fate
    reason: str
    size_bytes: int
    dead_bytes: int
    num_live: int
    num_dead: int


@dataclass(frozen=True, slots=True)
class PruneReport:
    """What went (or with ``dry_run`` would go)."""

    dry_run: bool
    policy: str
    dropped: tuple[Dropped, ...] = ()
    packs: tuple[PackFate, ...] = ()
    num_objects_removed: int = 0
    freed_bytes: int = 0
    """size of the packs deleted, less what of them is written again"""
    moved_bytes: int = 0

    @property
    def num_packs_removed(self) -> int:
        return sum(pack.fate != "keep" for pack in self.packs)

    def describe(self) -> list[str]:
        """For people: a line each, the sum last."""
        will = "would be" if self.dry_run else "was"
        lines = [
            f"KV of checkpoint {drop.checkpoint[:12]} ({drop.part}; {', '.join(drop.holders)}) {will} dropped: {drop.num_objects} objects; "
            f"policy {self.policy}"
            for drop in self.dropped
        ]
        words = {"delete": "deleted", "rewrite": "rewritten"}
        lines += [
            f"pack {pack.pack[:16]} {will} {words[pack.fate]}: {pack.reason} ({pack.dead_bytes} of {pack.size_bytes} bytes dead)"
            for pack in self.packs
            if pack.fate != "keep"
        ]
        kept = [pack for pack in self.packs if pack.fate == "keep" and pack.reason]
        lines += [f"pack {pack.pack[:16]} stays: {pack.reason}" for pack in kept]
        left = sum(pack.dead_bytes for pack in self.packs if pack.fate == "keep")
        lines.append(
            f"objects freed: {self.num_objects_removed:,}; bytes freed: {self.freed_bytes:,}; "
            f"packs deleted or rewritten: {self.num_packs_removed} of {len(self.packs)}; "
            f"unused bytes that stay, in packs not worth a rewrite: {left:,}"
        )
        return lines


@dataclass(slots=True)
class _Pack:
    name: str
    size_bytes: int
    live: list[tuple[Ref, Location]] = field(default_factory=list)
    num_dead: int = 0
    keep: str = ""
    """why it must stay as it is"""

    @property
    def live_bytes(self) -> int:
        return sum(record_span(at.stored_bytes) for _, at in self.live)

    @property
    def dead_bytes(self) -> int:
        return max(0, self.size_bytes - self.live_bytes)

    def fate(self, max_unused: float) -> tuple[Fate, str]:
        if self.keep:
            return "keep", self.keep
        if not self.live:
            return "delete", "nothing in it is needed"
        if self.num_dead and self.dead_bytes > max_unused * self.size_bytes:
            return "rewrite", f"{self.num_dead} of {self.num_dead + len(self.live)} objects are not needed"
        return "keep", ""


def prune(store: Store, *, kv: str | Policy = DEFAULT, dry_run: bool = False, max_unused: float = MAX_UNUSED) -> PruneReport:
    """Remove what is not needed. ``kv`` says which checkpoints keep their KV (``policy.py``); the others stay whole and
    restore by prefill. With ``dry_run`` nothing is changed and a read-only store will do.

    Raises ``ConflictError`` (another writer, a live session), ``CorruptionError`` (a held checkpoint is damaged),
    ``IncompatibleError`` (bad policy; features or tenants that this cannot judge), ``StoreError``, ``CapacityError``.
    """
    policy = parse_policy(kv)
    store.config.require("prune")
    with io_errors(store.path), nullcontext() if dry_run else _alone(store):
        if not dry_run:
            store.seal()
        view = store.view()
        _require_own_tenant(store, view)
        walker = Walker(store)
        reached = _walk(walker, view, set(view.drops))
        dropped = _to_drop(walker, view, reached, policy)
        gone = set(view.drops) | {key for key, _ in dropped}
        live = _walk(walker, view, gone).all
        packs = _sort_packs(store, live)
        if not dry_run:
            _drop(store, [key for key, _ in dropped])
            _sweep(store, packs, max_unused)
        return _report(view, reached, policy, dropped, packs, dry_run, max_unused)


@contextmanager
def _alone(store: Store) -> Iterator[None]:
    """No other writer, and no session that lives on this very store object."""
    with store.exclusive(), ExitStack() as leases:
        for session in live_sessions(store.view()):
            leases.enter_context(store.lease(session.sid.hex()))
        yield


def _require_own_tenant(store: Store, view: View) -> None:
    """Objects of a tenant whose key is not here can be neither followed nor verified."""
    mine = tenant_keys(store).tag
    tags = {name: keys_tag(entry) for name, entry in store.config.tenants.items()}
    others = sorted({session.tenant for session in live_sessions(view) if tags.get(session.tenant) != mine})
    if others:
        raise IncompatibleError(
            "cannot be pruned: it has sessions of other tenants", object=store.path, found=", ".join(others), code="other-tenants",
            hint="remove these sessions first, or prune with a version that takes all tenants' keys",
        )  # fmt: skip


def _walk(walker: Walker, view: View, unwanted: set[tuple[bytes, str]]) -> Reached:
    reached = walker.walk(holders(view), journal_refs(view), unwanted=unwanted)
    for ref, error in walker.unreadable.items():
        raise CorruptionError(
            f"a held checkpoint cannot be read ({error.message}); nothing was deleted", object=show_ref(ref), code="closure-damaged",
            hint="`agentckpt verify` names the sessions; remove them with `agentckpt rm`, then prune",
        )  # fmt: skip
    return reached


def _to_drop(walker: Walker, view: View, reached: Reached, policy: Policy) -> list[tuple[PartKey, int]]:
    """KV parts that the policy gives up, with the number of weak objects that each has."""
    kept = kept_kv(view, reached, policy)
    found: list[tuple[PartKey, int]] = []
    for key, kind, ref in reached.parts():
        if kind == "kv" and key.manifest not in kept and key not in view.drops and (below := walker.weak_below(ref)):
            found.append((key, len(below)))
    return sorted(found)


def _sort_packs(store: Store, live: set[Ref]) -> list[_Pack]:
    """What lives in each pack. Of an object's copies one is kept: a durable one if it verifies, best in a sealed pack.

    Records above the last commit marker of a dead writer come last: a power cut may still take them.
    """
    packs = [_Pack(name, _size(store, name)) for name in sorted(store.packs(), key=lambda name: (name.endswith(".open"), name))]
    durable = [(pack, store.pack_entries(pack.name, tail=False)) for pack in packs]
    tails = [(pack, store.pack_entries(pack.name)[len(rows) :]) for pack, rows in durable if pack.name.endswith(".open")]
    claimed: dict[Ref, tuple[_Pack, Location]] = {}
    for pack, rows in [*durable, *tails]:
        for ref, at in rows:
            superfluous = ref in claimed and sound_record(store, ref, claimed[ref][1])
            if ref not in live or superfluous:
                pack.num_dead += 1
            else:
                if ref in claimed:
                    claimed[ref][0].keep = "an object in it is damaged"
                claimed[ref] = (pack, at)
                pack.live.append((ref, at))
    damaged = {place.pack for place in store.damage()}
    for pack in packs:
        pack.keep = "it is damaged" if pack.name in damaged else pack.keep
    return packs


def _size(store: Store, name: str) -> int:
    with io_errors(name):
        return store._io.stat(pack_path(store.path, name)).size_bytes


def _report(
    view: View,
    reached: Reached,
    policy: Policy,
    dropped: Sequence[tuple[PartKey, int]],
    packs: Sequence[_Pack],
    dry_run: bool,
    max_unused: float,
) -> PruneReport:
    held = holders(view)
    fates = [(pack, *pack.fate(max_unused)) for pack in packs]
    moved = sum(pack.live_bytes for pack, fate, _ in fates if fate == "rewrite")
    return PruneReport(
        dry_run=dry_run,
        policy=str(policy),
        dropped=tuple(
            Dropped(key.manifest.hex(), key.part, tuple(held.get(key.manifest, ("a checkpoint that pins it",))), count)
            for key, count in dropped
        ),
        packs=tuple(
            PackFate(pack.name, fate, reason, pack.size_bytes, pack.dead_bytes, len(pack.live), pack.num_dead)
            for pack, fate, reason in fates
        ),
        num_objects_removed=sum(pack.num_dead for pack, fate, _ in fates if fate != "keep"),
        freed_bytes=sum(pack.size_bytes for pack, fate, _ in fates if fate != "keep") - moved,
        moved_bytes=moved,
    )


def _drop(store: Store, keys: Sequence[PartKey]) -> None:
    for at in range(0, len(keys), DROPS_PER_APPEND):
        drafts = [Draft("drop", None, {"manifest": key.manifest, "part": key.part}) for key in keys[at : at + DROPS_PER_APPEND]]
        store.append(lambda view, drafts=drafts: drafts)  # type: ignore[misc]


def _sweep(store: Store, packs: Sequence[_Pack], max_unused: float) -> None:
    """First what is wholly dead, so that a full disk has room for what must be moved."""
    dead = [pack for pack in packs if pack.fate(max_unused)[0] == "delete"]
    for at in range(0, len(dead), BATCH_PACKS):
        _delete(store, dead[at : at + BATCH_PACKS])
    batch: list[_Pack] = []
    moved = 0
    for pack in packs:
        if pack.fate(max_unused)[0] == "rewrite" and _move(store, pack):
            batch.append(pack)
            moved += pack.live_bytes
            if moved >= BATCH_BYTES or len(batch) >= BATCH_PACKS:
                _delete(store, batch)
                batch, moved = [], 0
    _delete(store, batch)


def _move(store: Store, pack: _Pack) -> bool:
    """Write the live objects again; False if one cannot be read, then the pack must stay."""
    try:
        for ref, at in pack.live:
            data = store.get(ref, MAX_PLAIN_BYTES)
            store.write_again(ref_kind(ref), data, compress=at.codec == CODEC_ZSTD)
    except CorruptionError:
        pack.keep = "an object in it that is needed is damaged"
        return False
    return True


def _delete(store: Store, packs: Sequence[_Pack]) -> None:
    """Delete packs whose live objects were moved; what was moved is durable, under its final name, before any record says so."""
    store.seal()
    names = _deserted(store, packs)
    if not names:
        return
    store.append(lambda view: [Draft("gc", None, {"state": "begin", "packs": names})])
    store.remove_packs(names)
    store.append(lambda view: [Draft("gc", None, {"state": "swept", "packs": names})])


def _deserted(store: Store, packs: Sequence[_Pack]) -> list[str]:
    """Names of those whose live objects all have a sound place in some other pack.

    A pack is named by its content: what was moved may have got the very name of a pack that was to go.
    """
    used: set[str] = set()
    for pack in packs:
        for ref, _ in pack.live:
            at = store.location(ref)
            if at is not None and sound_record(store, ref, at):
                used.add(at.pack)
            else:
                pack.keep = "what is needed of it could not be read back from its new place"
    for pack in packs:
        if pack.name in used:
            pack.keep = "what is needed was written again under its name"
    return [pack.name for pack in packs if not pack.keep]
