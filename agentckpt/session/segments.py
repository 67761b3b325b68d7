"""What was appended to and generated on the sequences of one turn, recorded for the next intent, and matched on recovery.

Invariants:
1. ``index`` counts the operations of one part in one turn, from 0; a record with an index already seen replaces it and all after it.
2. A recorded generation is never sampled again.
3. Records wait in memory until an intent is written, and are dropped by the cut that holds their tokens.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from ..errors import CorruptionError, DivergenceError

Operation = Literal["append", "generate", "truncate"]
OPERATIONS: tuple[Operation, ...] = ("append", "generate", "truncate")
MAX_SHOWN_IDS = 12


@dataclass(frozen=True, slots=True)
class Segment:
    """One operation on one sequence. ``ids``: tokens added; for ``truncate`` the one number is the new length."""

    turn: int
    part: str
    index: int
    op: Operation
    ids: tuple[int, ...]
    request: bytes | None = None
    text: str = ""
    stop: str = ""

    def body(self, epoch: int) -> dict[str, Any]:
        """The journal record; ``ids`` are u32, little endian."""
        return {
            "epoch": epoch,
            "turn": self.turn,
            "part": self.part,
            "index": self.index,
            "op": self.op,
            "ids": struct.pack(f"<{len(self.ids)}I", *self.ids),
            "request": self.request,
            "text": self.text,
            "stop": self.stop,
        }

    @classmethod
    def of_body(cls, body: Mapping[str, Any]) -> Segment:
        """Raises ``CorruptionError`` (code ``segment-shape``)."""
        ids, op, request = body.get("ids"), body.get("op"), body.get("request")
        numbers = (body.get("turn"), body.get("index"))
        texts = (body.get("part"), body.get("text"), body.get("stop"))
        sound = (
            op in OPERATIONS
            and (request is None or (isinstance(request, bytes) and len(request) == 32))
            and all(isinstance(number, int) and number >= 0 for number in numbers)
            and all(isinstance(text, str) for text in texts)
        )
        if not sound or not isinstance(ids, bytes) or len(ids) % 4:
            raise CorruptionError("not a segment record", code="segment-shape", expected="FORMAT.md section 5, kind 4", found=repr(op))
        tokens = struct.unpack(f"<{len(ids) // 4}I", ids)
        return cls(body["turn"], body["part"], body["index"], cast(Operation, op), tokens, request, body["text"], body["stop"])


def recorded_segments(bodies: Iterable[Mapping[str, Any]], turn: int) -> dict[str, list[Segment]]:
    """The segments of ``turn`` by part, in order, later records winning over earlier ones of the same index."""
    found: dict[str, list[Segment]] = {}
    for body in bodies:
        segment = Segment.of_body(body)
        if segment.turn != turn:
            continue
        kept = found.setdefault(segment.part, [])
        if segment.index > len(kept):
            raise CorruptionError(
                "a segment record is missing", code="segment-gap", object=segment.part, expected=str(len(kept)), found=str(segment.index)
            )
        del kept[segment.index :]
        kept.append(segment)
    return found


class Segments:
    """The segments of the turn that is open: those to be matched, and those new since the last record was written.

    Thread-safe. With ``continue_on_divergence`` the first difference drops all that was still to be matched.
    """

    def __init__(self, *, continue_on_divergence: bool = False) -> None:
        self._lock = threading.Lock()
        self._continue = continue_on_divergence
        self._recorded: dict[str, list[Segment]] = {}
        self._replay_turn = -1
        self._next: dict[str, int] = {}
        self._fresh: list[Segment] = []
        self._turn = 0
        self.num_dropped = 0
        """segments given up because the program did something else (``on_divergence="continue"``)"""

    def expect(self, turn: int, recorded: Mapping[str, Sequence[Segment]]) -> None:
        """Match these when ``turn`` is executed."""
        self._replay_turn, self._recorded = turn, {part: list(items) for part, items in recorded.items()}

    def begin_turn(self, turn: int) -> None:
        with self._lock:
            self._turn, self._next, self._fresh = turn, {}, []

    def next(self, part: str) -> Segment | None:
        """The record that the next operation on ``part`` must equal, or None: the operation is new."""
        with self._lock:
            items = self._recorded.get(part, []) if self._turn == self._replay_turn else []
            position = self._next.get(part, 0)
            return items[position] if position < len(items) else None

    def matched(self, segment: Segment) -> None:
        with self._lock:
            self._next[segment.part] = segment.index + 1

    def add(self, part: str, op: Operation, ids: Sequence[int], **facts: Any) -> None:
        """Record a new operation."""
        with self._lock:
            index = self._next.get(part, 0)
            self._next[part] = index + 1
            self._fresh.append(Segment(self._turn, part, index, op, tuple(ids), **facts))

    def diverged(self, part: str, index: int, expected: str, found: str) -> None:
        """The program did something else: raise ``DivergenceError``, or drop what was still to be matched."""
        if not self._continue:
            raise DivergenceError(
                "the recovered turn did something else",
                object=f"turn {self._turn}, {part}, operation {index}",
                expected=expected,
                found=found,
                hint="code between the calls must be a function of state, results and model output; "
                'or open the session with on_divergence="continue"',
            )
        with self._lock:
            for name, items in self._recorded.items():
                done = self._next.get(name, 0)
                self.num_dropped += max(0, len(items) - done)
                del items[done:]

    @property
    def turn(self) -> int:
        return self._turn

    @property
    def num_done(self) -> int:
        """Operations of the open turn so far."""
        with self._lock:
            return sum(self._next.values())

    def left(self) -> list[Segment]:
        """Records of the open turn that nothing has matched."""
        with self._lock:
            if self._turn != self._replay_turn:
                return []
            return [item for part, items in self._recorded.items() for item in items[self._next.get(part, 0) :]]

    def drop_left(self) -> None:
        with self._lock:
            self.num_dropped += sum(len(items) - self._next.get(part, 0) for part, items in self._recorded.items())
            self._recorded = {}

    def take_fresh(self) -> list[Segment]:
        """What no record holds yet; the caller writes it, or gives it back."""
        with self._lock:
            fresh, self._fresh = self._fresh, []
            return fresh

    def give_back(self, segments: Sequence[Segment]) -> None:
        with self._lock:
            if segments and segments[0].turn == self._turn:
                self._fresh = [*segments, *self._fresh]


def show_ids(ids: Sequence[int]) -> str:
    """Token ids for a message, cut short."""
    shown = " ".join(str(number) for number in ids[:MAX_SHOWN_IDS])
    return f"{len(ids)} ids [{shown}{' ...' if len(ids) > MAX_SHOWN_IDS else ''}]"
