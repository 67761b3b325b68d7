"""What one turn writes beside its KV and file chunks, at histories of 1k to 1M tokens: it must be flat.

The history is synthetic (a tiny model, random KV), the path is the real one: ``Session``, its parts, the store, the journal.
Counted are all bytes of packs and journal that are not chunk payloads: manifests, nodes, record headers, gaps, journal records.
"""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import agentckpt
from agentckpt.engine import Engine
from agentckpt.store import Store
from agentckpt.store.io import RealIO
from agentckpt.testing.recorder import RecorderIO
from tests.kv.support import tiny_model

from .report import Row

HISTORIES = (1_000, 10_000, 100_000, 1_000_000)
TURN_TOKENS = 200
NUM_TURNS = 256
NUM_FILES = 100


@dataclass(frozen=True, slots=True)
class Cost:
    """Means of one turn."""

    metadata_bytes: float
    written_bytes: float
    """everything, chunks as well"""
    num_nodes: float
    num_objects: float
    num_flushes: float


class Notes:
    """State of a turn: a counter and a growing log."""

    def __init__(self) -> None:
        self.turn = 0
        self.log = agentckpt.AppendList()

    def state_dict(self) -> dict[str, Any]:
        return {"turn": self.turn, "log": self.log}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.turn, self.log = state["turn"], state["log"]


@agentckpt.tool(effect="read")
def observe(number: int) -> str:
    return f"seen {number}"


class CountingStore:
    """Counts the new objects that pass ``put``, by kind."""

    def __init__(self, store: Store) -> None:
        self.bytes: Counter[str] = Counter()
        self.count: Counter[str] = Counter()
        inner = store.put

        def put(kind: Any, data: Any, compress: bool = False) -> Any:
            before = store.stats().objects.num_new
            ref = inner(kind, data, compress)
            if store.stats().objects.num_new > before:
                self.bytes[kind] += memoryview(data).nbytes
                self.count[kind] += 1
            return ref

        store.put = put  # type: ignore[method-assign]

    def reset(self) -> None:
        self.bytes.clear()
        self.count.clear()


def measure(num_history: int, *, num_turns: int = NUM_TURNS) -> Cost:
    """Mean cost of ``num_turns`` consecutive turns after a history of ``num_history`` tokens."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        workspace = folder / "repo"
        workspace.mkdir()
        for number in range(NUM_FILES):
            (workspace / f"file-{number}.txt").write_text(f"content {number}\n")
        recorder = RecorderIO(RealIO())
        store = Store.open(str(folder / "store"), create=True, io=recorder)
        room = num_history + (num_turns + 2) * TURN_TOKENS
        model = tiny_model(max_positions=room + 64)
        with store, Engine(model, num_blocks=room // 16 + 16, max_batch_tokens=512) as engine:
            return _run(store, recorder, engine, workspace, num_history, num_turns)


def _run(store: Store, recorder: RecorderIO, engine: Engine, workspace: Path, num_history: int, num_turns: int) -> Cost:
    draw = random.Random(num_history)
    counting = CountingStore(store)
    with agentckpt.Session.open(store, "long", kv=engine, sandbox=workspace, state=Notes) as session:
        turns = iter(session.turns(until=lambda: session.state.turn == num_turns + 1))
        next(turns)
        grow(engine, session, draw, num_history)
        session.state.log.extend(f"note {number}" for number in range(num_history // TURN_TOKENS))
        session.state.turn += 1
        turn: Any = next(turns)
        session.checkpoint("history").result()
        recorder.reset()
        counting.reset()
        for number in range(1, num_turns + 1):
            grow(engine, session, draw, TURN_TOKENS)
            turn.call(observe, number=number)
            session.sandbox.write_file(f"file-{number % NUM_FILES}.txt", f"content {number} " * 60)
            session.state.log.append(f"note {number}")
            session.state.turn += 1
            turn = next(turns, None)
        session.checkpoint("settled").result()
        written = sum(event.num_bytes for event in recorder.events if "/packs/" in event.path or "/journal/" in event.path)
        objects = sum(counting.count.values())
        return Cost(
            metadata_bytes=(written - counting.bytes["chunk"]) / num_turns,
            written_bytes=written / num_turns,
            num_nodes=counting.count["node"] / num_turns,
            num_objects=objects / num_turns,
            num_flushes=recorder.num_fdatasync / num_turns,
        )


def grow(engine: Engine, session: Any, draw: random.Random, num_tokens: int) -> None:
    """Add tokens through the session (they are recorded), half as an observation and half as if decoded, with random KV."""
    sequence = next(iter(session.kv.values())) if hasattr(session.kv, "values") else session.kv
    live = sequence._inner
    for kind in ("append", "decode"):
        sequence.append([draw.randrange(256) for _ in range(num_tokens // 2)]).result()
        with engine.lock:
            context = live.context
            end = len(context.tokens) - 1
            context.prepare(end)
            context.wrote(end, kind)


def run(*, quick: bool) -> list[Row]:
    histories = HISTORIES[:3] if quick else HISTORIES
    costs = {history: measure(history, num_turns=64 if quick else NUM_TURNS) for history in histories}
    base = costs[histories[0]]
    rows = []
    for history, cost in costs.items():
        rows.append(Row(f"metadata of a turn at {history:,} tokens", "bytes", cost.metadata_bytes,
                        against="at 1,000 tokens", other=base.metadata_bytes, goal=1.3, best="low"))  # fmt: skip
        rows.append(
            Row(f"objects of a turn at {history:,} tokens", "objects", cost.num_objects, against="at 1,000 tokens", other=base.num_objects)
        )
        rows.append(Row(f"flushes of a turn at {history:,} tokens", "flushes", cost.num_flushes, goal=2.1, best="low"))
    return rows
