"""Spans against an oracle that notes, for every position, the forward that computed it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentckpt.errors import CorruptionError
from agentckpt.kv import spans
from agentckpt.kv.spans import Span

PIECE = 8
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(2, 40)), st.tuples(st.just("decode"), st.integers(1, 6)),
        st.tuples(st.just("batch"), st.integers(1, 6)), st.tuples(st.just("cut"), st.integers(0, 30)),
    ),
    max_size=12,
)  # fmt: skip


def play(steps: list[tuple[str, int]]) -> tuple[list[Span], list[tuple[int, int, str]]]:
    """The spans, and by position (start, rows, kind) of its forward. An append run is cut into pieces of 8."""
    noted: list[Span] = []
    truth: list[tuple[int, int, str]] = []
    for kind, size in steps:
        if kind == "cut":
            del truth[max(0, len(truth) - size) :]
            spans.cut(noted, len(truth), PIECE)
        elif kind == "append":
            while size:
                rows = min(PIECE, size)
                spans.add(noted, len(truth), rows, "append" if rows > 1 else "decode", PIECE)
                truth += [(len(truth), rows, "append" if rows > 1 else "decode")] * rows
                size -= rows
        else:
            for _ in range(size):
                spans.add(noted, len(truth), 1, kind, PIECE)
                truth.append((len(truth), 1, kind))
    return noted, truth


@settings(deadline=None)
@given(STEPS)
def test_the_pieces_of_the_spans_are_the_forwards_that_ran(steps: list[tuple[str, int]]) -> None:
    noted, truth = play(steps)
    found: list[tuple[int, int, str]] = []
    for piece in spans.pieces(noted, 0, len(truth), PIECE):
        assert piece.start == len(found)
        assert 1 <= piece.num_valid <= piece.num_rows
        found += [(piece.start, piece.num_rows, piece.kind)] * piece.num_valid
    assert found == truth
    assert spans.check([list(span) for span in noted], len(truth), name="test") == noted


@settings(deadline=None)
@given(STEPS, st.floats(0, 1))
def test_pieces_from_the_middle_are_the_last_ones(steps: list[tuple[str, int]], share: float) -> None:
    noted, truth = play(steps)
    if not truth:
        return
    begin = int(share * (len(truth) - 1))
    every = list(spans.pieces(noted, 0, len(truth), PIECE))
    late = list(spans.pieces(noted, begin, len(truth), PIECE))
    assert late == every[-len(late) :]
    assert late[0].start == spans.piece_start(noted, begin, PIECE) <= begin
    assert late[0].start + late[0].num_valid > begin


@settings(deadline=None)
@given(STEPS, st.integers(0, 80))
def test_positions_computed_again_alone_are_no_longer_batch(steps: list[tuple[str, int]], begin: int) -> None:
    noted, truth = play(steps)
    changed = spans.redone(noted, begin)
    expected = [(s, r, "decode" if kind == "batch" and at >= begin else kind) for at, (s, r, kind) in enumerate(truth)]
    found = [(p.start, p.num_rows, p.kind) for p in spans.pieces(noted, 0, len(truth), PIECE) for _ in range(p.num_valid)]
    assert found == expected
    assert changed == len(noted) or expected != truth


@settings(deadline=None)
@given(STEPS, STEPS, st.integers(0, 5))
def test_adopted_positions_keep_their_forwards_or_say_so(a: list[tuple[str, int]], b: list[tuple[str, int]], units: int) -> None:
    """Units of 16 positions taken in turn from two texts; each keeps its forwards if it begins with one."""
    donors = [play(a), play(b)]
    noted: list[Span] = []
    expected: list[tuple[int, int, str]] = []
    for unit in range(units):
        donor, truth = donors[unit % 2]
        first, end = unit * 16, unit * 16 + 16
        if len(truth) < end:
            break
        spans.adopt(noted, spans.covering(donor, first, end, PIECE), first, end, PIECE)
        for at in range(first, end):
            start, rows, kind = truth[at]
            same = start >= first or (expected[-1] == truth[at] and at > first) or expected[first - 1] == truth[at]
            expected.append((start, rows, kind) if same else (at, 1, "batch"))
    found = [(p.start, p.num_rows, p.kind) for p in spans.pieces(noted, 0, len(expected), PIECE) for _ in range(p.num_valid)]
    assert found == expected


@pytest.mark.parametrize(
    ("raw", "computed"),
    [
        (None, 0), ([[0, 5]], 5), ([[0, 5, "guess"]], 5), ([[0, True, "append"]], 1), ([[1, 5, "append"]], 5), ([[0, 5, "append"]], 6),
        ([[0, 5, "append"], [7, 2, "decode"]], 9), ([[0, 5, "append"], [0, 5, "append"]], 5), ([], 3), ([[0, 0, "append"]], 0),
        ([[0, 5, "append"], [-1, 9, "decode"]], 6), ([[0, 9, "append"], [5, 4, "decode"]], 5),
    ],
)  # fmt: skip
def test_spans_that_do_not_cover_are_refused(raw: object, computed: int) -> None:
    with pytest.raises(CorruptionError):
        spans.check(raw, computed, name="test")
