"""Which journal positions belong to the present timeline, after any number of rollbacks.

A position is ``(depth, sseq)``: depth 0 is the oldest ancestor's journal, so positions of a whole lineage are ordered. A
rollback written at S that went back to mark M leaves the timeline *as it was at M*, up to M, plus everything after S. So a
rollback to a checkpoint of an abandoned timeline takes that timeline up again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

Position = tuple[int, int]
BEGINNING: Final[Position] = (-1, 0)


class Return(NamedTuple):
    """One rollback: the position of its record, and the mark that it went back to."""

    at: Position
    mark: Position


class Timeline:
    """The half-open intervals ``(low, high]`` of positions that lead to the present; the last one is open at its end."""

    def __init__(self, returns: Sequence[Return] = ()) -> None:
        """``returns`` in the order in which they were written."""
        self._returns = list(returns)
        self._intervals = _intervals_up_to(None, self._returns)

    def add(self, step: Return) -> None:
        self._returns.append(step)
        self._intervals = _intervals_up_to(None, self._returns)

    def __contains__(self, position: Position) -> bool:
        return any(low < position and (high is None or position <= high) for low, high in self._intervals)


def _intervals_up_to(end: Position | None, returns: Sequence[Return]) -> list[tuple[Position, Position | None]]:
    """The timeline that was the present one at ``end`` (None: now)."""
    intervals: list[tuple[Position, Position | None]] = []
    for step in reversed(returns):
        # Each step is older than the one before it, so this walks back in time and every return is looked at once.
        if end is None or step.at <= end:
            intervals.append((step.at, end))
            end = step.mark
    intervals.append((BEGINNING, end))
    return intervals
