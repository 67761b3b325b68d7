"""``view``: one session as one self-contained HTML page, made from what the store holds and nothing else.

Invariants:
1. The page loads nothing: its policy is ``default-src 'none'``, its data stands inside it.
2. Stored text enters the page as JSON with ``<`` escaped and reaches the screen through ``textContent`` only.
3. ``--redact`` leaves lengths and names of kinds, no content: no messages, arguments, results, file names.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...store import SessionView, Store, View
from .. import render as r
from ..effects import EffectRow, effect_rows
from ..parts import Differ
from ..stores import open_store, read_checkpoint, session_named
from .look import totals

MAX_TEXT = 4000
MAX_CHANGES = 200


@dataclass(frozen=True, slots=True)
class Page:
    session: str
    path: str
    num_bytes: int
    redacted: bool
    exit_code: int = 0


def configure(name: str, parser: argparse.ArgumentParser) -> None:
    parser.add_argument("session", help="a session's name")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="the HTML file to write")
    parser.add_argument("--redact", action="store_true", help="leave out all contents: messages, arguments, results, file names")
    parser.add_argument("--model", default=None, help="load this model's tokenizer to show tokens as text")


def run(name: str, args: argparse.Namespace) -> Page:
    with open_store(args) as store:
        view = store.view()
        data = page_data(store, view, session_named(view, args.session), redact=args.redact, model=args.model)
    template = (Path(__file__).parent.parent / "view.html").read_text(encoding="utf-8")
    body = json.dumps(r.to_plain(data), ensure_ascii=True).replace("<", "\\u003c")
    text = template.replace("__DATA__", body)
    Path(args.output).write_text(text, encoding="utf-8")
    return Page(args.session, args.output, len(text.encode()), args.redact)


def render(name: str, result: Page, screen: r.Screen) -> None:
    screen.line(f"{r.clean(result.path)}: {r.size(result.num_bytes)}, one file, loads nothing{', redacted' if result.redacted else ''}")


def page_data(store: Store, view: View, session: SessionView, *, redact: bool, model: str | None) -> dict[str, Any]:
    effects = effect_rows(view, session)
    cuts = cut_rows(store, session, redact=redact, model=model)
    first = cuts[0] if cuts else {}
    last = cuts[-1] if cuts else {}
    unknown = sum(e.state == "unknown" for e in effects)
    return {
        "name": session.name,
        "redacted": redact,
        "cuts": cuts,
        "takeovers": takeovers(session),
        "events": events(session, effects, redact=redact),
        "effects": [effect_row(e, redact=redact) for e in effects],
        "cards": [
            [str(last.get("turn", 0)), "turns"],
            [f"{last.get('tokens') or 0:,}", "tokens"],
            [r.size(last.get("logical_bytes") or 0), "whole state"],
            [r.size(sum(c["new_bytes"] or 0 for c in cuts)), "written by all cuts"],
            [str(len(takeovers(session))), "times killed or reopened"],
            [str(unknown), "effects unknown"],
            [r.ago(first.get("time")), "begun"],
        ],
        **branches(store, view, session),
    }


def cut_rows(store: Store, session: SessionView, *, redact: bool, model: str | None) -> list[dict[str, Any]]:
    differ = Differ(store, model=model)
    rows, before = [], None
    for head in session.heads:
        checkpoint = read_checkpoint(store, head["manifest"])
        facts = totals(head.get("facts"))
        changes = differ.changes(before, checkpoint)
        if redact:
            changes = [(part, [f"{len(lines)} lines of change"]) for part, lines in changes]
        messages = [] if redact else differ.messages(before, checkpoint)
        rows.append(
            {
                "id": head["manifest"].hex(),
                "time": head.get("time"),
                "turn": checkpoint.turn,
                "reason": head["reason"],
                "message": None if redact else head.get("message"),
                "tokens": facts.get("num_tokens"),
                "logical_bytes": facts.get("logical_bytes"),
                "new_bytes": facts.get("new_bytes"),
                "pause_s": facts.get("pause_s"),
                "exposed_s": facts.get("exposed_s"),
                "durable_s": facts.get("durable_s"),
                "changes": [{"part": part, "lines": lines[:MAX_CHANGES]} for part, lines in changes],
                "messages": [{"role": role, "content": text[:MAX_TEXT]} for role, text in messages],
            }
        )
        before = checkpoint
    return rows


def takeovers(session: SessionView) -> list[dict[str, Any]]:
    """Restores that took the session over again: after a kill, an ordinary end, or for a rollback."""
    found: dict[int, dict[str, Any]] = {}
    for entry in session.entries:
        if entry.kind == "restore":
            body = entry.body
            found.setdefault(body["epoch"], {"time": body.get("time"), "epoch": body["epoch"], "mode": body.get("mode")})
    return list(found.values())


def events(session: SessionView, effects: list[EffectRow], *, redact: bool) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for entry in session.entries:
        if entry.kind == "segment" and entry.body.get("op") in ("generate", "append", "request"):
            count = len(entry.body.get("ids") or b"") // 4
            end = entry.body.get("time")
            spent = entry.body.get("seconds") or 0
            start = None if end is None else end - spent
            found.append({"lane": "model", "start": start, "end": end, "label": f"{entry.body['op']} {count} tokens", "state": "done"})
    for effect in effects:
        lane = "sandbox" if effect.cls == "sandbox" else "effect"
        label = effect.cls if redact else effect.tool
        found.append({"lane": lane, "start": effect.begun, "end": effect.ended, "label": label, "state": effect.state})
    return [e for e in found if e["start"] is not None]


def effect_row(effect: EffectRow, *, redact: bool) -> dict[str, Any]:
    def text(value: Any) -> str:
        if value is None:
            return ""
        return "…" if redact else json.dumps(r.to_plain(value), ensure_ascii=False)[:400]

    return {"turn": effect.turn, "tool": "…" if redact else effect.tool, "class": effect.cls, "state": effect.state,
            "args": text(effect.args), "value": text(effect.error or effect.value)}  # fmt: skip


def branches(store: Store, view: View, session: SessionView) -> dict[str, Any]:
    """The session and its forks as rows of checkpoints, placed by the order in which they were published."""
    family = [session, *(s for s in view.sessions.values() if s.parent and s.parent["sid"] == session.sid)]
    order = sorted({(h.get("time") or 0.0, h["manifest"]) for s in family for h in s.heads})
    slots: dict[bytes, int] = {}
    for _, manifest in order:
        slots.setdefault(manifest, len(slots))
    rows = []
    for member in family:
        cuts, seen = [], set()
        for head in member.heads:
            if head["manifest"] in seen:
                continue
            seen.add(head["manifest"])
            checkpoint = read_checkpoint(store, head["manifest"])
            parents = [p.hex() for p in checkpoint.parents]
            cuts.append({"id": checkpoint.id.hex(), "turn": checkpoint.turn, "slot": slots[head["manifest"]], "parents": parents,
                         "head": member.head is not None and head["manifest"] == member.head["manifest"]})  # fmt: skip
        rows.append({"name": member.name, "cuts": cuts})
    return {"branches": rows, "slots": len(slots)}
