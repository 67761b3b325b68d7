"""Effects and their states: one table of transitions, and what is known of one effect.

Invariants:
1. ``unknown`` never becomes ``failed``. A failure clears only its own dispatch: if an earlier dispatch of the same key
   may have happened, the state stays ``unknown``.
2. What stands neither in ``TRANSITIONS`` nor in ``REDISPATCH`` is refused.
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

REDISPATCH: Final[dict[EffectClass, frozenset[EffectState]]] = {
    "sandbox": frozenset({"intended", "unknown", "committed", "raised", "failed"}),
    "read": frozenset({"intended", "unknown"}),
    "model": frozenset({"intended", "unknown"}),
    "idempotent": frozenset({"intended", "unknown", "verified-not", "compensated"}),
    "compensable": frozenset({"verified-not", "compensated"}),
    "irreversible": frozenset({"verified-not", "compensated"}),
    "authority": frozenset({"verified-not", "compensated"}),
}
"""States from which an effect of a class may be dispatched once more under its key."""

TRANSITIONS: Final[dict[EffectState, frozenset[EffectState]]] = {
    # An intent without outcome counts as dispatched, so a resolution may follow it directly.
    "intended": frozenset(
        {"committed", "raised", "failed", "unknown", "verified-applied", "verified-not", "compensated", "resolved"}
    ),
    "unknown": frozenset({"unknown", "verified-applied", "verified-not", "compensated", "resolved"}),
    # A person may decide about anything: a missing post-state, for one, stops recovery until somebody does.
    "committed": frozenset({"compensated", "resolved"}),
    "raised": frozenset({"resolved"}),
    "failed": frozenset({"resolved"}),
    "verified-applied": frozenset({"compensated", "resolved"}),
    "verified-not": frozenset({"resolved"}),
    "compensated": frozenset({"resolved"}),
    "resolved": frozenset({"compensated", "resolved"}),
}  # fmt: skip
"""State before -> events other than a dispatch. The one table; what it does not hold is refused."""


def check_dispatch(effect_class: EffectClass, state: EffectState | None) -> None:
    """Raises ``ConflictError`` (code ``effect-transition``) if a known effect may not be dispatched (again)."""
    if state is None or state in REDISPATCH[effect_class]:
        return
    raise ConflictError(
        f"an effect of class {effect_class} may not be dispatched again",
        code="effect-transition",
        expected=f"state {' or '.join(sorted(REDISPATCH[effect_class]))}",
        found=state,
        hint="match the call against the ledger first",
    )


def advance(state: EffectState, event: EffectState, *, earlier_may_stand: bool = False) -> EffectState:
    """The state after ``event``.

    ``earlier_may_stand``: an earlier dispatch under the same key ended without a definite outcome, so that a failure of
    this one proves nothing. Raises ``ConflictError`` (code ``effect-transition``) for what the table does not hold.
    """
    if event not in TRANSITIONS[state]:
        raise ConflictError(
            f"an effect cannot become {event}",
            code="effect-transition",
            expected=f"one of {sorted(TRANSITIONS[state])} after {state}",
            found=event,
            hint="an effect's states are drawn in agentckpt/ARCHITECTURE.md",
        )
    return "unknown" if event == "failed" and earlier_may_stand else event


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
    index: int
    """ordinal among the calls of its turn"""
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
    """an earlier dispatch under this key ended without a definite outcome (only of classes that reach the world)"""
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
