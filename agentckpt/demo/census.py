"""How many edits of a module pass its tests: the random searcher's chances, which the agent never sees.

A searcher that tries ``n`` edits in random order, of which ``p`` pass, needs ``(n + 1) / (p + 1)`` tries on average
(the expected position of the first of p marked items in a random order of n).

The edits run in a process of their own, each under a limit of processor time, without the test runner: this is arithmetic beside the
demo, and what counts as repaired is decided by the real runner alone.
"""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import StoreError
from .catalogue import Unit
from .edits import enumerate_edits
from .project import PACKAGE

EDIT_LIMIT_S = 0.1
"""of processor time, so that a busy machine counts as a quiet one does"""
MEMORY_LIMIT_BYTES = 2 << 30


@dataclass(frozen=True, slots=True)
class Census:
    """Of one planted bug: all candidate edits, and those that pass the tests."""

    bug: str
    num_candidates: int
    num_passing: int

    @property
    def random_tries(self) -> float:
        return (self.num_candidates + 1) / (self.num_passing + 1)


def take_census(units: Sequence[Unit]) -> list[Census]:
    """Count for each unit; one child process for all. Raises ``StoreError`` if it fails."""
    work = [(unit.name, unit.tests, [edit.text for edit in enumerate_edits(unit.buggy)]) for unit in units]
    done = subprocess.run(
        [sys.executable, "-m", "agentckpt.demo.census"], input=json.dumps(work), capture_output=True, text=True
    )  # fmt: skip
    if done.returncode:
        raise StoreError("the count of passing edits failed", found=done.stderr.strip()[-300:])
    counts: list[int] = json.loads(done.stdout)
    return [Census(name, len(texts), passing) for (name, _, texts), passing in zip(work, counts, strict=True)]


def passes(name: str, tests: str, text: str) -> bool:
    """Whether one edited module passes all its tests within the limit."""
    module = types.ModuleType(f"{PACKAGE}.{name}")
    scope: dict[str, Any] = {}
    signal.setitimer(signal.ITIMER_VIRTUAL, EDIT_LIMIT_S)
    try:
        exec(compile(text, name, "exec"), module.__dict__)
        sys.modules[module.__name__] = module
        exec(compile(tests, f"test_{name}", "exec"), scope)
        for key, value in list(scope.items()):
            if key.startswith("test_"):
                value()
    except Exception:
        return False
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    return True


def _too_slow(number: int, frame: types.FrameType | None) -> None:
    raise TimeoutError


def main() -> int:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    signal.signal(signal.SIGVTALRM, _too_slow)
    sys.modules[PACKAGE] = types.ModuleType(PACKAGE)
    work = json.load(sys.stdin)
    json.dump([sum(passes(name, tests, text) for text in texts) for name, tests, texts in work], sys.stdout)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
