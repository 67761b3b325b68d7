"""Opening a session: it is made, or its head is restored.

    OPEN -> LEASED -> PREPARED (parts verified, built aside) -> OWNED (owner record, epoch + 1: the commit point)
         -> RESTORED (each part's commit; restore record done)

Invariants:
1. A failure before OWNED leaves journal, parts and directories as they were, and gives the lease back.
2. A crash between OWNED and RESTORED is redone by the next opening: it restores the same head again.
3. A ledger that is shorter than the checkpoint's mark, or has another hash there, fails closed.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

from ..errors import ConflictError, IncompatibleError
from ..ledger import EffectRecord, Ledger, action_of
from ..manifest import Checkpoint
from ..store import Lease, SessionView, Store, View
from ..store.leases import host_identity
from ..types import Part
from .cut import Cutter
from .lineage import check_restored, first_nonce, next_nonce, session_ledger
from .live import Divergence, Head, Live
from .log import JournalLog
from .report import RestoreMode, RestoreReport
from .restore import (
    Prepared,
    as_sandbox,
    commit_parts,
    named_engines,
    open_sequence,
    prepare_parts,
    read_checkpoint,
    resolve_id,
)
from .segments import Segments, recorded_segments
from .sequence import RecordingSequence
from .state import StatePart

Durability = Literal["commit", "none"]
SID_BYTES = 16


@dataclass(frozen=True, slots=True)
class Options:
    """What ``Session.open`` was asked for."""

    store: str | Path | Store
    name: str
    kv: Any = None
    sandbox: Any = None
    state: Any = None
    at: str | None = None
    on_divergence: Divergence = "raise"
    durability: Durability = "commit"
    tenant: str = "local"


@dataclass(slots=True)
class Opened:
    """A session at work and what it must give back when it is closed."""

    live: Live
    cutter: Cutter
    lease: Lease | None
    owns_store: bool = False
    owned_parts: list[Part] = field(default_factory=list)


def open_session(options: Options) -> Opened:
    """Blocking; errors as ``Session.open``."""
    _check_options(options)
    store, owns_store = _open_store(options)
    try:
        view = store.view()
        sid = view.names.get(options.name)
        if sid is None or view.sessions[sid].head is None:
            opened = _create(options, store, view, sid)
        else:
            opened = resume(options, store, sid, Parts.open(options))
    except BaseException:
        if owns_store:
            store.close()
        raise
    opened.owns_store = owns_store
    return opened


def _check_options(options: Options) -> None:
    if not options.name or not isinstance(options.name, str):
        raise IncompatibleError("a session needs a name", code="session-name", object="name=", found=repr(options.name))
    if options.on_divergence not in ("raise", "continue"):
        raise IncompatibleError(
            "unknown option", code="bad-option", object="on_divergence=", expected="raise or continue", found=repr(options.on_divergence)
        )
    path = options.store.path if isinstance(options.store, Store) else options.store
    inside = options.sandbox if isinstance(options.sandbox, str | Path) else getattr(options.sandbox, "path", None)
    if inside is None:
        return
    store_path, sandbox_path = os.path.realpath(path), os.path.realpath(inside)
    for inner, outer, words in (
        (store_path, sandbox_path, "the store is in the sandbox"),
        (sandbox_path, store_path, "the sandbox is in the store"),
    ):
        if os.path.commonpath([inner, outer]) == outer:
            raise IncompatibleError(
                words, code="store-in-sandbox", object=str(path), expected="a store beside the sandbox", found=inner,
                hint="a checkpoint would capture the store that it is written to",
            )  # fmt: skip


def _open_store(options: Options) -> tuple[Store, bool]:
    if isinstance(options.store, Store):
        return options.store, False
    return Store.open(options.store, create=True, durability=options.durability, tenant=options.tenant), True


@dataclass(slots=True)
class Parts:
    """The live parts of a session before it runs."""

    kv: dict[str, Any]
    sandbox: Any
    state: StatePart | None
    nonce: bytes
    owned: list[Part]

    @classmethod
    def open(cls, options: Options) -> Parts:
        """Sequences are opened when the nonce is known."""
        sandbox = as_sandbox(options.sandbox)
        if sandbox is not None:
            sandbox.effect_class  # noqa: B018  a backend may probe the kernel once; not later, on somebody's event loop
        state = StatePart(options.state) if options.state is not None else None
        owned: list[Part] = [sandbox] if isinstance(options.sandbox, str | Path) else []
        return cls(named_engines(options.kv), sandbox, state, first_nonce(options.name), owned)

    def open_sequences(self, nonce: bytes) -> None:
        self.nonce = nonce
        for name, engine in self.kv.items():
            if hasattr(engine, "open_sequence"):
                self.kv[name] = open_sequence(engine, name, nonce)
                self.owned.append(self.kv[name])

    def named(self) -> dict[str, Part]:
        parts: dict[str, Part] = dict(self.kv)
        if self.sandbox is not None:
            parts["sandbox"] = self.sandbox
        if self.state is not None:
            parts["state"] = self.state
        return parts

    def close(self) -> None:
        for part in self.owned:
            part.close()


def make_live(
    store: Store, sid: bytes, name: str, lineage: bytes, parts: Parts, log: Any, ledger: Ledger, segments: Segments, lock: threading.RLock
) -> tuple[Live, Cutter]:
    """A session's working state around its parts."""
    live = Live(store=store, sid=sid, name=name, lineage=lineage, nonce=parts.nonce, log=log, ledger=ledger, segments=segments, lock=lock)
    cutter = Cutter(live)

    def guard() -> None:
        live.check_open()
        cutter.raise_error()
        live.open_turn()

    live.kv = {part: RecordingSequence(part, sequence, segments, guard) for part, sequence in parts.kv.items()}
    live.sandbox, live.state = parts.sandbox, parts.state
    return live, cutter


