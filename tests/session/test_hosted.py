"""An agent whose model is a hosted API: what was paid for is not asked for again, whatever kills the agent."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
from openai import BadRequestError, InternalServerError, OpenAI

import agentckpt
from agentckpt.errors import DivergenceError
from agentckpt.session.values import Result
from agentckpt.testing.openai_server import ChatServer, Reply, ToolCall

from . import hosted_program
from .harness import Child

REPLIES = [
    Reply(tool_calls=[ToolCall("add", {"x": 2, "y": 3})]),
    Reply(content="it is 5", tool_calls=[ToolCall("add", {"x": 5, "y": 5})]),
    Reply(content="twice that is 10"),
]


_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["session.programs", "session.hosted_program"])


class Agent(Child):
    """``hosted_program`` in a process group of its own."""

    def __init__(self, folder: Path, server: ChatServer, *options: str) -> None:
        self.events = folder / "events"
        self.log = folder / "child.log"
        self.log.touch()
        self.process = _context.Process(target=hosted_program.enter, args=(str(folder), server.url, options))
        self.process.start()

    def end(self) -> int:
        code = self.finish()
        assert code in (0, 3), self.log.read_text()[-3000:]
        return code


def seen(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "events").read_text().splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody killed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with ChatServer(REPLIES) as server:
        assert Agent(folder, server).end() == 0
        assert server.num_requests == 3
    return folder


def test_an_undisturbed_run_asks_once_a_turn(undisturbed: Path) -> None:
    assert [each["turn"] for each in seen(undisturbed)] == [1, 2, 3]
    final = json.loads((undisturbed / "final.json").read_text())
    assert [message["role"] for message in final] == ["user", "assistant", "tool", "assistant", "tool", "assistant"]
    assert [message["content"] for message in final][2::2] == ["5", "10"]


@pytest.mark.parametrize(("mode", "turn"), [("sync", 2), ("async", 1)])
def test_a_kill_after_the_response_does_not_pay_twice(tmp_path: Path, undisturbed: Path, mode: str, turn: int) -> None:
    with ChatServer(REPLIES) as server:
        killed = Agent(tmp_path, server, mode, f"pause={turn}")
        killed.wait_line("paused")
        killed.kill()
        assert server.num_requests == turn
        before = seen(tmp_path)[-1]
        if mode == "sync":
            assert Agent(tmp_path, server, mode, "change=temperature").end() == 3
            error = next(line for line in (tmp_path / "events").read_text().splitlines() if line.startswith("divergence"))
            assert f"turn {turn}" in error
            assert "expected temperature = 0.5; found temperature = 0.75" in error
            assert server.num_requests == turn
        assert Agent(tmp_path, server, mode).end() == 0
        assert server.num_requests == 3
    replayed = next(each for each in seen(tmp_path)[turn:] if each["turn"] == turn)
    # The same value of the same types: the id would show a second request, since every answer has its own.
    assert replayed == before
    assert replayed["value"]["id"] == f"chatcmpl-{turn}"
    assert replayed["types"] == ["Result", "list", "Result", "Result"]
    assert (tmp_path / "final.json").read_text() == (undisturbed / "final.json").read_text()


class Interrupted(Exception):
    """Leaves the turn open, as a kill does."""


@pytest.mark.parametrize(
    ("change", "expected", "found"),
    [
        ({"temperature": 1}, "temperature = 1.0", "temperature = 1"),
        ({"seed": 3}, "seed = nothing", "seed = 3"),
        ({"model": "n"}, "model = 'm'", "model = 'n'"),
        ({"messages": [{"role": "user", "content": "ho"}]}, "messages[0]['content'] = 'hi'", "messages[0]['content'] = 'ho'"),
        (
            {"messages": [{"role": "user", "content": "hi"}, {"role": "user"}]},
            "messages[1] = nothing",
            "messages[1] = {'role': 'user'}",
        ),
    ],
)
def test_another_request_stops_and_says_what_differs(tmp_path: Path, change: dict[str, Any], expected: str, found: str) -> None:
    request: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "temperature": 1.0}
    with ChatServer(lambda request: Reply(content="hello")) as server, OpenAI(base_url=server.url, api_key="none") as client:

        def attempt(**changes: Any) -> None:
            with agentckpt.Session.open(tmp_path / "store", "changed") as session:
                for turn in session.turns():
                    turn.generate(client.chat.completions.create, **{**request, **changes})
                    raise Interrupted

        with pytest.raises(Interrupted):
            attempt()
        with pytest.raises(DivergenceError) as raised:
            attempt(**change)
        assert (raised.value.expected, raised.value.found) == (expected, found)
        assert "turn 1" in str(raised.value)
        with pytest.raises(Interrupted):
            attempt()
        assert server.num_requests == 1


def test_a_kill_before_the_response_asks_again(tmp_path: Path) -> None:
    slow = [Reply(content="at last", delay_s=20.0)]
    with ChatServer(lambda request: slow.pop() if slow else Reply(content="at last")) as server:
        killed = Agent(tmp_path, server)
        killed.wait_until(lambda: server.num_requests == 1, "request")
        killed.kill()
        assert Agent(tmp_path, server).end() == 0
        assert server.num_requests == 2
        assert server.requests[0] == server.requests[1]


def test_a_failed_request_raises_what_the_client_raises_and_may_be_made_again(tmp_path: Path) -> None:
    replies = [Reply(content="fine"), Reply(status=500)]
    with ChatServer(lambda request: replies.pop()) as server, OpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
        request: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
        with agentckpt.Session.open(tmp_path / "store", "failing") as session:
            for turn in session.turns(until=lambda: session.turn_number == 1):
                with pytest.raises(InternalServerError):
                    turn.generate(client.chat.completions.create, **request)
                reply = turn.generate(client.chat.completions.create, **request)
                assert isinstance(reply, Result)
                assert reply.choices[0].message.content == "fine"
                assert reply.usage.total_tokens == 2
            assert [record.state for record in session.effects()] == ["committed"]
        assert server.num_requests == 2


def test_the_same_request_twice_in_a_turn_is_two_requests_and_replays_as_two(tmp_path: Path) -> None:
    with ChatServer(lambda request: Reply(content="hello")) as server, OpenAI(base_url=server.url, api_key="none") as client:
        request: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "temperature": 1.0}
        identities: list[list[str]] = []

        def attempt() -> None:
            with agentckpt.Session.open(tmp_path / "store", "twice") as session:
                for turn in session.turns():
                    identities.append([turn.generate(client.chat.completions.create, **request).id for _ in range(2)])
                    raise Interrupted

        for _ in range(2):
            with pytest.raises(Interrupted):
                attempt()
        assert identities == [["chatcmpl-1", "chatcmpl-2"]] * 2
        assert server.num_requests == 2


def test_a_request_left_unasked_is_a_divergence(tmp_path: Path) -> None:
    with ChatServer(lambda request: Reply(content="hello")) as server, OpenAI(base_url=server.url, api_key="none") as client:

        def attempt(ask: bool) -> None:
            with agentckpt.Session.open(tmp_path / "store", "left") as session:
                for turn in session.turns():
                    if ask:
                        turn.generate(client.chat.completions.create, model="m", messages=[])
                        raise Interrupted

        with pytest.raises(Interrupted):
            attempt(True)
        with pytest.raises(DivergenceError):
            attempt(False)
        assert server.num_requests == 1


def test_the_server_refuses_what_it_has_no_script_for() -> None:
    with ChatServer([Reply(content="one")]) as server, OpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
        history: list[Any] = [{"role": "assistant", "content": "one"}]
        for request in ({"messages": history}, {"messages": [], "stream": True}):
            with pytest.raises(BadRequestError):
                client.chat.completions.create(model="m", **request)
        assert [model.id for model in client.models.list()] == ["scripted-1"]
        assert server.num_requests == 1
