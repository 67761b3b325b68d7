"""``fork``, ``promote``, ``restore``, ``resolve``, ``tag``, ``rm``: change names and heads, or load files."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass, field
from typing import Any

from ...errors import NotFoundError
from .. import render as r
from ..stores import UsageError, find, open_store


@dataclass(frozen=True, slots=True)
class Done:
    """``what`` was done to ``name``; ``head`` is the 64-digit id that it now stands for."""

    what: str
    name: str
    head: str | None
    exit_code: int = 0


@dataclass(frozen=True, slots=True)
class Restored:
    id: str
    directory: str
    dry_run: bool
    num_files: int
    num_bytes: int
    plan: list[str] = field(default_factory=list)
    not_restored: list[str] = field(default_factory=list)
    exit_code: int = 0


def configure(name: str, parser: argparse.ArgumentParser) -> None:
    word = "a session (its head), a tag, or a short unique id"
    if name == "fork":
        parser.add_argument("id", help=word)
        parser.add_argument("name", help="the new session's name")
    elif name == "promote":
        parser.add_argument("branch", help="a session that was forked from the one whose head moves")
        parser.add_argument("--into", default=None, metavar="NAME", help="the session whose head moves (default: the branch's origin)")
    elif name == "restore":
        parser.add_argument("id", help=word)
        parser.add_argument("--sandbox", required=True, metavar="DIR", help="an absent or empty directory for the files")
        parser.add_argument("--dry-run", action="store_true", help="say what would be written; write nothing")
    elif name == "resolve":
        parser.add_argument("key", help="the first digits of the effect's key, as `agentckpt effects` shows them")
        how = parser.add_mutually_exclusive_group(required=True)
        how.add_argument("--applied", action="store_true", help="it stands in the world: the recovered call returns VALUE")
        how.add_argument("--not-applied", action="store_true", help="it does not: the recovered call is made, under the same key")
        parser.add_argument("--value", default=None, metavar="JSON", help="what the call returned, with --applied (default: null)")
        parser.add_argument("--note", default="", help="how you know; kept in the journal")
    elif name == "tag":
        parser.add_argument("id", nargs="?", help=word)
        parser.add_argument("tag", help="the name to give")
        parser.add_argument("-d", "--delete", action="store_true", help="take the tag away")
    else:
        parser.add_argument("session", help="a session's name")


def run(name: str, args: argparse.Namespace) -> Any:
    write = name != "restore"
    with open_store(args, write=write) as store:
        if name == "fork":
            from ...session.stored import fork_stored

            found = find(store, store.view(), args.id)
            fork_stored(store, found.checkpoint.id, args.name)
            return Done("forked", args.name, found.checkpoint.id.hex())
        if name == "promote":
            from ...session.stored import promote_stored

            target, head = promote_stored(store, args.branch, args.into)
            return Done("promoted", target, head.hex())
        if name == "resolve":
            return resolve(store, args)
        if name == "tag":
            return tag(store, args)
        if name == "rm":
            from ...session.stored import remove_stored

            remove_stored(store, args.session)
            return Done("removed", args.session, None)
        return restore(store, args)


def resolve(store: Any, args: argparse.Namespace) -> Done:
    from ...session.stored import resolve_stored

    if args.value is not None and args.not_applied:
        raise UsageError("what did not happen has no result", object="--value")
    try:
        value = None if args.value is None else json.loads(args.value)
    except ValueError as error:
        raise UsageError(f"is no JSON: {error}", object="--value", hint="""text needs its quotes: --value '"v1 is out"'""") from error
    name, record = resolve_stored(store, args.key, applied=args.applied, value=value, note=args.note)
    return Done("resolved", f"{record.tool} of {name}, turn {record.turn}: {'applied' if args.applied else 'not applied'}", None)


def tag(store: Any, args: argparse.Namespace) -> Done:
    from ...store import Draft

    if args.delete:
        if args.tag not in store.view().tags:
            raise NotFoundError("no such tag", object=args.tag)
        store.append(lambda view: [Draft("tag", None, {"tag": args.tag, "manifest": None})])
        return Done("untagged", args.tag, None)
    if args.id is None:
        raise UsageError("which checkpoint?", object=args.tag, hint="agentckpt tag ID TAG")
    identity = find(store, store.view(), args.id).checkpoint.id
    store.append(lambda view: [Draft("tag", None, {"tag": args.tag, "manifest": identity})])
    return Done("tagged", args.tag, identity.hex())


def restore(store: Any, args: argparse.Namespace) -> Restored:
    from ...sandbox import plan_tree, restore_tree, walk_tree

    checkpoint = find(store, store.view(), args.id).checkpoint
    trees = [(name, ref) for name, (kind, ref) in sorted(checkpoint.parts.items()) if kind == "sandbox"]
    if not trees:
        raise NotFoundError("the checkpoint has no sandbox part", object=r.short(checkpoint.id))
    name, ref = trees[0]
    plan = plan_tree(store, ref, args.sandbox)
    if not args.dry_run:
        restore_tree(store, ref, args.sandbox)
    left = [f"{other} ({kind})" for other, (kind, _) in sorted(checkpoint.parts.items()) if other != name]
    lines = [os.fsdecode(path) for path, _ in walk_tree(store, ref)] if args.dry_run else []
    return Restored(checkpoint.id.hex(), args.sandbox, args.dry_run, plan.num_files, plan.num_bytes, lines, left)


def render(name: str, result: Any, screen: r.Screen) -> None:
    if isinstance(result, Done):
        at = f" at {r.short(result.head)}" if result.head else ""
        screen.line(f"{result.what} {r.clean(result.name)}{at}")
        if result.what == "removed":
            screen.note("its checkpoints stay until `agentckpt prune`")
        return
    for line in result.plan:
        screen.line(r.clean(line))
    verb = "would restore" if result.dry_run else "restored"
    screen.line(f"{verb} {r.plural(result.num_files, 'file')}, {r.size(result.num_bytes)}, to {r.clean(result.directory)}")
    if result.not_restored:
        screen.note(f"not loaded by this command: {', '.join(map(r.clean, result.not_restored))}")
