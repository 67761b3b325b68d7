"""Recovery, divergence, rollback, orphans, and a restore that is interrupted."""

from __future__ import annotations

from pathlib import Path

import pytest

import agentckpt
from agentckpt import NotApplied, Session, Store
from agentckpt.errors import (
    ConflictError,
    CorruptionError,
    DivergenceError,
    EffectUnknownError,
    IncompatibleError,
    NotFoundError,
    ToolError,
)
from agentckpt.session import opening
from agentckpt.session.restore import Prepared

from .toy import Agent, Opener, ToyEngine

sent: list[str] = []


@agentckpt.tool(effect="idempotent")
def send(text: str, effect: agentckpt.Effect) -> str:
    sent.append(text)
    return f"sent {text}"


@agentckpt.tool(effect="irreversible")
def deploy(version: str) -> str:
    sent.append(version)
    if version == "refused":
        raise NotApplied("not today")
    if version == "lost":
        raise TimeoutError("no answer")
    return f"deployed {version}"


@agentckpt.tool(effect="irreversible", resources=lambda account, amount: [account])
def pay(account: str, amount: int) -> str:
    sent.append(f"{account} {amount}")
    return "paid"


@pytest.fixture(autouse=True)
def _nothing_sent() -> None:
    sent.clear()


class Stop(Exception):
    """What the test programs raise where a crash would be."""


def crashed(opener: Opener, body: object, **options: object) -> None:
    """One run of a program that stops in its first turn."""

    def program() -> None:
        with opener(**options) as session:  # type: ignore[arg-type]
            for turn in session.turns():
                body(session, turn)  # type: ignore[operator]
                raise Stop

    with pytest.raises(Stop):
        program()


def one_turn(opener: Opener, body: object, **options: object) -> Session:
    with opener(**options) as session:  # type: ignore[arg-type]
        for turn in session.turns(until=lambda: session.turn_number == 1):
            body(session, turn)  # type: ignore[operator]
    return session


# ---- the open turn ---------------------------------------------------------------------------------------------------


def talk(session: Session, turn: agentckpt.session.Turn) -> None:
    session.kv.append("question ")
    made = session.kv.generate(max_tokens=4, seed=5).result()
    session.kv.truncate(len(session.kv.tokens) - 1)
    turn.call(send, text=made.text)


def test_recorded_segments_and_effects_are_matched(opener: Opener) -> None:
    crashed(opener, talk)
    num_sampled = opener.engine.num_sampled
    session = one_turn(opener, talk)
    assert session.restored is not None
    assert session.restored.num_segments == 3
    assert [effect.tool for effect in session.restored.replayed] == ["send"]
    assert opener.engine.num_sampled == num_sampled
    assert len(sent) == 1


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda session, turn: session.kv.append("another ").result(), "append of 9 ids"),
        (lambda session, turn: session.kv.generate(max_tokens=2).result(), "append of 9 ids"),
        (lambda session, turn: session.kv.truncate(0), "append of 9 ids"),
        (lambda session, turn: (session.kv.append("question ").result(), session.kv.generate(max_tokens=4, seed=6).result()), "request"),
    ],
)
def test_the_first_difference_is_a_divergence_that_names_turn_and_call(opener: Opener, change: object, expected: str) -> None:
    crashed(opener, talk)
    with pytest.raises(DivergenceError) as caught:
        one_turn(opener, change)
    assert "turn 1" in str(caught.value)
    assert expected in str(caught.value.expected)
    assert caught.value.found
    session = one_turn(opener, talk)  # nothing was lost by the attempt
    assert session.turn_number == 1


def test_a_record_left_when_the_turn_ends_is_a_divergence(opener: Opener) -> None:
    crashed(opener, talk)
    with pytest.raises(DivergenceError) as caught:
        one_turn(opener, lambda session, turn: None)
    assert "ended without" in str(caught.value)
    with pytest.raises(DivergenceError):
        one_turn(
            opener,
            lambda session, turn: (session.kv.append("question "), session.kv.generate(max_tokens=4, seed=5), session.kv.truncate(12)),
        )


