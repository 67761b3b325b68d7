"""States and transitions: the table, what folding accepts, and a state machine that tries every order of events."""

from __future__ import annotations

import dataclasses
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from agentckpt.errors import ConflictError, CorruptionError
from agentckpt.ledger import EffectRecord, advance, intent_body, outcome_body
from agentckpt.ledger.effects import REDISPATCH, TERMINAL_STATES, TRANSITIONS, WORLD_CLASSES, check_dispatch
from agentckpt.types import EFFECT_CLASSES, EffectClass, EffectState

from .journal import Journal, call_of

STATES: tuple[EffectState, ...] = tuple(TRANSITIONS)


def test_the_table_names_every_state_and_every_class() -> None:
    assert set(STATES) == {"intended", "unknown"} | TERMINAL_STATES
    assert set(REDISPATCH) == set(EFFECT_CLASSES)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("event", STATES)
def test_advance_refuses_what_the_table_does_not_hold(state: EffectState, event: EffectState) -> None:
    if event in TRANSITIONS[state]:
        assert advance(state, event) == event
        return
    with pytest.raises(ConflictError) as raised:
        advance(state, event)
    assert raised.value.code == "effect-transition"


def test_unknown_never_becomes_failed() -> None:
    with pytest.raises(ConflictError):
        advance("unknown", "failed")
    assert advance("intended", "failed", earlier_may_stand=True) == "unknown"


@pytest.mark.parametrize("effect_class", ["compensable", "irreversible", "authority"])
@pytest.mark.parametrize("state", ["intended", "unknown", "committed", "verified-applied", "resolved"])
def test_what_may_stand_is_not_dispatched_again(effect_class: EffectClass, state: EffectState) -> None:
    with pytest.raises(ConflictError):
        check_dispatch(effect_class, state)


def record_of(journal: Journal, key: bytes) -> EffectRecord:
    record = journal.ledger().get(key)
    assert record is not None
    return record


def test_a_failure_of_the_second_dispatch_does_not_clear_the_first() -> None:
    journal = Journal()
    call = call_of(effect_class="idempotent")
    journal.intent(call)
    journal.intent(call, record_of(journal, call.key))
    journal.outcome(call, "failed", None, error=("NotApplied", "not now"))
    record = record_of(journal, call.key)
    assert record.state == "unknown"
    assert record.num_dispatches == 2
    assert record.may_stand


def test_a_late_failure_of_the_second_dispatch_does_not_clear_the_first() -> None:
    journal = Journal()
    call = call_of(effect_class="idempotent")
    journal.intent(call)
    journal.intent(call, record_of(journal, call.key))
    journal.outcome(call, "failed", None, late=True)
    assert record_of(journal, call.key).state == "unknown"


def test_a_failure_of_the_only_dispatch_is_a_failure() -> None:
    journal = Journal()
    call = call_of()
    journal.intent(call)
    journal.outcome(call, "failed", None, error=("NotApplied", "refused"))
    assert record_of(journal, call.key).state == "failed"


def test_drafts_refuse_before_anything_is_written() -> None:
    journal = Journal()
    call = call_of()
    journal.intent(call)
    journal.outcome(call)
    record = record_of(journal, call.key)
    with pytest.raises(ConflictError):
        intent_body(call, epoch=1, record=record)
    with pytest.raises(ConflictError):
        outcome_body(call.key, "failed", epoch=1, record=record)
    assert outcome_body(call.key, "failed", epoch=1, record=record, late=True)["late"] is True


@pytest.mark.parametrize(
    ("before", "late", "after"),
    [
        ("intended", "committed", "committed"),
        ("unknown", "committed", "committed"),
        ("unknown", "failed", "unknown"),
        ("verified-not", "committed", "committed"),
        ("compensated", "committed", "unknown"),
        ("verified-applied", "failed", "verified-applied"),
        ("resolved", "committed", "resolved"),
    ],
)
def test_a_late_outcome_is_accepted_and_marked(before: EffectState, late: EffectState, after: EffectState) -> None:
    journal = Journal()
    call = call_of()
    journal.intent(call)
    if before == "unknown":
        journal.outcome(call, "unknown", None)
    elif before != "intended":
        journal.resolve(record_of(journal, call.key), before)
    journal.epoch = 2
    journal.outcome(call, late, "late value", epoch=1, late=True)
    record = record_of(journal, call.key)
    assert (record.state, record.late) == (after, before != after)
    if before == after:
        evidence = record.late_evidence[-1]
        assert (evidence.state, evidence.epoch, evidence.value) == (late, 1, "late value")
    else:
        assert record.value == "late value"


def test_a_late_outcome_of_an_older_dispatch_does_not_end_the_newer_one() -> None:
    journal = Journal()
    call = call_of(effect_class="idempotent")
    journal.intent(call)
    journal.epoch = 2
    journal.intent(call, record_of(journal, call.key))
    journal.outcome(call, "committed", "first", epoch=1)
    record = record_of(journal, call.key)
    assert record.state == "intended"
    assert [evidence.value for evidence in record.late_evidence] == ["first"]
    journal.outcome(call, "committed", "second")
    assert record_of(journal, call.key).value == "second"


def test_two_timely_outcomes_are_corruption() -> None:
    journal = Journal()
    call = call_of()
    journal.intent(call)
    journal.outcome(call)
    journal.outcome(call)
    with pytest.raises(CorruptionError) as raised:
        journal.ledger()
    assert raised.value.code == "ledger-transition"


def test_a_second_dispatch_of_an_irreversible_effect_is_corruption() -> None:
    journal = Journal()
    call = call_of()
    journal.intent(call)
    journal.intent(call)
    with pytest.raises(CorruptionError):
        journal.ledger()


