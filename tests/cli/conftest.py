"""A store that a real session wrote: three turns with files, state and effects."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import agentckpt
from agentckpt.cli.main import main


@dataclass
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Command = Callable[..., Ran]


class Counter:
    def __init__(self) -> None:
        self.count = 0
        self.notes = agentckpt.AppendList()

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "notes": self.notes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self.notes = state["count"], state["notes"]


@agentckpt.tool(effect="irreversible", intent_key=lambda version: version)
def release(version: str) -> str:
    return f"released {version}"


def write_store(root: Path) -> Path:
    workspace = root / "repo"
    workspace.mkdir()
    (workspace / "README").write_text("first\n")
    with agentckpt.Session.open(root / "store", "fix", sandbox=workspace, state=Counter) as session:
        for turn in session.turns(until=lambda: session.state.count == 3):
            number = session.state.count
            turn.call(session.sandbox.run, command=f"echo line {number} >> log.txt; echo {number} > file-{number}")
            if number == 2:
                turn.call(release, version="v1")
            session.state.notes.append(f"<b>note {number}</b>")
            session.state.count += 1
    return root / "store"


@pytest.fixture(scope="session")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only: do not change it."""
    return write_store(tmp_path_factory.mktemp("shared"))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return write_store(tmp_path)


@pytest.fixture
def command() -> Command:
    """Run ``agentckpt`` in this process."""

    def run(*arguments: object) -> Ran:
        raw = io.BytesIO()
        out, err = io.TextIOWrapper(raw, encoding="utf-8", write_through=True), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            code = main([str(a) for a in arguments])
            sys.stdout.flush()
        return Ran(code, raw.getvalue().decode(), err.getvalue())

    return run
