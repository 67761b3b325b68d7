"""Fork and promote."""

from __future__ import annotations

from pathlib import Path

import pytest

import agentckpt
from agentckpt import Session
from agentckpt.errors import ConflictError, EffectUnknownError, IncompatibleError
from agentckpt.session import Branch
from agentckpt.session.restore import read_checkpoint

from .toy import Agent, Opener

sent: list[str] = []


@agentckpt.tool(effect="irreversible")
def deploy(version: str) -> str:
    sent.append(version)
    return f"deployed {version}"


@agentckpt.tool(effect="idempotent")
def send(text: str) -> str:
    sent.append(text)
    return text


@agentckpt.tool(effect="read")
def look() -> int:
    return len(sent)


@pytest.fixture(autouse=True)
def _nothing_sent() -> None:
    sent.clear()


def roll(branch: Branch, text: str) -> str:
    branch.kv.append(text)
    made = branch.kv.generate(max_tokens=4).result().text
    branch.call(branch.sandbox.run, f"echo {made} > result")
    branch.state.seen.append(made)
    return made


def folders(workspace: Path) -> list[str]:
    return sorted(path.name for path in workspace.parent.iterdir())


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_branches_are_independent_and_one_is_promoted(opener: Opener, workspace: Path, durable: bool, inside: bool) -> None:
    with opener() as session:
        if inside:
            next(session.turns())
            session.kv.append("base ")
            session.state.seen.append("base")
            session.sandbox.write_file("base", "base")
        before = folders(workspace)
        with session.fork(3, durable=durable) as branches:
            assert len(folders(workspace)) == len(before) + 3
            results = [roll(branch, f"branch {index} ") for index, branch in enumerate(branches)]
            assert len({branch.kv.nonce for branch in branches}) == 3
            assert len(set(results)) == 3
            assert not (workspace / "result").exists()
            assert session.state.seen == ["base"] * inside
            parent_tokens = bytes(session.kv.tokens)
            assert all(bytes(branch.kv.tokens).startswith(parent_tokens + b"branch") for branch in branches)
            info = session.promote(branches[1]).result()
            assert (info is None) == inside
            assert all(branch.released for branch in branches)
            with pytest.raises(ConflictError):
                branches[0].kv.append("x")
            with pytest.raises(ConflictError):
                session.promote(branches[0]).result()
        assert (workspace / "result").read_text().strip() == results[1]
        assert session.state.seen == ["base"] * inside + [results[1]]
        assert bytes(session.kv.tokens).endswith(b"branch 1 " + results[1].encode())
        assert folders(workspace) == before
        assert opener.engine.num_open == 1
    with opener() as session:
        assert session.state.seen == ["base"] * inside + [results[1]]
        assert (workspace / "result").read_text().strip() == results[1]
        assert bytes(session.kv.tokens).endswith(results[1].encode())
        reasons = [head["reason"] for head in session.store.view().session_named("agent").heads]
        assert reasons[-1 if not inside else 1] == "promote"
        checkpoint = read_checkpoint(session.store, bytes.fromhex(session.head or ""))
        assert len(checkpoint.parents) == 1 + durable
        assert any(effect.tool == "sandbox.run" for effect in session.effects())


def test_nonce_of_a_promoted_branch_goes_on(opener: Opener) -> None:
    with opener() as session:
        with session.fork(2, durable=False) as branches:
            nonce = branches[0].kv.nonce
            session.promote(branches[0]).result()
        assert session.kv.nonce == nonce
    with opener() as session:
        assert session.kv.nonce == nonce


def test_a_turn_that_is_executed_again_makes_the_same_branches_with_the_same_draws(opener: Opener, workspace: Path) -> None:
    seen: list[list[str]] = []

    def program(crash: bool) -> None:
        with opener() as session:
            for turn in session.turns(until=lambda: session.turn_number == 1):
                session.kv.append("base ")
                with session.fork(3, seeds=[5, 6, 7], durable=False) as branches:
                    seen.append([roll(branch, "x ") for branch in branches])
                    session.promote(branches[2]).result()
                turn.call(send, text="done")
                if crash:
                    raise KeyError

    with pytest.raises(KeyError):
        program(True)
    program(False)
    assert seen[0] == seen[1]
    assert sent == ["done"]


