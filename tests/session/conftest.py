"""Fixtures of the session's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from agentckpt import Store

from .toy import Opener, ToyEngine


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store", create=True) as opened:
        yield opened


@pytest.fixture
def engine() -> ToyEngine:
    return ToyEngine()


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    path = tmp_path / "workspace"
    path.mkdir()
    (path / "README").write_text("hello\n")
    return path


@pytest.fixture
def opener(store: Store, engine: ToyEngine, workspace: Path) -> Opener:
    return Opener(store, engine, workspace)
