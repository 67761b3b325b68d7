"""What is said about commands, options and exit codes in one place agrees with the other places."""

from __future__ import annotations

import builtins
import re
from pathlib import Path

import pytest

import agentckpt
from agentckpt import errors
from agentckpt.cli.main import COMMANDS
from agentckpt.cli.reference import reference
from agentckpt.cli.stores import UsageError

COMMITTED = Path(agentckpt.__file__).parent / "cli" / "REFERENCE.md"
DRAWN = re.compile(r"[|`]-- (\w+) +\((\w+)\) .* exit (\d+)$", re.MULTILINE)


def test_the_committed_reference_is_what_the_parsers_say() -> None:
    assert COMMITTED.read_text(encoding="utf-8") == reference(), "run: python -m agentckpt.cli.reference > agentckpt/cli/REFERENCE.md"


def test_the_reference_does_not_depend_on_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    assert reference() == COMMITTED.read_text(encoding="utf-8")


def test_every_command_and_every_option_is_explained() -> None:
    text = reference()
    assert all(f"### `{command.name}`" in text for command in COMMANDS)
    empty = [line for line in text.splitlines() if re.fullmatch(r"\| `.*` \| *\|", line)]
    assert not empty


def test_the_reference_lists_the_exit_codes() -> None:
    rows = dict(re.findall(r"^\| (\d+) \| (.*) \|$", reference(), re.MULTILINE))
    assert rows == {str(code): meaning for code, meaning in errors.EXIT_CODES.items()}


def test_the_drawing_of_the_exceptions_is_the_exceptions() -> None:
    drawn = {name: (getattr(builtins, base), int(code)) for name, base, code in DRAWN.findall(errors.__doc__ or "")}
    real = {
        cls.__name__: (cls.__bases__[1], cls.exit_code)
        for cls in vars(errors).values()
        if isinstance(cls, type) and issubclass(cls, errors.AgentckptError) and cls is not errors.AgentckptError
    }
    assert drawn == real
    assert {code for _, code in real.values()} | {UsageError.exit_code} <= set(errors.EXIT_CODES)
