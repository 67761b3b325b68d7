"""What the journal says, materialised: sessions, names, tags, drops (FORMAT.md section 5).

Invariants:
1. ``SessionView`` and ``Log`` never change once seen; a ``View`` from ``store.view()`` does not either.
2. ``check`` is the only place that decides whether a draft may be appended; ``apply`` never refuses.
3. Applying a record costs what the record is, not what the session's history is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Final, Generic, TypeVar, overload

from ..errors import ConflictError, CorruptionError, NotFoundError, StoreError
from .ids import ZERO_HASH

T = TypeVar("T")

KIND_NUMBER: Final[dict[str, int]] = {
    "session": 1, "owner": 2, "head": 3, "segment": 4, "intent": 5, "outcome": 6, "resolve": 7, "restore": 8,
    "name": 9, "tag": 10, "annotate": 11, "tombstone": 12, "drop": 13, "gc": 14,
}  # fmt: skip
KIND_OF: Final = {number: name for name, number in KIND_NUMBER.items()}
OF_SESSION: Final = frozenset({"session", "owner", "head", "segment", "intent", "outcome", "resolve", "restore", "annotate", "tombstone"})
ENTRY_KINDS: Final = frozenset({"segment", "intent", "outcome", "resolve", "restore"})
NOT_CRITICAL: Final = frozenset({"annotate"})

_TYPES: Final[dict[str, dict[str, type | tuple[type, ...]]]] = {
    "session": {"name": str, "tenant": str, "lineage": bytes},
    "owner": {"epoch": int, "owner": dict},
    "head": {"manifest": bytes, "previous": (bytes, type(None)), "epoch": int, "generation": int, "reason": str},
    "segment": {"epoch": int}, "intent": {"epoch": int, "key": bytes}, "outcome": {"epoch": int, "key": bytes},
    "resolve": {"epoch": int, "key": bytes}, "restore": {"epoch": int},
    "name": {"name": str, "sid": (bytes, type(None))}, "tag": {"tag": str, "manifest": (bytes, type(None))},
    "annotate": {"manifest": (bytes, type(None)), "values": dict}, "tombstone": {},
    "drop": {"manifest": bytes, "part": str}, "gc": {"state": str, "packs": list},
}  # fmt: skip
"""what a body must have for the view to be made of it"""


class Log(Sequence[T], Generic[T]):
    """An append-only sequence: older ones share the items of newer ones and keep their own length."""

    __slots__ = ("_items", "_length")

    def __init__(self, items: list[T] | None = None, length: int = 0) -> None:
        self._items: list[T] = [] if items is None else items
        self._length = length

    def plus(self, item: T) -> Log[T]:
        """A log with one more item. Not thread-safe against another ``plus``."""
        items = self._items if len(self._items) == self._length else self._items[: self._length]
        items.append(item)
        return Log(items, self._length + 1)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[T]:
        return islice(iter(self._items), self._length)

    @overload
    def __getitem__(self, at: int) -> T: ...
    @overload
    def __getitem__(self, at: slice) -> list[T]: ...
    def __getitem__(self, at: int | slice) -> T | list[T]:
        if isinstance(at, slice):
            return [self._items[i] for i in range(*at.indices(self._length))]
        if not -self._length <= at < self._length:
            raise IndexError(at)
        return self._items[at if at >= 0 else at + self._length]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return f"Log({list(self)!r})"


@dataclass(frozen=True, slots=True)
class Draft:
    """A record to be appended. ``sid`` is None for kinds that belong to no session (name, tag, drop, gc)."""

    kind: str
    sid: bytes | None
    body: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Entry:
    """A record of the journal. ``hash`` is that of its body's bytes; ``sid`` is None and ``sseq`` 0 outside sessions."""

    seq: int
    kind: str
    sid: bytes | None
    sseq: int
    hash: bytes
    body: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class SessionView:
    """One session as its records left it. ``head`` is the body of the last head record; ``generation`` 0 if there is none."""

    sid: bytes
    name: str
    tenant: str
    lineage: bytes
    parent: Mapping[str, Any] | None
    created: float
    epoch: int = 0
    owner: Mapping[str, Any] | None = None
    head: Mapping[str, Any] | None = None
    generation: int = 0
    sseq: int = 0
    hash: bytes = ZERO_HASH
    heads: Log[Mapping[str, Any]] = field(default_factory=Log)
    """bodies of all head records, oldest first"""
    entries: Log[Entry] = field(default_factory=Log)
    """segment, intent, outcome, resolve, restore"""
    annotations: Mapping[bytes | None, Mapping[str, Any]] = field(default_factory=dict)
    """by manifest id; None: of the session itself"""
    removed: bool = False


