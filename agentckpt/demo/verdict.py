"""From what the parent saw and what the stores hold to the result, and from that to a verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from .census import Census
from .compare import Account, count_arrivals, count_effects
from .processes import Event
from .results import ArmRow, DemoResult, Forks, TurnRow, WitnessCount, bug_rows
from .runs import UNKNOWN, Outcome, Setting
from .tools import NEITHER
from .worker import SESSION

INCOMPLETE = 3
"""done, but KV was recomputed (``errors.EXIT_CODES``)"""


def assemble(
    setting: Setting, census: Sequence[Census], outcomes: Mapping[str, Outcome], accounts: Mapping[str, Account], probed: Event
) -> DemoResult:
    """Everything but the verdict."""
    killed, outcome = accounts["killed"], outcomes["killed"]
    reference = accounts["reference"]
    store = setting.root / "killed" / "store"
    counted = count_effects(killed.deploys, outcome.arrivals)
    return DemoResult(
        seed=setting.seed,
        num_bugs=len(setting.bugs),
        broken=setting.broken,
        clean=False,
        reasons=(),
        killed=tuple(outcome.kills),
        tokens_identical=bool(reference.tokens) and killed.tokens == reference.tokens,
        files_identical=bool(reference.files) and killed.files == reference.files,
        state_identical=killed.state == reference.state,
        num_tokens=len(killed.tokens),
        num_files=sum(1 for entry in killed.files.values() if entry.startswith("f ")),
        witness=counted,
        bugs=bug_rows(killed.state["closed"], census),
        resumes=tuple(outcome.resumes),
        resume_parts=probed.facts["parts"],
        restore_s=probed.facts["restore_s"],
        reprefill_s=probed.facts["reprefill_s"],
        turns=_turns(killed.turns, outcome),
        arms=_arms(outcomes, counted),
        forks=_forks(outcome),
        num_recomputed=sum(resume.num_recomputed for resume in outcome.resumes),
        worker_exit_code=outcome.exit_code,
        seconds=0.0,
        store=str(store),
        session=SESSION,
        checkpoint=killed.cut,
        commands=(
            f"agentckpt -s {store} log {SESSION}",
            f"agentckpt -s {store} effects {SESSION}",
            f"agentckpt -s {store} view {SESSION} -o run.html",
        ),
    )


def judge(result: DemoResult) -> DemoResult:
    """The result with its verdict: clean only if nothing at all is wrong."""
    wrong = [*_wrong_with_twins(result), *_wrong_with_effects(result), *_wrong_with_kills(result)]
    clean = not wrong
    recomputed = result.broken == "kv" and clean
    said = tuple(wrong) or (_in_words(result),)
    return replace(result, clean=clean, reasons=said, exit_code=INCOMPLETE if recomputed else 0 if clean else 1)


def _wrong_with_twins(result: DemoResult) -> list[str]:
    wrong = []
    if not result.tokens_identical:
        wrong.append("the tokens differ from those of the undisturbed twin")
    if not result.files_identical:
        wrong.append("the files differ from those of the undisturbed twin")
    if not result.state_identical:
        wrong.append("the state (rankings, tries) differs from that of the undisturbed twin")
    if result.broken == "kv" and not result.num_recomputed:
        wrong.append("a bit of stored KV was flipped and nothing was recomputed")
    if result.broken != "kv" and result.num_recomputed:
        wrong.append(f"{result.num_recomputed} tokens were recomputed although nothing was damaged")
    return wrong


def _wrong_with_effects(result: DemoResult) -> list[str]:
    seen = result.witness
    in_last_window = any(NEITHER in kill.hit for kill in result.killed)
    allowed = 1 if in_last_window or any(kill.planned == "manual" for kill in result.killed) else 0
    wrong = []
    if seen.expected != 3:
        wrong.append(f"{seen.expected} deploys were intended in place of 3")
    if seen.duplicated:
        wrong.append(f"{seen.duplicated} deploys happened twice")
    if seen.lost:
        wrong.append(f"{seen.lost} deploys were lost")
    if seen.unknown > allowed:
        wrong.append(f"the outcome of {seen.unknown} deploys is unknown")
    if (result.worker_exit_code == UNKNOWN) != (seen.unknown > 0):
        wrong.append(f"the worker ended with {result.worker_exit_code}, {seen.unknown} effects are unknown")
    return wrong


def _wrong_with_kills(result: DemoResult) -> list[str]:
    return [f"a kill missed its moment: {kill.planned}: {kill.hit}" for kill in result.killed if not kill.as_planned]


def _in_words(result: DemoResult) -> str:
    seen = result.witness
    facts = [
        f"{len(result.killed)} kills",
        f"{result.num_tokens} tokens, {result.num_files} files and the state equal to those of the undisturbed twin",
        f"{seen.arrived} of {seen.expected} deploys arrived, {seen.duplicated} twice, {seen.lost} lost, {seen.unknown} unknown",
        f"{result.num_recomputed} tokens recomputed",
    ]
    return "; ".join(facts)


def _turns(published: Sequence[TurnRow], outcome: Outcome) -> tuple[TurnRow, ...]:
    """The published cuts, with the times that the worker lived to tell."""
    told = {event.facts["turn"]: event.facts for start in outcome.events for event in start if event.name == "cut"}
    rows = []
    for row in published:
        times = told.get(row.turn)
        rows.append(row if times is None else replace(row, **{name: times[name] for name in ("pause_s", "exposed_s", "durable_s")}))
    return tuple(rows)


def _forks(outcome: Outcome) -> Forks:
    events = [event for start in outcome.events for event in start]
    forked = [event.facts for event in events if event.name == "forked"]
    promoted = sum(1 for event in events if event.name == "tried" and event.facts["winner"] is not None)
    mean_s = sum(facts["seconds"] for facts in forked) / max(len(forked), 1)
    return Forks(len(forked), sum(facts["branches"] for facts in forked), mean_s, promoted)


def _arms(outcomes: Mapping[str, Outcome], counted: WitnessCount) -> tuple[ArmRow, ...]:
    """The same kill in a deploy window, three ways; empty if the arms were left out."""
    if "chat" not in outcomes:
        return ()
    killed = outcomes["killed"]
    rows = [_arm_row("agentckpt", killed, counted, turns=0, tokens=killed.resumes[-1].num_recomputed if killed.resumes else 0)]
    for name in ("restart", "chat"):
        outcome = outcomes[name]
        turns = _turns_before(outcome) if name == "restart" else 0
        tokens = _tokens_before(outcome) if name == "restart" else _prefilled(outcome)
        rows.append(_arm_row(name, outcome, count_arrivals(outcome.arrivals), turns=turns, tokens=tokens))
    return tuple(rows)


def _arm_row(name: str, outcome: Outcome, counted: WitnessCount, *, turns: int, tokens: int) -> ArmRow:
    return ArmRow(
        arm={"chat": "chat + files", "restart": "restart"}.get(name, name),
        turns_again=turns,
        tokens_again=tokens,
        arrived=counted.arrived,
        duplicated=counted.duplicated,
        lost=counted.lost,
        unknown=counted.unknown,
        back_s=outcome.back_s,
    )


def _turns_before(outcome: Outcome) -> int:
    """Turns that had ended when the arm was killed."""
    return max((event.facts["turn"] for event in outcome.events[0] if "turn" in event.facts), default=1) - 1


def _tokens_before(outcome: Outcome) -> int:
    return max((event.facts["tokens"] for event in outcome.events[0] if event.name == "closed"), default=0)


def _prefilled(outcome: Outcome) -> int:
    return next((int(event.facts["recomputed"]) for event in outcome.events[-1] if event.name == "resumed"), 0)
