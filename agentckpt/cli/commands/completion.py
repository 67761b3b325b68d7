"""``completion``: a script for the shell, and the words that it asks for."""

from __future__ import annotations

import argparse
import contextlib
from dataclasses import dataclass

from ...errors import AgentckptError
from ..main import COMMANDS
from ..render import Screen
from ..stores import UsageError

BASH = """_agentckpt() {
  local IFS=$'\\n'
  COMPREPLY=($(agentckpt completion --words -- "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
  [ ${#COMPREPLY[@]} -gt 0 ] || COMPREPLY=($(compgen -f -- "${COMP_WORDS[COMP_CWORD]}"))
}
complete -o filenames -F _agentckpt agentckpt
"""
ZSH = """#compdef agentckpt
_agentckpt() {
  local -a found
  found=("${(@f)$(agentckpt completion --words -- "${words[@]:1:$((CURRENT-1))}" 2>/dev/null)}")
  [ -n "$found" ] && compadd -a found || _files
}
compdef _agentckpt agentckpt
"""
FISH = """complete -c agentckpt -f -a '(agentckpt completion --words -- (commandline -opc)[2..-1] (commandline -ct) 2>/dev/null)'
"""
SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}
TAKES_A_SESSION = {"log", "effects", "view", "promote", "rm", "show", "fork", "restore", "cat", "diff", "tag"}


@dataclass(frozen=True, slots=True)
class Completion:
    lines: list[str]
    exit_code: int = 0


def configure(name: str, parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", nargs="?", metavar="{bash,fish,zsh}", help="which shell the script is for (default: bash)")
    parser.add_argument("--words", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("typed", nargs="*", help=argparse.SUPPRESS)


def run(name: str, args: argparse.Namespace) -> Completion:
    if args.words:
        typed = [w for w in [args.shell, *args.typed] if w is not None]
        return Completion(words(typed, args.store))
    script = SCRIPTS.get(args.shell or "bash")
    if script is None:
        raise UsageError("no script for this shell", object=args.shell, expected=", ".join(sorted(SCRIPTS)))
    return Completion(script.splitlines())


def words(typed: list[str], store: str | None) -> list[str]:
    """Candidates for the last word: a subcommand, or a session name where one is expected."""
    last = typed[-1] if typed else ""
    before = typed[:-1]
    if "-s" in before or "--store" in before:
        place = max(i for i, word in enumerate(before) if word in ("-s", "--store"))
        store = before[place + 1] if place + 1 < len(before) else store
        before = before[:place] + before[place + 2 :]
    plain = [word for word in before if not word.startswith("-")]
    if not plain:
        return [c.name for c in COMMANDS if c.name.startswith(last)]
    if plain[0] in TAKES_A_SESSION and store:
        with contextlib.suppress(AgentckptError):
            return [name for name in session_names(store) if name.startswith(last)]
    return []


def session_names(path: str) -> list[str]:
    from ...store import Store

    with Store.open(path, mode="ro") as store:
        view = store.view()
        return sorted([*view.names, *view.tags])


def render(name: str, result: Completion, screen: Screen) -> None:
    for line in result.lines:
        screen.line(line)
