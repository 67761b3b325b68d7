"""``ls``, ``show``, ``effects``, ``stats``: what a store holds."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...store import SessionView, Store, View
from .. import render as r
from ..effects import EffectRow, effect_rows
from ..stores import find, open_store, part_node, session_named


@dataclass(frozen=True, slots=True)
class SessionRow:
    name: str
    session: str
    head: str | None
    turn: int | None
    checkpoints: int
    tokens: int | None
    logical_bytes: int | None
    new_bytes: int | None
    unknown: int
    parent: str | None
    updated: float | None


@dataclass(frozen=True, slots=True)
class Sessions:
    store: str
    sessions: list[SessionRow]
    exit_code: int = 0


@dataclass(frozen=True, slots=True)
class PartRow:
    name: str
    kind: str
    ref: str
    facts: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Shown:
    id: str
    session: str
    name: str | None
    turn: int
    reason: str | None
    time: float | None
    message: str | None
    parents: list[str]
    parts: list[PartRow]
    children: dict[str, str]
    mark: int
    in_flight: list[str]
    undelivered: list[str]
    consistency: dict[str, str]
    nonce: str
    exit_code: int = 0


@dataclass(frozen=True, slots=True)
class Effects:
    session: str
    effects: list[EffectRow]
    exit_code: int = 0


@dataclass(frozen=True, slots=True)
class Stats:
    facts: dict[str, Any] = field(default_factory=dict)
    exit_code: int = 0


def configure(name: str, parser: argparse.ArgumentParser) -> None:
    if name == "show":
        parser.add_argument("id", help="a session (its head), a tag, or a short unique id")
    elif name == "effects":
        parser.add_argument("session", help="a session's name")
        parser.add_argument("--unknown", action="store_true", help="only those whose outcome is not known")


def run(name: str, args: argparse.Namespace) -> Any:
    with open_store(args) as store:
        view = store.view()
        if name == "ls":
            return Sessions(str(args.store), [row(view, view.sessions[sid]) for _, sid in sorted(view.names.items())])
        if name == "show":
            return show(store, view, args.id)
        if name == "effects":
            records = effect_rows(view, session_named(view, args.session))
            wanted = [e for e in records if not args.unknown or e.state == "unknown"]
            return Effects(args.session, wanted, exit_code=14 if args.unknown and wanted else 0)
        facts = r.to_plain(store.stats())
        # These two count what this process did, and a command that looks does nothing.
        return Stats({key: value for key, value in facts.items() if key not in ("objects", "num_journal_flushes")})


def row(view: View, session: SessionView) -> SessionRow:
    head = session.head
    facts = totals(head["facts"]) if head else {}
    parent = view.sessions.get(session.parent["sid"]) if session.parent else None
    return SessionRow(
        name=session.name,
        session=session.sid.hex(),
        head=head["manifest"].hex() if head else None,
        turn=facts.get("turn"),
        checkpoints=len({h["manifest"] for h in session.heads}),
        tokens=facts.get("num_tokens"),
        logical_bytes=facts.get("logical_bytes"),
        new_bytes=facts.get("new_bytes"),
        unknown=sum(e.state == "unknown" for e in effect_rows(view, session)),
        parent=parent.name if parent else None,
        updated=head.get("time") if head else session.created,
    )


def totals(facts: Any) -> dict[str, Any]:
    """The head record's facts with the parts' counts added up: facts stand as ``{part: {...}}`` beside plain ones."""
    if not isinstance(facts, dict):
        return {}
    whole: dict[str, Any] = {k: v for k, v in facts.items() if not isinstance(v, dict)}
    parts = facts.get("parts") if isinstance(facts.get("parts"), dict) else {}
    for part in (parts or {}).values():
        for key in ("num_tokens", "logical_bytes", "new_bytes", "num_files"):
            if isinstance(part.get(key), int) and key not in facts:
                whole[key] = whole.get(key, 0) + part[key]
    return whole


def show(store: Store, view: View, word: str) -> Shown:
    found = find(store, view, word)
    checkpoint, record = found.checkpoint, found.record or {}
    facts = record.get("facts") or {}
    details: dict[str, dict[str, Any]] = {name: dict((facts.get("parts") or {}).get(name) or {}) for name in checkpoint.parts}
    kv = part_node(store, checkpoint, "kv")
    if kv:
        details[kv[0]].setdefault("num_tokens", kv[1].body.get("n"))
        details[kv[0]].setdefault("num_computed", kv[1].body.get("computed"))
    return Shown(
        id=checkpoint.id.hex(),
        session=checkpoint.session.hex(),
        name=found.session.name if found.session else None,
        turn=checkpoint.turn,
        reason=record.get("reason"),
        time=record.get("time"),
        message=record.get("message"),
        parents=[p.hex() for p in checkpoint.parents],
        parts=[PartRow(n, kind, ref.hex(), details[n]) for n, (kind, ref) in sorted(checkpoint.parts.items())],
        children={n: i.hex() for n, i in checkpoint.children.items()},
        mark=checkpoint.mark[0],
        in_flight=[k.hex() for k in checkpoint.in_flight],
        undelivered=[k.hex() for k in checkpoint.undelivered],
        consistency=dict(checkpoint.consistency),
        nonce=checkpoint.nonce.hex(),
    )


def render(name: str, result: Any, screen: r.Screen) -> None:
    printers: dict[str, Callable[[Any, r.Screen], None]] = {"ls": render_ls, "show": render_show, "effects": render_effects}
    printers.get(name, render_stats)(result, screen)


def render_ls(result: Sessions, screen: r.Screen) -> None:
    if not result.sessions:
        screen.note("no sessions")
        return
    rows = [
        (s.name, r.short(s.head), _count(s.turn), _count(s.checkpoints), _count(s.tokens), _size(s.logical_bytes), _size(s.new_bytes),
         str(s.unknown or "-"), s.parent or "-", r.ago(s.updated))
        for s in result.sessions
    ]  # fmt: skip
    header = ("SESSION", "HEAD", "TURN", "CHECKPOINTS", "TOKENS", "SIZE", "LAST CUT", "UNKNOWN", "FORK OF", "UPDATED")
    screen.table(header, rows, right=(2, 3, 4, 5, 6, 7))


def render_show(s: Shown, screen: r.Screen) -> None:
    screen.line(screen.style(f"checkpoint {s.id}", "bold"))
    facts = [("session", s.name or s.session), ("turn", f"{s.turn}"), ("why", s.message or s.reason or "-"), ("when", r.ago(s.time)),
             ("parents", ", ".join(r.short(p) for p in s.parents) or "none"), ("ledger mark", f"{s.mark}"),
             ("in flight", ", ".join(r.short(k) for k in s.in_flight) or "none"),
             ("undelivered", ", ".join(r.short(k) for k in s.undelivered) or "none")]  # fmt: skip
    for label, text in facts:
        screen.line(f"  {label:<12} {r.clean(text)}")
    for part in s.parts:
        words = [_show_fact(key, value) for key, value in part.facts.items() if key != "consistency" and not isinstance(value, dict | list)]
        held = f" [{s.consistency[part.name]}]" if part.name in s.consistency else ""
        screen.line(f"  part {r.clean(part.name)} ({part.kind}){held}: {r.clean(', '.join(words)) or '-'}")


def render_effects(result: Effects, screen: r.Screen) -> None:
    if not result.effects:
        screen.note("none")
        return
    rows = []
    for e in result.effects:
        state = e.state + (" (late)" if e.late else "")
        rows.append((str(e.turn), e.tool, e.cls, state, r.short(e.key), _cut(e.args), _cut(e.error if e.error else e.value)))
    screen.table(("TURN", "TOOL", "CLASS", "STATE", "KEY", "ARGUMENTS", "RESULT"), rows, right=(0,))


def render_stats(result: Stats, screen: r.Screen) -> None:
    labels = {key: key.replace("num_", "").replace("_", " ") for key in result.facts}
    width = max(map(len, labels.values()), default=0)
    for key, value in result.facts.items():
        screen.line(f"{labels[key].ljust(width)}  {_amount(key, value)}")


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _size(value: int | None) -> str:
    return "-" if value is None else r.size(value)


def _show_fact(name: str, value: Any) -> str:
    """``num_tokens`` 419 as "419 tokens", ``new_bytes`` 173 as "new 173 B"; the JSON form keeps the names."""
    if name.startswith("num_"):
        return f"{_amount(name, value)} {name.removeprefix('num_').replace('_', ' ')}"
    label = name.removesuffix("_s") if isinstance(value, float) else name.removesuffix("_bytes")
    return f"{label.replace('_', ' ')} {_amount(name, value)}"


def _amount(name: str, value: Any) -> str:
    if isinstance(value, float):
        return f"{value * 1e3:.3g} ms" if name.endswith("_s") and value < 1 else f"{value:.4g}" + " s" * name.endswith("_s")
    if isinstance(value, bool) or not isinstance(value, int):
        return str(value)
    return _size(value) if name.endswith("bytes") else f"{value:,}"


def _cut(value: Any, limit: int = 48) -> str:
    """One line. Of a map the plain entries first, then texts; what is empty or null is left out."""
    if isinstance(value, Mapping):
        plain = {k: v for k, v in r.to_plain(value).items() if v not in (None, "") and v is not False}
        value = " ".join(f"{k}={v}" for k, v in sorted(plain.items(), key=lambda item: isinstance(item[1], str)))
    text = " ".join(str(r.to_plain(value)).split()) if value is not None else "-"
    return text if len(text) <= limit else text[: limit - 1] + "…"
