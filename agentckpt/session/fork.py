"""Forks of a session, and the promotion of one of them.

Invariants:
1. A branch has its own lineage, nonce, parts and records; nothing that it does is seen by the parent before ``promote``.
2. Nonce and id of a branch are functions of (parent's id and nonce, turn, ordinal of the fork, index, seed; a durable one's id also
   of the parent's head and ``at``): a turn that is executed again makes the same branches, with the same draws; durable ones are
   found again, and never those of another head or timeline. So a durable fork waits until the cut before it is published.
3. A branch may have no effects in the world unless they were granted, and none at all if it writes nothing.
4. Promote is durable with the turn's cut (outside a turn: a cut at once); a crash before it leaves the parent as it was.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from ..errors import ConflictError, IncompatibleError
from ..handles import Handle
from ..ledger import Ledger
from ..nodes import encode
from ..store import Lease, View
from ..store.leases import host_identity
from ..types import EFFECT_CLASSES, EffectClass, LiveSequence, Mark, Part, Value
from .cut import Cutter
from .executor import PoolName, on_loop_thread, submit
from .lineage import ancestors_of
from .live import Live
from .log import BodyOf, JournalLog, MemoryLog
from .opening import SID_BYTES, Opened, Options, Parts, make_live, resume
from .restore import NONCE_BYTES, commit_parts, nonce_of, prepare_parts, read_checkpoint, resolve_id
from .segments import Segments
from .state import StatePart

if TYPE_CHECKING:
    from .session import Branch

HARMLESS: frozenset[EffectClass] = frozenset({"read", "sandbox", "model"})
GRANTED: frozenset[EffectClass] = HARMLESS | {"idempotent", "compensable"}
"""What ``effects="grant"`` gives; ``irreversible`` and ``authority`` stay with the parent unless named."""


def allowed_classes(effects: str | Iterable[str]) -> frozenset[EffectClass]:
    """``"deny"``, ``"grant"``, or the classes by name (beside the harmless ones)."""
    if effects == "deny":
        return HARMLESS
    if effects == "grant":
        return GRANTED
    named = {effects} if isinstance(effects, str) else set(effects)
    found = frozenset(each for each in EFFECT_CLASSES if each in named)
    if len(found) != len(named):
        raise IncompatibleError(
            "unknown effect class", code="bad-option", object="effects=", expected=f"deny, grant or some of {list(EFFECT_CLASSES)}",
            found=repr(sorted(named - set(found))),
        )  # fmt: skip
    return HARMLESS | found


@dataclass(frozen=True, slots=True)
class Seedling:
    """What makes a branch, fixed at the instant of the fork."""

    index: int
    seed: int | None
    sid: bytes
    nonce: bytes
    name: str


@dataclass(slots=True)
class Taken:
    """The parts of all branches, being copied."""

    kv: dict[str, Handle[Sequence[LiveSequence]]]
    state: Sequence[StatePart] | None
    mark: Mark
    turn: int
    seedlings: list[Seedling]


def _derived_id(origin: Value) -> bytes:
    return blake3(encode(origin), derive_key_context="agentckpt v1 fork session").digest(SID_BYTES)


def take(live: Live, n: int, seeds: Sequence[int] | None) -> Taken:
    """The instant of a fork: on the caller's thread, without I/O."""
    with live.turn_lock:
        ordinal, live.num_forks = live.num_forks, live.num_forks + 1
    place = f"{live.turn}{'' if live.turn_open else 'e'}.{ordinal}"
    seedlings = []
    for index in range(n):
        seed = None if seeds is None else int(seeds[index])
        drawn = blake3(encode([live.nonce, place, index, seed]), derive_key_context="agentckpt v1 fork nonce").digest(NONCE_BYTES)
        sid = _derived_id([live.sid, live.nonce, place, index, seed])  # the nonce tells timelines apart
        seedlings.append(Seedling(index, seed, sid, drawn, f"{live.name}/{place}.{index}"))
    with live.lock:
        mark = live.ledger.mark
    kv = {name: sequence.fork_queued(n) for name, sequence in live.kv.items()}
    state = live.state.fork(n) if live.state is not None else None
    return Taken(kv, state, mark, live.turn, seedlings)


