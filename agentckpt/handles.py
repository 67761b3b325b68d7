"""A handle is what every waiting call returns: ``.result()`` for threads, ``await`` for tasks.

Invariants:
1. One surface: nothing has a second, async-only twin.
2. Awaiting a handle never blocks the event loop; completion is delivered with ``call_soon_threadsafe``.
3. Cancelling a task that awaits a handle stops the waiting, never the work: what runs has a result that others need.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

T = TypeVar("T")
U = TypeVar("U")


class Handle(Generic[T]):
    """The result of a call that may still be running."""

    def __init__(self, future: Future[T]) -> None:
        self._future = future

    @classmethod
    def of(cls, value: T) -> Handle[T]:
        """A handle that is done already."""
        future: Future[T] = Future()
        future.set_result(value)
        return cls(future)

    @classmethod
    def failed(cls, error: BaseException) -> Handle[T]:
        """A handle that raises ``error``."""
        future: Future[T] = Future()
        future.set_exception(error)
        return cls(future)

    def done(self) -> bool:
        return self._future.done()

    def result(self, timeout_s: float | None = None) -> T:
        """Wait for the value. Raises ``TimeoutError``, or whatever the call raised."""
        return self._future.result(timeout_s)

    def then(self, function: Callable[[T], U]) -> Handle[U]:
        """A handle for ``function(value)``; ``function`` runs on the completing thread and must be short."""
        chained: Future[U] = Future()

        def finish(done: Future[T]) -> None:
            try:
                chained.set_result(function(done.result()))
            except BaseException as error:
                chained.set_exception(error)

        self._future.add_done_callback(finish)
        return Handle(chained)

    def __await__(self) -> Generator[Any, None, T]:
        return asyncio.shield(asyncio.wrap_future(self._future)).__await__()
