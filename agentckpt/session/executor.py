"""The few threads that all sessions of a process share.

Invariants:
1. No session has a thread of its own.
2. A job of one pool waits only for jobs of pools further down this list, for the engine, or for nothing: so no pool can
   starve itself. ``turns`` (what waits for tools and then for a cut: checkpoint, promote, close) -> ``tools`` (user functions)
   -> ``work`` (open, cut, restore, fork) -> ``quick`` (one append, one match).
3. On an event loop's thread nothing of ours does I/O or waits: ``run`` moves the job to a pool there.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, TypeVar

from ..handles import Handle

T = TypeVar("T")
PoolName = Literal["turns", "tools", "work", "quick"]

NUM_THREADS: dict[PoolName, int] = {"turns": 16, "tools": 32, "work": 8, "quick": 16}

_pools: dict[tuple[int, PoolName], ThreadPoolExecutor] = {}
_pools_lock = threading.Lock()


def pool(name: PoolName) -> ThreadPoolExecutor:
    """The process's pool of that name; threads are started when they are first needed."""
    key = (os.getpid(), name)  # a forked child must not use threads that it does not have
    with _pools_lock:
        if key not in _pools:
            _pools[key] = ThreadPoolExecutor(NUM_THREADS[name], thread_name_prefix=f"agentckpt-{name}")
        return _pools[key]


def on_loop_thread() -> bool:
    """True if the caller runs inside an event loop, where nothing may block."""
    return asyncio._get_running_loop() is not None


def submit(name: PoolName, job: Callable[[], T]) -> Handle[T]:
    return Handle(pool(name).submit(job))


def run(name: PoolName, job: Callable[[], T]) -> Handle[T]:
    """Here and now, or in the pool if this is an event loop's thread. An error stands in the handle in both cases."""
    if on_loop_thread():
        return submit(name, job)
    try:
        return Handle.of(job())
    except Exception as error:
        return Handle.failed(error)


def chain(handle: Handle[T], target: Future[T]) -> None:
    """Let ``target`` end as ``handle`` does."""

    def copy(done: Future[T]) -> None:
        error = done.exception()
        if error is not None:
            target.set_exception(error)
        else:
            target.set_result(done.result())

    handle._future.add_done_callback(copy)


class Watched(Handle[T]):
    """A handle that knows whether anybody looked at its result."""

    def __init__(self) -> None:
        super().__init__(Future())
        self._seen = False

    def result(self, timeout_s: float | None = None) -> T:
        try:
            return super().result(timeout_s)
        finally:
            self._seen = self._seen or self._future.done()  # a timeout is no look at the result

    def __await__(self) -> Generator[Any, None, T]:
        self._seen = True
        return super().__await__()

    def unseen_error(self) -> BaseException | None:
        """The error, once, if the operation failed and nobody looked."""
        if self._seen or not self._future.done():
            return None
        self._seen = True
        return self._future.exception()


class Strand:
    """Jobs that run one after the other, in the order given, on a shared pool: order without a thread of one's own."""

    def __init__(self, name: PoolName) -> None:
        self._name: PoolName = name
        self._lock = threading.Lock()
        self._jobs: list[Callable[[], None]] = []
        self._running = False

    def submit(self, job: Callable[[], T]) -> Handle[T]:
        future: Future[T] = Future()

        def step() -> None:
            try:
                future.set_result(job())
            except BaseException as error:
                future.set_exception(error)

        with self._lock:
            self._jobs.append(step)
            if self._running:
                return Handle(future)
            self._running = True
        pool(self._name).submit(self._drain)
        return Handle(future)

    def run(self, job: Callable[[], T]) -> T:
        """The same, waiting for the result; without a change of thread if nothing else is queued."""
        with self._lock:
            idle = not self._running
            if idle:
                self._running = True
        if not idle:
            return self.submit(job).result()
        try:
            return job()
        finally:
            self._drain_or_hand_over()

    def _drain_or_hand_over(self) -> None:
        with self._lock:
            self._running = bool(self._jobs)
        if self._running:
            pool(self._name).submit(self._drain)

    def _drain(self) -> None:
        while True:
            with self._lock:
                if not self._jobs:
                    self._running = False
                    return
                step = self._jobs.pop(0)
            step()
