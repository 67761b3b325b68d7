"""Where the worker is killed: drawn from the seed, carried out by the parent on what it observes.

Three moments: while the model scores the edits of a bug, while the tests run in forks, and in the window of a deploy:
after the request arrived at the witness, before the worker learns of it (the witness answers late).
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..testing.witness import Witness
from .processes import Event, Worker
from .results import Kill
from .tools import ASKED, KEYED, NEITHER

ANSWER_DELAY_S = 20.0
"""the witness's delay for the tool in whose window the kill falls: far longer than any kill waits"""
POLL_S = 0.01
FIRST_EVENT = {"model": "scoring", "tool": "forked"}


@dataclass(frozen=True, slots=True)
class Plan:
    """One kill to come: at which bug (from 0) or tool, and how long after the event that shows it has begun."""

    kind: Literal["model", "tool", "window"]
    bug: int
    tool: str
    wait_s: float


def draw_plans(seed: int, num_bugs: int) -> tuple[Plan, ...]:
    """The kills of a run, in the order in which they come. The first third is spared, so that there is something to lose."""
    draw = random.Random(f"kills {seed}")
    first = draw.randrange(num_bugs // 3, num_bugs)
    second = draw.randrange(first, num_bugs)
    return (
        Plan("model", first, "", draw.uniform(0.02, 0.4)),
        Plan("tool", second, "", draw.uniform(0.02, 0.2)),
        Plan("window", num_bugs, draw.choice((KEYED, ASKED, NEITHER)), draw.uniform(0.0, 0.2)),
    )


def carry_out(plan: Plan, worker: Worker, witness: Witness, bugs: Sequence[str]) -> Kill:
    """Wait for the planned moment and kill. ``bugs``: names in the order in which they are repaired."""
    if plan.kind == "window":
        found = _wait_for_arrival(plan.tool, worker, witness)
    else:
        found = worker.wait_for(lambda event: _is_moment(event, plan, bugs)) is not None
    if not found:
        return Kill(plan.kind, "missed", False, latest_turn(worker), time.monotonic() - worker.started_s, 0.0)
    time.sleep(plan.wait_s)
    killed_s = time.monotonic()
    hit, as_planned = _what_was_hit(plan, worker) if worker.kill() else ("missed", False)
    return Kill(plan.kind, hit, as_planned, latest_turn(worker), killed_s - worker.started_s, plan.wait_s)


def _is_moment(event: Event, plan: Plan, bugs: Sequence[str]) -> bool:
    return event.name == FIRST_EVENT[plan.kind] and event.facts.get("bug") == bugs[plan.bug]


def _wait_for_arrival(tool: str, worker: Worker, witness: Witness) -> bool:
    before = witness.num_requests(tool)
    while witness.num_requests(tool) == before:
        if not worker.running():
            return False
        time.sleep(POLL_S)
    return True


def _what_was_hit(plan: Plan, worker: Worker) -> tuple[str, bool]:
    """By what the dead worker had said: in words, and whether it is what was planned."""
    last = worker.last
    if plan.kind == "window":
        return f"in the window of {plan.tool}: the request had arrived, its outcome was not known", True
    if last is not None and last.name == FIRST_EVENT[plan.kind]:
        doing = "while the model scored edits" if plan.kind == "model" else "while tests ran in forks"
        return f"{doing} ({last.facts['bug']})", True
    return f"after it said {last.name if last else 'nothing'}", False


def latest_turn(worker: Worker) -> int:
    return next((int(event.facts["turn"]) for event in reversed(worker.events) if "turn" in event.facts), 0)
