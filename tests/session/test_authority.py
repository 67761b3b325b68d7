"""Grants: the record holds a handle, the secret is this session's in this process, and spent for everybody else."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

import agentckpt
from agentckpt.errors import ConflictError, IncompatibleError, ToolError
from agentckpt.ledger import Vault

SECRET = "hunter2-the-secret-token"
granted: list[str] = []


@agentckpt.tool(effect="authority")
def get_token(scope: str) -> str:
    granted.append(scope)
    return SECRET


class Agent:
    def __init__(self) -> None:
        self.handle: Any = None

    def state_dict(self) -> dict[str, Any]:
        return {"handle": self.handle}

    def load_state_dict(self, state: Any) -> None:
        self.handle = state["handle"]


class Interrupted(Exception):
    """Leaves the turn open, as a kill does."""


def test_the_secret_is_nowhere_in_the_store(tmp_path: Path) -> None:
    with agentckpt.Session.open(tmp_path / "store", "a", state=Agent) as session:
        for turn in session.turns(until=lambda: session.turn_number == 1):
            session.state.handle = turn.call(get_token, scope="write")
            assert session.reveal(session.state.handle) == SECRET
            assert session.state.handle.tool == "get_token"
        assert [record.value for record in session.effects()] == [dict(session.state.handle)]
    files = [path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file()]
    assert any(b"get_token" in data for data in files)
    assert not any(SECRET.encode() in data for data in files)


def test_a_restored_session_finds_the_grant_spent(tmp_path: Path) -> None:
    with agentckpt.Session.open(tmp_path / "store", "a", state=Agent) as session:
        for turn in session.turns(until=lambda: session.turn_number == 1):
            session.state.handle = turn.call(get_token, scope="write")
    with agentckpt.Session.open(tmp_path / "store", "a", state=Agent) as session:
        with pytest.raises(ConflictError) as raised:
            session.reveal(session.state.handle)
        assert raised.value.code == "authority-spent"
        assert SECRET not in str(raised.value)


def test_a_recovered_turn_gets_the_handle_and_a_tool_that_needs_the_secret_fails_definitely(tmp_path: Path) -> None:
    granted.clear()
    used: list[str] = []

    def attempt(interrupt: bool) -> None:
        with agentckpt.Session.open(tmp_path / "store", "a") as session:

            @agentckpt.tool(effect="irreversible")
            def push(token: dict[str, Any]) -> None:
                used.append(session.reveal(token))

            for turn in session.turns(until=lambda: session.turn_number == 1):
                handle = turn.call(get_token, scope="write")
                if interrupt:
                    raise Interrupted
                with pytest.raises(ToolError):
                    turn.call(push, handle)
            assert [record.state for record in session.effects()] == ["committed", "failed"]

    with pytest.raises(Interrupted):
        attempt(True)
    attempt(False)
    assert granted == ["write"]
    assert used == []


def test_a_branch_finds_the_parents_grant_spent(tmp_path: Path) -> None:
    with agentckpt.Session.open(tmp_path / "store", "a", state=Agent) as session:
        for turn in session.turns(until=lambda: session.turn_number == 1):
            session.state.handle = turn.call(get_token, scope="write")
        with session.fork(1, effects="grant") as branches:
            branch = branches[0]
            with pytest.raises(ConflictError):
                branch.reveal(branch.state.handle)
            assert session.reveal(session.state.handle) == SECRET


def test_a_vault_shows_nothing_and_stays_in_its_process() -> None:
    vault, other = Vault(), Vault()
    handle = vault.keep("ab" * 32, "get_token", SECRET)
    assert SECRET not in repr(vault)
    assert SECRET not in repr(handle)
    with pytest.raises(TypeError):
        pickle.dumps(vault)
    for wrong in ({}, {"$authority": 3}, "text"):
        with pytest.raises(IncompatibleError):
            vault.reveal(wrong)  # type: ignore[arg-type]
    other.take_over(vault)
    assert other.reveal(handle) == SECRET
    with pytest.raises(ConflictError):
        vault.reveal(handle)