def _create(options: Options, store: Store, view: View, sid: bytes | None) -> Opened:
    """A new session, or one that crashed before its cut 0: nothing of it is visible yet."""
    if options.at is not None:
        raise IncompatibleError(
            "a new session has nothing to go back to", code="bad-option", object=f"session {options.name}", found=f"at={options.at}"
        )
    known = view.sessions.get(sid) if sid is not None else None
    sid = sid or os.urandom(SID_BYTES)
    lease = store.lease(sid.hex())
    parts = None
    try:
        parts = Parts.open(options)
        parts.open_sequences(parts.nonce)
        lock = threading.RLock()
        segments = Segments(continue_on_divergence=options.on_divergence == "continue")
        ledger = Ledger(sid=sid)
        epoch = 1 if known is None else known.epoch + 1
        log = JournalLog(store, sid, epoch=epoch, num_entries=0, ledger=ledger, segments=segments, lock=lock)
        lineage = sid if known is None else known.lineage
        live, cutter = make_live(store, sid, options.name, lineage, parts, log, ledger, segments, lock)
        live.on_divergence = options.on_divergence
        session = ("session", {"name": options.name, "tenant": options.tenant, "lineage": lineage, "parent": None})
        owner = ("owner", {"epoch": epoch, "owner": host_identity()})
        # Not flushed on its own: it becomes durable with cut 0, and without that there is nothing to find.
        log.append([owner] if known is not None else [session, owner], durable=False)
        cutter.cut(here=True).result()
    except BaseException:
        if parts is not None:
            parts.close()
        lease.release()
        raise
    return Opened(live, cutter, lease, owned_parts=parts.owned)


# ---- an existing session ---------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Plan:
    """What is to be restored, and under which ledger."""

    session: SessionView
    checkpoint: Checkpoint
    ledger: Ledger
    mode: RestoreMode
    nonce: bytes
    turn: int
    segments: dict[str, list[Any]]


def resume(options: Options, store: Store, sid: bytes, parts: Parts) -> Opened:
    """Restore the head (or roll back to ``at``) into ``parts``; they are closed if it fails."""
    started = perf_counter()
    lease = store.lease(sid.hex())
    prepared: Prepared | None = None
    try:
        view = store.view()
        plan = _plan(options, store, view, view.sessions[sid])
        parts.open_sequences(plan.nonce)
        seconds = {"read": perf_counter() - started}
        prepared = prepare_parts(store, plan.checkpoint, parts.named())
        opened = _own(options, store, plan, parts, lease)
    except BaseException:
        if prepared is not None:
            prepared.abort()
        parts.close()
        lease.release()
        raise
    seconds["own"] = perf_counter() - started - sum(seconds.values()) - sum(prepared.seconds.values())
    try:
        _commit(opened, plan, prepared, seconds)
    except BaseException:
        # Owned, but not restored: the restore record is not done, so the next opening does this again.
        parts.close()
        lease.release()
        raise
    return opened


def _plan(options: Options, store: Store, view: View, session: SessionView) -> Plan:
    assert session.head is not None
    manifest = bytes(session.head["manifest"]) if options.at is None else resolve_id(store, options.at)
    checkpoint = read_checkpoint(store, manifest)
    if options.at is not None and all(head["manifest"] != manifest for head in session.heads):
        raise IncompatibleError(
            "is no checkpoint of this session", code="other-session", object=f"at={options.at}", expected=f"a checkpoint of {session.name}",
            found=checkpoint.session.hex(), hint="fork that session instead",
        )  # fmt: skip
    mode: RestoreMode = "recover" if options.at is None else "rollback"
    ledger = session_ledger(store, view, session)
    ledger.restored(
        checkpoint.mark, sid=checkpoint.session, mode="rollback" if mode == "rollback" else "recover",
        keys=(*checkpoint.in_flight, *checkpoint.undelivered),
    )  # fmt: skip
    check_restored(ledger, checkpoint)
    nonce = bytes(session.head["nonce"])
    if mode == "rollback":
        nonce = next_nonce(nonce, session.generation + 1)
    later = [entry.body for entry in session.entries if entry.kind == "segment" and entry.sseq > session.head["sseq"]]
    turn = checkpoint.turn
    segments = recorded_segments(later, turn + 1) if mode == "recover" else {}
    return Plan(session, checkpoint, ledger, mode, nonce, turn, segments)


