"""One test a cell of the recovery table: an effect later than the cut, its class, whether it finished, and what happens."""

from __future__ import annotations

import pytest

from agentckpt.ledger import TABLE, Action, action_for
from agentckpt.types import EFFECT_CLASSES, EffectClass

from .journal import POST, Journal, call_of

CELLS: list[tuple[EffectClass, bool, Action]] = [
    ("sandbox", True, "void"),
    ("sandbox", False, "run"),
    ("read", True, "record"),
    ("read", False, "run"),
    ("model", True, "record"),
    ("model", False, "run"),
    ("idempotent", True, "record"),
    ("idempotent", False, "send-again"),
    ("compensable", True, "record"),
    ("compensable", False, "unknown"),
    ("irreversible", True, "record"),
    ("irreversible", False, "unknown"),
    ("authority", True, "record"),
    ("authority", False, "unknown"),
]


@pytest.mark.parametrize(("effect_class", "finished", "action"), CELLS)
def test_a_call_after_a_crash_gets_what_the_table_says(effect_class: EffectClass, finished: bool, action: Action) -> None:
    journal = Journal()
    cut = journal.head()
    call = call_of(effect_class=effect_class)
    journal.intent(call)
    if finished:
        journal.outcome(call, value="recorded")
    ledger = journal.ledger()
    ledger.restored(cut)
    match = ledger.match(call_of(effect_class=effect_class))
    assert match.action == action
    assert match.layer == "key"
    assert match.record is not None
    assert match.record.value == ("recorded" if finished else None)


def test_every_class_has_both_cells() -> None:
    assert set(TABLE) == {(effect_class, finished) for effect_class in EFFECT_CLASSES for finished in (True, False)}
    assert {(effect_class, finished): action for effect_class, finished, action in CELLS} == TABLE


@pytest.mark.parametrize("effect_class", [name for name in EFFECT_CLASSES if name != "sandbox"])
def test_a_tool_that_reaches_the_sandbox_is_returned_only_with_its_post_state(effect_class: EffectClass) -> None:
    assert action_for(effect_class, True, sandbox=True, has_post=True) == "record-and-install"
    assert action_for(effect_class, True, sandbox=True, has_post=False) == "post-missing"
    assert action_for(effect_class, False, sandbox=True) == action_for(effect_class, False)


@pytest.mark.parametrize(("post", "action"), [(POST, "record-and-install"), (None, "post-missing")])
def test_post_states_through_the_journal(post: bytes | None, action: Action) -> None:
    journal = Journal()
    call = call_of(sandbox=True)
    journal.intent(call)
    journal.outcome(call, post=post)
    ledger = journal.ledger()
    ledger.restored(journal.ledger().mark._replace(seq=0, hash=bytes(32)))
    match = ledger.match(call_of(sandbox=True))
    assert match.action == action
    assert match.record is not None
    assert match.record.post == post
    # What stops recovery is not used up: it stops it again until somebody resolves it.
    again = ledger.peek(call_of(sandbox=True))
    assert (again.action == "post-missing") == (post is None)


@pytest.mark.parametrize(
    ("state", "action"),
    [("verified-applied", "record"), ("verified-not", "run"), ("compensated", "run"), ("resolved", "record")],
)
def test_a_resolution_decides_what_was_unknown(state: str, action: Action) -> None:
    journal = Journal()
    call = call_of()
    journal.intent(call)
    record = journal.ledger().get(call.key)
    assert record is not None
    journal.resolve(record, state, value="said")  # type: ignore[arg-type]
    ledger = journal.ledger()
    ledger.restored(ledger.mark._replace(seq=0, hash=bytes(32)))
    match = ledger.match(call_of())
    assert match.action == action
    assert match.call.key == call.key


def test_a_person_may_resolve_a_missing_post_state() -> None:
    journal = Journal()
    call = call_of(sandbox=True)
    journal.intent(call)
    record = journal.ledger().get(call.key)
    assert record is not None
    journal.resolve(record, "verified-applied")
    ledger = journal.ledger()
    ledger.restored(ledger.mark._replace(seq=0, hash=bytes(32)))
    assert ledger.peek(call_of(sandbox=True)).action == "post-missing"
    applied = ledger.get(call.key)
    assert applied is not None
    ledger.add(journal.resolve(applied, "resolved", value="by hand"))
    match = ledger.match(call_of(sandbox=True))
    assert (match.action, match.record.value if match.record else None) == ("record", "by hand")


@pytest.mark.parametrize("state", ["raised", "failed"])
def test_what_a_read_tool_raised_is_raised_again(state: str) -> None:
    journal = Journal()
    call = call_of(effect_class="read")
    journal.intent(call)
    journal.outcome(call, state, None, error=("KeyError", "gone"))  # type: ignore[arg-type]
    ledger = journal.ledger()
    ledger.restored(ledger.mark._replace(seq=0, hash=bytes(32)))
    match = ledger.match(call_of(effect_class="read"))
    assert match.action == "record"
    assert match.record is not None
    assert match.record.error == ("KeyError", "gone")
