"""The ledger: pure logic of effects. It imports no store; the session feeds it journal entries and appends its drafts."""

from __future__ import annotations

from .drafts import intent_body, matched_body, outcome_body, resolve_body
from .effects import EffectRecord, advance
from .keys import Call, Occurrences, make_call
from .ledger import ZERO_MARK, Ancestor, Ledger, LedgerEntry, Match
from .table import TABLE, Action, action_for, action_of

__all__ = [
    "TABLE",
    "ZERO_MARK",
    "Action",
    "Ancestor",
    "Call",
    "EffectRecord",
    "Ledger",
    "LedgerEntry",
    "Match",
    "Occurrences",
    "action_for",
    "action_of",
    "advance",
    "intent_body",
    "make_call",
    "matched_body",
    "outcome_body",
    "resolve_body",
]