@dataclass(slots=True)
class View:
    """The journal's meaning at one instant."""

    sessions: dict[bytes, SessionView] = field(default_factory=dict)
    names: dict[str, bytes] = field(default_factory=dict)
    tags: dict[str, bytes] = field(default_factory=dict)
    drops: set[tuple[bytes, str]] = field(default_factory=set)
    """(manifest id, part) of weak data that prune dropped"""
    gc: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    """under ``last``: the body of the last gc record"""
    pack_lengths: dict[str, int] = field(default_factory=dict)
    """for open packs, the largest length that a head names: so much of the file is durable"""
    seq: int = 0

    def copy(self) -> View:
        return View(
            dict(self.sessions), dict(self.names), dict(self.tags), set(self.drops), dict(self.gc), dict(self.pack_lengths), self.seq
        )  # fmt: skip

    def session_named(self, name: str) -> SessionView:
        """``NotFoundError`` if no session has this name."""
        sid = self.names.get(name)
        if sid is None or sid not in self.sessions:
            raise NotFoundError("there is no such session", object=name, code="no-session", hint="`agentckpt ls` lists them")
        return self.sessions[sid]


Undo = list[tuple[MutableMapping[Any, Any] | set[Any], Any, Any]]
_ABSENT: Final = object()


def undo(changes: Undo) -> None:
    """Take back what ``apply`` noted, newest first."""
    for mapping, key, old in reversed(changes):
        if isinstance(mapping, set):
            mapping.discard(key)
        elif old is _ABSENT:
            mapping.pop(key, None)
        else:
            mapping[key] = old
    changes.clear()


def check_body(kind: str, body: Mapping[str, Any]) -> str | None:
    """None if the view can be made of this body, else what is wrong with it."""
    for key, wanted in _TYPES[kind].items():
        value = body.get(key, _ABSENT)
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is int):
            return f"{kind} record: {key} is {'missing' if value is _ABSENT else type(value).__name__}"
    for key in ("manifest", "previous"):
        if isinstance(body.get(key), bytes) and len(body[key]) != 32:
            return f"{kind} record: {key} is not 32 bytes"
    if kind in OF_SESSION and not (
        isinstance(body.get("sid"), bytes) and isinstance(body.get("sseq"), int) and isinstance(body.get("prev"), bytes)
    ):
        return f"{kind} record without sid, sseq and prev"
    return None


def check(view: View, draft: Draft) -> None:
    """Raises ``ConflictError`` or ``NotFoundError`` if this draft must not follow what the view shows."""
    if draft.kind == "session":
        _check_new(view, draft)
        return
    if draft.kind == "name" and draft.body["sid"] is not None:
        _check_name(view, draft.body["name"], draft.body["sid"])
    if draft.kind not in OF_SESSION:
        return
    session = view.sessions.get(draft.sid or b"")
    if session is None:
        raise NotFoundError("there is no such session", object=f"session {(draft.sid or b'').hex()}", code="no-session")
    if session.removed and draft.kind not in ("outcome", "annotate"):
        raise _conflict(session, "was removed", "removed", "a session that stands", "a tombstone")
    if draft.kind == "owner" and draft.body["epoch"] <= session.epoch:
        raise _conflict(session, "has another owner", "stale-epoch", f"an epoch above {session.epoch}", str(draft.body["epoch"]))
    _check_epoch(session, draft)
    if draft.kind == "head":
        _check_head(session, draft.body)


def apply(view: View, entry: Entry, changes: Undo) -> None:
    """Let the view show ``entry``, noting in ``changes`` how to take it back."""
    body = entry.body
    if entry.kind == "session":
        created = SessionView(
            sid=body["sid"], name=body["name"], tenant=body["tenant"], lineage=body["lineage"],
            parent=body.get("parent"), created=float(body.get("time", 0.0)),
        )  # fmt: skip
        _set(view.sessions, body["sid"], replace(created, sseq=entry.sseq, hash=entry.hash), changes)
        _set(view.names, body["name"], body["sid"], changes)
    elif entry.sid is not None and entry.sid in view.sessions:
        session = view.sessions[entry.sid]
        _set(view.sessions, entry.sid, _next(session, entry), changes)
        if entry.kind == "head":
            _note_pack(view, body.get("pack"), changes)
        if entry.kind == "tombstone":
            for name in [name for name, sid in view.names.items() if sid == entry.sid]:
                _set(view.names, name, _ABSENT, changes)
    elif entry.kind in ("name", "tag", "drop", "gc"):
        _apply_global(view, entry.kind, body, changes)
    view.seq = entry.seq


