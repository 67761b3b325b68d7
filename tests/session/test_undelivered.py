"""An outcome that the caller did not get is got by the next equal call, and nothing is dispatched a second time."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

import agentckpt
from agentckpt.errors import ConflictError, StoreError
from agentckpt.session.records import Records
from agentckpt.session.restore import read_checkpoint

from .toy import Opener

sent: list[str] = []


class Stop(Exception):
    """What a program raises where a crash would be."""


@pytest.fixture(autouse=True)
def _nothing_sent() -> None:
    sent.clear()


@agentckpt.tool(effect="irreversible")
async def deploy(version: str) -> str:
    sent.append(version)
    return version


@agentckpt.tool(effect="irreversible")
def pay(amount: int) -> int:
    sent.append(str(amount))
    return amount


def _cancel_before_the_result(call: asyncio.Future[str], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Records.result

    def cancelled(*args: object, **kwargs: object) -> object:
        call.get_loop().call_soon_threadsafe(call.cancel)
        monkeypatch.setattr(Records, "result", plain)
        return plain(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Records, "result", cancelled)


async def crashed(opener: Opener) -> None:
    with suppress(Stop):
        async with opener() as session:
            async for turn in session.turns():
                await turn.call(deploy, version="1")
                raise Stop


def test_a_replayed_call_that_is_cancelled_can_be_made_again(opener: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        await crashed(opener)
        async with opener() as session:
            async for turn in session.turns(until=lambda: session.turn_number == 1):
                call = asyncio.ensure_future(turn.call(deploy, version="1"))
                _cancel_before_the_result(call, monkeypatch)
                with pytest.raises(asyncio.CancelledError):
                    await call
                assert await turn.call(deploy, version="1") == "1"

    asyncio.run(main())
    assert sent == ["1"]


def test_a_replayed_call_that_a_failed_cut_stopped_can_be_made_again(opener: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    asyncio.run(crashed(opener))

    def fail() -> None:
        raise StoreError("no space")

    with opener() as session:
        for turn in session.turns(until=lambda: session.turn_number >= 1):
            with monkeypatch.context() as patch:
                patch.setattr(session._dispatcher._cutter, "gate", fail)
                with pytest.raises(StoreError):
                    asyncio.run(_awaited(turn.call(deploy, version="1")))
            assert asyncio.run(_awaited(turn.call(deploy, version="1"))) == "1"
    assert sent == ["1"]


async def _awaited(call: object) -> object:
    return await call  # type: ignore[misc]


def test_an_outcome_stays_listed_until_it_is_returned(opener: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a failed cut, a good one, a crash, another cut."""

    def fail(*args: object, **kwargs: object) -> None:
        raise StoreError("no space")

    with suppress(Stop), opener() as session:
        for turn in session.turns():
            with monkeypatch.context() as patch:
                patch.setattr(session._live.log, "append_outcome", fail)
                with pytest.raises(StoreError):
                    turn.call(pay, amount=5)
            session._live.log._unwritten.append(("outcome", _outcome(session)))  # type: ignore[attr-defined]
            with monkeypatch.context() as patch:
                patch.setattr(session.store, "sync", fail)
                with pytest.raises(StoreError):
                    session.checkpoint().result()
            for _ in range(2):
                info = session.checkpoint().result()
                assert len(read_checkpoint(session.store, bytes.fromhex(info.id)).undelivered) == 1
            raise Stop
    with suppress(Stop), opener() as session:
        for _turn in session.turns():
            info = session.checkpoint().result()
            assert len(read_checkpoint(session.store, bytes.fromhex(info.id)).undelivered) == 1
            raise Stop
    with opener() as session:
        for turn in session.turns(until=lambda: session.turn_number >= 5):
            assert turn.call(pay, amount=5) == 5
            info = session.checkpoint().result()
            assert read_checkpoint(session.store, bytes.fromhex(info.id)).undelivered == ()
    assert sent == ["5"]


def _outcome(session: agentckpt.Session) -> dict[str, object]:
    from agentckpt.ledger import outcome_body

    (record,) = session.effects()
    return dict(outcome_body(bytes.fromhex(record.key), "committed", epoch=record.epoch, value=5, record=record))


def test_an_outcome_that_waits_survives_a_call_that_the_gate_stops(opener: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise StoreError("no space")

    def broken() -> None:
        raise ConflictError("the last cut failed", code="cut-failed")

    with opener() as session:
        for turn in session.turns(until=lambda: session.turn_number == 1):
            with monkeypatch.context() as patch:
                patch.setattr(session.store, "append", _failing_outcomes(session))
                with pytest.raises(StoreError):
                    turn.call(pay, amount=5)
            with monkeypatch.context() as patch:
                patch.setattr(session._cutter, "gate", broken)
                with pytest.raises(ConflictError):
                    turn.call(pay, amount=5)
            assert turn.call(pay, amount=5) == 5
    assert sent == ["5"]


def _failing_outcomes(session: agentckpt.Session) -> object:
    plain, seen = session.store.append, []

    def append(build: object, *args: object, **kwargs: object) -> object:
        seen.append(build)
        if len(seen) > 1:
            raise StoreError("no space")
        return plain(build, *args, **kwargs)  # type: ignore[arg-type]

    return append
