"""What can be done to stored sessions without loading a part: fork, promote, resolve an effect, remove.

Invariants:
1. Each is one append: all its records are visible together or not at all.
2. A session with a live owner is refused: its lease is taken for the time of the change.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import AmbiguousIdError, ConflictError, IncompatibleError, NotFoundError
from ..ledger import EffectRecord, pack_value, resolve_body
from ..manifest import Checkpoint, decode_checkpoint
from ..store import Draft, SessionView, Store, View
from ..types import KIND_BYTE, EffectState, Ref, Value
from .lineage import session_ledger

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_MANIFEST_BYTES = 16 * 2**20


def load_checkpoint(store: Store, identity: bytes) -> Checkpoint:
    """The manifest with that 32-byte id. Raises ``NotFoundError``, ``CorruptionError``, ``IncompatibleError``."""
    return decode_checkpoint(store.get(Ref(bytes([KIND_BYTE["manifest"]]) + identity), MAX_MANIFEST_BYTES), identity)


def fork_stored(store: Store, identity: bytes, name: str) -> bytes:
    """Start a session ``name`` at a checkpoint; returns its id (16 bytes). Nothing is copied.

    Its ledger begins at the checkpoint's mark. Raises ``ConflictError`` if the name is taken.
    """
    checkpoint = load_checkpoint(store, identity)
    sid, lineage, nonce = (store.random(16) for _ in range(3))

    def build(view: View) -> list[Draft]:
        origin = view.sessions.get(checkpoint.session)
        if origin is None:
            raise NotFoundError("the checkpoint's session is not in this store", object=identity.hex()[:12])
        if name in view.names:
            raise ConflictError("the name is taken", object=name, hint="choose another, or `agentckpt rm` the session")
        parent = {"sid": checkpoint.session, "sseq": checkpoint.mark.seq, "hash": checkpoint.mark.hash}
        return [
            Draft("session", sid, {"name": name, "tenant": origin.tenant, "lineage": lineage, "parent": parent}),
            Draft("head", sid, head_body(identity, None, "fork", nonce, facts_of(view, identity))),
        ]

    store.append(build)
    return sid


def promote_stored(store: Store, branch: str, into: str | None = None) -> tuple[str, bytes]:
    """Move the head of ``into`` (default: the session that ``branch`` was forked from) to the branch's head.

    Returns the session's name and the 32-byte id of its new head. Refused with ``IncompatibleError`` if the branch has
    effects of its own on the world: its ledger can be taken over only by a running session's ``promote``.
    """
    view = store.view()
    source = named(view, branch)
    target = named(view, into) if into else view.sessions.get(source.parent["sid"]) if source.parent else None
    if target is None or source.parent is None or source.parent["sid"] != target.sid:
        raise NotFoundError("is not a fork of that session", object=branch, hint="promote takes a direct fork; `agentckpt ls` shows them")
    if source.head is None:
        raise NotFoundError("has no checkpoint", object=branch)
    own = [e for e in source.entries if e.kind == "intent" and e.body["class"] not in ("sandbox", "read")]
    if own:
        raise IncompatibleError(
            "has effects of its own on the world", object=branch, found=f"{len(own)}",
            hint="promote it from the running session, which takes its ledger over",
        )  # fmt: skip
    identity = source.head["manifest"]
    nonce = source.head["nonce"]
    with owned(store, source.sid), owned(store, target.sid):

        def build(now: View) -> list[Draft]:
            present = now.sessions[target.sid]
            return [Draft("head", target.sid, head_body(identity, present, "promote", nonce, facts_of(now, identity)))]

        store.append(build)
    return target.name, identity


def resolve_stored(store: Store, prefix: str, *, applied: bool, value: Value = None, note: str = "") -> tuple[str, EffectRecord]:
    """A person says how an effect ended: it stands in the world, with ``value`` as its result, or it does not and may be made.

    ``prefix``: the first hex digits of the effect's key. Returns the session's name and the record before. Raises
    ``NotFoundError``, ``AmbiguousIdError``, ``ConflictError`` (a live owner; an effect that has ended already, code
    ``effect-transition``), ``CapacityError`` (the value is over 16 MiB).
    """
    view = store.view()
    session, record = effect_named(store, view, prefix)

    def put(data: bytes) -> Ref:
        ref = store.put("chunk", data)
        store.sync()
        return ref

    packed = pack_value(value, put)
    state: EffectState = "resolved" if applied else "verified-not"
    with owned(store, session.sid):

        def build(now: View) -> list[Draft]:
            present = now.sessions[session.sid]
            found = session_ledger(store, now, present).get(bytes.fromhex(record.key))
            body = resolve_body(found or record, state, epoch=present.epoch, by="person", note=note, value=packed)
            return [Draft("resolve", session.sid, body)]

        store.append(build)
    return session.name, record


def effect_named(store: Store, view: View, prefix: str) -> tuple[SessionView, EffectRecord]:
    """The one effect whose key begins so, and the session that made it."""
    sessions = [session for session in view.sessions.values() if not session.removed]
    pairs = [(session, record) for session in sessions for record in session_ledger(store, view, session).effects]
    found = [(session, record) for session, record in pairs if record.sid == session.sid and record.key.startswith(prefix.lower())]
    if not prefix or not found:
        raise NotFoundError("no effect has that key", object=prefix or "''", hint="`agentckpt effects NAME` lists them")
    if len(found) > 1:
        raise AmbiguousIdError("fits several effects", object=prefix, found=", ".join(record.key[:16] for _, record in found[:5]))
    return found[0]


def remove_stored(store: Store, name: str) -> bytes:
    """Take the name away and leave a tombstone; the bytes go at the next prune. Returns the session's id."""
    view = store.view()
    session = named(view, name)
    with owned(store, session.sid):
        store.append(lambda now: [Draft("name", None, {"name": name, "sid": None}), Draft("tombstone", session.sid, {})])
    return session.sid


def named(view: View, name: str) -> SessionView:
    if name not in view.names:
        raise NotFoundError("no such session", object=name, hint="`agentckpt ls` lists them")
    return view.sessions[view.names[name]]


@contextmanager
def owned(store: Store, sid: bytes) -> Iterator[None]:
    lease = store.lease(sid.hex())
    try:
        yield
    finally:
        lease.release()


def facts_of(view: View, identity: bytes) -> Mapping[str, Any]:
    """The facts that a head record holds about a checkpoint, so that the new head shows them as well."""
    for session in view.sessions.values():
        for head in reversed(session.heads):
            if head["manifest"] == identity:
                return dict(head.get("facts") or {})
    return {}


def head_body(identity: bytes, present: SessionView | None, reason: str, nonce: bytes, facts: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "manifest": identity,
        "previous": present.head["manifest"] if present is not None and present.head is not None else None,
        "epoch": present.epoch if present is not None else 0,
        "generation": present.generation + 1 if present is not None else 1,
        "reason": reason,
        "nonce": nonce,
        "message": None,
        "pack": None,
        "facts": dict(facts),
    }
