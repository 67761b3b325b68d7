"""Sessions on the included engine: KV comes back bit-equal, and the continuation is the same."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from kv.support import tiny_model  # noqa: E402

from agentckpt import Session, Store  # noqa: E402
from agentckpt.engine import Engine  # noqa: E402

from .toy import Agent  # noqa: E402

torch.set_num_threads(1)


def talk(session: Session, num_turns: int) -> list[tuple[int, ...]]:
    drawn = []
    for turn in session.turns(until=lambda: session.state.step >= num_turns):
        session.kv.append(f"question {turn.number}? ")
        drawn.append(session.kv.generate(max_tokens=70, seed=turn.number, temperature=1.0).result().ids)
        session.state.step += 1
    return drawn


def test_another_engine_goes_on_where_the_first_one_stopped(store: Store) -> None:
    with Engine(tiny_model(), num_blocks=256) as engine, Session.open(store, "a", kv=engine, state=Agent) as session:
        talk(session, 2)
        with session.fork(1, durable=False) as (twin,):  # what an undisturbed run would draw is not touched by the twin
            twin.kv.append("x").result()
    with Engine(tiny_model(), num_blocks=256, block_size=32) as engine, Session.open(store, "a", kv=engine, state=Agent) as session:
        assert session.restored is not None
        report = session.restored.parts["kv"]
        assert (report.continuation, report.recomputed, report.rejected) == ("exact", 0, 0)
        assert report.restored == len(session.kv.tokens) - 1
        restored = talk(session, 4)
        tokens = list(session.kv.tokens)
        engine.check()
    with Engine(tiny_model(), num_blocks=256) as engine, Store.open(Path(store.path) / ".." / "other", create=True) as other:
        with Session.open(other, "a", kv=engine, state=Agent) as session:
            assert talk(session, 4)[2:] == restored
            assert list(session.kv.tokens) == tokens


def test_branches_share_blocks_and_the_engine_is_clean_afterwards(store: Store) -> None:
    with Engine(tiny_model(), num_blocks=256) as engine:
        with Session.open(store, "a", kv=engine, state=Agent) as session:
            talk(session, 1)
            used = engine.stats()["num_blocks"] - engine.stats()["num_free"]
            with session.fork(8, seeds=range(8), durable=False) as branches:
                assert engine.stats()["num_blocks"] - engine.stats()["num_free"] == used
                handles = [branch.kv.generate(max_tokens=20, temperature=1.0) for branch in branches]
                ids = [handle.result().ids for handle in handles]
                assert len(set(ids)) == 8
                session.promote(branches[3]).result()
            assert tuple(session.kv.tokens[-len(ids[3]) :]) == ids[3]
        assert engine.stats()["num_free"] == engine.stats()["num_blocks"]
        engine.check()
        with Session.open(store, "a", kv=engine, state=Agent) as session:
            assert tuple(session.kv.tokens[-len(ids[3]) :]) == ids[3]


def test_another_model_is_refused_and_nothing_changes(store: Store) -> None:
    from agentckpt.errors import IncompatibleError

    with Engine(tiny_model(), num_blocks=64) as engine, Session.open(store, "a", kv=engine, state=Agent) as session:
        talk(session, 1)
    seq = store.view().seq
    with Engine(tiny_model(seed=2), num_blocks=64) as engine:
        with pytest.raises(IncompatibleError):
            Session.open(store, "a", kv=engine, state=Agent)
        assert engine.stats()["num_sequences"] == 0
    assert store.view().seq == seq
