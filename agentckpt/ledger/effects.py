"""Effects and their states: one table of transitions, and what is known of one effect.

Invariants:
1. ``unknown`` never becomes ``failed``. A failure clears only its own dispatch: if an earlier dispatch of the same key
   may have happened, the state stays ``unknown``.
2. What does not stand in ``TRANSITIONS`` is refused.
3. Evidence is never destroyed: a late outcome is always kept, in ``EffectRecord.late_evidence`` where it changes no state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ..errors import ConflictError
from ..types import EffectClass, EffectState, Ref, Value

WORLD_CLASSES: Final[frozenset[EffectClass]] = frozenset({"idempotent", "compensable", "irreversible", "authority"})
"""Classes that change something outside: their intents are durable before dispatch, and rollback leaves them done."""

TERMINAL_STATES: Final[frozenset[EffectState]] = frozenset(
    {"committed", "raised", "failed", "verified-applied", "verified-not", "compensated", "resolved"}
)
APPLIED_STATES: Final[frozenset[EffectState]] = frozenset({"committed", "verified-applied", "resolved"})
"""The effect stands in the world."""

# (state before, event): state after. The one table; everything else is refused.
_DISPATCHED_AGAIN: tuple[EffectState, ...] = ("intended", "unknown", "committed", "raised", "verified-not", "compensated")
TRANSITIONS: Final[dict[tuple[EffectState | None, EffectState], EffectState]] = {
    (None, "intended"): "intended",
    # `intended`, `unknown`: sent or run again. `committed`, `raised`: void (sandbox). The rest is known not to stand.
    **{(state, "intended"): "intended" for state in _DISPATCHED_AGAIN},
    ("intended", "committed"): "committed",
    ("intended", "raised"): "raised",
    ("intended", "failed"): "failed",
    ("intended", "unknown"): "unknown",
    # An intent without outcome counts as dispatched, so a resolution may follow it directly.
    ("intended", "verified-applied"): "verified-applied",
    ("intended", "verified-not"): "verified-not",
    ("intended", "compensated"): "compensated",
    ("intended", "resolved"): "resolved",
    ("unknown", "committed"): "committed",
    ("unknown", "unknown"): "unknown",
    ("unknown", "verified-applied"): "verified-applied",
    ("unknown", "verified-not"): "verified-not",
    ("unknown", "compensated"): "compensated",
    ("unknown", "resolved"): "resolved",
    ("committed", "compensated"): "compensated",
    ("verified-applied", "compensated"): "compensated",
    ("resolved", "compensated"): "compensated",
}


def advance(state: EffectState | None, event: EffectState, *, earlier_may_stand: bool = False) -> EffectState:
    """The state after ``event``.

    ``earlier_may_stand``: an earlier dispatch under the same key ended without a definite outcome, so that a failure of
    this one proves nothing. Raises ``ConflictError`` (code ``effect-transition``) for what the table does not hold.
    """
    after = TRANSITIONS.get((state, event))
    if after is None:
        raise ConflictError(
            "an effect cannot go this way",
            code="effect-transition",
            expected=f"one of {sorted({e for s, e in TRANSITIONS if s == state})} after {state or 'nothing'}",
            found=event,
            hint="an effect's states are listed in agentckpt/ARCHITECTURE.md",
        )
    return "unknown" if after == "failed" and earlier_may_stand else after


@dataclass(frozen=True, slots=True)
class LateEvidence:
    """An outcome that a stale epoch reported after its session had a new owner."""

    seq: int
    epoch: int
    state: EffectState
    value: Value = None
    error: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class EffectRecord:
    """All that the journal says about one effect. Immutable: every entry makes a new one.

    ``key`` is 64 hex digits. ``args`` and ``value`` stand as in the journal: either the value itself, or
    ``{"$ref": reference}`` (``agentckpt.ledger.values.load_value`` gives the value).
    """

    key: str
    tool: str
    effect_class: EffectClass
    state: EffectState
    sandbox: bool
    """the tool reaches the sandbox as well as the world"""
    turn: int
    occurrence: int
    epoch: int
    """of the last dispatch"""
    args: Value
    intent_key: Value
    resources: tuple[str, ...]
    value: Value = None
    error: tuple[str, str] | None = None
    """(type name, message) of what the tool raised"""
    post: Ref | None = None
    """the sandbox after the effect, for tools declared ``sandbox=True``"""
    late: bool = False
    """the outcome came from an owner that was already replaced"""
    late_evidence: tuple[LateEvidence, ...] = ()
    may_stand: bool = False
    """an earlier dispatch under this key ended without a definite outcome"""
    num_dispatches: int = 1
    sid: bytes = b""
    """whose journal holds it: the session's own, or an ancestor's"""
    intent_seq: int = 0
    """position (sseq) of the first intent"""
    last_seq: int = 0
    """position of the last entry that changed the record"""
    resolved_by: str | None = None
    note: str | None = None
    matched_turn: int | None = None
    """the later turn that an orphan was returned to"""

    @property
    def finished(self) -> bool:
        """True if the journal says how it ended; ``intended`` and ``unknown`` are not finished."""
        return self.state in TERMINAL_STATES

    @property
    def stands(self) -> bool:
        """True if the effect happened, or may have, and was not undone."""
        return self.state in APPLIED_STATES or self.state in ("intended", "unknown")
