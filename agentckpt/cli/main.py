"""The ``agentckpt`` command.

Invariants:
1. Data goes to stdout, everything else to stderr; ``--json`` prints exactly one document.
2. A command returns a dataclass; ``render`` alone knows what a terminal is.
3. torch is imported by no command but those that run an engine.
4. The exit code of an error is its class's (``errors.EXIT_CODES``).
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import EXIT_CODES, AgentckptError
from .render import Screen, to_plain


@dataclass(frozen=True, slots=True)
class Command:
    """One subcommand. Its module is imported only when it is the one that runs or asks for help."""

    name: str
    group: str
    help: str
    module: str


COMMANDS: tuple[Command, ...] = (
    Command("ls", "look", "list the sessions of a store", "look"),
    Command("log", "look", "the checkpoints of a session, newest first", "log"),
    Command("show", "look", "what one checkpoint holds", "look"),
    Command("diff", "look", "what changed between two checkpoints", "compare"),
    Command("cat", "look", "a file, the tokens, the text, the state or the manifest of a checkpoint", "compare"),
    Command("effects", "look", "the effects of a session and how they ended", "look"),
    Command("stats", "look", "how many bytes the store holds, and what for", "look"),
    Command("view", "look", "write a session as one self-contained HTML page", "page"),
    Command("fork", "act", "start a new session from a checkpoint", "act"),
    Command("promote", "act", "move a session's head to the head of one of its forks", "act"),
    Command("restore", "act", "load the files of a checkpoint into a directory", "act"),
    Command("resolve", "act", "say how an effect ended whose outcome is not known", "act"),
    Command("tag", "act", "give a checkpoint a name, or take the name away", "act"),
    Command("rm", "act", "remove a session; its bytes go at the next prune", "act"),
    Command("init", "maintain", "create a store", "maintain"),
    Command("verify", "maintain", "check that nothing is lost or damaged", "maintain"),
    Command("prune", "maintain", "delete what nothing names any more", "maintain"),
    Command("doctor", "maintain", "say what works on this machine, and why not", "doctor"),
    Command("completion", "maintain", "print a shell completion script", "completion"),
    Command("demo", "run", "kill an agent, run it again, and count what it repeated", "demo"),
)
GROUPS = {"look": "look", "act": "act", "maintain": "maintain", "run": "run"}


def load(command: Command) -> Any:
    return importlib.import_module(f".commands.{command.module}", __package__)


def build_parser(chosen: str | None = None) -> argparse.ArgumentParser:
    """The parser; only the chosen subcommand's options are filled in (all of them for None)."""
    parser = argparse.ArgumentParser(prog="agentckpt", description="Checkpoint, restore, fork and inspect LLM agents.", epilog=epilog(),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    add_globals(parser, top=True)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for command in COMMANDS:
        sub = commands.add_parser(command.name, help=command.help, description=command.help[0].upper() + command.help[1:] + ".")
        add_globals(sub, top=False)
        if chosen in (None, command.name):
            load(command).configure(command.name, sub)
    return parser


def add_globals(parser: argparse.ArgumentParser, *, top: bool) -> None:
    """Global options stand before or after the subcommand; the later one wins."""
    default: Any = None if top else argparse.SUPPRESS
    off: Any = False if top else argparse.SUPPRESS
    group = parser.add_argument_group("everywhere")
    group.add_argument("-s", "--store", metavar="DIR", default=default, help="the store (or AGENTCKPT_STORE)")
    group.add_argument("--json", action="store_true", default=off, help="print one JSON document")
    group.add_argument("-q", "--quiet", action="store_true", default=off, help="print no notes on stderr")
    group.add_argument("-v", "--verbose", action="store_true", default=off, help="print tracebacks of errors")


def epilog() -> str:
    lines = ["exit codes:"] + [f"  {code:>3}  {meaning}" for code, meaning in EXIT_CODES.items()]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    chosen = next((a for a in arguments if a in {c.name for c in COMMANDS}), "")
    parser = build_parser(chosen)
    try:
        args = parser.parse_args(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    screen = Screen(sys.stdout, sys.stderr, json=args.json, quiet=args.quiet, color=use_color())
    if args.version:
        screen.line(f"agentckpt {version()}")
        return 0
    if not args.command:
        parser.print_help()
        return 2
    args.store = args.store or os.environ.get("AGENTCKPT_STORE")
    args.screen = screen
    return guarded(lambda: run(args, screen), screen, verbose=args.verbose)


def run(args: argparse.Namespace, screen: Screen) -> int:
    module = load(next(c for c in COMMANDS if c.name == args.command))
    result = module.run(args.command, args)
    if screen.json:
        screen.line(json.dumps(to_plain(result), indent=2, sort_keys=False))
    else:
        module.render(args.command, result, screen)
    return int(getattr(result, "exit_code", 0))


def guarded(action: Callable[[], int], screen: Screen, *, verbose: bool) -> int:
    """Turn the library's errors into an exit code, one line and a hint; anything else is a bug and is shown whole."""
    try:
        return action()
    except AgentckptError as error:
        if verbose:
            import traceback

            traceback.print_exc(file=sys.stderr)
        screen.error(error)
        return error.exit_code
    except BrokenPipeError:
        # The reader (head, less) went away: point stdout elsewhere so that the interpreter's last flush is silent.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130


def use_color() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def version() -> str:
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed("agentckpt")
    except PackageNotFoundError:
        return "0.1.0 (not installed)"


def entry() -> None:
    """Console script."""
    sys.exit(main())