def _own(options: Options, store: Store, plan: Plan, parts: Parts, lease: Lease) -> Opened:
    """The commit point: epoch + 1, and for a rollback the new head, in one append."""
    session, checkpoint = plan.session, plan.checkpoint
    assert session.head is not None
    lock = threading.RLock()
    segments = Segments(continue_on_divergence=options.on_divergence == "continue")
    epoch = session.epoch + 1
    log = JournalLog(store, session.sid, epoch=epoch, num_entries=len(session.entries), ledger=plan.ledger, segments=segments, lock=lock)
    live, cutter = make_live(store, session.sid, session.name, session.lineage, parts, log, plan.ledger, segments, lock)
    live.on_divergence = options.on_divergence
    live.turn = plan.turn
    live.undelivered = set(checkpoint.undelivered)
    refs = {name: ref for name, (_, ref) in checkpoint.parts.items()}
    generation = session.generation + (plan.mode == "rollback")
    live.head = Head(checkpoint.id, generation, checkpoint.turn, refs)
    segments.expect(plan.turn + 1, plan.segments)
    records: list[tuple[str, Mapping[str, Any]]] = [
        ("owner", {"epoch": epoch, "owner": host_identity()}),
        ("restore", _restore_body(plan, epoch, done=False)),
    ]
    if plan.mode == "rollback":
        records.append(("head", _rollback_body(plan, epoch, generation)))
    expected = bytes(session.head["manifest"])

    def unmoved(view: View) -> None:
        head = view.sessions[session.sid].head
        if head is None or bytes(head["manifest"]) != expected:
            raise ConflictError(
                "its head moved while it was being restored", code="stale-head", object=f"session {session.name}", hint="open it again"
            )

    log.append(records, expect=unmoved)
    return Opened(live, cutter, lease, owned_parts=parts.owned)


def _restore_body(plan: Plan, epoch: int, *, done: bool, displaced: str | None = None) -> dict[str, Any]:
    mark = plan.checkpoint.mark
    return {
        "epoch": epoch,
        "manifest": plan.checkpoint.id,
        "mode": plan.mode,
        "done": done,
        "displaced": displaced,
        "mark": {"sid": plan.checkpoint.session, "seq": mark.seq, "hash": mark.hash} if plan.mode == "rollback" else None,
    }


def _rollback_body(plan: Plan, epoch: int, generation: int) -> dict[str, Any]:
    assert plan.session.head is not None
    return {
        "manifest": plan.checkpoint.id,
        "previous": bytes(plan.session.head["manifest"]),
        "epoch": epoch,
        "generation": generation,
        "reason": "rollback",
        "nonce": plan.nonce,
        "message": None,
        "pack": None,
        "facts": {"turn": plan.checkpoint.turn},
    }


def _commit(opened: Opened, plan: Plan, prepared: Prepared, seconds: dict[str, float]) -> None:
    live = opened.live
    reports = commit_parts(prepared)
    displaced = next((report.displaced for report in reports.values() if report.displaced), None)
    body = _restore_body(plan, live.log.epoch, done=True, displaced=displaced)
    live.log.append([("restore", body)])
    report = RestoreReport(
        checkpoint=plan.checkpoint.id.hex(),
        session=live.name,
        turn=plan.checkpoint.turn,
        mode=plan.mode,
        epoch=live.log.epoch,
        parts=reports,
        num_segments=sum(len(items) for items in plan.segments.values()),
        seconds={**seconds, **prepared.seconds},
    )
    live.restored = _with_effects(report, live)


def _with_effects(report: RestoreReport, live: Live) -> RestoreReport:
    ledger = live.ledger
    groups: dict[str, list[EffectRecord]] = {"replayed": [], "rerun": [], "unknown": []}
    kinds = {"record": "replayed", "record-and-install": "replayed", "unknown": "unknown", "post-missing": "unknown"}
    for record in ledger.unmatched:
        groups[kinds.get(action_of(record), "rerun")].append(record)
    return replace(
        report, replayed=tuple(groups["replayed"]), rerun=tuple(groups["rerun"]), unknown=tuple(groups["unknown"]), orphaned=ledger.orphans
    )
