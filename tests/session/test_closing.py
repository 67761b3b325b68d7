"""The end of a session with calls under way, calls from where none may come, and many sessions that wait at once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

import agentckpt
from agentckpt import Session, Store
from agentckpt.errors import ConflictError, EffectUnknownError
from agentckpt.session.executor import NUM_THREADS

from .toy import Agent, Opener

WAIT_S = 20.0
sent: list[str] = []


class Stop(Exception):
    """What a program raises where a crash would be."""


@pytest.fixture(autouse=True)
def _nothing_sent() -> None:
    sent.clear()


@agentckpt.tool(effect="irreversible")
def deploy(version: str) -> str:
    sent.append(version)
    return version


def ends(program: Callable[[], None]) -> None:
    """Run it on a thread of its own, so that a hang is a failure."""
    thread = threading.Thread(target=program, daemon=True)
    thread.start()
    thread.join(WAIT_S)
    assert not thread.is_alive(), "it hangs"


def test_nothing_is_dispatched_by_a_closed_session(opener: Opener) -> None:
    with opener() as session:
        for turn in session.turns(until=lambda: session.turn_number == 1):
            kept = turn
    with pytest.raises(ConflictError) as caught:
        kept.call(deploy, version="1")
    assert (caught.value.code, sent) == ("closed", [])


def test_closing_waits_for_what_runs_and_refuses_what_does_not(opener: Opener) -> None:
    release = threading.Event()
    num_calls = NUM_THREADS["tools"] + 8

    @agentckpt.tool(effect="irreversible")
    def wait(number: int) -> int:
        release.wait(WAIT_S)
        sent.append(str(number))
        return number

    def program() -> None:
        with opener() as session:
            for turn in session.turns():
                for number in range(num_calls):
                    turn.submit(wait, number=number)
                while len(session.effects()) < NUM_THREADS["tools"]:
                    threading.Event().wait(0.01)
                threading.Timer(0.1, release.set).start()
                raise Stop

    with pytest.raises(Stop):
        program()
    num_sent = len(sent)
    with opener() as session:
        states = [effect.state for effect in session.effects()]
    assert states == ["committed"] * num_sent  # no outcome was lost: nothing is unknown
    assert len(sent) == num_sent < num_calls


@pytest.mark.parametrize("what", ["checkpoint", "fork", "promote", "close", "branch"])
def test_a_tool_that_would_wait_for_itself_is_refused(opener: Opener, what: str) -> None:
    refused: list[str] = []

    def program() -> None:
        with opener() as session:
            branch = session.fork(1, durable=False).result()[0]

            @agentckpt.tool(effect="read", sandbox=True)
            def inner() -> None:
                try:
                    if what in ("promote", "branch"):
                        session.promote(branch).result()
                    else:
                        getattr(session, what)(*[1] * (what == "fork")).result()
                except ConflictError as error:
                    refused.append(error.code)

            if what == "branch":
                branch.call(inner)
                return
            for turn in session.turns(until=lambda: session.turn_number == 1):
                turn.call(inner)

    ends(program)
    assert refused == ["nested-call"]


def test_a_condition_that_uses_a_part_does_not_skip_a_turn(opener: Opener) -> None:
    with opener() as session:
        numbers = [turn.number for turn in session.turns(until=lambda: session.kv.score(["a"]).result() and session.turn_number == 3)]
    assert numbers == [1, 2]


def test_a_part_that_fails_to_close_keeps_no_lease(opener: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    session = opener()

    def fail() -> None:
        raise OSError("busy")

    monkeypatch.setattr(session.kv.inner, "close", fail)
    with pytest.raises(OSError, match="busy"):
        session.close().result()
    opener().close().result()


@agentckpt.tool(effect="read")
async def look() -> None:
    await asyncio.sleep(0.2)


@pytest.mark.parametrize("what", ["checkpoint", "promote", "leave"])
def test_more_sessions_than_threads_wait_at_once(store: Store, what: str) -> None:
    num_sessions = NUM_THREADS["turns"] + NUM_THREADS["work"] + 1

    async def one(number: int, together: asyncio.Barrier) -> None:
        async with Session.open(store, f"agent {number}", state=Agent) as session:
            if what == "promote":
                branch = (await session.fork(1))[0]
                await together.wait()
                await session.promote(branch)
                return
            async for turn in session.turns(until=lambda: session.turn_number >= 1):
                call = asyncio.ensure_future(turn.call(look))
                await together.wait()
                await asyncio.sleep(0.05)
                if what == "leave":
                    raise EffectUnknownError
                await session.checkpoint()
                await call

    async def main() -> None:
        together = asyncio.Barrier(num_sessions)
        done = await asyncio.gather(*(one(number, together) for number in range(num_sessions)), return_exceptions=True)
        assert {type(each) for each in done} == {EffectUnknownError if what == "leave" else type(None)}
        finished.append(True)

    finished: list[bool] = []
    ends(lambda: asyncio.run(main()))
    assert finished
