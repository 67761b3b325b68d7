"""How each position's KV was computed: pure functions over lists of ``(start, length, kind)``.

An ``append`` span was computed in pieces of ``piece`` tokens counted from its start, each piece in a forward of its own;
a ``decode`` span one token at a time, alone; a ``batch`` span one token at a time beside other sequences, so that its
bytes cannot be had again.

Invariants:
1. Starts increase strictly, the first is 0, and every position below the computed length lies in a span.
2. A later span, or the computed length, may begin before an earlier span ends (truncation, a prefix hit). The rest of the
   earlier span is void, but its length still says how many rows the forward had: the bytes of a row depend on that number
   and not on the other rows' values, so the piece can be computed again with rows of padding.
3. ``cut`` keeps the length only up to the end of the piece that holds the last valid position.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..errors import CorruptionError

Span = tuple[int, int, str]
"""(first position, number of rows, ``append`` | ``decode`` | ``batch``)"""
KINDS = frozenset({"append", "decode", "batch"})


@dataclass(frozen=True, slots=True)
class Piece:
    """One forward: ``num_rows`` rows from ``start``, of which the first ``num_valid`` are kept."""

    start: int
    num_rows: int
    num_valid: int
    kind: str


def add(spans: list[Span], start: int, length: int, kind: str, piece: int) -> None:
    """Note that ``length`` positions from ``start`` (the computed length) were computed; merge where the rule allows."""
    if spans:
        first, rows, last_kind = spans[-1]
        whole = last_kind != "append" or rows % piece == 0
        if last_kind == kind and first + rows == start and whole:
            spans[-1] = (first, rows + length, kind)
            return
    spans.append((start, length, kind))


def cut(spans: list[Span], computed: int, piece: int) -> None:
    """Forget, in place, how positions from ``computed`` on were computed."""
    while spans and spans[-1][0] >= computed:
        spans.pop()
    if not spans:
        return
    start, rows, kind = spans[-1]
    used = computed - start
    keep = -(-used // piece) * piece if kind == "append" else used
    spans[-1] = (start, min(rows, keep), kind)


def pieces(spans: Sequence[Span], begin: int, end: int, piece: int) -> Iterator[Piece]:
    """The forwards that compute positions from the piece that holds ``begin`` up to ``end``, in order.

    The first one starts at or below ``begin``; a decode span yields one piece a token.
    """
    first_index = max(bisect_right(spans, begin, key=lambda span: span[0]) - 1, 0)
    for index in range(first_index, len(spans)):
        start, rows, kind = spans[index]
        if start >= end:
            return
        following = spans[index + 1][0] if index + 1 < len(spans) else end
        stop = min(start + rows, following, end)
        if stop <= begin:
            continue
        size = piece if kind == "append" else 1
        first = start + max(0, begin - start) // size * size
        for position in range(first, stop, size):
            num_rows = min(size, start + rows - position)
            yield Piece(position, num_rows, min(num_rows, stop - position), kind)


def piece_start(spans: Sequence[Span], position: int, piece: int) -> int:
    """Where the forward that computed ``position`` began."""
    start, _rows, kind = spans[bisect_right(spans, position, key=lambda span: span[0]) - 1]
    return start + (position - start) // piece * piece if kind == "append" else position


def covering(spans: Sequence[Span], begin: int, end: int, piece: int) -> tuple[Span, ...]:
    """The single forwards that computed positions ``begin`` to ``end``, for another sequence to take over."""
    return tuple((p.start, p.num_rows, p.kind) for p in pieces(spans, begin, end, piece))


def adopt(spans: list[Span], taken: Sequence[Span], begin: int, end: int, piece: int) -> None:
    """Note that positions ``begin`` to ``end`` were taken over from a sequence that computed them in ``taken``.

    A forward that began earlier, in a text taken from elsewhere, cannot be repeated: its positions are noted as ``batch``.
    """
    for start, rows, kind in taken:
        if start >= begin:
            add(spans, start, rows, kind, piece)
        elif not any((p.start, p.num_rows, p.kind) == (start, rows, kind) for p in pieces(spans, begin - 1, begin, piece)):
            add(spans, begin, min(start + rows, end) - begin, "batch", piece)


def redone(spans: list[Span], begin: int) -> int:
    """Positions from ``begin`` on were computed again, alone: ``batch`` becomes ``decode``. Returns the first index that changed."""
    first = len(spans)
    index = 0
    while index < len(spans):
        start, rows, kind = spans[index]
        following = spans[index + 1][0] if index + 1 < len(spans) else start + rows
        end = min(start + rows, following)
        if kind == "batch" and end > begin:
            parts = [(start, begin - start, "batch"), (begin, end - begin, "decode")] if start < begin else [(start, end - start, "decode")]
            spans[index : index + 1] = parts
            first = min(first, index)
            index += len(parts) - 1
        index += 1
    return first


def check(raw: object, computed: int, *, name: str) -> list[Span]:
    """Validate spans that were read. Raises ``CorruptionError``."""
    spans: list[Span] = []
    reached = 0
    for item in raw if isinstance(raw, list) else [None]:
        if not isinstance(item, list | tuple) or len(item) != 3:
            raise CorruptionError(object=name, expected="spans [start, length, kind]", found=repr(item)[:80])
        start, rows, kind = item
        if type(start) is not int or type(rows) is not int or kind not in KINDS or rows < 1:
            raise CorruptionError(object=name, expected="spans [start, length, kind]", found=repr(item)[:80])
        if start > reached or (spans and start <= spans[-1][0]) or start < 0 or (not spans and start != 0):
            raise CorruptionError(object=name, expected="spans in order and without gaps", found=f"a span at {start} after {reached}")
        spans.append((start, rows, kind))
        reached = start + rows
    if reached < computed or (spans and spans[-1][0] >= max(computed, 1)):
        raise CorruptionError(object=name, expected=f"spans over {computed} positions", found=f"{reached}")
    return spans
