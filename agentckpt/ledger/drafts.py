"""Bodies of ledger records, as plain maps; the session appends them to the store's journal (which adds sid, sseq, prev, time).

Each takes the record that it follows and refuses a transition that the table does not hold, before anything is written.
"""

from __future__ import annotations

from ..types import EffectState, Ref, Value
from .effects import EffectRecord, advance, check_dispatch
from .keys import Call

MATCHED = "matched"
"""``state`` of a resolve record that says: this orphan was returned to a call of a later turn. It changes no state."""


def intent_body(call: Call, *, epoch: int, record: EffectRecord | None = None, args: Value = None) -> dict[str, Value]:
    """Body of an ``intent``. ``record``: the known record of the key when it is dispatched again.

    ``args``: ``{"$ref": ...}`` where the session stored large arguments as a chunk; None means inline.
    Raises ``ConflictError`` (code ``effect-transition``) if the key may not be dispatched (again).
    """
    check_dispatch(call.effect_class, None if record is None else record.state)
    return {
        "epoch": epoch,
        "turn": call.turn,
        "key": call.key,
        "tool": call.tool,
        "class": call.effect_class,
        "sandbox": call.sandbox,
        "args": dict(call.args) if args is None else args,
        "intent_key": call.intent_key,
        "occurrence": call.occurrence,
        "index": call.index,
        "resources": list(call.resources),
    }


def outcome_body(
    key: bytes,
    state: EffectState,
    *,
    epoch: int,
    value: Value = None,
    error: tuple[str, str] | None = None,
    post: Ref | None = None,
    late: bool = False,
    record: EffectRecord | None = None,
) -> dict[str, Value]:
    """Body of an ``outcome``: ``state`` is ``committed``, ``raised``, ``failed`` or ``unknown``.

    ``late=True`` for a stale epoch: never refused, the ledger keeps it as evidence.
    """
    if record is not None and not late:
        advance(record.state, state, earlier_may_stand=record.may_stand)
    return {
        "epoch": epoch,
        "key": key,
        "state": state,
        "value": value,
        "error": None if error is None else list(error),
        "late": late,
        "post": None if post is None else bytes(post),
    }


def resolve_body(record: EffectRecord, state: EffectState, *, epoch: int, by: str, note: str = "", value: Value = None) -> dict[str, Value]:
    """Body of a ``resolve``: ``verified-applied``, ``verified-not``, ``compensated`` or ``resolved``; ``by`` names who says so."""
    advance(record.state, state)
    return {"epoch": epoch, "key": bytes.fromhex(record.key), "state": state, "by": by, "note": note, "value": value}


def matched_body(record: EffectRecord, *, epoch: int, turn: int) -> dict[str, Value]:
    """Body of the ``resolve`` that makes an orphan's match durable, so that it is not matched a second time after the next cut."""
    note = f"turn {turn}"
    return {"epoch": epoch, "key": bytes.fromhex(record.key), "state": MATCHED, "by": "match", "note": note, "value": turn}
