"""A session's journal in memory, chained like the store's, for tests of the ledger's logic."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from blake3 import blake3

from agentckpt.ledger import (
    Call,
    EffectRecord,
    Ledger,
    Occurrences,
    intent_body,
    make_call,
    matched_body,
    outcome_body,
    resolve_body,
)
from agentckpt.nodes import encode
from agentckpt.types import EffectClass, EffectState, Mark, Ref, Value

SID = b"S" * 16
LINEAGE = b"L" * 16
POST = Ref(b"\x02" + b"p" * 32)


@dataclass(frozen=True)
class Entry:
    kind: str
    sseq: int
    hash: bytes
    body: dict[str, Any]


@dataclass
class Journal:
    sid: bytes = SID
    lineage: bytes = LINEAGE
    epoch: int = 1
    entries: list[Entry] = field(default_factory=list)

    def append(self, kind: str, body: dict[str, Value]) -> Entry:
        before = self.entries[-1].hash if self.entries else bytes(32)
        full = {**body, "sid": self.sid, "sseq": len(self.entries) + 1, "prev": before}
        entry = Entry(kind, len(self.entries) + 1, blake3(encode(full)).digest(), full)
        self.entries.append(entry)
        return entry

    @property
    def mark(self) -> Mark:
        return Mark(len(self.entries), self.entries[-1].hash) if self.entries else Mark(0, bytes(32))

    def intent(self, call: Call, record: EffectRecord | None = None) -> Entry:
        return self.append("intent", intent_body(call, epoch=self.epoch, record=record))

    def outcome(self, call: Call, state: EffectState = "committed", value: Value = "done", **options: Any) -> Entry:
        epoch = options.pop("epoch", self.epoch)
        return self.append("outcome", outcome_body(call.key, state, epoch=epoch, value=value, **options))

    def resolve(self, record: EffectRecord, state: EffectState, value: Value = None) -> Entry:
        return self.append("resolve", resolve_body(record, state, epoch=self.epoch, by="person", value=value))

    def matched(self, record: EffectRecord, turn: int) -> Entry:
        return self.append("resolve", matched_body(record, epoch=self.epoch, turn=turn))

    def head(self) -> Mark:
        """The mark of a cut taken now, and the head record that publishes it."""
        mark = self.mark
        self.append("head", {})
        return mark

    def rollback(self, mark: Mark, sid: bytes | None = None) -> Entry:
        where = {"sid": sid or self.sid, "seq": mark.seq, "hash": mark.hash}
        self.epoch += 1
        return self.append("restore", {"epoch": self.epoch, "mode": "rollback", "mark": where, "done": True})

    def ledger(self, **options: Any) -> Ledger:
        """The ledger's entries: heads are none of its."""
        return Ledger(sid=self.sid, entries=[entry for entry in self.entries if entry.kind != "head"], **options)


def call_of(
    tool: str = "deploy",
    args: dict[str, Value] | None = None,
    *,
    turn: int = 1,
    effect_class: EffectClass = "irreversible",
    occurrences: Occurrences | None = None,
    lineage: bytes = LINEAGE,
    **options: Any,
) -> Call:
    return make_call(
        occurrences=occurrences or Occurrences(),
        lineage=lineage,
        turn=turn,
        tool=tool,
        effect_class=effect_class,
        args={"version": "v1"} if args is None else args,
        **options,
    )