def test_an_outcome_without_an_intent_is_corruption() -> None:
    journal = Journal()
    journal.outcome(call_of())
    with pytest.raises(CorruptionError):
        journal.ledger()


def test_a_resolution_that_came_too_late_is_kept_and_changes_nothing() -> None:
    journal = Journal()
    call = call_of()
    journal.intent(call)
    record = record_of(journal, call.key)
    journal.outcome(call, value="really")
    journal.resolve(record, "verified-not")
    after = record_of(journal, call.key)
    assert (after.state, after.value) == ("committed", "really")
    assert [evidence.state for evidence in after.late_evidence] == ["verified-not"]


BAD_BODIES: list[tuple[str, str, Any]] = [
    ("intent", "key", b"short"),
    ("intent", "class", "harmless"),
    ("intent", "turn", -1),
    ("intent", "epoch", True),
    ("intent", "resources", ["a", 1]),
    ("intent", "sandbox", 1),
    ("intent", "tool", None),
    ("outcome", "state", "resolved"),
    ("outcome", "error", ["one"]),
    ("outcome", "post", b"not 33 bytes"),
    ("outcome", "late", None),
    ("resolve", "state", "committed"),
    ("restore", "mode", 3),
    ("restore", "mark", {"seq": 1}),
]


@pytest.mark.parametrize(("kind", "field", "value"), BAD_BODIES)
@pytest.mark.parametrize("missing", [False, True])
def test_bad_bodies_are_corruption(kind: str, field: str, value: Any, missing: bool) -> None:
    journal = Journal()
    call = call_of()
    journal.intent(call)
    if kind == "resolve":
        journal.resolve(record_of(journal, call.key), "resolved")
    elif kind == "outcome":
        journal.outcome(call)
    elif kind == "restore":
        journal.rollback(journal.mark)
    entry = journal.entries[-1]
    body = {name: item for name, item in entry.body.items() if name != field}
    journal.entries[-1] = dataclasses.replace(entry, body=body if missing else {**body, field: value})
    with pytest.raises(CorruptionError) as raised:
        journal.ledger()
    assert raised.value.code == "ledger-shape"
    assert field in str(raised.value)


class Life(RuleBasedStateMachine):
    """One effect under every order of dispatches, outcomes, late outcomes and resolutions, against a model of the world."""

    def __init__(self) -> None:
        super().__init__()
        self.journal = Journal()
        self.effect_class: EffectClass = "irreversible"
        self.call = call_of()

    @property
    def record(self) -> EffectRecord | None:
        return self.journal.ledger().get(self.call.key)

    @precondition(lambda self: not self.journal.entries)
    @rule(effect_class=st.sampled_from(EFFECT_CLASSES))
    def choose(self, effect_class: EffectClass) -> None:
        self.effect_class = effect_class
        self.call = call_of(effect_class=effect_class)
        self.journal.intent(self.call)

    @precondition(lambda self: self.journal.entries)
    @rule(new_owner=st.booleans())
    def dispatch(self, new_owner: bool) -> None:
        record = self.record
        assert record is not None
        self.journal.epoch += new_owner
        allowed = record.state in REDISPATCH[self.effect_class]
        try:
            self.journal.intent(self.call, record)
        except ConflictError:
            assert not allowed
            return
        assert allowed
        after = self.record
        assert after is not None
        assert after.state == "intended"
        if record.state in ("intended", "unknown") and self.effect_class in WORLD_CLASSES:
            assert after.may_stand

    @precondition(lambda self: self.journal.entries)
    @rule(state=st.sampled_from(["committed", "raised", "failed", "unknown"]))
    def finish(self, state: EffectState) -> None:
        record = self.record
        assert record is not None
        if record.epoch < self.journal.epoch:
            return
        if record.state != "intended":
            assert state == "unknown" or state not in TRANSITIONS[record.state]
            return
        self.journal.append("outcome", outcome_body(self.call.key, state, epoch=self.journal.epoch, record=record))
        after = self.record
        assert after is not None
        if state == "failed" and record.may_stand:
            assert after.state == "unknown"
        else:
            assert after.state == state

    @precondition(lambda self: self.journal.entries)
    @rule(state=st.sampled_from(["committed", "raised", "failed", "unknown"]))
    def finish_late(self, state: EffectState) -> None:
        before = self.record
        assert before is not None
        self.journal.outcome(self.call, state, "late", late=True, epoch=before.epoch)
        after = self.record
        assert after is not None
        assert after.late or len(after.late_evidence) == len(before.late_evidence) + 1
        if before.state == "unknown":
            assert after.state in ("unknown", "committed")
        if before.state in ("committed", "verified-applied", "resolved"):
            assert after.state == before.state

    @precondition(lambda self: self.journal.entries)
    @rule(state=st.sampled_from(["verified-applied", "verified-not", "compensated", "resolved"]))
    def resolve(self, state: EffectState) -> None:
        record = self.record
        assert record is not None
        if state in TRANSITIONS[record.state]:
            self.journal.resolve(record, state)
            after = self.record
            assert after is not None
            assert after.state == state

    @invariant()
    def failed_means_that_nothing_may_stand(self) -> None:
        record = self.record if self.journal.entries else None
        if record is not None and record.state == "failed" and self.effect_class in WORLD_CLASSES:
            assert not record.may_stand

    @invariant()
    def evidence_is_never_lost(self) -> None:
        if not self.journal.entries:
            return
        record = self.record
        assert record is not None
        late = sum(entry.kind == "outcome" and entry.body["late"] for entry in self.journal.entries)
        assert record.num_dispatches == sum(entry.kind == "intent" for entry in self.journal.entries)
        assert len(record.late_evidence) <= late


Life.TestCase.settings = settings(max_examples=80, stateful_step_count=15, deadline=None)
TestLife = Life.TestCase
