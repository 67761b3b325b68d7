"""An agent with a hosted model and no KV: the program that test_hosted kills.

Options ``pause=N``, ``change=temperature``, ``async``: it pauses (to be killed) after the response of turn N, asks something else if
told so, and notes in ``FOLDER/events`` what each response was.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI, OpenAI

import agentckpt
from agentckpt.errors import DivergenceError

from .harness import note

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]


class Agent:
    def __init__(self) -> None:
        self.messages = agentckpt.AppendList([{"role": "user", "content": "what is 2 + 3, and twice that?"}])
        self.done = False

    def state_dict(self) -> dict[str, Any]:
        return {"messages": self.messages, "done": self.done}

    def load_state_dict(self, state: Any) -> None:
        self.messages, self.done = state["messages"], state["done"]


@agentckpt.tool(effect="read")
def add(x: int, y: int) -> int:
    return x + y


class Program:
    def __init__(self, folder: Path, url: str, options: Sequence[str]) -> None:
        self.folder = folder
        self.url = url
        self.pause = next((int(option[6:]) for option in options if option.startswith("pause=")), 0)
        self.change_temperature = "change=temperature" in options

    def request(self, agent: Agent) -> dict[str, Any]:
        made: dict[str, Any] = {"model": "scripted-1", "messages": list(agent.messages), "tools": TOOLS, "temperature": 0.5}
        if self.change_temperature:
            made["temperature"] = 0.75
        return made

    def saw(self, number: int, reply: Any) -> None:
        message = reply.choices[0].message
        seen = {
            "turn": number,
            "types": [type(reply).__name__, type(reply.choices).__name__, type(message).__name__, type(reply.usage).__name__],
            "value": reply,
        }
        note(str(self.folder / "events"), json.dumps(seen, sort_keys=True))
        if self.pause == number:
            note(str(self.folder / "events"), "paused")
            time.sleep(60)

    def observe(self, agent: Agent, reply: Any, call: Any) -> Any:
        """Take the reply over into the state; the calls that it asks for are made by ``call``."""
        message = reply.choices[0].message
        agent.messages.append(message)
        agent.done = reply.choices[0].finish_reason == "stop"
        return [(each.id, call(add, **json.loads(each.function.arguments))) for each in message.tool_calls or []]

    def run(self) -> None:
        client = OpenAI(base_url=self.url, api_key="none", max_retries=0)
        with agentckpt.Session.open(self.folder / "store", "hosted", state=Agent) as session:
            for turn in session.turns(until=lambda: session.state.done):
                reply = turn.generate(client.chat.completions.create, **self.request(session.state))
                self.saw(turn.number, reply)
                for identity, value in self.observe(session.state, reply, turn.call):
                    session.state.messages.append({"role": "tool", "tool_call_id": identity, "content": str(value)})
            (self.folder / "final.json").write_text(json.dumps(list(session.state.messages)))

    async def run_async(self) -> None:
        client = AsyncOpenAI(base_url=self.url, api_key="none", max_retries=0)
        with agentckpt.Session.open(self.folder / "store", "hosted", state=Agent) as session:
            async for turn in session.turns(until=lambda: session.state.done):
                reply = await turn.generate(client.chat.completions.create, **self.request(session.state))
                self.saw(turn.number, reply)
                for identity, handle in self.observe(session.state, reply, turn.submit):
                    session.state.messages.append({"role": "tool", "tool_call_id": identity, "content": str(await handle)})
            (self.folder / "final.json").write_text(json.dumps(list(session.state.messages)))


def enter(folder: str, url: str, options: Sequence[str]) -> None:
    """The child's side. Exit code 3: a divergence, noted as an event."""
    os.setsid()
    warnings.simplefilter("error")
    log = os.open(os.path.join(folder, "child.log"), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    program = Program(Path(folder), url, options)
    try:
        if "async" in options:
            asyncio.run(program.run_async())
        else:
            program.run()
    except DivergenceError as error:
        note(str(program.folder / "events"), f"divergence: {error}")
        sys.exit(3)
