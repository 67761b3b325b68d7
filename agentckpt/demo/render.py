"""The result as text: the last thing that the demo says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..cli.render import Screen, size
from .results import ArmRow, BugRow, DemoResult, Resume, TurnRow
from .run import RULE


def render(result: DemoResult, screen: Screen) -> None:
    """Tables, the resume beside the re-prefill, the verdict, and what to try next."""
    _bugs(result.bugs, screen)
    _turns(result.turns, screen)
    _kills(result, screen)
    _resumes(result, screen)
    _arms(result.arms, screen)
    _verdict(result, screen)


def _heading(text: str, screen: Screen) -> None:
    screen.line()
    screen.line(screen.style(text, "bold"))


def _bugs(bugs: Sequence[BugRow], screen: Screen) -> None:
    _heading(f"Repairs: {RULE}", screen)
    rows = [
        [bug.bug, str(bug.num_candidates), str(bug.num_passing), str(bug.tries), f"{bug.random_tries:.1f}", bug.edit, bug.assertion or "-"]
        for bug in bugs
    ]
    totals = [sum(bug.num_candidates for bug in bugs), sum(bug.num_passing for bug in bugs), sum(bug.tries for bug in bugs)]
    rows.append(["all", *map(str, totals), f"{sum(bug.random_tries for bug in bugs):.1f}", "", ""])
    header = ["module", "edits", "passing", "tries", "random", "the edit that passed", "assertion that the model added"]
    screen.table(header, rows, right=(1, 2, 3, 4))
    screen.line("random = (edits + 1) / (passing + 1), the expected number of tries in random order")


def _turns(turns: Sequence[TurnRow], screen: Screen) -> None:
    _heading("Cuts", screen)
    rows = [
        [str(turn.turn), f"{turn.num_tokens:,}", size(turn.logical_bytes), size(turn.new_bytes)]
        + [_milliseconds(seconds) for seconds in (turn.pause_s, turn.exposed_s, turn.durable_s)]
        for turn in turns
    ]
    header = ["turn", "tokens", "logical", "new", "pause ms", "exposed ms", "durable ms"]
    screen.table(header, rows, right=range(7))
    screen.line("new = bytes given to the store; it drops what it has already")
    if any(turn.durable_s is None for turn in turns):
        screen.line("- : the worker was killed, or ended, before it could tell")


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.1f}"


def _kills(result: DemoResult, screen: Screen) -> None:
    _heading("Kills and forks", screen)
    for kill in result.killed:
        screen.line(f"SIGKILL in turn {kill.turn}, {kill.after_s:.1f} s after this start, {kill.hit}")
    forks = result.forks
    screen.line(
        f"{forks.num_forks} forks into {forks.num_branches} branches, {forks.mean_s * 1000:.0f} ms a fork on average, "
        f"{forks.num_promoted} promoted"
    )


def _resumes(result: DemoResult, screen: Screen) -> None:
    _heading("Resume", screen)
    rows = [_resume_row(resume) for resume in result.resumes]
    screen.table(["tokens", "recomputed", "effects from the record", "seconds", "of which"], rows, right=(0, 1, 2, 3))
    for resume in result.resumes:
        if resume.reason:
            screen.line(f"recomputed because {resume.reason}")
    parts = _parts(result.resume_parts)
    screen.line(
        f"alone, {result.num_tokens:,} tokens: restore {result.restore_s:.3f} s ({parts}); fast re-prefill {result.reprefill_s:.3f} s"
    )


def _resume_row(resume: Resume) -> list[str]:
    numbers = [f"{resume.num_tokens:,}", f"{resume.num_recomputed:,}", str(resume.num_replayed), f"{resume.total_s:.2f}"]
    return [*numbers, _parts(resume.parts)]


def _parts(parts: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {seconds:.2f}" for name, seconds in parts.items())


def _arms(arms: Sequence[ArmRow], screen: Screen) -> None:
    if not arms:
        return
    _heading("The same kill in the deploy window, three ways to go on", screen)
    rows = [
        [arm.arm, str(arm.turns_again), f"{arm.tokens_again:,}"]
        + [str(number) for number in (arm.arrived, arm.duplicated, arm.lost, arm.unknown)]
        + [f"{arm.back_s:.1f}"]
        for arm in arms
    ]
    header = ["", "turns again", "tokens again", "arrived", "twice", "lost", "unknown", "s to the end"]
    screen.table(header, rows, right=range(1, 8))


def _verdict(result: DemoResult, screen: Screen) -> None:
    _heading("Verdict", screen)
    for reason in result.reasons:
        screen.line(reason)
    screen.line(screen.style("clean" if result.clean else "NOT CLEAN", "green" if result.clean else "red") + f", {result.seconds:.0f} s")
    screen.line()
    for command in result.commands:
        screen.line(f"  {command}")
