"""``log``: the checkpoints of a session as a graph, newest first."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from ...store import View
from .. import render as r
from ..stores import open_store, session_named
from .look import totals


@dataclass(frozen=True, slots=True)
class LogRow:
    id: str
    turn: int | None
    reason: str
    message: str | None
    time: float | None
    epoch: int
    tokens: int | None
    new_tokens: int | None
    new_bytes: int | None
    head: bool
    forks: list[str]
    tags: list[str]


@dataclass(frozen=True, slots=True)
class Log:
    session: str
    rows: list[LogRow]
    exit_code: int = 0


def configure(name: str, parser: argparse.ArgumentParser) -> None:
    parser.add_argument("session", help="a session's name")
    parser.add_argument("-n", type=count, default=None, metavar="N", help="only the newest N")


def count(text: str) -> int:
    """A positive number, for argparse."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def run(name: str, args: argparse.Namespace) -> Log:
    with open_store(args) as store:
        view = store.view()
        rows = log_rows(view, args.session)
    return Log(args.session, rows[: args.n])


def log_rows(view: View, name: str) -> list[LogRow]:
    session = session_named(view, name)
    forks = forks_by_checkpoint(view, session.sid)
    rows: list[LogRow] = []
    before: int | None = None
    seen: set[bytes] = set()
    for number, head in enumerate(session.heads):
        facts = totals(head.get("facts"))
        tokens = facts.get("num_tokens")
        moved = head["manifest"] in seen or head["reason"] == "fork"  # the head moved to what was written before
        seen.add(head["manifest"])
        rows.append(
            LogRow(
                id=head["manifest"].hex(),
                turn=facts.get("turn"),
                reason=head["reason"],
                message=head.get("message"),
                time=head.get("time"),
                epoch=head["epoch"],
                tokens=tokens,
                new_tokens=None if tokens is None else tokens - (before or 0),
                new_bytes=0 if moved else facts.get("new_bytes"),
                head=number == len(session.heads) - 1,
                forks=sorted(forks.pop(head["manifest"], ())),
                tags=sorted(tag for tag, identity in view.tags.items() if identity == head["manifest"]),
            )
        )
        before = tokens if tokens is not None else before
    return rows[::-1]


def forks_by_checkpoint(view: View, sid: bytes) -> dict[bytes, list[str]]:
    found: dict[bytes, list[str]] = {}
    for other in view.sessions.values():
        if other.parent and other.parent["sid"] == sid and other.heads and not other.removed:
            found.setdefault(other.heads[0]["manifest"], []).append(other.name)
    return found


def facts_of(row: LogRow) -> tuple[str, ...]:
    """Columns: turn, tokens, how many of them are new, bytes that this cut wrote, when."""
    return (
        "" if row.turn is None else f"turn {row.turn}",
        "" if row.tokens is None else r.plural(row.tokens, "token"),
        "" if row.new_tokens is None else f"({row.new_tokens:+,})",
        "" if row.new_bytes is None else f"+{r.size(row.new_bytes)}",
        r.ago(row.time),
    )


def render(name: str, result: Log, screen: r.Screen) -> None:
    cells = [facts_of(row) for row in result.rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for row, facts in zip(result.rows, cells, strict=True):
        mark = "@" if row.head else "○"
        text = "  ".join(fact.rjust(width) for fact, width in zip(facts, widths) if width)
        words = [row.reason] * (row.reason != "cut") + [f"[{tag}]" for tag in row.tags] + [row.message] * bool(row.message)
        screen.line(f"{mark}  {screen.style(r.short(row.id), 'yellow')}  {text}  {r.clean(' '.join(map(str, words)))}".rstrip())
        for number, fork in enumerate(row.forks):
            screen.line(f"│{'├╴' if number < len(row.forks) - 1 else '└╴'}{screen.style(r.clean(fork), 'cyan')}")