def test_divergence_may_be_continued_and_then_unused_effects_are_orphans(opener: Opener) -> None:
    crashed(opener, talk)
    session = one_turn(opener, lambda session, turn: session.kv.append("another "), on_divergence="continue")
    assert bytes(session.kv.tokens) == b"another "
    assert [effect.tool for effect in session.orphans] == ["send"]
    assert session.turn_number == 1


def test_a_generation_without_a_record_is_drawn_again_the_same(opener: Opener) -> None:
    texts = []

    def body(session: Session, turn: agentckpt.session.Turn) -> None:
        session.kv.append("x")
        texts.append(session.kv.generate(max_tokens=6, seed=9).result().text)

    crashed(opener, body)
    one_turn(opener, body)
    assert texts[0] == texts[1]
    assert opener.engine.num_sampled == 12


def test_raised_and_failed_are_replayed_and_unknown_stays(opener: Opener) -> None:
    def body(session: Session, turn: agentckpt.session.Turn) -> None:
        with pytest.raises(ToolError) as caught:
            turn.call(deploy, version="refused")
        assert caught.value.type_name == "NotApplied"
        with pytest.raises(EffectUnknownError):
            turn.call(deploy, version="lost")

    crashed(opener, body)
    session = one_turn(opener, body)
    assert sent == ["refused", "lost"]
    assert [effect.state for effect in session.effects()] == ["failed", "unknown"]
    with opener() as session:  # an unknown effect of an old turn does not stand in the way
        assert [effect.state for effect in session.effects()] == ["failed", "unknown"]
        for turn in session.turns(until=lambda: session.turn_number == 2):
            with pytest.raises(EffectUnknownError):
                turn.call(deploy, version="lost")
    assert sent == ["refused", "lost"]


def test_a_large_result_is_kept_as_a_chunk(opener: Opener) -> None:
    big = "x" * 200_000

    def body(session: Session, turn: agentckpt.session.Turn) -> None:
        assert turn.call(send, text=big) == f"sent {big}"

    crashed(opener, body)
    one_turn(opener, body)
    assert len(sent) == 1


def test_a_result_that_cannot_be_recorded_does_not_undo_the_effect(opener: Opener) -> None:
    @agentckpt.tool(effect="irreversible")
    def fire() -> object:
        sent.append("fired")
        return object()

    def body(session: Session, turn: agentckpt.session.Turn) -> None:
        with pytest.raises(IncompatibleError) as caught:
            turn.call(fire)
        assert caught.value.code == "not-encodable"

    crashed(opener, body)
    session = one_turn(opener, body)
    assert sent == ["fired"]
    assert session.effects()[0].state == "committed"


def test_an_adapter_begins_and_finishes(opener: Opener) -> None:
    def body(session: Session, turn: agentckpt.session.Turn) -> None:
        begun = turn.begin(deploy, version="1").result()
        if not begun.recorded:
            sent.append(begun.key)
            assert turn.finish(begun, {"ok": True}).result().ok
        else:
            assert begun.value.ok
        other = turn.begin(deploy, version="2").result()
        if not other.recorded:
            with pytest.raises(ToolError):
                turn.finish(other, error=NotApplied("no")).result()

    def again(session: Session, turn: agentckpt.session.Turn) -> None:
        assert turn.begin(deploy, version="1").result().value.ok
        with pytest.raises(ToolError):
            turn.begin(deploy, version="2").result()

    crashed(opener, body)
    one_turn(opener, again)
    assert len(sent) == 1


def test_a_begun_call_that_is_not_finished_stands_in_the_cut(opener: Opener, store: Store) -> None:
    session = one_turn(opener, lambda session, turn: turn.begin(deploy, version="1").result())
    assert [effect.state for effect in session.effects()] == ["intended"]
    with opener() as session:
        with pytest.raises(EffectUnknownError):
            next(session.turns()).call(deploy, version="1")
    assert sent == []


# ---- rollback --------------------------------------------------------------------------------------------------------


def three_turns(opener: Opener) -> list[str]:
    heads = []
    with opener() as session:
        for turn in session.turns(until=lambda: session.state.step == 3):
            session.kv.append(f"{turn.number} ")
            session.kv.generate(max_tokens=2, seed=1).result()
            turn.call(send, text=f"turn {turn.number}")
            turn.call(session.sandbox.run, f"echo {turn.number} >> log")
            session.state.step += 1
            heads.append(session.head or "")
        heads.append(session.checkpoint().result().id)
    return heads[1:]


