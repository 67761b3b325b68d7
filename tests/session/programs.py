"""Programs that the tests start, kill and start again.

Each is an ordinary agent on the public API. What it notes in the event file is for the parent to watch, not for the program.
"""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch  # here, so that the process that forks the children imports it once
from kv.support import tiny_model

import agentckpt
from agentckpt import Session
from agentckpt.engine import Engine
from agentckpt.session import Applied

from .harness import note
from .toy import Agent, ToyEngine

FOLDER = Path()


def event(line: str) -> None:
    note(str(FOLDER / "events"), line)


def hold(name: str) -> None:
    """Say where we are; stay there if the parent wants to kill us here."""
    event(name)
    if (FOLDER / "stop-at").exists() and (FOLDER / "stop-at").read_text() == name:
        time.sleep(60)


def post(tool: str, key: str) -> str:
    address = (FOLDER / "witness").read_text()
    request = urllib.request.Request(
        f"{address}/act", json.dumps({"tool": tool}).encode(), {"Idempotency-Key": key, "Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        return str(json.load(answer)["num_applied"])


def seen(tool: str, key: str) -> int:
    address = (FOLDER / "witness").read_text()
    with urllib.request.urlopen(f"{address}/seen?tool={tool}&key={key}") as answer:
        return sum(each["num_requests"] for each in json.load(answer)["arrivals"])


# ---- one cell of the effect table -------------------------------------------------------------------------------------


def reach(tool: str, effect: agentckpt.Effect) -> str:
    """What every tool here does: be seen by the witness, between two points where the parent may kill."""
    hold("dispatched")
    answer = post(tool, effect.key)
    hold("done")
    return f"seen by the witness, {answer}"


@agentckpt.tool(effect="read")
def read(effect: agentckpt.Effect) -> str:
    return reach("read", effect)


@agentckpt.tool(effect="sandbox")
def sandbox(effect: agentckpt.Effect) -> str:
    return reach("sandbox", effect)


@agentckpt.tool(effect="idempotent")
def idempotent(effect: agentckpt.Effect) -> str:
    return reach("idempotent", effect)


@agentckpt.tool(effect="compensable")
def compensable(effect: agentckpt.Effect) -> str:
    return reach("compensable", effect)


@agentckpt.tool(effect="irreversible")
def irreversible(effect: agentckpt.Effect) -> str:
    return reach("irreversible", effect)


@agentckpt.tool(effect="authority")
def authority(effect: agentckpt.Effect) -> str:
    return reach("authority", effect)


def was_seen(effect: agentckpt.Effect) -> Applied | bool:
    return Applied("seen by the witness, verified") if seen("asked", effect.key) else False


@agentckpt.tool(effect="irreversible", verify=was_seen)
def asked(effect: agentckpt.Effect) -> str:
    return reach("asked", effect)


@agentckpt.tool(effect="irreversible", sandbox=True)
def both(effect: agentckpt.Effect) -> str:
    """Reaches the world and the sandbox."""
    answer = reach("both", effect)
    (FOLDER / "workspace" / "receipt").write_text(answer)
    return answer


def model(**request: Any) -> dict[str, Any]:
    return {"text": reach("model", agentckpt.Effect(key="", lineage="", turn=0, epoch=0)), "request": request}


TOOLS: dict[str, Callable[..., Any]] = {
    tool.spec.name: tool for tool in (read, sandbox, idempotent, compensable, irreversible, authority, asked, both)
}


def cell(name: str) -> None:
    """One turn with one call, then a turn without."""
    workspace = FOLDER / "workspace"
    engine = ToyEngine()
    with Session.open(FOLDER / "store", "agent", kv=engine, sandbox=workspace, state=Agent) as session:
        for turn in session.turns(until=lambda: session.state.step == 2):
            session.kv.append(f"turn {turn.number}")
            session.kv.generate(max_tokens=4, seed=3).result()
            if turn.number == 1:
                if name == "model":
                    result = turn.generate(model, prompt="p").text
                else:
                    result = turn.call(TOOLS[name])
                session.state.seen.append(result)
                event("value " + json.dumps(result))
                hold("returned")
            session.state.step += 1
        event("result " + json.dumps(session.state.seen))
        event(f"sampled {engine.num_sampled}")
        event(f"different {len(session.differences)}")


# ---- a loop that is killed anywhere ----------------------------------------------------------------------------------


@agentckpt.tool(effect="idempotent")
def publish(text: str, effect: agentckpt.Effect) -> str:
    note(str(FOLDER / "published"), effect.key)
    return text.upper()


def toy_loop(num_turns: str) -> None:
    loop(ToyEngine(), int(num_turns))


def engine_loop(num_turns: str) -> None:
    """The same on the included engine with a tiny random model: sampled, in float32, KV in bf16."""
    torch.set_num_threads(1)
    with Engine(tiny_model(), num_blocks=256) as engine:
        loop(engine, int(num_turns))


def loop(engine: Any, num_turns: int) -> None:
    """Tokens, commands and keyed effects; the end is the same however often it is killed."""
    workspace = FOLDER / "workspace"
    with Session.open(FOLDER / "store", "agent", kv=engine, sandbox=workspace, state=Agent) as session:
        event("opened")
        for turn in session.turns(until=lambda: session.state.step == num_turns):
            session.kv.append(f"turn {turn.number}: ")
            made = session.kv.generate(max_tokens=6, seed=7, temperature=1.0).result()
            done = turn.call(session.sandbox.run, ["sh", "-c", "echo $1 >> log; wc -l < log", "sh", repr(made.ids)])
            session.kv.append(done.stdout)
            if turn.number % 3 == 0:
                session.kv.truncate(len(session.kv.tokens) - 2)
            answer = turn.call(publish, text=made.text)
            session.state.seen.append([made.text, done.stdout, answer])
            session.state.step += 1
            event(f"end of turn {turn.number}")
        tokens = list(session.kv.tokens)
        event("final " + json.dumps([tokens, session.state.seen, (workspace / "log").read_text()]))


PROGRAMS: dict[str, Callable[..., None]] = {"cell": cell, "toy": toy_loop, "engine": engine_loop}


def main(program: str, folder: str, args: Sequence[str]) -> int:
    """Run a program; its exit code."""
    global FOLDER
    FOLDER = Path(folder)
    try:
        PROGRAMS[program](*args)
    except agentckpt.errors.AgentckptError as error:
        event(f"error {error.code}")
        return error.exit_code
    return 0
