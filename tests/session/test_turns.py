"""Turns, cuts and the gate, without crashes."""

from __future__ import annotations

import errno
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import agentckpt
from agentckpt import Session, Store, Workspace
from agentckpt.errors import CapacityError, ConflictError, IncompatibleError, StoreError, ToolError
from agentckpt.session.cut import Cutter
from agentckpt.store.io import RealIO
from agentckpt.testing.faults import Fault, FaultyIO
from agentckpt.testing.recorder import RecorderIO
from agentckpt.types import PartRef

from .toy import Agent, Opener, ToyEngine, ToyPending


@agentckpt.tool(effect="read")
def look(what: str) -> str:
    if what == "nothing":
        raise FileNotFoundError(what)
    return what.upper()


def work(session: Session, num_turns: int) -> None:
    """A deterministic agent: tokens, a command and state in each turn."""
    for turn in session.turns(until=lambda: session.state.step >= num_turns):
        session.kv.append(f"turn {turn.number}: ")
        made = session.kv.generate(max_tokens=5, seed=7).result()
        done = turn.call(session.sandbox.run, f"echo {made.text} >> log")
        session.state.seen.append([made.text, done.exit_code])
        session.state.step += 1


def test_a_new_session_has_cut_0_and_a_second_opening_restores_the_head(opener: Opener, engine: ToyEngine) -> None:
    with opener() as session:
        assert session.restored is None
        assert session.turn_number == 0
        assert session.head is not None
        first = session.head
        work(session, 3)
        assert session.turn_number == 3
    with opener() as session:
        assert session.restored is not None
        assert (session.restored.mode, session.restored.turn) == ("recover", 3)
        assert session.head != first
        assert session.state.step == 3
        assert bytes(session.kv.tokens).startswith(b"turn 1: ")
        assert session.restored.parts["kv"].restored == len(session.kv.tokens)
        assert any("tokens restored" in line for line in session.restored.describe())
        num_sampled = engine.num_sampled
        work(session, 3)  # nothing is left to do
        assert engine.num_sampled == num_sampled
        assert session.turn_number == 3


def test_an_exception_leaves_the_turn_open_and_the_next_run_executes_it_again(opener: Opener, workspace: Path) -> None:
    def crash() -> None:
        with opener() as session:
            for turn in session.turns():
                turn.call(session.sandbox.run, "echo x >> log")
                session.state.step += 1
                if turn.number == 2:
                    raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        crash()
    assert (workspace / "log").read_text() == "x\nx\n"
    with opener() as session:
        assert session.turn_number == 1
        assert session.state.step == 1
        assert (workspace / "log").read_text() == "x\n"
        assert session.restored is not None
        assert [effect.tool for effect in session.restored.rerun] == ["sandbox.run"]
        displaced = session.restored.parts["sandbox"].displaced
        assert displaced is not None
        assert (Path(displaced) / "log").read_text() == "x\nx\n"
        for turn in session.turns(until=lambda: session.state.step == 2):
            assert turn.number == 2
            turn.call(session.sandbox.run, "echo x >> log")
            session.state.step += 1
    assert (workspace / "log").read_text() == "x\nx\n"


def test_break_closes_the_turn_with_a_cut(opener: Opener) -> None:
    with opener() as session:
        for _ in session.turns():
            session.state.step = 5
            break
    with opener() as session:
        assert (session.turn_number, session.state.step) == (1, 5)


def test_what_comes_before_the_loop_is_a_turn_of_its_own(opener: Opener) -> None:
    with opener() as session:
        session.kv.append("system prompt")
        for turn in session.turns():
            assert turn.number == 2
            break
    with opener() as session:
        assert bytes(session.kv.tokens) == b"system prompt"
        assert session.turn_number == 2


def test_until_is_evaluated_after_each_cut(opener: Opener) -> None:
    asked: list[tuple[int, int]] = []
    with opener() as session:

        def until() -> bool:
            asked.append((session.turn_number, session.state.step))
            return len(asked) == 3

        for _ in session.turns(until):
            session.state.step += 1
    assert asked == [(0, 0), (1, 1), (2, 2)]


def test_two_flushes_a_checkpoint(tmp_path: Path, workspace: Path, engine: ToyEngine) -> None:
    recorder = RecorderIO(RealIO())
    Store.init(tmp_path / "store").close()
    with Store.open(tmp_path / "store", io=recorder) as store:
        with Session.open(store, "agent", kv=engine, sandbox=workspace, state=Agent) as session:
            session.checkpoint().result()
            for number in range(3):
                session.kv.append(f"more {number}").result()
                session.sandbox.write_file("f", str(number))
                session.state.step += 1
                recorder.reset()
                session.checkpoint().result()
                assert recorder.num_fdatasync == 2
                assert recorder.num_fsync_dir == 0
            recorder.reset()
            for turn in session.turns(until=lambda: session.state.step >= 6):
                # A read and a command are flushed with the cut, an idempotent effect flushes its intent and its outcome.
                turn.call(look, what="a")
                turn.call(session.sandbox.run, ["true"])
                session.state.step += 1
            session.checkpoint().result()
    # Closed turn of the three checkpoints, three turns, the explicit one.
    assert recorder.num_fdatasync >= 2 * 4


