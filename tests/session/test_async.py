"""The same surface on an event loop, and that the loop is never held."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from pathlib import Path

import pytest

import agentckpt
from agentckpt import Session, Store
from agentckpt.errors import ConflictError, EffectUnknownError, ToolError
from agentckpt.store.io import RealIO
from agentckpt.testing.recorder import RecorderIO

from .toy import Agent, Opener, ToyEngine

NUM_SESSIONS = 500


@agentckpt.tool(effect="idempotent")
async def send(text: str, effect: agentckpt.Effect) -> str:
    await asyncio.sleep(0)
    return f"{text} {len(effect.key)}"


@agentckpt.tool(effect="read")
async def look(what: str) -> str:
    await asyncio.sleep(0.001)
    if what == "nothing":
        raise LookupError(what)
    return what.upper()


class Stalls:
    """How long the loop was held, as a task that should wake every millisecond sees it."""

    def __init__(self) -> None:
        self.worst_s = 0.0
        self.num_over_1_ms = 0

    async def watch(self) -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(0.001)
            late_s = time.perf_counter() - before - 0.001
            self.worst_s = max(self.worst_s, late_s)
            self.num_over_1_ms += late_s > 0.001


async def agent(store: Store, engine: ToyEngine, number: int) -> tuple[int, bytes]:
    async with Session.open(store, f"agent {number}", kv=engine, state=Agent) as session:
        async for turn in session.turns(until=lambda: session.state.step == 2):
            await session.kv.append(f"turn {turn.number} ")
            made = await session.kv.generate(max_tokens=3, seed=number)
            answers = await asyncio.gather(turn.call(send, text=made.text), turn.call(look, what="a"))
            session.state.seen.append(answers)
            session.state.step += 1
        return session.turn_number, bytes(session.kv.tokens)


def test_500_sessions_on_one_loop_do_no_io_on_its_thread(tmp_path: Path, record_property: pytest.RecordProperty) -> None:
    Store.init(tmp_path / "store").close()
    recorder = RecorderIO(RealIO())
    engine, stalls = ToyEngine(), Stalls()

    async def main() -> list[tuple[int, bytes]]:
        watch = asyncio.create_task(stalls.watch())
        done = await asyncio.gather(*(agent(store, engine, number) for number in range(NUM_SESSIONS)))
        watch.cancel()
        return done

    with Store.open(tmp_path / "store", io=recorder) as store:
        recorder.reset()
        results = asyncio.run(main())
        events = list(recorder.events)
        assert [turns for turns, _ in results] == [2] * NUM_SESSIONS
        assert all(tokens.startswith(b"turn 1 ") and len(tokens) == 20 for _, tokens in results)
        loop_thread = threading.get_ident()
        assert [event for event in events if event.thread == loop_thread] == []
        assert len(store.view().sessions) == NUM_SESSIONS
        # Flushes are shared: far fewer than the ten that each session asks for.
        num_flushes = sum(event.kind == "fdatasync" for event in events)
        assert num_flushes < NUM_SESSIONS * 10
        threads = {event.thread for event in events}
        assert len(threads) <= 8 + 16, "no thread a session"
    record_property("worst_stall_ms", stalls.worst_s * 1000)
    record_property("num_stalls_over_1_ms", stalls.num_over_1_ms)
    record_property("num_flushes", num_flushes)


def test_async_and_sync_runs_are_twins(store: Store, opener: Opener) -> None:
    """One is recovered by the other."""

    async def first() -> None:
        async with opener() as session:
            async for turn in session.turns(until=lambda: session.state.step == 3):
                await session.kv.append(f"turn {turn.number}")
                made = await session.kv.generate(max_tokens=4, seed=1)
                session.state.seen.append(await turn.submit(session.sandbox.run, f"echo {made.text} >> log; cat log"))
                session.state.seen.append(await turn.call(look, what="b"))
                session.state.step += 1
                if turn.number == 2:
                    raise KeyError("stop")

    async def opens() -> Session:
        return opener()  # inside a loop this is not open before it is awaited

    unopened = asyncio.run(opens())
    with pytest.raises(ConflictError) as caught:
        _ = unopened.head
    assert caught.value.code == "not-open"
    with pytest.raises(KeyError):
        asyncio.run(first())
    with opener() as session:
        assert session.restored is not None
        assert session.turn_number == 1
        assert sorted(effect.tool for effect in (*session.restored.rerun, *session.restored.replayed)) == ["look", "sandbox.run"]
        num_sampled = opener.engine.num_sampled
        for turn in session.turns(until=lambda: session.state.step == 2):
            session.kv.append(f"turn {turn.number}")
            made = session.kv.generate(max_tokens=4, seed=1).result()
            done = turn.call(session.sandbox.run, f"echo {made.text} >> log; cat log")
            session.state.seen += [done, asyncio.run(as_coroutine(turn.call(look, what="b")))]
            session.state.step += 1
        assert opener.engine.num_sampled == num_sampled  # the recorded generation was fed again
        assert session.differences == ()


async def as_coroutine(awaitable: object) -> object:
    return await awaitable  # type: ignore[misc]


def test_parallel_calls_are_numbered_in_the_order_in_which_they_were_made(opener: Opener) -> None:
    async def once() -> list[tuple[str, int]]:
        async with opener("parallel") as session:
            async for turn in session.turns():
                await asyncio.gather(*(turn.call(send, text="same") for _ in range(20)))
                handles = [turn.submit(session.sandbox.run, "true") for _ in range(5)]
                for handle in handles:
                    await handle
                break
            return sorted((effect.tool, effect.occurrence) for effect in session.effects())

    calls = asyncio.run(once())
    assert calls == [("sandbox.run", number) for number in range(5)] + [("send", number) for number in range(20)]


@pytest.mark.parametrize("dispatched", [True, False])
def test_a_cancelled_call_is_unknown_only_if_it_was_dispatched(opener: Opener, dispatched: bool) -> None:
    started = []

    @agentckpt.tool(effect="irreversible")
    async def never(text: str) -> str:
        started.append(text)
        await asyncio.sleep(3600)
        return text

    async def main() -> None:
        async with opener("cancelled") as session:
            async for turn in session.turns():
                task = asyncio.create_task(as_coroutine(turn.call(never, text="x")))
                while not (started if dispatched else session.effects()):
                    await asyncio.sleep(0)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert [effect.state for effect in session.effects()] == ["unknown" if started else "failed"]
                if started:
                    with pytest.raises(EffectUnknownError):
                        await turn.call(never, text="x")
                break

    asyncio.run(main())
    with opener("cancelled") as session:
        assert [effect.state for effect in session.effects()] == ["unknown" if started else "failed"]


def test_a_call_cancelled_anywhere_leaves_nothing_hanging(opener: Opener) -> None:
    sent: list[int] = []

    @agentckpt.tool(effect="irreversible")
    async def act(number: int) -> int:
        sent.append(number)
        await asyncio.sleep(0)
        return number

    async def main() -> list[str]:
        async with opener("anywhere") as session:
            async for turn in session.turns():
                for number in range(120):
                    task = asyncio.ensure_future(turn.call(act, number=number))
                    for _ in range(number // 2):
                        await asyncio.sleep(0)
                    if number % 2:
                        await asyncio.sleep(number / 40_000)
                    task.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await task
                await asyncio.wait_for(session.checkpoint(), 30)
                states = {number: effect.state for effect in session.effects() for number in [effect.args["number"]]}  # type: ignore[index, call-overload]
                assert all((state == "failed") == (number not in sent) for number, state in states.items())
                assert set(sent) <= set(states)
                return list(states.values())
        return []

    states = asyncio.run(main())
    assert set(states) <= {"failed", "unknown", "committed"}


def test_errors_of_async_tools(opener: Opener) -> None:
    async def main() -> None:
        async with opener("errors") as session:
            async for turn in session.turns():
                with pytest.raises(ToolError) as caught:
                    await turn.call(look, what="nothing")
                assert caught.value.type_name == "LookupError"
                break

    asyncio.run(main())


def test_operations_that_nobody_awaits_keep_their_order(opener: Opener) -> None:
    opener.engine.delay_s = 0.002

    async def main() -> bytes:
        async with opener("order") as session:
            async for _ in session.turns():
                for number in range(30):
                    session.kv.append(f"{number},")
                done = session.kv.generate(max_tokens=2)
                session.kv.truncate(5)
                await done
                break
            await session.checkpoint()
            return bytes(session.kv.tokens)

    assert asyncio.run(main()) == b"0,1,2"
    with opener("order") as session:
        assert bytes(session.kv.tokens) == b"0,1,2"


def test_a_checkpoint_waits_for_tools_under_way(opener: Opener) -> None:
    @agentckpt.tool(effect="read")
    async def slow() -> int:
        await asyncio.sleep(0.05)
        return 1

    async def main() -> None:
        async with opener("waits") as session:
            async for turn in session.turns():
                task = asyncio.create_task(as_coroutine(turn.call(slow)))
                while not session.effects():
                    await asyncio.sleep(0.001)
                info = await session.checkpoint("now")
                assert task.done() or [effect.state for effect in session.effects()] == ["committed"]
                assert info.message == "now"
                await task
                break

    asyncio.run(main())


def test_fork_and_promote_on_a_loop(opener: Opener) -> None:
    async def roll(branch: agentckpt.session.Branch) -> agentckpt.session.Branch:
        await branch.kv.append("roll ")
        made = await branch.kv.generate(max_tokens=3)
        await branch.submit(branch.sandbox.run, f"echo {made.text} > result")
        branch.state.seen.append(made.text)
        branch.meta["reward"] = made.text
        return branch

    async def main() -> None:
        async with opener("search") as session:
            async for turn in session.turns():
                await session.kv.append("start ")
                async with session.fork(8, seeds=range(8), durable=False) as branches:
                    done = await asyncio.gather(*map(roll, branches))
                    best = max(done, key=lambda branch: str(branch.meta["reward"]))
                    await session.promote(best)
                assert session.state.seen == [best.meta["reward"]]
                assert bytes(session.kv.tokens).endswith(best.meta["reward"].encode())
                assert turn.number == 1
                break

    asyncio.run(main())
    with opener("search") as session:
        assert session.sandbox.read_file("result").decode().strip() == session.state.seen[0]
        assert bytes(session.kv.tokens).decode() == f"start roll {session.state.seen[0]}"
