"""``diff`` and ``cat``: what stands inside checkpoints."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from typing import Any

from ...errors import NotFoundError
from .. import render as r
from ..parts import Differ, read_file, state_value, token_ids, token_text
from ..stores import find, open_store, part_node


@dataclass(frozen=True, slots=True)
class PartDiff:
    part: str
    lines: list[str]


@dataclass(frozen=True, slots=True)
class Diff:
    before: str
    after: str
    parts: list[PartDiff]
    exit_code: int = 0


@dataclass(frozen=True, slots=True)
class Content:
    id: str
    what: str
    value: Any
    exit_code: int = 0


def configure(name: str, parser: argparse.ArgumentParser) -> None:
    if name == "diff":
        parser.add_argument("before", metavar="A", help="the earlier one: a session (its head), a tag, or a short unique id")
        parser.add_argument("after", metavar="B", help="the later one")
        return
    parser.add_argument("what", metavar="ID[:PATH]", help="a checkpoint, and the path of a file in its sandbox; alone: the manifest")
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--tokens", action="store_true", help="the token ids")
    one.add_argument("--text", action="store_true", help="the tokens as text (needs --model)")
    one.add_argument("--state", action="store_true", help="the state as JSON")
    one.add_argument("--manifest", action="store_true", help="the manifest as JSON")
    parser.add_argument("--model", default=None, help="whose tokenizer to use for --text")


def run(name: str, args: argparse.Namespace) -> Any:
    with open_store(args) as store:
        view = store.view()
        if name == "diff":
            a, b = (find(store, view, word).checkpoint for word in (args.before, args.after))
            changes = Differ(store).changes(a, b)
            return Diff(a.id.hex(), b.id.hex(), [PartDiff(part, lines) for part, lines in changes])
        word, _, path = args.what.partition(":")
        checkpoint = find(store, view, word).checkpoint
        if path:
            return Content(checkpoint.id.hex(), "file", read_file(store, checkpoint, path))
        if args.tokens or args.text:
            kv = part_node(store, checkpoint, "kv")
            if kv is None:
                raise NotFoundError(
                    "the checkpoint has no kv part", object=r.short(checkpoint.id), hint="its agent has a hosted model or none"
                )
            ids = token_ids(store, kv[1])
            return (
                Content(checkpoint.id.hex(), "tokens", ids)
                if args.tokens
                else Content(checkpoint.id.hex(), "text", token_text(kv[1], ids, args.model))
            )
        if args.state:
            return Content(checkpoint.id.hex(), "state", state_value(store, checkpoint))
        return Content(checkpoint.id.hex(), "manifest", checkpoint)


def render(name: str, result: Any, screen: r.Screen) -> None:
    if name == "cat":
        render_content(result, screen)
        return
    if not result.parts:
        screen.note("no difference")
    for part in result.parts:
        screen.line(screen.style(r.clean(part.part), "bold"))
        for line in part.lines:
            color = {"+": "green", "-": "red"}.get(line[:1], "dim")
            screen.line("  " + screen.style(r.clean(line), color))


def render_content(result: Content, screen: r.Screen) -> None:
    if result.what == "file":
        # Raw bytes, as `cat` gives them: what a terminal does with them is the reader's choice.
        sys.stdout.flush()
        sys.stdout.buffer.write(result.value)
        sys.stdout.buffer.flush()
    elif result.what == "tokens":
        screen.line(" ".join(map(str, result.value)))
    elif result.what == "text":
        screen.line(result.value)
    else:
        screen.line(json.dumps(r.to_plain(result.value), indent=2, ensure_ascii=False))
