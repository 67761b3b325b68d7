"""The workspace that the agent repairs: a package with planted bugs, its tests, and a few hundred modules around them.

Everything is a function of the list of bugs: two runs of one seed begin with the same bytes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from ..errors import ConflictError
from .catalogue import CATALOGUE, Unit
from .filler import filler_modules

PACKAGE = "quay"

README = """# quay

Small functions for a small harbour. `python -m pytest` runs the tests.
"""

RECORDS_TEST = '''"""Every generated module can be imported and answers."""

import importlib
import pkgutil

import quay


def test_every_module_can_be_imported():
    names = [module.name for module in pkgutil.walk_packages(quay.__path__, "quay.")]
    for name in names:
        importlib.import_module(name)
    assert len(names) > 200
'''


def draw_bugs(seed: int, num_bugs: int) -> tuple[Unit, ...]:
    """Which units get their bug, in the order of the catalogue. Raises ``ValueError`` outside 1 to all."""
    if not 1 <= num_bugs <= len(CATALOGUE):
        raise ValueError(f"the number of bugs is from 1 to {len(CATALOGUE)}, not {num_bugs}")
    drawn = random.Random(f"bugs {seed}").sample(range(len(CATALOGUE)), num_bugs)
    return tuple(CATALOGUE[index] for index in sorted(drawn))


def build(path: Path, bugs: Sequence[Unit]) -> int:
    """Write the project into an absent directory: the number of files. Raises ``ConflictError`` if it is there."""
    if path.exists():
        raise ConflictError("cannot build the project", object=str(path), expected="an absent directory", found="something")
    planted = {unit.name for unit in bugs}
    files = {"README.md": README, f"{PACKAGE}/__init__.py": '"""Functions of a small harbour."""\n'}
    files |= {f"{PACKAGE}/{name}": source for name, source in filler_modules().items()}
    files |= {source_path(u.name): u.buggy if u.name in planted else u.source for u in CATALOGUE}
    files |= {tests_path(unit.name): unit.tests for unit in CATALOGUE}
    files["tests/test_records.py"] = RECORDS_TEST
    for name, text in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    return len(files)


def source_path(name: str) -> str:
    return f"{PACKAGE}/{name}.py"


def tests_path(name: str) -> str:
    return f"tests/test_{name}.py"
