"""What a session tells: a published checkpoint, a turn's costs, and the fidelity report of every restore."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..types import PartReport, Value

if TYPE_CHECKING:
    from ..ledger import EffectRecord

RestoreMode = Literal["recover", "rollback", "fork", "load"]


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """A published checkpoint. ``id`` is 64 hex digits; times in seconds."""

    id: str
    turn: int
    generation: int
    reason: str
    """``cut``, ``rollback``, ``promote`` or ``fork``"""
    message: str | None = None
    parts: Mapping[str, Mapping[str, Value]] = field(default_factory=dict)
    """facts of each part's capture"""
    requested_turn: int | None = None
    """the turn that was to be checkpointed, if a newer cut took its place before it was written; else None"""
    pause_s: float = 0.0
    durable_s: float = 0.0

    @property
    def superseded(self) -> bool:
        """True if this is not the cut that was asked for, but the newer one that superseded it."""
        return self.requested_turn is not None


@dataclass(frozen=True, slots=True)
class TurnMetrics:
    """What one cut cost. ``exposed_s``: time in which the loop or a tool waited for this cut, the pause included."""

    turn: int
    num_tokens: int
    logical_bytes: int
    new_bytes: int
    pause_s: float
    exposed_s: float
    durable_s: float
    error: str | None = None
    """what a cut that was not published ran into"""


@dataclass(frozen=True, slots=True)
class RestoreReport:
    """What came back, part by part, and what did not: returned by every restore.

    ``seconds`` by step: ``read`` (journal and manifest), ``prepare.<part>``, ``own`` (the commit point), ``commit.<part>``.
    """

    checkpoint: str
    """id, 64 hex digits"""
    session: str
    turn: int
    mode: RestoreMode
    epoch: int
    parts: Mapping[str, PartReport] = field(default_factory=dict)
    replayed: tuple[EffectRecord, ...] = ()
    """effects of the open turn whose record will be returned"""
    rerun: tuple[EffectRecord, ...] = ()
    """effects of the open turn that run again: sandbox, unfinished reads, idempotent ones under the same key"""
    unknown: tuple[EffectRecord, ...] = ()
    orphaned: tuple[EffectRecord, ...] = ()
    num_segments: int = 0
    """recorded appends and generations of the open turn that will be matched"""
    seconds: Mapping[str, float] = field(default_factory=dict)
    live: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """the parts themselves, for ``agentckpt.restore``"""

    @property
    def complete(self) -> bool:
        """False if anything had to be recomputed or was rejected."""
        return not any(part.recomputed or part.rejected for part in self.parts.values())

    def describe(self) -> list[str]:
        """Plain lines for people; the order is parts, effects, time."""
        lines = [f"{self.mode}: session {self.session}, checkpoint {self.checkpoint[:12]}, turn {self.turn}, epoch {self.epoch}"]
        for name, part in sorted(self.parts.items()):
            lines += _describe_part(name, part)
        if self.num_segments:
            lines.append(f"open turn: {self.num_segments} recorded appends and generations to match")
        groups = (("replayed", self.replayed), ("run again", self.rerun), ("unknown", self.unknown), ("orphaned", self.orphaned))
        for word, effects in groups:
            lines += [f"effect {word}: {effect.tool} ({effect.effect_class}, turn {effect.turn}, {effect.state})" for effect in effects]
        if self.seconds:
            lines.append("seconds: " + ", ".join(f"{step} {seconds:.3f}" for step, seconds in self.seconds.items()))
        return lines


UNITS = {"kv": "tokens", "sandbox": "files", "state": "objects"}


def _describe_part(name: str, part: PartReport) -> list[str]:
    unit = UNITS.get(part.kind, "items")
    facts = [f"{part.restored} {unit} restored"]
    if part.recomputed:
        facts.append(f"{part.recomputed} recomputed")
    if part.rejected:
        facts.append(f"{part.rejected} rejected")
    facts += [text for text in (part.continuation, part.consistency, part.reason) if text]
    lines = [f"{name}: " + ", ".join(facts)]
    lines += [f"{name}: lost: {item}" for item in part.lost]
    if part.displaced:
        lines.append(f"{name}: the changed tree was moved to {part.displaced} and is kept until the next cut")
    return lines
