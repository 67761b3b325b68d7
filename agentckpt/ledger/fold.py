"""How one journal entry changes what is known of one effect. Pure: record and entry in, record out.

Invariants:
1. An outcome or resolution without an intent is corruption, and so is a dispatch or a timely outcome that ``TRANSITIONS`` refuses.
2. A late outcome is never refused. ``LATE`` says which states it changes; elsewhere it is kept as evidence.
3. A resolution that came too late (an outcome or another resolution was there first) is kept as evidence and changes nothing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final, NoReturn

from ..errors import ConflictError, CorruptionError
from ..types import EffectState
from .effects import WORLD_CLASSES, EffectRecord, LateEvidence, advance, check_dispatch
from .entries import Intent, Outcome, Resolve

# What an outcome from a stale epoch changes. A late failure clears nothing; a late success of something that was undone,
# or held for not applied, means that nobody knows how the world stands.
LATE: Final[dict[tuple[EffectState, EffectState], EffectState]] = {
    ("intended", "committed"): "committed",
    ("intended", "raised"): "raised",
    ("intended", "failed"): "failed",
    ("intended", "unknown"): "unknown",
    ("unknown", "committed"): "committed",
    ("verified-not", "committed"): "committed",
    ("compensated", "committed"): "unknown",
}


def fold_intent(record: EffectRecord | None, intent: Intent, *, sid: bytes, seq: int) -> EffectRecord:
    """The first intent makes a record; a further one is another dispatch under the same key."""
    if record is None:
        return EffectRecord(
            key=intent.key,
            tool=intent.tool,
            effect_class=intent.effect_class,
            state="intended",
            sandbox=intent.sandbox,
            turn=intent.turn,
            occurrence=intent.occurrence,
            index=intent.index,
            epoch=intent.epoch,
            args=intent.args,
            intent_key=intent.intent_key,
            resources=intent.resources,
            sid=sid,
            intent_seq=seq,
            last_seq=seq,
        )
    try:
        check_dispatch(record.effect_class, record.state)
    except ConflictError:
        _refuse(record, "intended", seq)
    open_before = record.state in ("intended", "unknown") and record.effect_class in WORLD_CLASSES
    return replace(
        record,
        state="intended",
        epoch=intent.epoch,
        turn=intent.turn,
        index=intent.index,
        args=intent.args,
        may_stand=record.may_stand or open_before,
        num_dispatches=record.num_dispatches + 1,
        value=None,
        error=None,
        post=None,
        late=False,
        last_seq=seq,
    )


def fold_outcome(record: EffectRecord, outcome: Outcome, *, seq: int) -> EffectRecord:
    """The end of a dispatch, on time or late."""
    if outcome.late or outcome.epoch < record.epoch:
        return _fold_late(record, outcome, seq)
    if record.state != "intended":
        _refuse(record, outcome.state, seq)
    state = advance("intended", outcome.state, earlier_may_stand=record.may_stand)
    return replace(record, state=state, value=outcome.value, error=outcome.error, post=outcome.post, late=False, last_seq=seq)


def _fold_late(record: EffectRecord, outcome: Outcome, seq: int) -> EffectRecord:
    # Of an earlier dispatch while a later one is under way: what that one reports decides the state.
    superseded = record.state == "intended" and outcome.epoch < record.epoch
    after = None if superseded else LATE.get((record.state, outcome.state))
    if after == "failed" and record.may_stand:
        after = "unknown"
    if after is None:
        evidence = LateEvidence(seq, outcome.epoch, outcome.state, outcome.value, outcome.error)
        return replace(record, late_evidence=(*record.late_evidence, evidence), last_seq=seq)
    return replace(record, state=after, value=outcome.value, error=outcome.error, post=outcome.post, late=True, last_seq=seq)


def fold_resolve(record: EffectRecord, resolve: Resolve, *, seq: int) -> EffectRecord:
    """What ``verify``, a compensation or a person says about an effect."""
    if resolve.state == "matched":
        turn = resolve.value if isinstance(resolve.value, int) else None
        return replace(record, matched_turn=turn, last_seq=seq)
    try:
        state = advance(record.state, resolve.state)
    except ConflictError:
        evidence = LateEvidence(seq, resolve.epoch, resolve.state, resolve.value)
        return replace(record, late_evidence=(*record.late_evidence, evidence), last_seq=seq)
    undone = state in ("compensated", "verified-not")
    return replace(
        record,
        state=state,
        value=record.value if state == "compensated" else resolve.value,
        error=record.error if state == "compensated" else None,
        may_stand=record.may_stand and not undone,
        resolved_by=resolve.by,
        note=resolve.note,
        last_seq=seq,
    )


def _refuse(record: EffectRecord, event: EffectState, seq: int) -> NoReturn:
    raise CorruptionError(
        f"effect {record.key[:12]} ({record.tool}) cannot become {event}",
        code="ledger-transition",
        object=f"journal entry {seq}",
        found=f"state {record.state}",
        hint="two owners wrote this session; run agentckpt verify and look at agentckpt effects",
    )
