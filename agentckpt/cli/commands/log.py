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
    parser.add_argument("-n", type=int, default=None, metavar="N", help="only the newest N")


def run(name: str, args: argparse.Namespace) -> Log:
    with open_store(args) as store:
        view = store.view()
        rows = log_rows(view, args.session)
    return Log(args.session, rows[: args.n] if args.n else rows)


def log_rows(view: View, name: str) -> list[LogRow]:
    session = session_named(view, name)
    forks = forks_by_checkpoint(view, session.sid)
    rows: list[LogRow] = []
    before: int | None = None
    for number, head in enumerate(session.heads):
        facts = totals(head.get("facts"))
        tokens = facts.get("num_tokens")
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
                new_bytes=facts.get("new_bytes"),
                head=number == len(session.heads) - 1,
                forks=sorted(forks.get(head["manifest"], ())),
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


def render(name: str, result: Log, screen: r.Screen) -> None:
    for row in result.rows:
        mark = "@" if row.head else "○"
        words = [f"turn {row.turn}" if row.turn is not None else row.reason]
        if row.tokens is not None:
            words.append(f"{row.tokens:,} tokens ({row.new_tokens:+,})")
        if row.new_bytes is not None:
            words.append(f"+{r.size(row.new_bytes)}")
        if row.reason != "cut":
            words.append(row.reason)
        words.append(r.ago(row.time))
        tags = "".join(f" [{t}]" for t in row.tags)
        name = screen.style(r.short(row.id), "yellow") + r.clean(tags)
        screen.line(f"{mark}  {name}  {', '.join(words)}  {r.clean(row.message or '')}".rstrip())
        for number, fork in enumerate(row.forks):
            screen.line(f"│{'├╴' if number < len(row.forks) - 1 else '└╴'}{screen.style(r.clean(fork), 'cyan')}")
