"""Matching after a restore: the layers, what is a candidate, each record once, orphans, forks."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from agentckpt.errors import ConflictError, CorruptionError
from agentckpt.ledger import ZERO_MARK, Ancestor, Ledger, Occurrences, load_value, pack_value
from agentckpt.ledger.keys import canonical_arguments
from agentckpt.types import Mark, Ref

from .journal import Journal, call_of


def done(journal: Journal, value: Any = "done", **options: Any) -> bytes:
    """A committed effect; returns its key."""
    call = call_of(**options)
    journal.intent(call)
    journal.outcome(call, value=value)
    return call.key


# ---- layers ----------------------------------------------------------------------------------------------------------


def test_layer_1_the_exact_key() -> None:
    journal = Journal()
    key = done(journal)
    ledger = journal.ledger()
    ledger.restored(ZERO_MARK)
    match = ledger.match(call_of())
    assert (match.layer, match.call.key, match.orphan) == ("key", key, False)


def test_layer_2_canonical_arguments_on_another_turn() -> None:
    journal = Journal()
    key = done(journal, turn=4, args={"version": "v1", "asked_at": 17.0}, volatile=("asked_at",))
    ledger = journal.ledger()
    ledger.restored(ZERO_MARK)
    match = ledger.match(call_of(turn=3, args={"version": "v1", "asked_at": 99.0}, volatile=("asked_at",)))
    assert (match.layer, match.call.key) == ("arguments", key)


def test_layer_3_the_declared_intent_key() -> None:
    journal = Journal()
    key = done(journal, turn=4, args={"to": "ann", "text": "hello"}, intent_key=["ann"])
    ledger = journal.ledger()
    ledger.restored(ZERO_MARK)
    match = ledger.match(call_of(turn=3, args={"to": "ann", "text": "hello there"}, intent_key=["ann"]))
    assert (match.layer, match.call.key) == ("intent", key)
    assert match.record is not None
    assert match.record.args == {"to": "ann", "text": "hello"}


def test_layer_4_a_shared_resource_with_other_arguments_is_refused() -> None:
    journal = Journal()
    done(journal, turn=4, args={"amount": 10}, resources=("account/7",))
    ledger = journal.ledger()
    ledger.restored(ZERO_MARK)
    with pytest.raises(ConflictError) as raised:
        ledger.match(call_of(turn=4, args={"amount": 20}, resources=("account/7", "account/8")))
    assert raised.value.code == "effect-overlap"
    assert "account/7" in str(raised.value)
    assert "fork" in (raised.value.hint or "")
    assert len(ledger.unmatched) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"resources": ("account/9",)},
        {"resources": ("account/7",), "effect_class": "read"},
        {"resources": ()},
    ],
)
def test_what_overlaps_with_nothing_is_new(options: dict[str, Any]) -> None:
    journal = Journal()
    done(journal, turn=4, args={"amount": 10}, resources=("account/7",))
    ledger = journal.ledger()
    ledger.restored(ZERO_MARK)
    assert ledger.match(call_of(turn=4, args={"amount": 20}, **options)).action == "new"


def test_an_overlap_with_what_was_not_applied_is_no_overlap() -> None:
    journal = Journal()
    call = call_of(turn=4, args={"amount": 10}, resources=("account/7",))
    journal.intent(call)
    journal.outcome(call, "failed", None)
    ledger = journal.ledger()
    ledger.restored(ZERO_MARK)
    assert ledger.match(call_of(turn=4, args={"amount": 20}, resources=("account/7",))).action == "new"


@pytest.mark.parametrize("changed", [{"tool": "other"}, {"args": {"version": "v2"}}])
def test_other_tools_and_other_arguments_are_new(changed: dict[str, Any]) -> None:
    journal = Journal()
    done(journal)
    ledger = journal.ledger()
    ledger.restored(ZERO_MARK)
    assert ledger.match(call_of(**changed)).action == "new"
    assert len(ledger.unmatched) == 1


def test_another_call_at_the_place_of_a_recorded_one_is_seen_before_it_is_dispatched() -> None:
    journal = Journal()
    calls = Occurrences()
    for version in ("v1", "v2"):
        done(journal, args={"version": version}, occurrences=calls)
    ledger = journal.ledger()
    ledger.restored(ZERO_MARK)
    replay = Occurrences()
    match = ledger.match(call_of(args={"version": "v9"}, occurrences=replay))
    assert match.action == "new"
    assert match.displaced is not None
    assert match.displaced.args == {"version": "v1"}


def test_a_parallel_call_whose_intent_was_lost_displaces_nothing() -> None:
    journal = Journal()
    calls = Occurrences()
    lost = call_of(args={"to": "ann"}, occurrences=calls)
    done(journal, args={"to": "bob"}, occurrences=calls)
    ledger = journal.ledger()
    ledger.restored(ZERO_MARK)
    replay = Occurrences()
    first = ledger.match(call_of(args={"to": "ann"}, occurrences=replay))
    assert (first.action, first.displaced, first.call.key) == ("new", None, lost.key)
    assert ledger.match(call_of(args={"to": "bob"}, occurrences=replay)).action == "record"


# ---- once, and only what is later -----------------------------------------------------------------------------------


def test_each_record_is_matched_at_most_once() -> None:
    journal = Journal()
    first = done(journal)
    ledger = journal.ledger()
    ledger.restored(ZERO_MARK)
    occurrences = Occurrences()
    one, two = (call_of(occurrences=occurrences) for _ in range(2))
    assert ledger.match(one).action == "record"
    second = ledger.match(two)
    assert second.action == "new"
    assert second.call.key != first
    assert ledger.unmatched == ()


def test_equal_calls_of_one_turn_match_in_their_order() -> None:
    journal = Journal()
    occurrences = Occurrences()
    for value in ("a", "b"):
        done(journal, value, occurrences=occurrences)
    ledger = journal.ledger()
    ledger.restored(ZERO_MARK)
    again = Occurrences()
    values = [ledger.match(call_of(occurrences=again)).record for _ in range(2)]
    assert [record.value for record in values if record] == ["a", "b"]


def test_what_the_cut_holds_is_not_matched() -> None:
    journal = Journal()
    done(journal)
    cut = journal.head()
    ledger = journal.ledger()
    ledger.restored(cut)
    assert ledger.match(call_of(turn=2)).action == "new"
    assert ledger.unmatched == ()


def test_undelivered_and_in_flight_effects_of_the_cut_are_matched() -> None:
    journal = Journal()
    key = done(journal)
    cut = journal.head()
    ledger = journal.ledger()
    ledger.restored(cut, keys=[key])
    assert ledger.match(call_of()).action == "record"


def test_what_this_run_dispatched_is_no_candidate() -> None:
    journal = Journal()
    ledger = journal.ledger()
    ledger.restored(ZERO_MARK)
    occurrences = Occurrences()
    call = call_of(occurrences=occurrences)
    assert ledger.match(call).action == "new"
    ledger.add(journal.intent(call))
    ledger.add(journal.outcome(call))
    again = ledger.match(call_of(occurrences=occurrences))
    assert again.action == "new"
    assert ledger.match(call_of(turn=2)).action == "new"


def test_a_call_beside_an_equal_one_in_flight_is_new() -> None:
    journal = Journal()
    ledger = journal.ledger()
    ledger.restored(ZERO_MARK)
    occurrences = Occurrences()
    first = ledger.match(call_of(occurrences=occurrences)).call
    ledger.add(journal.intent(first))
    second = ledger.match(call_of(occurrences=occurrences))
    assert second.action == "new"
    assert second.call.key != first.key


def test_only_effects_later_than_the_cut_can_overlap() -> None:
    journal = Journal()
    call = call_of(args={"amount": 10}, resources=("account/7",))
    journal.intent(call)
    journal.outcome(call, "unknown", None)
    cut = journal.head()
    ledger = journal.ledger()
    ledger.restored(cut)
    assert ledger.match(call_of(turn=2, args={"amount": 20}, resources=("account/7",))).action == "new"
    assert ledger.match(call_of(turn=2, args={"amount": 10}, resources=("account/7",))).action == "unknown"


@pytest.mark.parametrize("effect_class", ["irreversible", "compensable", "authority"])
def test_unknown_is_refused_until_it_is_resolved_also_in_the_run_that_made_it(effect_class: Any) -> None:
    journal = Journal()
    ledger = journal.ledger()
    ledger.restored(ZERO_MARK)
    occurrences = Occurrences()
    call = call_of(occurrences=occurrences, effect_class=effect_class)
    ledger.add(journal.intent(call))
    ledger.add(journal.outcome(call, "unknown", None))
    for turn in (1, 1, 2):
        match = ledger.match(call_of(turn=turn, occurrences=occurrences, effect_class=effect_class))
        assert match.action == "unknown"
        assert match.call.key == call.key
    record = ledger.get(call.key)
    assert record is not None
    ledger.add(journal.resolve(record, "verified-not"))
    assert ledger.match(call_of(turn=2, effect_class=effect_class)).action == "new"


def test_an_unknown_effect_of_an_older_turn_is_still_refused() -> None:
    journal = Journal()
    call = call_of()
    journal.intent(call)
    cut = journal.head()
    ledger = journal.ledger()
    ledger.restored(cut)
    assert ledger.match(call_of(turn=9)).action == "unknown"


def test_resolve_and_match_again() -> None:
    journal = Journal()
    call = call_of()
    journal.intent(call)
    ledger = journal.ledger()
    ledger.restored(ZERO_MARK)
    match = ledger.match(call_of())
    assert match.action == "unknown"
    assert match.record is not None
    ledger.add(journal.resolve(match.record, "verified-applied", value="found"))
    again = ledger.match(call_of())
    assert again.action == "record"
    assert again.record is not None
    assert again.record.value == "found"
    assert ledger.unmatched == ()


def test_an_idempotent_effect_is_sent_again_under_its_own_key() -> None:
    journal = Journal()
    call = call_of(effect_class="idempotent")
    journal.intent(call)
    journal.epoch = 2
    ledger = journal.ledger()
    ledger.restored(ZERO_MARK)
    match = ledger.match(call_of(effect_class="idempotent"))
    assert (match.action, match.call.key) == ("send-again", call.key)
    ledger.add(journal.intent(match.call, match.record))
    ledger.add(journal.outcome(match.call))
    record = ledger.get(call.key)
    assert record is not None
    assert (record.state, record.num_dispatches) == ("committed", 2)


# ---- rollback ---------------------------------------------------------------------------------------------------------


def rolled_back(*effects: dict[str, Any]) -> tuple[Journal, Ledger, Mark]:
    """Cut, one turn with the effects, another cut, and a rollback to the first."""
    journal = Journal()
    cut = journal.head()
    for options in effects:
        done(journal, turn=1, **options)
    journal.head()
    ledger = journal.ledger()
    ledger.restored(cut, mode="rollback")
    ledger.add(journal.rollback(cut))
    return journal, ledger, cut


def test_a_rollback_makes_orphans_and_a_call_gets_the_record() -> None:
    journal, ledger, _ = rolled_back({})
    assert [record.tool for record in ledger.orphans] == ["deploy"]
    assert ledger.unmatched == ()
    match = ledger.match(call_of(turn=1))
    assert (match.action, match.orphan) == ("record", True)
    assert ledger.orphans == ()
    assert match.record is not None
    ledger.add(journal.matched(match.record, 1))
    matched = ledger.get(match.call.key)
    assert matched is not None
    assert (matched.state, matched.matched_turn) == ("committed", 1)


def test_orphans_survive_later_cuts_and_crashes() -> None:
    journal, _, _ = rolled_back({})
    later = journal.head()
    done(journal, turn=2, args={"version": "v2"})
    ledger = journal.ledger()
    ledger.restored(later)
    assert [record.args for record in ledger.orphans] == [{"version": "v1"}]
    assert [record.args for record in ledger.unmatched] == [{"version": "v2"}]
    assert ledger.match(call_of(turn=2)).orphan


def test_a_matched_orphan_is_not_matched_again_after_the_cut() -> None:
    journal, ledger, _ = rolled_back({})
    match = ledger.match(call_of(turn=1))
    assert match.record is not None
    journal.matched(match.record, 1)
    later = journal.head()
    ledger = journal.ledger()
    ledger.restored(later)
    assert ledger.orphans == ()
    again = ledger.match(call_of(turn=2))
    assert again.action == "new"


def test_the_key_of_another_timeline_is_never_used_twice() -> None:
    journal, ledger, _ = rolled_back({})
    match = ledger.match(call_of(turn=1))
    assert match.record is not None
    journal.matched(match.record, 1)
    cut = journal.head()
    ledger = journal.ledger()
    ledger.restored(cut)
    # A program that calls it in turn 1 once more (the turn that the orphan was made in) derives the orphan's key.
    new = ledger.match(call_of(turn=1))
    assert new.action == "new"
    assert new.call.key != match.call.key
    journal.intent(new.call)
    journal.outcome(new.call, value="second")
    ledger = journal.ledger()
    ledger.restored(cut)
    replay = ledger.match(call_of(turn=1))
    assert replay.record is not None
    assert (replay.layer, replay.record.value) == ("key", "second")


def test_a_match_within_the_open_turn_is_made_again_with_it() -> None:
    journal, ledger, _ = rolled_back({})
    cut = journal.head()
    match = ledger.match(call_of(turn=1))
    assert match.record is not None
    journal.matched(match.record, 1)
    ledger = journal.ledger()
    ledger.restored(cut)
    assert ledger.match(call_of(turn=1)).orphan


@pytest.mark.parametrize("effect_class", ["read", "sandbox", "model"])
def test_reads_commands_and_model_calls_of_an_abandoned_timeline_run_anew(effect_class: Any) -> None:
    journal, ledger, _ = rolled_back({"effect_class": effect_class})
    first = journal.entries[1].body["key"]
    match = ledger.match(call_of(turn=1, effect_class=effect_class))
    assert match.action == "new"
    assert match.call.key != first
    assert len(ledger.orphans) == (effect_class == "read")


def test_a_rollback_to_an_abandoned_timeline_takes_it_up_again() -> None:
    journal = Journal()
    start = journal.head()
    done(journal, turn=1)
    one = journal.head()
    done(journal, turn=2, args={"version": "v2"})
    journal.head()
    journal.rollback(start)
    done(journal, turn=1, args={"version": "other"})
    journal.head()
    journal.rollback(one)
    ledger = journal.ledger()
    ledger.restored(journal.mark)
    # v1 is the past of the present timeline; v2 and "other" are what stands outside it.
    assert [record.args for record in ledger.orphans] == [{"version": "v2"}, {"version": "other"}]
    assert ledger.match(call_of(turn=3)).action == "new"


def test_effects_that_do_not_stand_are_no_orphans() -> None:
    journal = Journal()
    cut = journal.head()
    call = call_of()
    journal.intent(call)
    journal.outcome(call, "failed", None)
    journal.rollback(cut)
    ledger = journal.ledger()
    ledger.restored(cut)
    assert ledger.orphans == ()
    assert ledger.match(call_of()).action == "new"


# ---- forks ------------------------------------------------------------------------------------------------------------


def forked(journal: Journal, mark: Mark) -> tuple[Journal, Ancestor]:
    branch = Journal(sid=b"B" * 16, lineage=b"M" * 16)
    return branch, Ancestor(journal.sid, [entry for entry in journal.entries if entry.kind != "head"], mark)


def test_a_fork_sees_its_ancestors_effects_up_to_the_fork_only() -> None:
    parent = Journal()
    done(parent, turn=1)
    mark = parent.mark
    done(parent, turn=2, args={"version": "v2"})
    branch, ancestor = forked(parent, mark)
    ledger = branch.ledger(ancestors=[ancestor])
    assert [record.args for record in ledger.effects] == [{"version": "v1"}]
    assert ledger.mark == ZERO_MARK
    ledger.restored(mark, sid=parent.sid)
    assert ledger.match(call_of(turn=2, lineage=branch.lineage)).action == "new"


def test_a_fork_rolled_back_behind_its_beginning_matches_its_ancestors_effects() -> None:
    parent = Journal()
    early = parent.head()
    done(parent, turn=1)
    mark = parent.head()
    branch, ancestor = forked(parent, mark)
    branch.head()
    branch.rollback(early, sid=parent.sid)
    ledger = branch.ledger(ancestors=[ancestor])
    ledger.restored(early, sid=parent.sid)
    match = ledger.match(call_of(turn=1, lineage=branch.lineage))
    assert (match.layer, match.orphan) == ("arguments", True)


def test_promote_takes_a_branchs_effects_into_the_parents_journal() -> None:
    parent = Journal(epoch=4)
    branch = Journal(sid=b"B" * 16, lineage=b"M" * 16)
    keys = [done(branch, turn=1, lineage=branch.lineage, effect_class="idempotent")]
    open_call = call_of("pay", turn=1, lineage=branch.lineage)
    branch.intent(open_call)
    resolved = call_of("mail", turn=1, lineage=branch.lineage)
    branch.intent(resolved)
    record = branch.ledger().get(resolved.key)
    assert record is not None
    branch.resolve(record, "resolved", value="sent")
    for kind, body in branch.ledger().bodies_after(ZERO_MARK, epoch=parent.epoch):
        parent.append(kind, body)
    ledger = parent.ledger()
    ours = {record.key: (record.tool, record.state, record.value) for record in branch.ledger().effects}
    theirs = {record.key: (record.tool, record.state, record.value) for record in ledger.effects}
    assert ours == theirs
    assert keys[0].hex() in theirs
    assert {record.epoch for record in ledger.effects} == {4}


# ---- marks ------------------------------------------------------------------------------------------------------------


def test_a_ledger_shorter_than_the_mark_fails_closed() -> None:
    journal = Journal()
    done(journal)
    mark = journal.mark
    shorter = Ledger(sid=journal.sid, entries=journal.entries[:-1])
    for check in (shorter.check_mark, shorter.restored):
        with pytest.raises(CorruptionError) as raised:
            check(mark)
        assert raised.value.code == "ledger-short"


def test_another_hash_at_the_mark_fails_closed() -> None:
    journal = Journal()
    done(journal)
    with pytest.raises(CorruptionError) as raised:
        journal.ledger().restored(Mark(journal.mark.seq, b"x" * 32))
    assert raised.value.code == "ledger-mismatch"


def test_an_ancestor_shorter_than_the_fork_fails_closed() -> None:
    parent = Journal()
    done(parent)
    mark = parent.mark
    branch, _ = forked(parent, mark)
    with pytest.raises(CorruptionError):
        branch.ledger(ancestors=[Ancestor(parent.sid, parent.entries[:-1], mark)])


def test_a_mark_on_a_head_record_is_proven_by_the_next_entry_or_by_the_end() -> None:
    journal = Journal()
    done(journal)
    journal.head()
    on_head = journal.mark
    with pytest.raises(CorruptionError):
        journal.ledger().check_mark(on_head)
    journal.ledger(end=on_head).check_mark(on_head)
    done(journal, turn=2)
    journal.ledger().check_mark(on_head)


def test_a_mark_of_a_stranger_is_refused() -> None:
    journal = Journal()
    with pytest.raises(CorruptionError):
        journal.ledger().restored(Mark(1, b"x" * 32), sid=b"?" * 16)


def test_entries_out_of_order_are_corruption() -> None:
    journal = Journal()
    done(journal)
    with pytest.raises(CorruptionError) as raised:
        Ledger(sid=journal.sid, entries=[journal.entries[1], journal.entries[0]])
    assert raised.value.code in ("ledger-order", "ledger-transition")


def test_a_broken_chain_is_corruption() -> None:
    journal = Journal()
    done(journal)
    entry = journal.entries[1]
    journal.entries[1] = dataclasses.replace(entry, body={**entry.body, "prev": b"x" * 32})
    with pytest.raises(CorruptionError) as raised:
        journal.ledger()
    assert raised.value.code == "ledger-mismatch"


def test_effects_after_a_mark_and_open_effects() -> None:
    journal = Journal()
    done(journal, turn=1)
    mark = journal.mark
    key = done(journal, turn=2)
    call = call_of("pay")
    journal.intent(call)
    ledger = journal.ledger()
    assert [record.key for record in ledger.effects_after(mark)] == [key.hex(), call.key.hex()]
    assert [record.tool for record in ledger.open_effects] == ["pay"]


# ---- keys and large values --------------------------------------------------------------------------------------------


def test_keys_depend_on_every_field_and_on_nothing_else() -> None:
    base = call_of().key
    assert call_of().key == base
    assert call_of(effect_class="read", resources=("r",)).key == base
    changed = [
        call_of(turn=2),
        call_of("other"),
        call_of(args={"version": "v2"}),
        call_of(lineage=b"M" * 16),
        call_of(intent_key="v1"),
    ]
    again = Occurrences()
    call_of(occurrences=again)
    changed.append(call_of(occurrences=again))
    assert len({base, *(call.key for call in changed)}) == len(changed) + 1


def test_a_declared_key_cannot_be_confused_with_arguments() -> None:
    args = {"a": 1}
    assert call_of(args=args).key != call_of(args=args, intent_key=canonical_arguments(args)).key


@pytest.mark.parametrize(
    ("args", "volatile", "same"),
    [
        ({"a": 1, "t": 2}, ("t",), {"a": 1}),
        ({"a": {"t": 1, "b": 2}}, ("a.t",), {"a": {"b": 2}}),
        ({"a": 1}, ("missing", "a.b"), {"a": 1}),
        ({"a.t": 1, "a": {"t": 2}}, ("a.t",), {"a.t": 1, "a": {}}),
    ],
)
def test_volatile_fields_are_stripped(args: Any, volatile: tuple[str, ...], same: Any) -> None:
    before = repr(args)
    assert canonical_arguments(args, volatile) == canonical_arguments(same)
    assert repr(args) == before


def test_large_values_stand_in_chunks_and_come_back() -> None:
    chunks: dict[bytes, bytes] = {}

    def put(data: bytes) -> Ref:
        ref = Ref(b"\x01" + len(chunks).to_bytes(32, "big"))
        chunks[ref] = data
        return ref

    def get(ref: Ref, max_bytes: int) -> bytes:
        return chunks[ref]

    for value, num_chunks in [("x" * 10, 0), ("x" * (70 << 10), 1), ({"$ref": b"mine"}, 2), ({"$ref": 1, "a": 2}, 2)]:
        packed = pack_value(value, put)
        assert len(chunks) == num_chunks
        assert load_value(packed, get) == value
    with pytest.raises(CorruptionError):
        load_value({"$ref": b"\x02" + bytes(32)}, get)


def test_large_arguments_are_matched_through_their_chunk() -> None:
    chunks: dict[bytes, bytes] = {}

    def put(data: bytes) -> Ref:
        ref = Ref(b"\x01" + bytes(32))
        chunks[ref] = data
        return ref

    journal = Journal()
    args = {"text": "x" * (80 << 10), "at": 1}
    call = call_of(args=args, volatile=("at",), turn=5)
    entry_body = {**journal.intent(call).body, "args": pack_value(args, put)}
    journal.entries.clear()
    journal.append("intent", entry_body)
    journal.outcome(call)
    ledger = journal.ledger(load=lambda value: load_value(value, lambda ref, max_bytes: chunks[ref]))
    ledger.restored(ZERO_MARK)
    assert ledger.match(call_of(args={**args, "at": 2}, volatile=("at",), turn=4)).layer == "arguments"
