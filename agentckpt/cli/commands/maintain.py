"""``init``, ``verify``, ``prune``."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from ...store import Store
from .. import render as r
from ..stores import UsageError, open_store


@dataclass(frozen=True, slots=True)
class Created:
    store: str
    format: int = 1
    exit_code: int = 0


@dataclass(frozen=True, slots=True)
class Checked:
    ok: bool
    report: Any
    exit_code: int = 0


@dataclass(frozen=True, slots=True)
class Pruned:
    report: Any
    exit_code: int = 0


def configure(name: str, parser: argparse.ArgumentParser) -> None:
    if name == "init":
        parser.add_argument("dir", nargs="?", help="an absent or empty directory (default: --store)")
    elif name == "verify":
        parser.add_argument("--level", choices=("quick", "structure", "data"), default=None,
                            help="quick: packs and their footers; structure: every head's closure; data: every byte is hashed")  # fmt: skip
        parser.add_argument("--data", action="store_true", help="the same as --level data")
    elif name == "prune":
        parser.add_argument("--dry-run", action="store_true", help="say what would go, and why; delete nothing")
        parser.add_argument("--kv", default=None, metavar="POLICY",
                            help="which checkpoints keep their KV: keep-last=K[,forks][,pinned], or all")  # fmt: skip


def run(name: str, args: argparse.Namespace) -> Any:
    if name == "init":
        return init(args)
    if name == "verify":
        from ...store.verify import verify

        with open_store(args) as store:
            report = verify(store, level="data" if args.data else args.level or "structure")
        return Checked(report.ok, report, exit_code=0 if report.ok else 12)
    from ...store.prune import prune

    with open_store(args, write=not args.dry_run) as store:
        options = {} if args.kv is None else {"kv": args.kv}
        return Pruned(prune(store, dry_run=args.dry_run, **options))


def init(args: argparse.Namespace) -> Created:
    path = args.dir or args.store
    if not path:
        raise UsageError("no directory was named", code="no-store", hint="agentckpt init DIR")
    Store.init(path).close()
    return Created(str(path))


def render(name: str, result: Any, screen: r.Screen) -> None:
    if name == "init":
        screen.line(f"created store at {r.clean(result.store)} (format {result.format})")
        return
    for line in result.report.describe():
        screen.line(r.clean(line))
