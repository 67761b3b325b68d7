"""The project is the same in every run, its planted bugs are found by the real runner, and the census agrees with it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from agentckpt.demo.catalogue import CATALOGUE
from agentckpt.demo.census import Census, take_census
from agentckpt.demo.edits import enumerate_edits
from agentckpt.demo.project import build, draw_bugs, source_path
from agentckpt.errors import ConflictError

RUNNER = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=no"]
ENVIRONMENT = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def contents(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("num_bugs", [12, len(CATALOGUE)])
def test_exactly_the_planted_bugs_fail(tmp_path: Path, num_bugs: int) -> None:
    bugs = draw_bugs(3, num_bugs)
    assert build(tmp_path / "project", bugs) > 250
    done = subprocess.run(RUNNER, cwd=tmp_path / "project", env=ENVIRONMENT, capture_output=True, text=True)
    failed = {line.split("::")[0] for line in done.stdout.splitlines() if line.startswith("FAILED ")}
    assert failed == {f"FAILED tests/test_{unit.name}.py" for unit in bugs}
    assert not list((tmp_path / "project").rglob("*.pyc")), "the runner leaves nothing behind"


def test_without_bugs_everything_passes(tmp_path: Path) -> None:
    build(tmp_path / "project", ())
    done = subprocess.run(RUNNER, cwd=tmp_path / "project", env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_two_builds_are_equal_and_a_third_place_is_refused(tmp_path: Path) -> None:
    bugs = draw_bugs(1, 4)
    for name in ("one", "two"):
        build(tmp_path / name, bugs)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert contents(tmp_path / "one")[source_path(bugs[0].name)].decode() == bugs[0].buggy
    with pytest.raises(ConflictError):
        build(tmp_path / "one", bugs)


def test_the_draw_follows_the_seed() -> None:
    assert draw_bugs(7, 12) == draw_bugs(7, 12)
    assert len({draw_bugs(seed, 12) for seed in range(20)}) > 10
    assert set(draw_bugs(1, len(CATALOGUE))) == set(CATALOGUE)
    for num_bugs in (0, len(CATALOGUE) + 1):
        with pytest.raises(ValueError):
            draw_bugs(1, num_bugs)


def test_the_census_counts_what_passes() -> None:
    by_name = {unit.name: unit for unit in CATALOGUE}
    boarding, search = take_census([by_name["can_board"], by_name["binary_search"]])
    assert boarding.num_candidates == len(enumerate_edits(by_name["can_board"].buggy))
    assert 1 <= boarding.num_passing < 4
    assert 1 <= search.num_passing < search.num_candidates / 2, "endless loops are ended and count as failed"


def test_every_unit_can_be_repaired() -> None:
    for census in take_census(CATALOGUE):
        assert 1 <= census.num_passing <= census.num_candidates / 3, census


def test_the_random_expectation() -> None:
    assert Census("x", 1, 1).random_tries == 1.0
    assert Census("x", 9, 1).random_tries == 5.0
    assert Census("x", 9, 9).random_tries == 1.0