def test_intents_are_flushed_before_the_dispatch_and_outcomes_before_the_return(tmp_path: Path) -> None:
    recorder = RecorderIO(RealIO())
    Store.init(tmp_path / "store").close()
    flushed: list[int] = []

    @agentckpt.tool(effect="irreversible")
    def act() -> int:
        flushed.append(recorder.num_fdatasync)
        return 1

    @agentckpt.tool(effect="read")
    def see() -> int:
        flushed.append(recorder.num_fdatasync)
        return 1

    with Store.open(tmp_path / "store", io=recorder) as store, Session.open(store, "agent", state=Agent) as session:
        turn = next(session.turns())
        for tool, counts in ((act, (1, 2)), (see, (0, 0))):
            recorder.reset()
            turn.call(tool)
            assert (flushed.pop(), recorder.num_fdatasync) == counts


class SlowCuts:
    """Cuts take long; remembers when each was published."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, delay_s: float = 0.15) -> None:
        self.published: list[int] = []
        inner = Cutter._publish

        def publish(cutter: Cutter, cut: Any) -> Any:
            if cut.turn:
                time.sleep(delay_s)
            info = inner(cutter, cut)
            self.published.append(cut.turn)
            return info

        monkeypatch.setattr(Cutter, "_publish", publish)


def test_the_gate_no_tool_runs_before_the_cut_before_it_is_published(opener: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = SlowCuts(monkeypatch)
    seen: list[list[int]] = []

    @agentckpt.tool(effect="read")
    def watch() -> int:
        seen.append(list(slow.published))
        return len(seen)

    with opener() as session:
        for turn in session.turns(until=lambda: len(seen) == 3):
            turn.call(watch)
    assert seen == [[0], [0, 1], [0, 1, 2]]
    assert all(metrics.exposed_s >= 0.1 for metrics in session.metrics[1:3])


def test_the_model_works_while_the_cut_is_written(opener: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = SlowCuts(monkeypatch)
    with opener() as session:
        published = []
        for turn in session.turns(until=lambda: session.state.step >= 2):
            session.kv.append("x").result()
            session.kv.generate(max_tokens=3).result()
            published.append(list(slow.published))
            turn.call(look, what="a")
            session.state.step += 1
    assert published == [[0], [0]]


def test_a_newer_cut_supersedes_the_waiting_one_and_says_so(opener: Opener, monkeypatch: pytest.MonkeyPatch, engine: ToyEngine) -> None:
    slow = SlowCuts(monkeypatch)
    with opener() as session:
        handles = []
        for turn in session.turns(until=lambda: turn_count(session) == 4):
            session.kv.append(f"{turn.number};").result()
            handles.append(session.checkpoint(f"after {turn.number}"))
        infos = [handle.result() for handle in handles]
    assert infos[0].requested_turn is None
    superseded = [info for info in infos if info.superseded]
    assert superseded
    assert all(info.turn > (info.requested_turn or 0) for info in superseded)
    assert slow.published == sorted(slow.published)
    assert session.kv.inner.num_pins == 0
    with opener() as session:
        assert bytes(session.kv.tokens) == b"1;3;5;7;"


def turn_count(session: Session) -> int:
    return bytes(session.kv.tokens).count(b";")


def test_an_error_of_a_cut_surfaces_at_the_next_call_and_nothing_is_dispatched(tmp_path: Path, workspace: Path) -> None:
    Store.init(tmp_path / "store").close()
    faulty = FaultyIO(RealIO())
    ran = []

    @agentckpt.tool(effect="read")
    def act() -> int:
        ran.append(1)
        return 1

    with Store.open(tmp_path / "store", io=faulty) as store:
        with Session.open(store, "agent", kv=ToyEngine(), sandbox=workspace, state=Agent) as session:
            before = session.head
            loop = session.turns()
            next(loop)
            session.state.step = 1
            faulty.plan, faulty._seen = [Fault("fdatasync", errno.ENOSPC, repeat=True, path="*pack*")], [0]
            turn = next(loop)
            with pytest.raises(CapacityError):
                turn.call(act)
            assert not ran
            with pytest.raises(ConflictError) as caught:
                turn.call(act)
            assert caught.value.code == "cut-failed"
            assert session.head == before
            faulty.clear()
            session.checkpoint("again").result()
            turn.call(act)
            assert ran == [1]
            assert session.kv.inner.num_pins == 0
            assert ["CapacityError" in (each.error or "") for each in session.metrics] == [False, True, False]


def test_a_cut_that_fails_in_one_part_gives_back_the_pins_of_all(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    engines = {"a": ToyEngine(), "b": ToyEngine()}
    with Session.open(store, "pins", kv=engines, state=Agent) as session:
        inner = ToyPending.write

        def write(pending: ToyPending) -> PartRef:
            if pending.sequence.engine is engines["a"]:
                pending.cancel()
                raise OSError("on purpose")
            return inner(pending)

        monkeypatch.setattr(ToyPending, "write", write)
        with pytest.raises(OSError, match="on purpose"):
            session.checkpoint().result()
        assert [session.kv[name].inner.num_pins for name in "ab"] == [0, 0]
        monkeypatch.undo()
        session.kv["a"].append("x").result()  # the error was seen, so it does not come up again


def test_calls_that_leave_a_post_state_have_the_sandbox_alone(opener: Opener) -> None:
    inside: list[int] = []
    most: list[int] = []

    def step(alone: bool) -> int:
        inside.append(1)
        time.sleep(0.01)
        most.append(len(inside) if alone else 0)
        inside.pop()
        return 1

    @agentckpt.tool(effect="idempotent", sandbox=True)
    def both(number: int) -> int:
        return step(True)

    @agentckpt.tool(effect="sandbox")
    def command(number: int) -> int:
        return step(False)

    with opener() as session:
        turn = next(session.turns())
        handles = [turn.submit(tool, number=number) for number in range(6) for tool in (both, command, command)]
        assert [handle.result() for handle in handles] == [1] * 18
        posts = [effect.post for effect in session.effects() if effect.tool == "both"]
        assert len(posts) == 6
        assert None not in posts
    assert set(most) == {0, 1}


def test_an_error_that_nobody_looked_at_fails_the_next_operation(opener: Opener) -> None:
    with opener() as session:
        next(session.turns())
        session.kv.append([999])
        with pytest.raises(IncompatibleError):
            session.kv.generate(max_tokens=2).result()
        failed = session.kv.append([999])
        with pytest.raises(IncompatibleError):
            failed.result()
        session.kv.append("seen, so this one works").result()
        session.kv.append([999])
        with pytest.raises(IncompatibleError):
            session.checkpoint().result()


def test_an_outcome_that_cannot_be_written_is_owed_and_the_effect_is_not_repeated(tmp_path: Path, workspace: Path) -> None:
    Store.init(tmp_path / "store").close()
    faulty = FaultyIO(RealIO())
    sent = []

    @agentckpt.tool(effect="irreversible")
    def send(text: str) -> str:
        sent.append(text)
        faulty.plan, faulty._seen = [Fault("pwritev", errno.ENOSPC, repeat=True, path="*journal*")], [0]
        return f"sent {text}"

    with Store.open(tmp_path / "store", io=faulty) as store:
        with Session.open(store, "agent", state=Agent) as session:
            turn = next(session.turns())
            with pytest.raises(CapacityError):
                turn.call(send, text="a")
            assert [effect.state for effect in session.effects()] == ["intended"]
            with pytest.raises(CapacityError):
                turn.call(send, text="a")
            faulty.clear()
            assert turn.call(send, text="a") == "sent a"
            assert sent == ["a"]
            assert [effect.state for effect in session.effects()] == ["committed"]
        with Session.open(store, "agent", state=Agent) as session:
            assert [effect.state for effect in session.effects()] == ["committed"]


def test_tools_raise_now_as_they_do_on_a_replay(opener: Opener) -> None:
    with opener() as session:
        for turn in session.turns():
            with pytest.raises(ToolError) as caught:
                turn.call(look, what="nothing")
            assert caught.value.type_name == "FileNotFoundError"
            assert turn.call(look, what="a") == "A"
            break
        assert [effect.state for effect in session.effects()] == ["raised", "committed"]


def test_a_tool_that_calls_a_tool_is_refused(opener: Opener) -> None:
    with opener() as session:
        turn = next(session.turns())

        @agentckpt.tool(effect="read")
        def outer() -> str:
            return str(turn.call(look, what="a"))

        with pytest.raises(ToolError) as caught:
            turn.call(outer)
        assert caught.value.type_name == "ConflictError"


def test_the_class_sandbox_is_granted_only_where_the_network_is_denied(store: Store, workspace: Path) -> None:
    @agentckpt.tool(effect="sandbox")
    def inside() -> int:
        return 1

    def undeclared() -> int:
        return 1

    def classes(name: str, sandbox: Workspace | None) -> list[tuple[str, bool]]:
        with Session.open(store, name, sandbox=sandbox, state=Agent) as session:
            turn = next(session.turns())
            for tool in (inside, undeclared):
                turn.call(tool)
            if sandbox is not None:
                turn.call(session.sandbox.run, "true")
            return [(effect.effect_class, effect.sandbox) for effect in session.effects()]

    both = ("irreversible", True)
    assert classes("allowed", Workspace(workspace, network="allow")) == [both, both, both]
    assert classes("declared", Workspace(workspace, network="declared-harmless")) == [("sandbox", False), both, ("sandbox", False)]
    assert classes("none", None) == [("irreversible", False), ("irreversible", False)]


def test_owners(opener: Opener, store: Store) -> None:
    with opener():
        with pytest.raises(ConflictError):
            opener()
    with opener() as session:
        assert session.restored is not None
        assert session.restored.epoch == store.view().session_named("agent").epoch == 2


def test_a_stale_epoch_appends_nothing_but_a_late_outcome(opener: Opener, store: Store, workspace: Path, tmp_path: Path) -> None:
    sent = []
    stale = opener()
    turn = next(stale.turns())
    newer: list[Session] = []

    @agentckpt.tool(effect="irreversible")
    def send(text: str) -> str:
        sent.append(text)
        stale._opened.lease.release()  # type: ignore[union-attr]  # as if the host had lost the lock
        other = tmp_path / "other"
        newer.append(opener(sandbox=other))
        return "ok"

    with pytest.raises(ConflictError) as caught:
        turn.call(send, text="a")
    assert caught.value.code == "stale-epoch"
    record = newer[0].effects()[-1]
    assert record.state == "intended"
    with pytest.raises(ConflictError):
        turn.call(send, text="b")
    assert sent == ["a"]
    stale.close()
    with newer[0] as session:
        session.annotate(seen=1).result()  # an append of its own learns what others wrote
        record = session.effects()[-1]
        assert (record.state, record.late) == ("committed", True)


def test_places_that_are_refused(tmp_path: Path, workspace: Path) -> None:
    with pytest.raises(IncompatibleError) as caught:
        Session.open(workspace / "store", "a", sandbox=workspace)
    assert caught.value.code == "store-in-sandbox"
    assert not (workspace / "store").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    with pytest.raises((StoreError, agentckpt.errors.NotFoundError)):
        Session.open(tmp_path / "full", "a")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["file"]


def test_a_part_that_nothing_was_given_for(opener: Opener, store: Store) -> None:
    with opener() as session:
        head = session.head
    with pytest.raises(IncompatibleError) as caught:
        Session.open(store, "agent", kv=opener.engine, state=Agent)
    assert caught.value.code == "part-missing"
    with opener() as session:
        assert session.head == head
        assert session.restored is not None
        assert session.restored.epoch == 2


def test_several_sequences(store: Store) -> None:
    planner, coder = ToyEngine(), ToyEngine()
    for run in range(2):
        with Session.open(store, "two", kv={"planner": planner, "coder": coder}) as session:
            assert bytes(session.kv["planner"].tokens) == b"plan" * run
            session.kv["planner"].append("plan")
            session.kv["coder"].append("code")
    assert session.turn_number == 2
    assert planner.num_open == coder.num_open == 0


def test_threads_share_a_session(opener: Opener) -> None:
    with opener() as session:
        for turn in session.turns():
            handles = [turn.submit(session.sandbox.run, f"echo {number} > f{number}; sleep 0.05") for number in range(4)]
            threads = [threading.Thread(target=turn.call, args=(look,), kwargs={"what": "a"}) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert [handle.result().exit_code for handle in handles] == [0] * 4
            break
        assert len(session.effects()) == 8
        assert len({effect.key for effect in session.effects()}) == 8


def test_annotations_and_metrics(opener: Opener, store: Store) -> None:
    with opener() as session:
        for _ in session.turns(until=lambda: session.turn_number == 2):
            session.kv.append("abc")
            session.annotate(reward=0.5)
        session.annotate(final=True).result()
        metrics = session.metrics
        assert [each.turn for each in metrics] == [0, 1, 2]
        assert [each.num_tokens for each in metrics] == [0, 3, 6]
        head = bytes.fromhex(session.head or "")
    notes = store.view().session_named("agent").annotations
    assert notes[head] == {"reward": 0.5, "final": True}


def test_the_public_names_come_without_torch() -> None:
    import subprocess
    import sys

    code = "import sys, agentckpt\nfor name in agentckpt.__all__: getattr(agentckpt, name)\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent.parent)
    assert done.returncode == 0, done.stderr
