"""What a running agent feels: the pause of a capture, token gaps while the store writes, time between last token and tool."""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import agentckpt
from agentckpt.engine import Engine
from agentckpt.store import Store

from .rates import sync_seconds
from .report import Row

PROMPT = "A checkpoint holds what an agent has read and written. " * 24


def run(*, quick: bool) -> list[Row]:
    with tempfile.TemporaryDirectory() as scratch, Engine("smollm2-135m-instruct") as engine:
        return [*pauses(engine, Path(scratch), quick=quick), *exposed(engine, Path(scratch), quick=quick)]


def pauses(engine: Engine, folder: Path, *, quick: bool) -> list[Row]:
    """Captures every 50 ms while one sequence decodes, beside the same decode without; rounds alternate."""
    num_rounds, num_tokens = (4, 24) if quick else (12, 32)
    gaps: dict[bool, list[float]] = {True: [], False: []}
    found: list[float] = []
    with Store.open(str(folder / "pauses"), create=True) as store:
        for number in range(num_rounds):
            for capturing in (number % 2 == 0, number % 2 == 1):
                gap, paused = decode(engine, store, num_tokens, capturing=capturing, seed=number)
                gaps[capturing].append(gap)
                found += paused
    differences = [with_it - without for with_it, without in zip(gaps[True], gaps[False], strict=True)]
    low, high = interval(differences)
    ordered = sorted(found)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    without = statistics.median(gaps[False]) * 1e3
    return [
        Row(f"pause of a capture, p99 of {len(ordered)} (the store writes)", "ms", p99 * 1e3, goal=2.0, best="low"),
        Row("pause of a capture, median", "ms", statistics.median(ordered) * 1e3),
        Row("token gap while captures are written", "ms", statistics.median(gaps[True]) * 1e3, against="without captures", other=without),
        Row("difference of token gaps, paired, low end of 95 %", "ms", low * 1e3),
        Row("difference of token gaps, paired, high end of 95 %", "ms", high * 1e3),
    ]


def decode(engine: Engine, store: Store, num_tokens: int, *, capturing: bool, seed: int) -> tuple[float, list[float]]:
    """(seconds a token, pauses): generate with or without captures beside it."""
    sequence = engine.open_sequence(nonce=bytes(16))
    sequence.append(f"{seed} {PROMPT}").result()
    sequence.generate(max_tokens=1, temperature=1.0, seed=seed).result()  # the prefill is not what is measured
    stop, paused = threading.Event(), []

    def capture() -> None:
        previous = None
        while not stop.wait(0.05):
            part = sequence.capture(store, previous).write()
            store.sync()
            previous = part.ref
            paused.append(float(part.facts["pause_s"]))  # type: ignore[arg-type]

    thread = threading.Thread(target=capture)
    if capturing:
        thread.start()
    begun = time.perf_counter()
    done = sequence.generate(max_tokens=num_tokens, temperature=1.0, seed=seed + 1).result()
    gap = (time.perf_counter() - begun) / max(1, len(done.ids))
    stop.set()
    if capturing:
        thread.join()
    sequence.close()
    return gap, paused


def interval(differences: list[float]) -> tuple[float, float]:
    """95 % of the mean of paired differences, by Student's t for the number of pairs."""
    t = {3: 3.18, 11: 2.20}.get(len(differences) - 1, 2.0)
    mean = statistics.fmean(differences)
    half = t * statistics.stdev(differences) / len(differences) ** 0.5
    return mean - half, mean + half


@agentckpt.tool(effect="read")
def look(begun: dict[str, float]) -> float:
    return time.perf_counter()


@agentckpt.tool(effect="irreversible")
def act(number: int) -> float:
    return time.perf_counter()


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def exposed(engine: Engine, folder: Path, *, quick: bool) -> list[Row]:
    """From the last token to the tool's first line, for a reading and an irreversible tool, beside one flush of this disk."""
    num_turns = 8 if quick else 24
    workspace = folder / "repo"
    workspace.mkdir()
    for number in range(200):
        (workspace / f"file-{number}").write_text(f"{number}\n" * 50)
    waits: dict[str, list[float]] = {"read": [], "irreversible": []}
    with agentckpt.Session.open(folder / "exposed", "agent", kv=engine, sandbox=workspace, state=Counter) as session:
        for turn in session.turns(until=lambda: session.state.count == num_turns):
            session.kv.append(f"turn {session.state.count}\n").result()
            session.kv.generate(max_tokens=8, seed=session.state.count).result()
            last = time.perf_counter()
            name = "read" if session.state.count % 2 else "irreversible"
            started = turn.call(look, begun={}) if name == "read" else turn.call(act, number=session.state.count)
            waits[name].append(started - last)
            session.state.count += 1
        metrics = list(session.metrics)
    flush = sync_seconds(folder, 4096) * 1e3
    without = statistics.median(plain(engine, num_turns)) * 1e3
    reading, acting = (statistics.median(waits[name]) * 1e3 for name in ("read", "irreversible"))
    exposed_ms = statistics.median(m.exposed_s for m in metrics) * 1e3
    durable_ms = statistics.median(m.durable_s for m in metrics) * 1e3
    return [
        Row("last token to a reading tool", "ms", reading, against="the same loop without agentckpt", other=without),
        Row("last token to an irreversible tool (intent flushed)", "ms", acting, against="one 4 KiB append and fdatasync", other=flush),
        Row("exposed time of a cut, median", "ms", exposed_ms),
        Row("cut until durable, median", "ms", durable_ms, against="two such flushes", other=2 * flush),
    ]


def plain(engine: Engine, num_turns: int) -> list[float]:
    """The same loop on the engine alone: nothing is recorded, the tool is called as a function."""
    sequence, waits = engine.open_sequence(), []
    for number in range(num_turns):
        sequence.append(f"turn {number}\n").result()
        sequence.generate(max_tokens=8, seed=number).result()
        last = time.perf_counter()
        waits.append(look(begun={}) - last)
    sequence.close()
    return waits
