"""Handles: one result for threads and tasks, and a task that stops waiting stops nothing else."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future

import pytest

from agentckpt.handles import Handle


def test_a_cancelled_task_leaves_the_work_alone() -> None:
    future: Future[int] = Future()
    handle = Handle(future)

    async def main() -> int:
        async def wait() -> int:
            return await handle

        task = asyncio.create_task(wait())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not future.cancelled()
        future.set_result(3)  # would raise if the cancellation had reached it
        return await handle

    assert asyncio.run(main()) == 3
    assert handle.result() == 3


def test_then_passes_values_and_errors_on() -> None:
    assert Handle.of(2).then(lambda value: value + 1).result() == 3
    with pytest.raises(KeyError):
        Handle.failed(KeyError("x")).then(str).result()
    with pytest.raises(ZeroDivisionError):
        Handle.of(0).then(lambda value: 1 // value).result()


def test_a_result_that_is_late() -> None:
    with pytest.raises(TimeoutError):
        Handle(Future[int]()).result(timeout_s=0.01)
