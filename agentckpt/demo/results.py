"""What the demo found out, as plain values: the JSON document, and what ``render`` draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .census import Census


@dataclass(frozen=True, slots=True)
class Kill:
    """One SIGKILL of the worker's whole process group."""

    planned: str
    """``model``, ``tool``, ``window``, or ``manual``"""
    hit: str
    """what the worker was doing, by what it had said last or what had arrived; ``missed`` if it was over before"""
    as_planned: bool
    turn: int
    after_s: float
    """since this worker started"""
    waited_s: float
    """between the event that the parent saw and the kill, drawn from the seed"""


@dataclass(frozen=True, slots=True)
class BugRow:
    """One closed bug: what the model's ranking took, beside what a random order takes on average."""

    bug: str
    num_candidates: int
    num_passing: int
    tries: int
    random_tries: float
    edit: str
    assertion: str | None


@dataclass(frozen=True, slots=True)
class WitnessCount:
    """Deploys: intents in the ledger, and what the witness saw. Counts of effects, not of requests."""

    expected: int
    arrived: int
    duplicated: int
    """arrivals beyond one of the same tool"""
    lost: int
    """neither arrived nor known to be unknown"""
    unknown: int
    num_requests: int


@dataclass(frozen=True, slots=True)
class TurnRow:
    """One published cut. Times are None where the worker was killed before it could tell."""

    turn: int
    num_tokens: int
    logical_bytes: int
    new_bytes: int
    pause_s: float | None
    exposed_s: float | None
    durable_s: float | None


@dataclass(frozen=True, slots=True)
class Resume:
    """One start after a kill: seconds from the kill to the worker going on, in parts."""

    total_s: float
    parts: Mapping[str, float]
    num_tokens: int
    num_recomputed: int
    reason: str | None
    num_replayed: int
    num_unknown: int


@dataclass(frozen=True, slots=True)
class ArmRow:
    """One way to go on after the same kill in the deploy window."""

    arm: str
    turns_again: int
    """turns that had ended and ran again"""
    tokens_again: int
    """tokens of the context that were computed again"""
    arrived: int
    duplicated: int
    lost: int
    unknown: int
    back_s: float
    """from the kill to the end of the run"""


@dataclass(frozen=True, slots=True)
class Forks:
    """All forks of the run that was killed, counted over all its starts."""

    num_forks: int
    num_branches: int
    mean_s: float
    num_promoted: int


@dataclass(frozen=True, slots=True)
class DemoResult:
    """The whole run. ``clean`` is the verdict, ``reasons`` say what it rests on or what is wrong."""

    seed: int
    num_bugs: int
    broken: str | None
    clean: bool
    reasons: tuple[str, ...]
    killed: tuple[Kill, ...]
    tokens_identical: bool
    files_identical: bool
    state_identical: bool
    num_tokens: int
    num_files: int
    witness: WitnessCount
    bugs: tuple[BugRow, ...]
    resumes: tuple[Resume, ...]
    resume_parts: Mapping[str, float]
    """of a restore alone, with nothing else running: seconds by step"""
    restore_s: float
    reprefill_s: float
    turns: tuple[TurnRow, ...]
    arms: tuple[ArmRow, ...]
    forks: Forks
    num_recomputed: int
    worker_exit_code: int
    seconds: float
    store: str
    session: str
    checkpoint: str
    exit_code: int = 0
    commands: tuple[str, ...] = field(default=())


def bug_rows(closed: Sequence[Mapping[str, object]], census: Sequence[Census]) -> tuple[BugRow, ...]:
    """The worker's own account of each closed bug, beside the census of its edits."""
    by_name = {count.bug: count for count in census}
    rows = []
    for bug in closed:
        count = by_name[str(bug["bug"])]
        tries, assertion = bug["tries"], bug["assertion"]
        assert isinstance(tries, int)
        rows.append(
            BugRow(
                bug=count.bug,
                num_candidates=count.num_candidates,
                num_passing=count.num_passing,
                tries=tries,
                random_tries=count.random_tries,
                edit=str(bug["edit"]),
                assertion=None if assertion is None else str(assertion),
            )
        )
    return tuple(rows)
