"""One procedure, two drivers: what a call does is written once, as a generator of steps, and driven by a thread or a task.

A step is ``Ordered`` (short, in the order of the calls), ``Job`` (blocking I/O of ours), ``Wait`` (for handles) or ``Invoke``
(user code). The thread driver runs them here and now; the task driver awaits them, so that the event loop is never held.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ..handles import Handle
from .executor import Strand, submit


@dataclass(frozen=True, slots=True)
class Ordered:
    strand: Strand
    job: Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Job:
    job: Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Wait:
    handles: Sequence[Handle[Any]]


@dataclass(frozen=True, slots=True)
class Invoke:
    call: Callable[[], Any]
    is_async: bool


Step = Ordered | Job | Wait | Invoke
Procedure = Generator[Step, Any, Any]


def drive(procedure: Procedure) -> Any:
    """Run to the end on this thread; the value, or what the procedure raises."""
    try:
        step = next(procedure)
        while True:
            try:
                result = _run(step)
            except BaseException as error:
                step = procedure.throw(error)
            else:
                step = procedure.send(result)
    except StopIteration as end:
        return end.value


def _run(step: Step) -> Any:
    if isinstance(step, Ordered):
        return step.strand.run(step.job)
    if isinstance(step, Job):
        return step.job()
    if isinstance(step, Wait):
        for handle in step.handles:
            handle.result()
        return None
    return step.call()


async def drive_async(procedure: Procedure) -> Any:
    """The same on an event loop."""
    try:
        step = next(procedure)
        while True:
            try:
                result = await _await(step)
            except BaseException as error:
                step = procedure.throw(error)
            else:
                step = procedure.send(result)
    except StopIteration as end:
        return end.value


async def _await(step: Step) -> Any:
    if isinstance(step, Ordered | Job):
        handle = step.strand.submit(step.job) if isinstance(step, Ordered) else submit("quick", step.job)
        try:
            return await handle
        except asyncio.CancelledError:
            # What is being written will be: go on only when it is, so that what follows is in order.
            with suppress(Exception):
                await handle
            raise
    if isinstance(step, Wait):
        for handle in step.handles:
            await handle
        return None
    if not step.is_async:
        return await submit("tools", step.call)
    made: Awaitable[Any] = step.call()
    return await made if inspect.isawaitable(made) else made
