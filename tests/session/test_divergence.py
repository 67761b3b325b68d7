"""A recovered turn that calls something else is stopped before the call, and a parallel one is not mistaken for that."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

import agentckpt
from agentckpt.errors import DivergenceError, ToolError

sent: list[str] = []


class Interrupted(Exception):
    """Leaves the turn open, as a kill does."""


@pytest.fixture(autouse=True)
def nothing_sent() -> None:
    sent.clear()


@agentckpt.tool(effect="irreversible")
def send(to: str) -> str:
    sent.append(to)
    return f"to {to}"


@agentckpt.tool(effect="irreversible")
def other(to: str) -> str:
    sent.append(f"other {to}")
    return to


def attempt(folder: Path, calls: list[tuple[Any, str]], *, interrupt: bool, **options: Any) -> list[Any]:
    results = []
    with agentckpt.Session.open(folder / "store", "a", **options) as session:
        for turn in session.turns(until=lambda: session.turn_number == 1):
            results = [turn.call(tool, to=to) for tool, to in calls]
            if interrupt:
                raise Interrupted
    return results


@pytest.mark.parametrize(
    ("calls", "expected", "found"),
    [
        ([(send, "eve")], "to = 'ann'", "to = 'eve'"),
        ([(other, "ann")], "send", "other"),
        ([(send, "ann"), (send, "eve")], "to = 'bob'", "to = 'eve'"),
        ([(send, "zoe"), (send, "ann"), (send, "bob")], "to = 'ann'", "to = 'zoe'"),
    ],
)
def test_another_call_stops_before_it_is_dispatched(tmp_path: Path, calls: list[Any], expected: str, found: str) -> None:
    with pytest.raises(Interrupted):
        attempt(tmp_path, [(send, "ann"), (send, "bob")], interrupt=True)
    with pytest.raises(DivergenceError) as raised:
        attempt(tmp_path, calls, interrupt=False)
    assert (raised.value.expected, raised.value.found) == (expected, found)
    assert sent == ["ann", "bob"]
    assert attempt(tmp_path, [(send, "ann"), (send, "bob")], interrupt=False) == ["to ann", "to bob"]
    assert sent == ["ann", "bob"]


def test_asked_for_it_goes_on_and_lists_what_was_left(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        attempt(tmp_path, [(send, "ann")], interrupt=True)
    assert attempt(tmp_path, [(send, "eve")], interrupt=False, on_divergence="continue") == ["to eve"]
    assert sent == ["ann", "eve"]


def test_parallel_calls_of_which_some_were_recorded_are_no_divergence(tmp_path: Path) -> None:
    @agentckpt.tool(effect="irreversible", name="send")
    async def post(to: str) -> str:
        sent.append(to)
        return to

    async def run(names: list[str], *, interrupt: bool) -> list[Any]:
        results: list[Any] = []
        with agentckpt.Session.open(tmp_path / "store", "a") as session:
            async for turn in session.turns(until=lambda: session.turn_number == 1):
                results = await asyncio.gather(*(turn.call(post, to=name) for name in names))
                if interrupt:
                    raise Interrupted
        return results

    with pytest.raises(Interrupted):
        asyncio.run(run(["ann", "bob"], interrupt=True))
    assert asyncio.run(run(["ann", "bob", "zoe"], interrupt=False)) == ["ann", "bob", "zoe"]
    assert sorted(sent) == ["ann", "bob", "zoe"]


def test_a_read_tool_that_raised_after_it_wrote_to_the_sandbox_raises_again_on_what_it_wrote(tmp_path: Path) -> None:
    (tmp_path / "workspace").mkdir()
    made = tmp_path / "workspace" / "partial"
    ran: list[int] = []

    @agentckpt.tool(effect="read", sandbox=True)
    def fetch() -> None:
        ran.append(1)
        made.write_text("half")
        raise OSError("connection lost")

    def once(interrupt: bool) -> None:
        with agentckpt.Session.open(tmp_path / "store", "a", sandbox=tmp_path / "workspace") as session:
            for turn in session.turns(until=lambda: session.turn_number == 1):
                with pytest.raises(ToolError, match="connection lost"):
                    turn.call(fetch)
                assert made.read_text() == "half"
                turn.call(send, to="ann")
                if interrupt:
                    raise Interrupted

    with pytest.raises(Interrupted):
        once(True)
    once(False)
    assert (len(ran), sent) == (1, ["ann"])