def grow(live: Live, taken: Taken, *, allowed: frozenset[EffectClass], durable: bool, at: str | None) -> list[Opened]:
    """Make the branches' parts and sessions. Blocking; if it fails, nothing is left behind."""
    parts: list[Parts] = []
    opened: list[Opened] = []
    try:
        parts = _copy_parts(live, taken)
        for part, seedling in zip(parts, taken.seedlings, strict=True):
            opened.append(_durable_branch(live, taken, seedling, part, at) if durable else _memory_branch(live, seedling, part, taken, at))
            opened[-1].live.allowed = allowed
        return opened
    except BaseException:
        for part in parts:
            part.close()
        for each in opened:
            if each.lease is not None:
                each.lease.release()
        raise


def _copy_parts(live: Live, taken: Taken) -> list[Parts]:
    n = len(taken.seedlings)
    sequences = {name: handle.result() for name, handle in taken.kv.items()}
    copies: Sequence[Any] = [None] * n
    if live.sandbox is not None:
        # Alone: a copy made while a command runs would be of no instant.
        live.turnstile.enter(alone=True).result()
        try:
            copies = live.sandbox.fork(n)
        finally:
            live.turnstile.leave()
    made = []
    for index, seedling in enumerate(taken.seedlings):
        kv = {name: forks[index] for name, forks in sequences.items()}
        for name, sequence in kv.items():
            sequence.nonce = nonce_of(seedling.nonce, name)
        state = taken.state[index] if taken.state is not None else None
        owned: list[Part] = [*kv.values(), *([copies[index]] if copies[index] is not None else []), *([state] if state is not None else [])]
        made.append(Parts(kv, copies[index], state, seedling.nonce, owned))
    return made


def _memory_branch(live: Live, seedling: Seedling, parts: Parts, taken: Taken, at: str | None) -> Opened:
    """A branch that writes nothing."""
    _load_older(live, parts, at)
    lock, segments = threading.RLock(), Segments()
    ledger = Ledger(sid=seedling.sid)
    log = MemoryLog(ledger=ledger, segments=segments, lock=lock)
    branch, cutter = make_live(live.store, seedling.sid, seedling.name, seedling.sid, parts, log, ledger, segments, lock)
    branch.turn = taken.turn
    return Opened(branch, cutter, None, owned_parts=parts.owned)


def _load_older(live: Live, parts: Parts, at: str | None) -> tuple[bytes, Mark] | None:
    """Bring forked parts back to an older checkpoint; (session, mark) of it."""
    if at is None:
        return None
    checkpoint = read_checkpoint(live.store, resolve_id(live.store, at))
    commit_parts(prepare_parts(live.store, checkpoint, parts.named()))
    return checkpoint.session, checkpoint.mark


def _durable_branch(live: Live, taken: Taken, seedling: Seedling, parts: Parts, at: str | None) -> Opened:
    """A branch with a session of its own; one that an earlier execution of this turn made is found again."""
    store = live.store
    view = store.view()
    seedling = _rooted(view, seedling, live.head.manifest if live.head is not None else None, at)
    known = view.sessions.get(seedling.sid)
    if known is not None and known.head is not None and not known.removed:
        options = Options(store, known.name, on_divergence=live.on_divergence)
        return resume(options, store, seedling.sid, parts)
    lease: Lease | None = store.lease(seedling.sid.hex())
    try:
        sid, mark = _load_older(live, parts, at) or (live.sid, taken.mark)
        parent = {"sid": sid, "sseq": mark.seq, "hash": mark.hash}
        lock, segments = threading.RLock(), Segments(continue_on_divergence=live.on_divergence == "continue")
        ledger = Ledger(sid=seedling.sid, ancestors=ancestors_of(view, parent))
        epoch = 1 if known is None else known.epoch + 1
        log = JournalLog(store, seedling.sid, epoch=epoch, num_entries=0, ledger=ledger, segments=segments, lock=lock)
        branch, cutter = make_live(store, seedling.sid, seedling.name, seedling.sid, parts, log, ledger, segments, lock)
        branch.turn, branch.on_divergence = taken.turn, live.on_divergence
        tenant = view.sessions[live.sid].tenant if live.sid in view.sessions else "local"
        session = ("session", {"name": seedling.name, "tenant": tenant, "lineage": seedling.sid, "parent": parent})
        owner = ("owner", {"epoch": epoch, "owner": host_identity()})
        log.append([owner] if known is not None else [session, owner], durable=False)
        parents = (live.head.manifest,) if live.head is not None else ()
        cutter.cut("fork", here=True, parents=parents).result()
    except BaseException:
        if lease is not None:
            lease.release()
        raise
    return Opened(branch, cutter, lease, owned_parts=parts.owned)


