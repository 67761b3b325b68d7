"""The command reference, made from the parsers: ``python -m agentckpt.cli.reference`` prints ``REFERENCE.md``.

The text is laid out here and not by argparse's help formatter, which wraps by terminal width and words options differently
from one Python to the next. A test compares the committed file with what this module makes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from ..errors import EXIT_CODES
from .main import COMMANDS, GROUPS, Command, build_parser
from .render import Screen

HEAD = """# The command line

Made by `python -m agentckpt.cli.reference` from the parsers; edit those, not this file.

`agentckpt [OPTION...] COMMAND [ARGUMENT...]`. Data goes to stdout, everything else to stderr. Where a checkpoint is wanted, a session's
name (its head), a tag, or a short unique id will do. Text from a store is printed with its control characters escaped; `cat ID:PATH`
gives a file's bytes as they are. Colours appear on a terminal only, and not if `NO_COLOR` is set.
"""


def reference() -> str:
    """The whole document."""
    parser = build_parser()
    parsers = subparsers(parser)
    lines = [HEAD, "## Everywhere", "", "These options may stand before or after the command; the later one wins.", ""]
    lines += table(a for a in parser._actions if not isinstance(a, argparse._HelpAction | argparse._SubParsersAction))
    for group, title in GROUPS.items():
        lines += ["", f"## {title[0].upper()}{title[1:]}"]
        for command in COMMANDS:
            if command.group == group:
                lines += section(command, parsers[command.name])
    lines += ["", "## Exit codes", "", "| code | meaning |", "| --- | --- |"]
    lines += [f"| {code} | {meaning} |" for code, meaning in EXIT_CODES.items()]
    return "\n".join(lines) + "\n"


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Subcommand name -> its parser."""
    (actions,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return dict(actions.choices)


def section(command: Command, parser: argparse.ArgumentParser) -> list[str]:
    own = list(own_actions(parser))
    lines = ["", f"### `{command.name}`", "", f"`{synopsis(command.name, own)}`", "", f"{command.help[0].upper()}{command.help[1:]}."]
    return lines + (["", *table(own)] if own else [])


def own_actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Arguments and options of one subcommand alone: no help, nothing hidden, nothing that stands under *Everywhere*."""
    shared = {id(a) for group in parser._action_groups if group.title == "everywhere" for a in group._group_actions}
    for action in parser._actions:
        if action.help != argparse.SUPPRESS and not isinstance(action, argparse._HelpAction) and id(action) not in shared:
            yield action


def synopsis(name: str, actions: list[argparse.Action]) -> str:
    must = [f"{a.option_strings[-1]} {value(a)}" for a in actions if a.option_strings and a.required]
    may = ["[OPTION...]"] if any(a.option_strings and not a.required for a in actions) else []
    places = [f"[{value(a)}]" if a.nargs == "?" else value(a) for a in actions if not a.option_strings]
    return " ".join(["agentckpt", name, *may, *must, *places])


def table(actions: Iterator[argparse.Action] | list[argparse.Action]) -> list[str]:
    rows = [f"| `{cell(label(a))}` | {cell(meaning(a))} |" for a in actions]
    return ["| | |", "| --- | --- |", *rows]


def label(action: argparse.Action) -> str:
    if not action.option_strings:
        return value(action)
    names = ", ".join(action.option_strings)
    return names if action.nargs == 0 else f"{names} {value(action)}"


def value(action: argparse.Action) -> str:
    """What stands in the place of the value: the metavar, the choices, or the name in capitals."""
    if isinstance(action.metavar, str):
        return action.metavar
    if action.choices is not None:
        return "{" + ",".join(map(str, action.choices)) + "}"
    return action.dest.upper()


def meaning(action: argparse.Action) -> str:
    text = (action.help or "") % {"default": action.default, "prog": "agentckpt"}
    return f"{text}; required" if action.option_strings and action.required else text


def cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    import sys

    Screen(sys.stdout, sys.stderr).out.write(reference())
