"""The effects of a stored session, as the commands show them: the ledger's records with the times of their entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..ledger import Ancestor, EffectRecord, Ledger
from ..store import SessionView, View
from ..types import Mark


@dataclass(frozen=True, slots=True)
class EffectRow:
    """One effect for display. ``begun`` and ``ended`` are seconds since 1970, or None."""

    turn: int
    tool: str
    cls: str
    state: str
    key: str
    args: Any
    value: Any
    error: str | None
    late: bool
    begun: float | None
    ended: float | None
    own: bool
    """False for an effect of an ancestor, up to the fork"""


def effect_rows(view: View, session: SessionView) -> list[EffectRow]:
    times = entry_times(view, session)
    return [row(record, times, own=record.sid == session.sid) for record in ledger_of(view, session).effects]


def ledger_of(view: View, session: SessionView) -> Ledger:
    return Ledger(sid=session.sid, entries=session.entries, ancestors=ancestors_of(view, session))


def ancestors_of(view: View, session: SessionView) -> list[Ancestor]:
    """Oldest first, each with the mark at which the next one was forked from it."""
    chain: list[Ancestor] = []
    while session.parent is not None:
        mark = Mark(session.parent["sseq"], session.parent["hash"])
        session = view.sessions[session.parent["sid"]]
        chain.append(Ancestor(session.sid, session.entries, mark))
    return chain[::-1]


def entry_times(view: View, session: SessionView) -> dict[tuple[bytes, str, str], float]:
    """(session, key, intent or outcome) -> time of the last such entry."""
    found: dict[tuple[bytes, str, str], float] = {}
    member: SessionView | None = session
    while member is not None:
        for entry in member.entries:
            if entry.kind in ("intent", "outcome", "resolve") and entry.body.get("time") is not None:
                moment = "intent" if entry.kind == "intent" else "outcome"
                found[(member.sid, entry.body["key"].hex(), moment)] = entry.body["time"]
        member = view.sessions.get(member.parent["sid"]) if member.parent else None
    return found


def row(record: EffectRecord, times: dict[tuple[bytes, str, str], float], *, own: bool) -> EffectRow:
    error = None if record.error is None else f"{record.error[0]}: {record.error[1]}"
    return EffectRow(
        turn=record.turn,
        tool=record.tool,
        cls=record.effect_class,
        state=record.state,
        key=record.key,
        args=record.args,
        value=record.value,
        error=error,
        late=record.late,
        begun=times.get((record.sid, record.key, "intent")),
        ended=times.get((record.sid, record.key, "outcome")),
        own=own,
    )
