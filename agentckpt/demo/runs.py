"""The four runs of a demo, each in a directory and with a witness of its own.

- ``killed``: SIGKILL to the whole process group at drawn moments, then the same program again, until it is done;
- ``reference``: never killed, in a store of its own that no earlier run has opened;
- ``restart`` and ``chat``: the same agent without checkpoints (``plain.py``), killed in the same deploy window.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import ConflictError, NotFoundError
from ..testing.witness import Arrival, Witness
from .breaks import Flip, flip_kv_byte
from .catalogue import Unit
from .census import Census
from .kills import ANSWER_DELAY_S, Plan, carry_out, latest_turn
from .processes import Crew, Event, Worker
from .project import build
from .results import Kill, Resume
from .tools import KEYED
from .worker import SESSION

UNKNOWN = 14
"""exit code of a worker that met an effect whose outcome nobody knows (``errors.EXIT_CODES``)"""
FLIP_SHARE = 0.5
Note = Callable[[str], None]


@dataclass
class Setting:
    """What all runs of one demo share."""

    root: Path
    seed: int
    bugs: tuple[Unit, ...]
    plans: tuple[Plan, ...]
    model: str
    broken: str | None
    manual: bool
    note: Note
    crew: Crew = field(default_factory=Crew)

    @property
    def options(self) -> list[str]:
        """What every worker is told."""
        return ["--seed", str(self.seed), "--model", self.model]

    @property
    def order(self) -> list[str]:
        """The bugs in the order in which the agent meets them."""
        return sorted(unit.name for unit in self.bugs)


@dataclass
class Outcome:
    """What the parent saw of one run."""

    kills: list[Kill] = field(default_factory=list)
    resumes: list[Resume] = field(default_factory=list)
    events: list[list[Event]] = field(default_factory=list)
    """of each start of the worker"""
    arrivals: list[Arrival] = field(default_factory=list)
    flip: Flip | None = None
    exit_code: int = 0
    back_s: float = 0.0


class Commentary:
    """Tells what the killed run does, bug by bug, with a running total beside the random expectation."""

    def __init__(self, setting: Setting, census: Sequence[Census]) -> None:
        self._note = setting.note
        self._census = {count.bug: count for count in census}
        self._closed: dict[str, int] = {}

    def __call__(self, event: Event) -> None:
        facts = event.facts
        if event.name == "opened" and facts["restored"]:
            self._note(f"  restored turn {facts['turn']}: {facts['tokens']} tokens, {facts['recomputed']} recomputed")
        elif event.name == "surveyed":
            self._note(f"  the test runner names {facts['failing']} failing modules")
        elif event.name == "closed":
            self._closed[facts["bug"]] = facts["tries"]
            count = self._census[facts["bug"]]
            total = sum(self._census[bug].random_tries for bug in self._closed)
            self._note(
                f"  {count.bug}: {facts['edit']}; try {facts['tries']} of {count.num_candidates} (random order: {count.random_tries:.1f}); "
                f"so far {sum(self._closed.values())} tries, random {total:.1f}"
            )
            if facts["assertion"] is not None:
                self._note(f"    the model adds: {facts['assertion']}")


def _place(setting: Setting, name: str) -> Path:
    place = setting.root / name
    place.mkdir()
    build(place / "work", setting.bugs)
    return place


def _start(
    setting: Setting, place: Path, witness: Witness, *, module: str = "worker", on_event: Callable[[Event], None] | None = None
) -> Worker:
    arguments = [str(place / "store"), str(place / "work"), witness.url, *setting.options]
    return setting.crew.start(f"agentckpt.demo.{module}", arguments, log=place / "worker.log", on_event=on_event)


def reference(setting: Setting) -> Outcome:
    place = _place(setting, "reference")
    outcome = Outcome()
    if (place / "store").exists():
        raise ConflictError("the reference must begin in a store that nobody has opened", object=str(place / "store"))
    with Witness.start(honoured=[KEYED]) as witness, _start(setting, place, witness) as worker:
        worker.expect(0)
        outcome.events.append(worker.events)
        outcome.arrivals = witness.seen()
    setting.note("  (the undisturbed twin is done)")
    return outcome


def killed(setting: Setting, commentary: Commentary) -> Outcome:
    """The run that is killed: every plan in turn, then the last start to its end."""
    place = _place(setting, "killed")
    outcome = Outcome()
    module = "zeroed" if setting.broken == "verify-off" else "worker"
    with Witness.start(honoured=[KEYED]) as witness:
        if setting.manual:
            _by_hand(setting, place, witness, outcome, commentary)
            outcome.arrivals = witness.seen()
            return outcome
        for plan in setting.plans:
            if plan.kind == "window":
                witness.delay(plan.tool, ANSWER_DELAY_S)
            with _start(setting, place, witness, module=module, on_event=commentary) as worker:
                kill = carry_out(plan, worker, witness, setting.order)
            _after(setting, worker, outcome, kill)
            if setting.broken == "kv" and outcome.flip is None:
                outcome.flip = _damage(setting, place)
            witness.delay(plan.tool, 0.0)
        with _start(setting, place, witness, module=module, on_event=commentary) as worker:
            outcome.exit_code = worker.expect(0, UNKNOWN)
        outcome.back_s = time.monotonic() - worker.started_s
        _after(setting, worker, outcome, None)
        outcome.arrivals = witness.seen()
    return outcome


def _damage(setting: Setting, place: Path) -> Flip | None:
    """Flip a bit of the head's KV; None while it has no whole block."""
    try:
        flip = flip_kv_byte(place / "store", SESSION, FLIP_SHARE)
    except NotFoundError:
        return None
    setting.note(f"  one bit flipped in block {flip.block} of {flip.num_blocks} of the stored KV")
    return flip