def test_rollback_brings_parts_back_and_lists_what_stands_in_the_world(opener: Opener, workspace: Path) -> None:
    heads = three_turns(opener)
    with opener() as session:
        first_nonce, tokens = session.kv.nonce, bytes(session.kv.tokens)
    with opener(at=heads[0]) as session:
        report = session.restored
        assert report is not None
        assert (report.mode, report.turn, session.turn_number, session.state.step) == ("rollback", 1, 1, 1)
        assert (workspace / "log").read_text() == "1\n"
        assert [effect.args for effect in report.orphaned] == [{"text": "turn 2"}, {"text": "turn 3"}]
        assert session.orphans == report.orphaned
        first = bytes(session.kv.tokens)
        nonce = session._live.nonce
        assert session.kv.nonce == nonce != first_nonce
        sent.clear()
        for turn in session.turns(until=lambda: session.state.step == 2):
            # The same call in the new timeline is not sent a second time; a new one is.
            assert turn.call(send, text="turn 2") == "sent turn 2"
            assert turn.call(send, text="new") == "sent new"
            session.kv.append("2 ")
            session.kv.generate(max_tokens=2, seed=1).result()
            session.state.step += 1
        assert sent == ["new"]
        assert [effect.args for effect in session.orphans] == [{"text": "turn 3"}]
    with opener() as session:
        assert (session.turn_number, session.state.step) == (2, 2)
        assert session._live.nonce == nonce
        assert bytes(session.kv.tokens).startswith(first)
        again = bytes(session.kv.tokens)
        assert (again[: len(again) - 2], len(again)) == (tokens[: len(again) - 2], len(again))
        assert again != tokens[: len(again)], "the same seed drew the same although the session went back"
        assert [effect.args for effect in session.orphans] == [{"text": "turn 3"}]


def test_a_rollback_that_is_killed_in_its_first_turn_goes_on(opener: Opener) -> None:
    heads = three_turns(opener)

    def body(session: Session, turn: agentckpt.session.Turn) -> None:
        session.kv.append("again ")
        turn.call(send, text="again")

    crashed(opener, body, at=heads[0])
    sent.clear()
    with opener() as session:
        assert session.turn_number == 1
        assert session.restored is not None
        assert [effect.args for effect in session.restored.replayed] == [{"text": "again"}]
        assert [effect.args for effect in session.orphans] == [{"text": "turn 2"}, {"text": "turn 3"}]
        for turn in session.turns(until=lambda: session.turn_number == 2):
            body(session, turn)
    assert sent == []


def test_an_orphan_on_the_same_resource_is_refused(opener: Opener) -> None:
    with opener() as session:
        first = session.checkpoint().result().id
        for turn in session.turns(until=lambda: session.turn_number == 1):
            turn.call(pay, account="A", amount=5)
    with opener(at=first) as session:
        turn = next(session.turns())
        with pytest.raises(ConflictError) as caught:
            turn.call(pay, account="A", amount=6)
        assert caught.value.code == "effect-overlap"
        assert turn.call(pay, account="A", amount=5) == "paid"
    assert sent == ["A 5"]


def test_rollback_goes_only_to_checkpoints_of_the_session(opener: Opener) -> None:
    three_turns(opener)
    with Session.open(opener.store, "other", state=Agent) as other:
        head = other.head
    with pytest.raises(IncompatibleError) as caught:
        opener(at=head)
    assert caught.value.code == "other-session"
    with pytest.raises(NotFoundError):
        opener(at="ffffffff")


# ---- a restore that fails or is interrupted --------------------------------------------------------------------------


def snapshot(opener: Opener) -> tuple[int, list[str], str]:
    view = opener.store.view()
    log = opener.workspace / "log"
    names = sorted(path.name for path in opener.workspace.parent.iterdir())
    return view.seq, names, log.read_text() if log.exists() else ""