def _apply_global(view: View, kind: str, body: Mapping[str, Any], changes: Undo) -> None:
    if kind == "name":
        _set(view.names, body["name"], _ABSENT if body["sid"] is None else body["sid"], changes)
        if body["sid"] in view.sessions:
            _set(view.sessions, body["sid"], replace(view.sessions[body["sid"]], name=body["name"]), changes)
    elif kind == "tag":
        _set(view.tags, body["tag"], _ABSENT if body["manifest"] is None else body["manifest"], changes)
    elif kind == "drop":
        if (key := (body["manifest"], body["part"])) not in view.drops:
            view.drops.add(key)
            changes.append((view.drops, key, _ABSENT))
    else:
        _set(view.gc, "last", body, changes)


def _next(session: SessionView, entry: Entry) -> SessionView:
    """The session after one more of its records."""
    body = entry.body
    changed: dict[str, Any] = {"sseq": entry.sseq, "hash": entry.hash}
    if entry.kind == "owner":
        changed |= {"epoch": body["epoch"], "owner": body["owner"]}
    elif entry.kind == "head":
        changed |= {"head": body, "generation": body["generation"], "heads": session.heads.plus(body)}
    elif entry.kind in ENTRY_KINDS:
        changed["entries"] = session.entries.plus(entry)
    elif entry.kind == "annotate":
        old = session.annotations.get(body["manifest"], {})
        changed["annotations"] = {**session.annotations, body["manifest"]: {**old, **body["values"]}}
    elif entry.kind == "tombstone":
        changed["removed"] = True
    return replace(session, **changed)


def _note_pack(view: View, pack: object, changes: Undo) -> None:
    if not (isinstance(pack, list) and len(pack) == 2 and isinstance(pack[0], str) and isinstance(pack[1], int)):
        return
    if pack[0].endswith(".open") and pack[1] > view.pack_lengths.get(pack[0], 0):
        _set(view.pack_lengths, pack[0], pack[1], changes)


def _set(mapping: MutableMapping[Any, Any], key: Any, value: Any, changes: Undo) -> None:
    changes.append((mapping, key, mapping.get(key, _ABSENT)))
    if value is _ABSENT:
        mapping.pop(key, None)
    else:
        mapping[key] = value


def _check_new(view: View, draft: Draft) -> None:
    if draft.sid is None or len(draft.sid) != 16:
        raise StoreError("a session's id must have 16 bytes", object="session record", code="bad-record")
    if draft.sid in view.sessions:
        raise ConflictError("exists already; ids are never used twice", object=f"session {draft.sid.hex()}", code="sid-taken")
    _check_name(view, draft.body["name"], draft.sid)


def _check_name(view: View, name: str, sid: bytes) -> None:
    owner = view.names.get(name)
    if owner is not None and owner != sid:
        raise ConflictError("the name is taken", object=name, expected="a free name", found=f"session {owner.hex()}", code="name-taken")


def _check_epoch(session: SessionView, draft: Draft) -> None:
    epoch = draft.body.get("epoch")
    if epoch is None or epoch >= session.epoch or (draft.kind == "outcome" and draft.body.get("late") is True):
        return
    raise _conflict(session, "has a newer owner", "stale-epoch", f"epoch {session.epoch} or above", str(epoch))


def _check_head(session: SessionView, body: Mapping[str, Any]) -> None:
    if body["generation"] != session.generation + 1:
        raise _conflict(session, "its head moved", "stale-head", f"generation {session.generation + 1}", str(body["generation"]))
    present = session.head["manifest"] if session.head else None
    if body["previous"] != present:
        raise _conflict(session, "its head moved", "stale-head", _short(present), _short(body["previous"]))


def _conflict(session: SessionView, what: str, code: str, expected: str, found: str) -> ConflictError:
    return ConflictError(what, object=f"session {session.name}", expected=expected, found=found, code=code)


def _short(manifest: bytes | None) -> str:
    return "no head" if manifest is None else f"head {manifest.hex()[:12]}"


def chain_error(view: View, kind: str, body: Mapping[str, Any]) -> CorruptionError | None:
    """What is wrong with the place of a record in its session's chain, read from disk."""
    session = view.sessions.get(body["sid"])
    sseq, prev = (session.sseq, session.hash) if session else (0, ZERO_HASH)
    if body["sseq"] != sseq + 1 or body["prev"] != prev:
        return CorruptionError(
            f"a {kind} record does not continue it", object=f"session {body['sid'].hex()}", expected=f"number {sseq + 1}",
            found=str(body["sseq"]), code="broken-chain",
        )  # fmt: skip
    if session is None and kind != "session":
        return CorruptionError(
            f"a {kind} record comes before its session record", object=f"session {body['sid'].hex()}", code="broken-chain"
        )
    return None
