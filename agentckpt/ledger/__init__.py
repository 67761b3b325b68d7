"""The ledger: pure logic of effects. It imports no store; the session feeds it journal entries and appends its drafts."""

from __future__ import annotations

from .authority import SpentError, Vault
from .drafts import intent_body, matched_body, outcome_body, resolve_body
from .effects import EffectRecord, advance
from .entries import LedgerEntry
from .keys import Call, Occurrences, make_call
from .ledger import ZERO_MARK, Ancestor, Ledger, Match
from .table import TABLE, Action, action_for, action_of
from .values import INLINE_BYTES, load_value, pack_value

__all__ = [
    "INLINE_BYTES",
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
    "SpentError",
    "Vault",
    "action_for",
    "action_of",
    "advance",
    "intent_body",
    "load_value",
    "make_call",
    "matched_body",
    "outcome_body",
    "pack_value",
    "resolve_body",
]
