"""``session.kv``: a live sequence whose operations are recorded, and matched on recovery.

Invariants:
1. Operations on one sequence happen in the order of the calls, also when nobody waits for them.
2. A failed operation whose handle nobody looked at fails the next operation too: it never goes unseen.
3. On an event loop's thread a call only queues; the engine is called from a pool thread.
4. A capture is an operation in the same queue, so it sees exactly the operations before it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from ..handles import Handle
from ..types import Appendable, Generation, LiveSequence, Pending, Ref, Score, Sink
from .executor import Watched, chain, on_loop_thread, pool
from .segments import Segments, show_ids

T = TypeVar("T")


class RecordingSequence:
    """A live sequence of a session. ``append``, ``generate`` and ``truncate`` are recorded; ``score`` passes through.

    Several threads and tasks may call it; operations are queued in the order of the calls.
    """

    def __init__(self, name: str, inner: LiveSequence, segments: Segments, guard: Callable[[], None] = lambda: None) -> None:
        self._name = name
        self._inner = inner
        self._segments = segments
        self._guard = guard
        self._lock = threading.Lock()
        self._last: Watched[Any] | None = None
        self._last_append: Watched[Any] | None = None

    # reading

    @property
    def tokens(self) -> Sequence[int]:
        return self._inner.tokens

    @property
    def num_computed(self) -> int:
        return self._inner.num_computed

    @property
    def nonce(self) -> bytes:
        return self._inner.nonce

    def encode(self, item: Appendable) -> list[int]:
        """The ids that ``append(item)`` would add now."""
        return self._inner.encode(item)

    # operations

    def append(self, item: Appendable) -> Handle[tuple[int, ...]]:
        """Add ids, text or messages. Raises (in the handle) ``IncompatibleError``, ``CapacityError``, ``DivergenceError``."""
        self._guard()
        self._last_append = self._enqueue(lambda: self._append(item))
        return self._last_append

    def generate(self, **options: Any) -> Handle[Generation]:
        """Decode; options as ``LiveSequence.generate``. On recovery a recorded generation is fed again and never sampled."""
        self._guard()
        return self._enqueue(lambda: self._generate(options))

    def score(self, candidates: Sequence[str | Sequence[int]]) -> Handle[list[Score]]:
        """Log-probabilities (nats) of each candidate after the present tokens; leaves sequence and journal unchanged."""
        self._guard()
        return self._enqueue(lambda: self._inner.score(candidates))

    def truncate(self, length: int) -> Handle[None]:
        """Forget the tokens from ``length`` on."""
        self._guard()
        done = self._enqueue(lambda: self._truncate(length))
        if done.done():
            done.result()  # an error of a call that is over surfaces here
        return done

    def capture(self, sink: Sink, previous: Ref | None) -> Handle[Pending]:
        """Pin the sequence as it stands after the operations queued so far."""
        return self._enqueue(lambda: Handle.of(self._inner.capture(sink, previous)))

    def quiet(self) -> Handle[None]:
        """Done when the operations queued so far are; fails if one of them did and nobody looked."""
        return self._enqueue(lambda: Handle.of(None))

    def append_waiting(self) -> Handle[Any] | None:
        """The last append, if it is still on its way: an intent waits for it, so that it carries the segments so far."""
        last = self._last_append
        return None if last is None or last.done() else last.then(lambda _: None)

    def fork(self, n: int) -> Sequence[LiveSequence]:
        """Raw forks of the sequence: nothing on them is recorded, and the caller closes them. See ``Session.fork``."""
        return self._inner.fork(n)

    def fork_queued(self, n: int) -> Handle[Sequence[LiveSequence]]:
        """Raw forks as the sequence stands after the operations queued so far."""
        return self._enqueue(lambda: Handle.of(self._inner.fork(n)))

    def close(self) -> None:
        self._inner.close()

    def replace(self, inner: LiveSequence) -> LiveSequence:
        """Take over another live sequence; returns the one before (not closed)."""
        with self._lock:
            self._inner, before = inner, self._inner
        return before

    @property
    def inner(self) -> LiveSequence:
        """The engine's own sequence: what is done on it directly is not recorded."""
        return self._inner

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._inner, name)

    # one operation after the other

    def _enqueue(self, start: Callable[[], Handle[T]]) -> Watched[T]:
        operation: Watched[T] = Watched()
        with self._lock:
            before, self._last = self._last, operation

        def begin() -> None:
            try:
                error = before.unseen_error() if before is not None else None
                if error is not None:
                    raise error
                started = start()
            except BaseException as failure:
                operation._future.set_exception(failure)
            else:
                chain(started, operation._future)

        if before is not None and not before.done():
            before._future.add_done_callback(lambda _: pool("quick").submit(begin) and None)
        elif on_loop_thread():
            pool("quick").submit(begin)
        else:
            begin()
        return operation

    def _append(self, item: Appendable) -> Handle[tuple[int, ...]]:
        recorded = self._segments.next(self._name)
        if recorded is None:
            return self._inner.append(item).then(self._record_append)
        ids = tuple(self._inner.encode(item))
        if recorded.op != "append" or recorded.ids != ids:
            found = f"append of {show_ids(ids)}"
            self._segments.diverged(self._name, recorded.index, f"{recorded.op} of {show_ids(recorded.ids)}", found)
            return self._inner.append(item).then(self._record_append)
        self._segments.matched(recorded)
        return self._inner.append(item)

    def _record_append(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        self._segments.add(self._name, "append", ids)
        return ids

    def _generate(self, options: dict[str, Any]) -> Handle[Generation]:
        digest = self._inner.request_digest(**options)
        recorded = self._segments.next(self._name)
        if recorded is not None and (recorded.op != "generate" or recorded.request != digest):
            wanted = (
                f"generate, request {recorded.request.hex()[:12]}" if recorded.request else f"{recorded.op} of {show_ids(recorded.ids)}"
            )
            found = f"generate, request {digest.hex()[:12]} at position {len(self._inner.tokens)} with {options}"
            self._segments.diverged(self._name, recorded.index, wanted, found)
            recorded = None
        if recorded is None:
            return self._inner.generate(**options).then(lambda made: self._record_generation(made, digest))
        self._segments.matched(recorded)
        text, stop = recorded.text, recorded.stop
        forced = {**options, "forced": recorded.ids}
        return self._inner.generate(**forced).then(lambda made: replace(made, text=text, stop_reason=stop))

    def _record_generation(self, made: Generation, digest: bytes) -> Generation:
        self._segments.add(self._name, "generate", made.ids, request=digest, text=made.text, stop=made.stop_reason)
        return made

    def _truncate(self, length: int) -> Handle[None]:
        recorded = self._segments.next(self._name)
        if recorded is not None and (recorded.op != "truncate" or recorded.ids != (length,)):
            wanted = f"{recorded.op} of {show_ids(recorded.ids)}"
            self._segments.diverged(self._name, recorded.index, wanted, f"truncate to {length}")
            recorded = None
        self._inner.truncate(length)
        if recorded is None:
            self._segments.add(self._name, "truncate", (length,))
        else:
            self._segments.matched(recorded)
        return Handle.of(None)


class Sequences(Mapping[str, RecordingSequence]):
    """``session.kv`` of a session with several sequences: ``session.kv["planner"]``."""

    def __init__(self, sequences: Mapping[str, RecordingSequence]) -> None:
        self._sequences = sequences

    def __getitem__(self, name: str) -> RecordingSequence:
        return self._sequences[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sequences)

    def __len__(self) -> int:
        return len(self._sequences)