def _rooted(view: View, seedling: Seedling, head: bytes | None, at: str | None) -> Seedling:
    """A durable branch's id and name: the place in the turn does not tell apart what is forked between turns, by several runs."""
    sid = _derived_id([seedling.sid, head, at])
    taken = view.names.get(seedling.name, sid) != sid
    return replace(seedling, sid=sid, name=f"{seedling.name}.{sid.hex()[:8]}" if taken else seedling.name)


class Fork(Handle[list["Branch"]]):
    """Branches on their way: ``.result()``, ``await``, ``with`` and ``async with`` give the list; the blocks release them."""

    def __init__(self, handle: Handle[list[Branch]]) -> None:
        super().__init__(handle._future)

    def __enter__(self) -> list[Branch]:
        return self.result()

    def __exit__(self, *exc: object) -> None:
        release(self.result())

    async def __aenter__(self) -> list[Branch]:
        return await self

    async def __aexit__(self, *exc: object) -> None:
        branches = await self
        await submit("turns", lambda: release(branches))

    def __await__(self) -> Generator[Any, None, list[Branch]]:
        return super().__await__()


def release(branches: Sequence[Branch]) -> None:
    """Free the live parts of branches; what durable ones stored stays. Idempotent."""
    for branch in branches:
        branch.release()


@dataclass(slots=True)
class Promotion:
    """A branch taken over, to be written with the next cut."""

    records: list[BodyOf]
    parents: tuple[bytes, ...]


def take_over(parent: Live, parent_cutter: Cutter, branch: Live, branch_cutter: Cutter) -> Promotion:
    """Exchange the live parts. Blocking: waits for what is under way on both sides."""
    for cutter in (parent_cutter, branch_cutter):
        gate = cutter.gate()
        if gate is not None:
            gate.result()
    for live in (parent, branch):
        for future in live.in_flight.waiting():
            future.result()
        for sequence in live.kv.values():
            sequence.quiet().result()
    if branch.in_flight.begun():
        raise ConflictError("the branch has a begun call that is not finished", code="effect-open", object=f"branch {branch.name}")
    drafts = _drafts_of(parent, branch)
    if parent.sandbox is not None and branch.sandbox is not None:
        parent.turnstile.enter(alone=True).result()
        try:
            parent.sandbox.exchange(branch.sandbox)
        finally:
            parent.turnstile.leave()
    for name, sequence in parent.kv.items():
        branch.kv[name].replace(sequence.replace(branch.kv[name].inner))
    if parent.state is not None and branch.state is not None:
        parent.state.exchange(branch.state)
    parent.vault.take_over(branch.vault)
    parent.nonce = branch.nonce
    return Promotion(drafts, (branch.head.manifest,) if branch.head is not None else ())


def exchange_owned(parent: Opened, branch: Opened) -> None:
    """Who closes a sequence follows who holds it; directories and states were exchanged within their objects."""
    taken, given = ({id(sequence.inner) for sequence in opened.live.kv.values()} for opened in (parent, branch))
    arrived = [part for part in branch.owned_parts if id(part) in taken]
    left = [part for part in parent.owned_parts if id(part) in given]
    parent.owned_parts = [part for part in parent.owned_parts if id(part) not in given] + arrived
    branch.owned_parts = [part for part in branch.owned_parts if id(part) not in taken] + left


def _drafts_of(parent: Live, branch: Live) -> list[BodyOf]:
    """What the parent's ledger must know of the branch's effects; large values become chunks."""
    with branch.lock:
        bodies = branch.ledger.bodies_after(Mark(0, bytes(32)), epoch=parent.log.epoch)
    with parent.lock:
        known = {bytes.fromhex(record.key) for record in parent.ledger.effects}
    drafts: list[BodyOf] = []
    for kind, body in bodies:
        if body["key"] in known:
            continue
        for name in ("args", "value"):
            if name in body and not _is_packed(body[name]):
                body[name] = parent.log.pack(body[name])
        drafts.append((kind, body))
    return drafts


def _is_packed(value: Any) -> bool:
    return isinstance(value, dict) and set(value) == {"$ref"}


def start(name: PoolName, job: Callable[[], Any]) -> Handle[Any]:
    """In the background on an event loop, here otherwise."""
    if on_loop_thread():
        return submit(name, job)
    try:
        return Handle.of(job())
    except Exception as error:
        return Handle.failed(error)
