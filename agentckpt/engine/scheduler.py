"""What runs next, and who gives up blocks for it.

Invariants:
1. A piece of a prefill, a recomputation and a pack of branches run alone; decodes run together.
2. Room is made in this order: sequences without an operation (paused ones last), longest unused first; then operations
   younger than the one that needs room, youngest first. So the oldest operation always progresses.
3. An operation fails for want of blocks only if it is the oldest, nothing can be given up, and no capture holds a pin.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import CapacityError
from ..kv.spans import Piece
from .context import Context, Memory
from .operations import Generate, Operation, ScoreCandidates
from .sequence import Sequence


@dataclass(frozen=True, slots=True)
class Step:
    """One forward. ``piece`` is None for a decode of all ``operations``, and for a pack of branches."""

    operations: tuple[Operation, ...]
    piece: Piece | None = None
    again: bool = False
    """positions that were computed before"""
    logits: bool = False
    branches: bool = False


class Scheduler:
    """Guarded by the engine's lock."""

    def __init__(self, memory: Memory, *, max_batch: int) -> None:
        self._memory = memory
        self._max_batch = max_batch
        self._num_started = 0
        self._pieces_turn = True
        self.operations: list[Operation] = []
        self.sequences: set[Sequence] = set()
        self.num_preempted = 0

    def start(self, operation: Operation) -> None:
        self._num_started += 1
        operation.order = self._num_started
        operation.sequence.operation = operation
        operation.sequence.last_used = self._num_started
        self.operations.append(operation)

    def end(self, operation: Operation) -> None:
        self.operations.remove(operation)
        operation.sequence.operation = None

    @property
    def runnable(self) -> list[Operation]:
        return [operation for operation in self.operations if not operation.sequence.paused]

    def next(self) -> Step | None:
        """The next step with its blocks made ready, or None if nothing can run for want of blocks."""
        singles: list[tuple[Operation, Step]] = []
        decodes: list[Operation] = []
        for operation in self.runnable:
            step = self._single(operation)
            if step is None:
                decodes.append(operation)
            else:
                singles.append((operation, step))
        choices = [lambda: self._ready_single(singles), lambda: self._ready_batch(decodes)]
        if not self._pieces_turn:
            choices.reverse()
        self._pieces_turn = not self._pieces_turn
        return choices[0]() or choices[1]()

    def _single(self, operation: Operation) -> Step | None:
        """The step that ``operation`` must run alone, or None if it is a row of a decode."""
        context = operation.sequence.context
        again = context.next_recompute()
        if again is not None:
            return Step((operation,), piece=again, again=True)
        end = operation.run_end
        if not context.computed:
            context.reuse_prefix(end)
        missing = end - context.computed
        if missing == 1 and isinstance(operation, Generate):
            return None
        if missing > 0:
            rows = min(self._memory.piece_tokens, missing)
            piece = Piece(context.computed, rows, rows, "append" if rows > 1 else "decode")
            return Step((operation,), piece=piece, logits=operation.wants_logits and rows == missing)
        return Step((operation,), branches=isinstance(operation, ScoreCandidates))

    def _ready_single(self, singles: list[tuple[Operation, Step]]) -> Step | None:
        for operation, step in singles:
            context = operation.sequence.context
            if step.piece is None:
                return step
            if self.make_room(operation, context, step.piece.start + step.piece.num_valid):
                context.prepare(step.piece.start + step.piece.num_valid)
                return step
        return None

    def _ready_batch(self, decodes: list[Operation]) -> Step | None:
        ready: list[Operation] = []
        for operation in decodes[: self._max_batch]:
            context = operation.sequence.context
            if context.next_recompute() is not None:
                continue  # gave up its blocks to an older one just now
            if self.make_room(operation, context, context.computed + 1):
                context.prepare(context.computed + 1)
                ready.append(operation)
        return Step(tuple(ready), logits=True) if ready else None

    def make_room(self, operation: Operation | None, context: Context, end: int) -> bool:
        """Free the blocks that ``context`` needs to write up to position ``end``. None stands for the youngest operation."""
        needed = context.num_needed(end)
        while self._memory.pool.num_free < needed:
            victim = next(iter(self._victims(operation, context)), None)
            if victim is None:
                return False
            self.num_preempted += 1
            victim.context.drop()
        return True

    def _victims(self, operation: Operation | None, context: Context) -> Iterable[Sequence]:
        holders = [one for one in self.sequences if one.context.table and one.context is not context and not one.held]
        idle = [one for one in holders if one.operation is None or one.paused]
        yield from sorted(idle, key=lambda one: (one.paused, one.last_used))
        if operation is None:
            return
        younger = [one for one in holders if one.operation is not None and not one.paused and one.operation.order > operation.order]
        yield from sorted(younger, key=lambda one: -one.last_used)

    def out_of_blocks(self) -> CapacityError:
        pool = self._memory.pool
        return CapacityError(
            "the KV pool is too small for this sequence", object="engine", expected=f"at most {pool.num_blocks * pool.block_size} tokens",
            found="more", hint="make the engine with a larger num_blocks, or truncate the sequence", code="kv-pool-full",
        )  # fmt: skip