def test_durable_branches_are_found_again(opener: Opener) -> None:
    def program(crash: bool) -> list[str]:
        with opener() as session:
            for _ in session.turns(until=lambda: session.turn_number == 1):
                with session.fork(2, effects="grant") as branches:
                    for branch in branches:
                        for turn in branch.turns(until=lambda: branch.state.step == 2):  # noqa: B023
                            branch.kv.append("s")
                            turn.call(send, text=f"{branch.seed} {turn.number}")
                            branch.state.step += 1
                    tokens = [bytes(branch.kv.tokens).decode() for branch in branches]
                    if crash:
                        raise KeyError
                    session.promote(branches[0]).result()
            return tokens

    with pytest.raises(KeyError):
        program(True)
    first = list(sent)
    assert len(first) == 4
    assert program(False) == ["ss", "ss"]
    assert sent == first
    with opener() as session:
        assert session.state.step == 2
        assert [effect.tool for effect in session.effects()] == ["send", "send"]
        names = sorted(session.store.view().names)
        assert names == ["agent", "agent/1.0.0", "agent/1.0.1"]


def test_branches_may_not_reach_the_world_unless_it_was_granted(opener: Opener) -> None:
    with opener() as session:
        with session.fork(1, durable=False) as (branch,):
            assert branch.call(look) == 0
            for tool in (send, deploy):
                with pytest.raises(ConflictError) as caught:
                    branch.call(tool, "x")
                assert caught.value.code == "effects-denied"
        with session.fork(1, effects="grant") as (branch,):
            assert branch.call(send, "x") == "x"
            with pytest.raises(ConflictError):  # an irreversible grant stays with the parent
                branch.call(deploy, "x")
        with session.fork(1, effects=["irreversible"]) as (branch,):
            assert branch.call(deploy, "y") == "deployed y"
        assert sent == ["x", "y"]
        for options in ({"effects": "grant", "durable": False}, {"effects": ["magic"]}, {"seeds": [1, 2, 3]}):
            with pytest.raises(IncompatibleError):
                session.fork(1, **options)  # type: ignore[arg-type]


def test_a_fork_sees_an_unknown_effect_of_its_parent_as_its_own(opener: Opener) -> None:
    @agentckpt.tool(effect="irreversible")
    def lost(text: str) -> str:
        sent.append(text)
        raise TimeoutError

    with opener() as session:
        turn = next(session.turns())
        with pytest.raises(EffectUnknownError):
            turn.call(lost, text="a")
        with session.fork(1, effects=["irreversible"]) as (branch,):
            assert [effect.state for effect in branch.effects()] == ["unknown"]
            with pytest.raises(EffectUnknownError):
                branch.call(lost, text="a")
    assert sent == ["a"]


def test_a_fork_of_an_older_checkpoint(opener: Opener) -> None:
    with opener() as session:
        for _ in session.turns(until=lambda: session.state.step == 3):
            session.kv.append("t")
            session.state.step += 1
            if session.turn_number == 2:
                session.checkpoint("here").result()
        second = session.store.view().session_named("agent").heads[2]["manifest"].hex()
        with session.fork(2, at=second, durable=False) as branches:
            assert [branch.state.step for branch in branches] == [2, 2]
            assert [bytes(branch.kv.tokens) for branch in branches] == [b"tt", b"tt"]
        assert session.state.step == 3


def test_a_fork_needs_a_second_object(opener: Opener) -> None:
    with opener(state=Agent()) as session:
        with pytest.raises(IncompatibleError) as caught:
            session.fork(2)
        assert caught.value.code == "no-factory"
        session.kv.append("still alive").result()


def test_a_crash_before_the_turns_cut_leaves_the_parent_as_it_was(opener: Opener, workspace: Path) -> None:
    def program() -> None:
        with opener() as session:
            for _ in session.turns():
                with session.fork(1, durable=False) as (branch,):
                    roll(branch, "x ")
                    session.promote(branch).result()
                raise KeyError

    with pytest.raises(KeyError):
        program()
    with opener() as session:
        assert session.turn_number == 0
        assert list(session.kv.tokens) == []
        assert session.state.seen == []
        assert not (workspace / "result").exists()


def test_a_stranger_is_not_promoted(opener: Opener) -> None:
    with opener() as session, Session.open(opener.store, "other", state=Agent) as other:
        with other.fork(1, durable=False) as (branch,):
            with pytest.raises(ConflictError) as caught:
                session.promote(branch).result()
            assert caught.value.code == "no-branch"
