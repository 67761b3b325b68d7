"""A durable branch is found again by the turn that made it, and by nothing else."""

from __future__ import annotations

from contextlib import suppress

from .toy import Opener


class Stop(Exception):
    """What a program raises where a crash would be."""


def test_a_turn_that_is_executed_again_finds_its_branch(opener: Opener) -> None:
    ids = []
    for _ in range(2):
        with suppress(Stop), opener() as session:
            for _turn in session.turns():
                ids.append(session.fork(1).result()[0].id)
                raise Stop
    assert ids[0] == ids[1]


def test_a_fork_after_a_rollback_forks_the_new_timeline(opener: Opener) -> None:
    with opener() as session:
        for _turn in session.turns(until=lambda: session.turn_number == 1):
            session.state.seen.append("first turn")
    cut = session.head
    found = []
    for at, mark in ((None, "old"), (cut, "new")):
        with suppress(Stop), opener(at=at) as session:
            for _turn in session.turns():
                session.state.seen.append(mark)
                branch = session.fork(1).result()[0]
                found.append((branch.id, branch.name, branch.state.seen))
                raise Stop
    (old_id, old_name, _), (new_id, new_name, seen) = found
    assert seen == ["first turn", "new"]
    assert old_id != new_id
    assert old_name != new_name


def test_a_fork_between_turns_forks_the_head(opener: Opener) -> None:
    with opener() as session:
        branch = session.fork(1).result()[0]
        branch.state.seen.append("branch")
        session.promote(branch).result()
    with opener() as session:
        assert session.fork(1).result()[0].state.seen == ["branch"]
        session.state.seen.append("changed")
        session.checkpoint()  # a fork waits for it: a branch stands on a published head
    with opener() as session:
        assert session.fork(1).result()[0].state.seen == ["branch", "changed"]


def test_forks_of_two_older_checkpoints_are_two(opener: Opener) -> None:
    with opener() as session:
        heads = [session.head]
        for _turn in session.turns(until=lambda: session.turn_number == 2):
            session.state.seen.append(session.turn_number)
    heads.append(session.head)
    seen = []
    for head in heads:
        with opener() as session:
            seen.append(session.fork(1, at=head).result()[0].state.seen)
    assert seen == [[], [1, 2]]