def _by_hand(setting: Setting, place: Path, witness: Witness, outcome: Outcome, commentary: Commentary) -> None:
    """``--manual``: whoever watches kills; the same program is started again until it ends by itself."""
    while True:
        with _start(setting, place, witness, on_event=commentary) as worker:
            setting.note(f"the agent runs as process {worker.pid}: kill -9 {worker.pid}")
            code = worker.wait()
        if code >= 0:
            outcome.exit_code = worker.expect(0, UNKNOWN)
            _after(setting, worker, outcome, None)
            return
        last = worker.last
        kill = Kill(
            "manual",
            f"after it said {last.name if last else 'nothing'}",
            True,
            latest_turn(worker),
            time.monotonic() - worker.started_s,
            0.0,
        )
        _after(setting, worker, outcome, kill)


def _after(setting: Setting, worker: Worker, outcome: Outcome, kill: Kill | None) -> None:
    """Note how a start of the worker began, and how it ended."""
    if outcome.kills and len(outcome.events) == len(outcome.kills):
        resume = _resume(worker, outcome.events)
        if resume is not None:
            outcome.resumes.append(resume)
    outcome.events.append(worker.events)
    if kill is not None:
        outcome.kills.append(kill)
        setting.note(f"SIGKILL to the worker's process group: {kill.hit}")


def _resume(worker: Worker, earlier: Sequence[Sequence[Event]]) -> Resume | None:
    """The seconds from a worker's start to its first step, in parts, as the parent saw them."""
    at = {event.name: event for event in reversed(worker.events)}
    if "opened" not in at or not at["opened"].facts["restored"]:
        return None
    facts = at["opened"].facts
    steps = [event for event in worker.events if event.at_s > at["opened"].at_s]
    first = steps[0].at_s if steps else at["opened"].at_s
    parts = {
        "python": at["started"].at_s - worker.started_s,
        "model": at["loaded"].at_s - at["started"].at_s,
        "open": at["opened"].at_s - at["loaded"].at_s,
        "first step": first - at["opened"].at_s,
    }
    return Resume(
        total_s=first - worker.started_s,
        parts=parts,
        num_tokens=facts["tokens"],
        num_recomputed=facts["recomputed"],
        reason=facts["reason"],
        num_replayed=facts["replayed"],
        num_unknown=facts["unknown"],
    )


def arm(setting: Setting, name: str) -> Outcome:
    """One way without checkpoints, killed in the deploy window of the same tool, started again, and run to its end."""
    place = _place(setting, name)
    outcome = Outcome()
    plan = setting.plans[-1]
    with Witness.start(honoured=[KEYED]) as witness:
        arguments = [str(place / "work"), witness.url, *setting.options]
        arguments += ["--keep", str(place / "kept")] if name == "chat" else []
        witness.delay(plan.tool, ANSWER_DELAY_S)
        with setting.crew.start("agentckpt.demo.plain", arguments, log=place / "worker.log") as worker:
            outcome.kills.append(carry_out(plan, worker, witness, setting.order))
            outcome.events.append(worker.events)
        witness.delay(plan.tool, 0.0)
        if name == "restart":
            shutil.rmtree(place / "work")
            build(place / "work", setting.bugs)
        begin = time.monotonic()
        with setting.crew.start("agentckpt.demo.plain", arguments, log=place / "worker.log") as worker:
            outcome.exit_code = worker.expect(0)
            outcome.events.append(worker.events)
        outcome.back_s = time.monotonic() - begin
        outcome.arrivals = witness.seen()
    setting.note(f"  (the arm without checkpoints, {name}, is done)")
    return outcome
