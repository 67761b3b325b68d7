"""The timeline after any rollbacks equals that of a model that keeps the whole history of each position."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from agentckpt.ledger.timeline import Return, Timeline


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 1000)), max_size=40))
def test_the_timeline_is_the_history_of_the_present(steps: list[tuple[bool, int]]) -> None:
    # The model: at each position, the set of positions that led to it.
    histories: list[frozenset[int]] = [frozenset()]
    returns: list[Return] = []
    timeline = Timeline()
    for is_rollback, choice in steps:
        position = len(histories)
        if is_rollback:
            mark = choice % position
            step = Return((0, position), (0, mark))
            returns.append(step)
            timeline.add(step)
            histories.append(histories[mark] | ({mark} if mark else frozenset()))
        else:
            last = position - 1
            histories.append(histories[last] | ({last} if last else frozenset()))
    present = histories[-1] | {len(histories) - 1}
    rollbacks = {step.at[1] for step in returns}
    for position in range(1, len(histories)):
        # A rollback's own record belongs to no timeline as an effect; the ledger never asks for it.
        if position not in rollbacks:
            assert ((0, position) in timeline) == (position in present)
    assert Timeline(returns)._intervals == timeline._intervals


def test_ancestors_come_before_the_session() -> None:
    timeline = Timeline([Return(at=(1, 5), mark=(0, 3))])
    assert (0, 3) in timeline
    assert (0, 4) not in timeline
    assert (1, 4) not in timeline
    assert (1, 6) in timeline
