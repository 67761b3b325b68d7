"""Captures in flight: their pins, and what they hand back.

Invariants:
1. Captures hold pins on at most ``pin_limit`` blocks, or one capture alone on more. Above it a capture waits for one that is
   being written. If none is (all wait to be written, maybe behind this very caller), it copies its bytes at once: no wait
   without an end.
2. What a capture wrote becomes the base of the next only if it was written whole.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from ..kv.capture import Base, Cut, KVPending, Marks, Run, Written
from ..types import Ref, Sink
from .blocks import BlockPool, PagedKV
from .context import Context

if TYPE_CHECKING:
    from .sequence import Sequence

AtBoundary = Callable[[Callable[[], KVPending | None]], KVPending | None]


class Captures:
    """All captures of one engine. ``lock`` is the engine's."""

    def __init__(self, pool: BlockPool, kv: PagedKV, lock: threading.Condition, *, pin_limit: int) -> None:
        self._pool = pool
        self._kv = kv
        self._lock = lock
        self._pin_limit = pin_limit
        self._pendings: list[KVPending] = []

    def take(self, holder: Sequence, at_boundary: AtBoundary, sink: Sink, previous: Ref | None) -> KVPending:
        """Cut the context of ``holder`` between two steps. Blocks the caller until there, and while too much is pinned."""
        num_needed: list[int] = []
        while True:
            pending = at_boundary(lambda: self._cut(holder.context, sink, previous, num_needed))
            if pending is not None:
                return pending
            with self._lock:
                # A cut of a long context is not cheap: it is tried again when there is room for it, not at each unpin.
                while self._any_written_now() and self._is_over(num_needed[-1]):
                    self._lock.wait()

    def _is_over(self, num_more: int) -> bool:
        return self._pool.num_pinned > 0 and self._pool.num_pinned + num_more > self._pin_limit

    def _any_written_now(self) -> bool:
        return any(one.started for one in self._pendings)

    def _cut(self, context: Context, sink: Sink, previous: Ref | None, num_needed: list[int]) -> KVPending | None:
        """None, and the number of blocks that it would pin, if it has to wait."""
        begun = time.perf_counter()
        cut = context.cut(sink, previous)
        parts = [*cut.runs, *([cut.tail_runs] if cut.tail_runs else [])]
        staged = None
        num_blocks = sum(map(len, parts))
        if parts and self._is_over(num_blocks):
            if self._any_written_now():
                num_needed.append(num_blocks)
                return None
            staged = [self._kv.gather(runs) for runs in parts]
        else:
            for block, slot, count in (run for runs in parts for run in runs):
                self._pool.pin(block, slot + count)
        context.marks.append(cut.marks)
        pending = KVPending(
            cut=cut, sink=sink, memory=self._kv, unpin=self._unpin, pause_s=0.0, staged=staged,
            done=lambda written: self._ended(context, cut, pending, written),
        )  # fmt: skip
        self._pendings.append(pending)
        pending.pause_s = time.perf_counter() - begun
        return pending

    def _unpin(self, runs: Iterable[Run]) -> None:
        with self._lock:
            for block, slot, count in runs:
                self._pool.unpin(block, slot + count)
            self._lock.notify_all()

    def _ended(self, context: Context, cut: Cut, pending: KVPending, written: Written | None) -> None:
        with self._lock:
            gone: Marks | None = cut.marks
            if written is not None:
                gone = context.base.marks if context.base else None
                context.base = Base(written, cut.marks)
            context.marks = [marks for marks in context.marks if marks is not gone]
            self._pendings = [one for one in self._pendings if one is not pending]
            self._lock.notify_all()
