"""One module under test."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Unit:
    """``bug`` is (text of the right source, text planted in its place); the first occurs exactly once in ``source``."""

    name: str
    """module name in the package, and the function that a new assertion is asked for"""
    source: str
    bug: tuple[str, str]
    tests: str
    """the body of ``tests/test_<name>.py``"""

    @property
    def buggy(self) -> str:
        right, wrong = self.bug
        if self.source.count(right) != 1:
            raise ValueError(f"{self.name}: {right!r} occurs {self.source.count(right)} times in its source")
        return self.source.replace(right, wrong)


def unit(name: str, bug: tuple[str, str], source: str, tests: str) -> Unit:
    """A unit from indented literals: the leading newline goes, the last one stays."""
    return Unit(name, source.lstrip("\n"), bug, tests.lstrip("\n"))
