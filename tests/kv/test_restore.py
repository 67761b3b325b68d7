"""What comes back, what is computed again, what is refused; damage is reported and never attended to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentckpt.engine import Engine
from agentckpt.engine.sequence import Sequence
from agentckpt.errors import AgentckptError, CapacityError, ConflictError, CorruptionError, IncompatibleError, NotFoundError
from agentckpt.nodes import Node, decode, get_node, put_node
from agentckpt.types import Ref

from .support import DictStore, tiny_model

MODEL = tiny_model()
OPTIONS: dict[str, Any] = {"num_blocks": 64, "max_batch_tokens": 64}


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine(MODEL, **OPTIONS) as made:
        yield made
        made.check()


def captured(engine: Engine, store: DictStore, length: int = 200) -> tuple[Sequence, Ref]:
    sequence = engine.open_sequence(nonce=bytes(16))
    sequence.append([i % 250 for i in range(length)])
    sequence.generate(forced=[(5 * i) % 250 for i in range(30)]).result(30)
    return sequence, sequence.capture(store, None).write().ref


def kv_bytes(engine: Engine, sequence: Sequence) -> list[bytes]:
    assert sequence.context.valid == sequence.num_computed
    return [bytes(view) for view in engine.kv.gather(sequence.context.runs(0, sequence.num_computed))]


def continuation(sequence: Sequence) -> Any:
    return sequence.generate(max_tokens=20, temperature=1.0, seed=2).result(30)


def test_rungs_a_to_c_in_one_process(engine: Engine) -> None:
    store = DictStore()
    sequence, ref = captured(engine, store)
    before = kv_bytes(engine, sequence)
    with Engine(MODEL, **OPTIONS) as other:
        twin = other.open_sequence(nonce=bytes(16))
        report = twin.prepare(store, ref).commit()
        assert (report.restored, report.recomputed, report.rejected, report.reason) == (229, 0, 0, None)
        assert report.continuation == "exact"
        assert kv_bytes(other, twin) == before
        assert continuation(twin) == continuation(sequence)
        assert kv_bytes(other, twin) == kv_bytes(engine, sequence)
        other.check()


@pytest.mark.parametrize(("size", "order"), [(1, "block"), (8, "layer"), (64, "layer"), (128, "block")])
def test_layout_and_block_size_are_converted(engine: Engine, size: int, order: Any) -> None:
    store = DictStore()
    sequence, ref = captured(engine, store)
    with Engine(MODEL, block_size=size, kv_order=order, num_blocks=1024 // size, max_batch_tokens=64) as other:
        twin = other.open_sequence(nonce=bytes(16))
        assert twin.prepare(store, ref).commit().continuation == "exact"
        assert continuation(twin) == continuation(sequence)


def test_the_live_sequence_is_untouched_until_commit(engine: Engine) -> None:
    store = DictStore()
    _, ref = captured(engine, store)
    live = engine.open_sequence(nonce=bytes(16))
    live.append([5] * 40)
    live.generate(forced=[1]).result(30)
    before, free = list(live.tokens), engine.pool.num_free
    staged = live.prepare(store, ref)
    assert live.tokens == before
    staged.abort()
    staged.abort()
    assert engine.pool.num_free == free
    with pytest.raises(ConflictError):
        staged.commit()
    staged = live.prepare(store, ref)
    report = staged.commit()
    assert staged.commit() is report
    staged.abort()
    assert len(live.tokens) == 230
    assert engine.stats()["num_sequences"] == 2


def test_a_capture_after_a_restore_costs_what_is_new(engine: Engine) -> None:
    store = DictStore()
    _, ref = captured(engine, store, 400)
    with Engine(MODEL, **OPTIONS) as other:
        twin = other.open_sequence(nonce=bytes(16))
        twin.prepare(store, ref).commit()
        assert twin.capture(store, ref).write().ref == ref
        twin.generate(forced=[1] * 3).result(30)
        puts = store.num_puts
        pending = twin.capture(store, ref)
        assert len(pending.cut.known_refs) == 6
        pending.write()
        assert store.num_puts - puts <= 2 + 2 + 1


def test_a_fork_of_a_restored_sequence_builds_on_what_it_was_restored_from(engine: Engine) -> None:
    store = DictStore()
    _, ref = captured(engine, store, 400)
    with Engine(MODEL, **OPTIONS) as other:
        twin = other.open_sequence(nonce=bytes(16))
        twin.prepare(store, ref).commit()
        (branch,) = twin.fork(1)
        twin.generate(forced=[1] * 3).result(30)
        newer = twin.capture(store, ref).write().ref  # published meanwhile: the branch was restored from an older one
        pending = branch.capture(store, newer)
        assert len(pending.cut.known_refs) == 6
        pending.cancel()
        pending = branch.capture(DictStore(), newer)
        assert len(pending.cut.known_refs) == 0
        pending.cancel()


# Damage


@pytest.mark.parametrize("block", [0, 1, 2, 3])
@pytest.mark.parametrize("damage", ["corrupt", "missing", "short"])
def test_a_damaged_chunk_is_recomputed_from_there_along_the_spans(engine: Engine, block: int, damage: str) -> None:
    store = DictStore()
    sequence, ref = captured(engine, store)
    chunk = store.chunks(ref)[block][1]
    if damage == "corrupt":
        store.broken.add(chunk)
    elif damage == "missing":
        del store.objects[chunk]
    else:
        store.objects[chunk] = store.objects[chunk][:-1]
    with Engine(MODEL, **OPTIONS) as other:
        twin = other.open_sequence(nonce=bytes(16))
        report = twin.prepare(store, ref).commit()
        assert report.restored == 64 * block
        assert report.restored + report.recomputed == 229
        assert report.rejected == (0 if damage == "missing" else 64 if block < 3 else 37)
        assert report.reason is not None
        assert f"position {64 * block}" in report.reason
        assert report.continuation == "exact"
        assert kv_bytes(other, twin) == kv_bytes(engine, sequence)
        assert continuation(twin) == continuation(sequence)


def test_a_recompute_begins_with_a_whole_piece() -> None:
    store = DictStore()
    with Engine(MODEL, num_blocks=64, max_batch_tokens=96) as engine:
        sequence, ref = captured(engine, store)
        before = kv_bytes(engine, sequence)
    store.broken.add(store.chunks(ref)[2][0])
    with Engine(MODEL, num_blocks=64, max_batch_tokens=96) as other:
        twin = other.open_sequence(nonce=bytes(16))
        report = twin.prepare(store, ref).commit()
        assert (report.restored, report.recomputed, report.rejected) == (96, 133, 64)
        assert kv_bytes(other, twin) == before
        other.check()


def test_a_fast_recompute_says_prefix_equivalent(engine: Engine) -> None:
    store = DictStore()
    sequence, ref = captured(engine, store)
    for chunks in store.chunks(ref)[1:]:
        del store.objects[chunks[0]]
    with Engine(MODEL, **OPTIONS, recompute="fast") as other:
        twin = other.open_sequence(nonce=bytes(16))
        report = twin.prepare(store, ref).commit()
        assert (report.restored, report.recomputed) == (64, 165)
        assert report.continuation == "prefix-equivalent"
        assert other.num_steps == 3
        assert twin.tokens == sequence.tokens
        assert len(continuation(twin).ids) == 20
        again = other.open_sequence().prepare(store, ref, recompute="exact")
        assert again.commit().continuation == "exact"


def test_tokens_decoded_beside_others_are_not_called_exact(engine: Engine) -> None:
    store = DictStore()
    sequences = [engine.open_sequence(nonce=bytes([i]) * 16) for i in range(2)]
    for sequence in sequences:
        sequence.append([3] * 70)
        sequence.pause()
    handles = [sequence.generate(max_tokens=10) for sequence in sequences]
    for sequence in sequences:
        sequence.resume()
    for handle in handles:
        handle.result(30)
    assert any(kind == "batch" for _, _, kind in sequences[0].spans)
    ref = sequences[0].capture(store, None).write().ref
    assert engine.open_sequence().prepare(store, ref).commit().continuation == "exact"
    del store.objects[store.chunks(ref)[1][0]]
    report = engine.open_sequence().prepare(store, ref).commit()
    assert report.continuation == "compatible, not bit-exact"


def test_a_checkpoint_without_kv_is_whole(engine: Engine) -> None:
    """The KV was given up before the first capture."""
    store = DictStore()
    sequence = engine.open_sequence(nonce=bytes(16))
    sequence.append([2] * 100)
    sequence.generate(max_tokens=4).result(30)
    before = kv_bytes(engine, sequence)
    with engine.lock:
        sequence.context.drop()
    ref = sequence.capture(store, None).write().ref
    body = get_node(store, ref).body
    assert body["kv_id"] is None
    assert body["numerics_id"] is None
    assert body["computed"] == 103
    twin = engine.open_sequence(nonce=bytes(16))
    report = twin.prepare(store, ref).commit()
    assert (report.restored, report.recomputed) == (0, 103)
    assert report.continuation == "compatible, not bit-exact"
    assert kv_bytes(engine, twin) == before


def test_an_empty_and_a_never_computed_sequence_come_back(engine: Engine) -> None:
    store = DictStore()
    for count in (0, 1, 64, 200):
        sequence = engine.open_sequence()
        sequence.append([4] * count)
        ref = sequence.capture(store, None).write().ref
        twin = engine.open_sequence()
        report = twin.prepare(store, ref).commit()
        assert twin.tokens == [4] * count
        assert (report.restored, report.recomputed, report.continuation) == (0, 0, "exact")


# Identity


def test_another_model_is_refused_unless_asked_for(engine: Engine) -> None:
    store = DictStore()
    sequence, ref = captured(engine, store)
    with Engine(tiny_model(seed=2), **OPTIONS) as other:
        twin = other.open_sequence()
        with pytest.raises(IncompatibleError) as caught:
            twin.prepare(store, ref)
        assert "model_change" in str(caught.value.hint)
        report = twin.prepare(store, ref, model_change=True).commit()
        assert (report.restored, report.recomputed) == (0, 229)
        assert twin.tokens == sequence.tokens


def test_another_kv_dtype_is_recomputed(engine: Engine) -> None:
    store = DictStore()
    _, ref = captured(engine, store)
    with Engine(MODEL, **OPTIONS, kv_dtype="f32") as other:
        report = other.open_sequence().prepare(store, ref).commit()
        assert (report.restored, report.recomputed, report.rejected) == (0, 229, 0)
        assert "kv_id" in str(report.reason)
        assert report.continuation == "compatible, not bit-exact"


def test_other_numerics_are_restored_and_reported(engine: Engine) -> None:
    store = DictStore()
    _, ref = captured(engine, store)
    with Engine(MODEL, num_blocks=64, max_batch_tokens=32) as other:
        report = other.open_sequence().prepare(store, ref).commit()
        assert (report.restored, report.recomputed) == (229, 0)
        assert report.continuation == "compatible, not bit-exact"


def test_a_sequence_that_does_not_fit_now_is_recomputed_when_it_does() -> None:
    store = DictStore()
    with Engine(MODEL, **OPTIONS) as engine:
        sequence, ref = captured(engine, store)
        text = continuation(sequence)
    with Engine(MODEL, num_blocks=16, max_batch_tokens=64) as small:
        idle = small.open_sequence()
        idle.append([1] * 100)
        idle.generate(forced=[1]).result(30)
        twin = small.open_sequence(nonce=bytes(16))
        assert twin.prepare(store, ref).commit().restored == 229
        assert idle.context.valid == 0
        assert continuation(twin) == text
        assert len(idle.generate(max_tokens=3).result(30).ids) == 3
        small.check()
    with Engine(MODEL, num_blocks=8, max_batch_tokens=64) as tiny:
        with pytest.raises(CapacityError):
            tiny.open_sequence().prepare(store, ref)
        assert tiny.pool.num_free == 8
    with Engine(tiny_model(max_positions=128), num_blocks=64) as short, pytest.raises(CapacityError, match="at most 128"):
        short.open_sequence().prepare(store, ref)


# Hostile input


def rewritten(store: DictStore, ref: Ref, **changes: Any) -> Ref:
    node = get_node(store, ref)
    return put_node(store, Node("kv", node.strong, node.weak, {**node.body, **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        {"n": 231}, {"n": -1}, {"n": 1 << 50}, {"n": True}, {"computed": 230}, {"computed": -1}, {"computed": 128}, {"tail": b""},
        {"tail": b"\xff" * 152}, {"tail": "x"}, {"model_id": b"short"}, {"kv_id": 7}, {"tail_block": {"len": 37, "w": 0, "count": 3}},
        {"tail_block": {"len": 37, "w": 1 << 40, "count": 2}}, {"tail_block": {"len": 36, "w": 6, "count": 2}}, {"tail_block": []},
        {"open_span": [0, 1, "guess"]}, {"open_span": None}, {"groups": []}, {"groups": None}, {"v": "1"}, {"blocks": {}},
        {"messages": None},
    ],
)  # fmt: skip
def test_a_node_of_a_wrong_form_is_refused(engine: Engine, changes: dict[str, Any]) -> None:
    store = DictStore()
    _, ref = captured(engine, store)
    free = engine.pool.num_free
    with pytest.raises((CorruptionError, CapacityError)):
        engine.open_sequence().prepare(store, rewritten(store, ref, **changes))
    assert engine.pool.num_free == free
    assert engine.stats()["num_sequences"] == 2


def test_a_newer_version_and_a_missing_node_are_named(engine: Engine) -> None:
    store = DictStore()
    _, ref = captured(engine, store)
    with pytest.raises(IncompatibleError, match="version 2"):
        engine.open_sequence().prepare(store, rewritten(store, ref, v=2))
    with pytest.raises(NotFoundError):
        engine.open_sequence().prepare(store, Ref(b"\x02" + bytes(32)))
    with pytest.raises(CorruptionError):
        engine.open_sequence().prepare(store, store.chunks(ref)[0][0])


FUZZ_STORE = DictStore()
FUZZ_ENGINE = Engine(MODEL, num_blocks=64, max_batch_tokens=64)
_, FUZZ_REF = captured(FUZZ_ENGINE, FUZZ_STORE)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-(1 << 70), 1 << 70), st.binary(max_size=40), st.text(max_size=5))
VALUES = st.recursive(
    SCALARS, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=3), inner, max_size=3))
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
@given(st.sampled_from(sorted(get_node(FUZZ_STORE, FUZZ_REF).body)), VALUES, st.integers(0, 5))
def test_any_other_value_in_any_place_gives_a_typed_error_or_the_same_tokens(key: str, value: Any, depth: int) -> None:
    body = decode(FUZZ_STORE.objects[FUZZ_REF], max_bytes=1 << 20)[3]
    if isinstance(body[key], dict) and depth:
        inner = sorted(body[key])[depth % len(body[key])]
        value = {**body[key], inner: value}
    before = FUZZ_ENGINE.pool.num_free
    twin = FUZZ_ENGINE.open_sequence()
    try:
        twin.prepare(FUZZ_STORE, rewritten(FUZZ_STORE, FUZZ_REF, **{key: value})).commit()
        assert len(twin.tokens) == 230
        twin.generate(forced=[1]).result(30)
    except AgentckptError:
        pass
    twin.close()
    FUZZ_ENGINE.check()
    assert FUZZ_ENGINE.pool.num_free == before