def test_a_failure_before_the_commit_point_leaves_everything_untouched(opener: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    three_turns(opener)
    (opener.workspace / "log").write_text("changed since\n")
    before = snapshot(opener)

    def refuse(self: object, source: object, ref: object) -> None:
        raise CorruptionError("damaged on purpose")

    monkeypatch.setattr("agentckpt.session.state.StatePart.prepare", refuse)
    num_open = opener.engine.num_open
    with pytest.raises(CorruptionError):
        opener()
    assert snapshot(opener) == before
    assert opener.engine.num_open == num_open
    monkeypatch.undo()
    with opener() as session:  # and the lease was given back
        assert (opener.workspace / "log").read_text() == "1\n2\n3\n"
        assert session.restored is not None
        assert session.restored.epoch == 2


@pytest.mark.parametrize("part", ["kv", "sandbox", "state"])
def test_a_crash_between_owned_and_restored_is_redone(opener: Opener, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    three_turns(opener)
    (opener.workspace / "log").write_text("changed since\n")

    def stop_before(prepared: Prepared) -> None:
        for name in sorted(prepared.staged, key=lambda name: (name == "state", name)):
            if name == part:
                raise Stop
            prepared.staged[name].commit()

    monkeypatch.setattr(opening, "commit_parts", stop_before)
    with pytest.raises(Stop):
        opener()
    entries = opener.store.view().session_named("agent").entries
    assert [entry.body["done"] for entry in entries if entry.kind == "restore"] == [False]
    monkeypatch.undo()
    with opener() as session:
        assert (session.turn_number, session.state.step) == (3, 3)
        assert (opener.workspace / "log").read_text() == "1\n2\n3\n"
        assert session.restored is not None
        assert session.restored.epoch == 3
    entries = opener.store.view().session_named("agent").entries
    assert [entry.body["done"] for entry in entries if entry.kind == "restore"] == [False, False, True]


def test_a_moved_head_stops_a_restore(opener: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    heads = three_turns(opener)
    (opener.workspace / "log").write_text("changed since\n")
    inner = opening.prepare_parts

    def meanwhile(source: object, checkpoint: object, parts: object) -> Prepared:
        from agentckpt.store import Draft

        session = opener.store.view().session_named("agent")
        head = {
            **{name: session.head[name] for name in ("nonce", "message", "pack", "facts")},  # type: ignore[index]
            "manifest": bytes.fromhex(heads[0]), "previous": bytes.fromhex(heads[-1]), "epoch": session.epoch,
            "generation": session.generation + 1, "reason": "rollback",
        }  # fmt: skip
        opener.store.append(lambda view: [Draft("head", session.sid, head)])
        return inner(source, checkpoint, parts)  # type: ignore[arg-type]

    monkeypatch.setattr(opening, "prepare_parts", meanwhile)
    with pytest.raises(ConflictError) as caught:
        opener()
    assert opener.workspace.joinpath("log").read_text() == "changed since\n"
    assert caught.value.code == "stale-head"
    assert opener.store.view().session_named("agent").epoch == 1


def test_a_ledger_shorter_than_the_mark_fails_closed(opener: Opener, tmp_path: Path) -> None:
    three_turns(opener)
    session = opener.store.view().session_named("agent")
    assert session.head is not None
    checkpoint = opening.read_checkpoint(opener.store, bytes(session.head["manifest"]))
    ledger = opening.Ledger(sid=session.sid, entries=list(session.entries)[:2])
    with pytest.raises(CorruptionError) as caught:
        ledger.restored(checkpoint.mark, sid=checkpoint.session)
    assert caught.value.code == "ledger-short"


# ---- agentckpt.restore -----------------------------------------------------------------------------------------------


def test_restore_loads_parts_and_moves_no_head(opener: Opener, tmp_path: Path) -> None:
    heads = three_turns(opener)
    seq = opener.store.view().seq
    target, state, engine = tmp_path / "copy", Agent(), ToyEngine()
    report = agentckpt.restore(opener.store, heads[1][:12], kv=engine, sandbox=target, state=state)
    assert (report.mode, report.turn, state.step) == ("load", 2, 2)
    assert (target / "log").read_text() == "1\n2\n"
    assert bytes(report.live["kv"].tokens).startswith(b"1 ")
    assert report.complete
    assert opener.store.view().seq == seq
    assert agentckpt.restore(opener.store, "agent", state=state).turn == 3
    assert state.step == 3
    with pytest.raises(IncompatibleError):
        agentckpt.restore(opener.store, "agent", kv={"planner": engine})
