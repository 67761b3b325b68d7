"""Bodies of journal entries as typed values. They come from a disk: every field is checked before it is used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, NoReturn, Protocol, cast

from ..errors import CorruptionError
from ..types import EFFECT_CLASSES, REF_BYTES, EffectClass, EffectState, Ref, Value

OUTCOME_STATES: Final = frozenset({"committed", "raised", "failed", "unknown"})
RESOLVE_STATES: Final = frozenset({"verified-applied", "verified-not", "compensated", "resolved", "matched"})


class LedgerEntry(Protocol):
    """What the ledger needs of a journal entry (the store's ``Entry`` has it)."""

    @property
    def kind(self) -> str: ...

    @property
    def sseq(self) -> int: ...

    @property
    def hash(self) -> bytes: ...

    @property
    def body(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Intent:
    epoch: int
    turn: int
    key: str
    tool: str
    effect_class: EffectClass
    sandbox: bool
    args: Value
    intent_key: Value
    occurrence: int
    index: int
    resources: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    epoch: int
    key: str
    state: EffectState
    value: Value
    error: tuple[str, str] | None
    late: bool
    post: Ref | None


@dataclass(frozen=True, slots=True)
class Resolve:
    epoch: int
    key: str
    state: EffectState | Literal["matched"]
    by: str
    note: str
    value: Value


@dataclass(frozen=True, slots=True)
class Rollback:
    """The part of a ``restore`` record that the ledger reads: the mark that a rollback went back to."""

    sid: bytes
    seq: int
    hash: bytes


def read_intent(entry: LedgerEntry) -> Intent:
    """Raises ``CorruptionError`` (code ``ledger-shape``) naming entry, field, expected and found; so do the others."""
    body = _Reader(entry)
    effect_class = body.text("class")
    if effect_class not in EFFECT_CLASSES:
        body.refuse("class", f"one of {list(EFFECT_CLASSES)}", repr(effect_class))
    return Intent(
        epoch=body.number("epoch"),
        turn=body.number("turn"),
        key=body.key(),
        tool=body.text("tool"),
        effect_class=effect_class,
        sandbox=body.flag("sandbox"),
        args=body.field("args"),
        intent_key=body.field("intent_key"),
        occurrence=body.number("occurrence"),
        index=body.number("index"),
        resources=body.texts("resources"),
    )


def read_outcome(entry: LedgerEntry) -> Outcome:
    body = _Reader(entry)
    post = body.field("post")
    if post is not None and not (isinstance(post, bytes) and len(post) == REF_BYTES):
        body.refuse("post", "null or a reference of 33 bytes", type(post).__name__)
    error = body.field("error")
    if error is not None and not (isinstance(error, list) and len(error) == 2 and all(isinstance(text, str) for text in error)):
        body.refuse("error", "null or [type name, message]", type(error).__name__)
    return Outcome(
        epoch=body.number("epoch"),
        key=body.key(),
        state=cast(EffectState, body.choice("state", OUTCOME_STATES)),
        value=body.field("value"),
        error=None if error is None else (error[0], error[1]),
        late=body.flag("late"),
        post=None if post is None else Ref(post),
    )


def read_resolve(entry: LedgerEntry) -> Resolve:
    body = _Reader(entry)
    return Resolve(
        epoch=body.number("epoch"),
        key=body.key(),
        state=cast("EffectState | Literal['matched']", body.choice("state", RESOLVE_STATES)),
        by=body.text("by"),
        note=body.text("note"),
        value=body.field("value"),
    )


def read_rollback(entry: LedgerEntry) -> Rollback | None:
    """None for a restore that is no rollback."""
    body = _Reader(entry)
    if body.text("mode") != "rollback":
        return None
    mark = body.field("mark")
    if not isinstance(mark, dict) or set(mark) != {"sid", "seq", "hash"}:
        body.refuse("mark", "{sid, seq, hash} in a rollback", type(mark).__name__)
    inner = _Reader(entry, mark)
    return Rollback(sid=inner.octets("sid", 16), seq=inner.number("seq"), hash=inner.octets("hash", 32))


class _Reader:
    def __init__(self, entry: LedgerEntry, body: Mapping[str, Any] | None = None) -> None:
        self.entry = entry
        self.body = entry.body if body is None else body

    def refuse(self, name: str, expected: str, found: str) -> NoReturn:
        raise CorruptionError(
            f"field {name!r}",
            code="ledger-shape",
            object=f"journal entry {self.entry.sseq} ({self.entry.kind})",
            expected=expected,
            found=found,
            hint="run agentckpt verify on the store",
        )

    def field(self, name: str) -> Any:
        if name not in self.body:
            self.refuse(name, "a value", "nothing")
        return self.body[name]

    def number(self, name: str) -> int:
        value = self.field(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            self.refuse(name, "an integer >= 0", repr(value)[:40])
        return value

    def flag(self, name: str) -> bool:
        value = self.field(name)
        if not isinstance(value, bool):
            self.refuse(name, "true or false", repr(value)[:40])
        return value

    def text(self, name: str) -> str:
        value = self.field(name)
        if not isinstance(value, str):
            self.refuse(name, "text", type(value).__name__)
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        value = self.field(name)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self.refuse(name, "a list of texts", type(value).__name__)
        return tuple(value)

    def octets(self, name: str, length: int) -> bytes:
        value = self.field(name)
        if not isinstance(value, bytes) or len(value) != length:
            self.refuse(name, f"{length} bytes", type(value).__name__)
        return value

    def key(self) -> str:
        return self.octets("key", 32).hex()

    def choice(self, name: str, allowed: frozenset[str]) -> str:
        value = self.text(name)
        if value not in allowed:
            self.refuse(name, f"one of {sorted(allowed)}", repr(value)[:40])
        return value
