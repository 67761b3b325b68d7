"""Killed by the clock, started again, until it is done: the end equals that of an undisturbed run."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest

from agentckpt import Store

from .harness import Child, run

NUM_TURNS = 10


def final(child: Child) -> list[Any]:
    found: list[Any] = json.loads(next(line for line in child.lines() if line.startswith("final ")).removeprefix("final "))
    return found


def undisturbed(program: str, folder: Path) -> list[Any]:
    (folder / "workspace").mkdir(parents=True)
    return final(run(program, folder, str(NUM_TURNS)))


def killed(program: str, folder: Path, seed: int, max_kills: int) -> tuple[list[Any], int]:
    """Kill at drawn times, each time a little after it made some progress (or before any)."""
    (folder / "workspace").mkdir(parents=True)
    draw = random.Random(seed)
    for num_kills in range(max_kills):
        child = Child(program, folder, str(NUM_TURNS))
        start = len(child.lines())
        num_lines = start + draw.randrange(4)
        child.wait_until(lambda: len(child.lines()) >= num_lines or not child.process.is_alive(), "progress")  # noqa: B023
        time.sleep(draw.random() * 0.08)
        if any(line.startswith("final ") for line in child.lines()):
            assert child.finish() == 0, child.log.read_text()[-3000:]
            return final(child), num_kills
        child.kill()
    return final(run(program, folder, str(NUM_TURNS))), max_kills


def check(program: str, tmp_path: Path, seed: int, max_kills: int) -> None:
    expected = undisturbed(program, tmp_path / "quiet")
    found, num_kills = killed(program, tmp_path / "killed", seed, max_kills)
    assert num_kills >= 1, f"seed {seed}: the clock never hit; nothing was tested"
    assert found == expected, f"seed {seed}, {num_kills} kills"
    keys = (tmp_path / "killed" / "published").read_text().split()
    # Each of ten keyed effects was dispatched, and none under a key of its own on another attempt.
    assert len(set(keys)) == NUM_TURNS, f"seed {seed}"
    with Store.open(tmp_path / "killed" / "store") as store:
        session = store.view().session_named("agent")
        assert session.head is not None
        assert session.head["facts"]["turn"] == NUM_TURNS
        assert [head["generation"] for head in session.heads] == list(range(1, session.generation + 1))


@pytest.mark.parametrize(("program", "seed"), [("toy", 1), ("toy", 2), ("engine", 3)])
def test_killed_at_random_times_it_ends_like_an_undisturbed_run(tmp_path: Path, program: str, seed: int) -> None:
    check(program, tmp_path, seed, max_kills=4)


@pytest.mark.slow
@pytest.mark.parametrize("program", ["toy", "engine"])
@pytest.mark.parametrize("seed", range(100, 200))
def test_killed_at_random_times_long_form(tmp_path: Path, program: str, seed: int) -> None:
    check(program, tmp_path, seed, max_kills=30)
