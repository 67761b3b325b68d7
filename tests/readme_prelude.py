"""What the README's first example leaves to its reader: an agent, a deployment that can be asked, and a model on disk.

``post`` notes the request in ``arrived`` as the outside world would. If ``kill`` exists, it is removed and the worker then
dies by SIGKILL: the request has arrived, and nobody knows it.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any, NamedTuple

import torch

from agentckpt.session import Applied

torch.set_num_threads(1)

NUM_TURNS = 3
ARRIVED = Path("arrived")
KILL = Path("kill")


class Call(NamedTuple):
    name: str
    args: dict[str, Any]


class MyAgent:
    """Asks for a command each turn and runs what the model wrote through ``echo``; the last turn deploys."""

    def __init__(self) -> None:
        self.replies: list[str] = []
        self.seen: list[str] = []

    @property
    def done(self) -> bool:
        return len(self.replies) == NUM_TURNS

    def next_message(self) -> str:
        example = "<tool_call>ls 1</tool_call>\n<tool_call>ls 2</tool_call>\n<tool_call>ls 3</tool_call>\n"
        return f"{'' if self.replies else example}<tool_call>"

    def parse(self, reply: Any) -> list[Call]:
        self.replies.append(reply.text)
        calls = [Call("run", {"command": f"echo {len(self.replies)} {reply.text.encode().hex()} >> log.txt; cat log.txt"})]
        return calls + ([Call("deploy", {"version": "v1"})] if self.done else [])

    def observe(self, call: Call, result: Any) -> None:
        self.seen.append(result if isinstance(result, str) else result.stdout)

    def state_dict(self) -> dict[str, Any]:
        return {"replies": self.replies, "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.replies, self.seen = list(state["replies"]), list(state["seen"])


def is_deployed(version: str, effect: Any) -> Any:
    """``Applied`` with what ``post`` would have returned, or False: it never arrived."""
    arrived = ARRIVED.exists() and any(json.loads(line)["key"] == effect.key for line in ARRIVED.read_text().splitlines())
    return Applied(f"{version} is out") if arrived else False


def post(path: str, version: str, *, headers: dict[str, str]) -> str:
    with ARRIVED.open("a") as file:
        file.write(json.dumps({"path": path, "version": version, "key": headers["Idempotency-Key"]}) + "\n")
    if KILL.exists():
        KILL.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    return f"{version} is out"


def report(session: Any) -> None:
    """What a run ended with, for the one who compares."""
    effects = [[record.tool, record.state] for record in session.effects()]
    ids = [int(token) for token in session.kv.tokens]
    Path("report").write_text(json.dumps({"tokens": ids, "state": session.state.state_dict(), "effects": effects}))
