"""A capture pins, costs what is new, releases what it pinned whatever happens, and writes the form of FORMAT.md section 6."""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
from typing import Any

import cbor2
import numpy as np
import pytest
import torch

from agentckpt.engine import Engine
from agentckpt.engine.sequence import Sequence
from agentckpt.errors import ConflictError
from agentckpt.types import Buffer, Kind, Ref

from .support import DictStore, tiny_model

MODEL = tiny_model()


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine(MODEL, num_blocks=64, max_batch_tokens=64) as made:
        yield made
        made.check()


def opened(engine: Engine, length: int = 200, more: int = 10) -> Sequence:
    sequence = engine.open_sequence(nonce=bytes(16))
    sequence.append([i % 250 for i in range(length)])
    sequence.generate(forced=[7] * more).result(30)
    return sequence


def test_the_node_has_the_form_of_the_format(engine: Engine) -> None:
    """Read with another CBOR library and no code of ours."""
    store = DictStore()
    sequence = engine.open_sequence(nonce=bytes(16))
    sequence.append([{"role": "user", "content": "x" * 160}])
    sequence.generate(forced=[9] * 5).result(30)
    part = sequence.capture(store, None).write()
    kind, strong, weak, body = cbor2.loads(store.objects[part.ref])
    assert kind == "kv"
    count = len(sequence.tokens)
    assert (body["v"], body["n"], body["computed"]) == (1, count, count - 1)
    items = body["tokens"]["e"]
    packed = b"".join(items) + body["tail"]
    assert list(struct.unpack(f"<{count}I", packed)) == list(sequence.tokens)
    assert [len(item) for item in items] == [256] * (count // 64)
    assert body["spans"]["e"] == [list(span) for span in sequence.spans[:-1]]
    assert body["open_span"] == list(sequence.spans[-1])
    assert body["messages"]["e"] == [["user", 0, "x" * 160]]
    assert body["kv_id"] == engine.identity.kv_id
    assert body["groups"] == [group.body() for group in engine.kv.groups]
    num_blocks, rest = divmod(count - 1, 64)
    assert body["blocks"]["n"] == num_blocks
    assert body["blocks"]["t"] == [[0, 2]] * num_blocks
    assert body["tail_block"] == {"len": rest, "w": 2 * num_blocks, "count": 2}
    assert len(weak) == 2 * num_blocks + 2
    assert all(ref[0] == 1 for ref in weak)
    assert all(ref[0] == 2 for ref in strong)
    check_chunks(engine, sequence, [store.objects[Ref(ref)] for ref in weak], num_blocks, rest)


def check_chunks(engine: Engine, sequence: Sequence, chunks: list[bytes], num_blocks: int, rest: int) -> None:
    """Each chunk is ``[layer, plane, token, dim]`` of one head, dense, little endian."""
    for number, chunk in enumerate(chunks):
        block, head = divmod(number, 2)
        length = 64 if block < num_blocks else rest
        values = np.frombuffer(chunk, dtype="<u2").reshape(2, 2, length, 8)
        for token in range(length):
            position = 64 * block + token
            place = engine.kv.view[sequence.context.table[position // 16], head, :, :, position % 16]
            assert np.array_equal(values[:, :, token], place.view(torch.int16).numpy().view(np.uint16))


def test_a_capture_costs_what_is_new(engine: Engine) -> None:
    store = DictStore()
    sequence = opened(engine, 500, 10)
    first = sequence.capture(store, None).write()
    puts, size = store.num_puts, store.put_bytes
    sequence.append([1] * 20)
    sequence.generate(forced=[2] * 5).result(30)
    pending = sequence.capture(store, first.ref)
    assert len(pending.cut.known_refs) == 7
    second = pending.write()
    chunk = engine.kv.groups[0].chunk_bytes(64)
    assert store.num_puts - puts == 2 + 2 + 1
    assert store.put_bytes - size < 3 * 2 * chunk
    assert second.facts["new_bytes"] == store.put_bytes - size
    assert second.facts["new_tokens"] == 25
    assert second.facts["kv_bytes"] == 534 * 2 * engine.kv.groups[0].chunk_bytes(1)
    assert first.ref != second.ref
    third = sequence.capture(store, second.ref).write()
    assert third.ref == second.ref


def test_ten_times_the_history_costs_the_same_turn(engine: Engine) -> None:
    costs = []
    for length in (64 * 2, 64 * 10):
        store = DictStore()
        sequence = opened(engine, length, 5)
        ref = sequence.capture(store, None).write().ref
        puts, size = store.num_puts, store.put_bytes
        sequence.generate(forced=[3] * 30).result(30)
        pending = sequence.capture(store, ref)
        pins = sum(map(len, [*pending.cut.runs, pending.cut.tail_runs]))
        pending.write()
        costs.append((store.num_puts - puts, pins, store.put_bytes - size))
        sequence.close()
    assert costs[0][:2] == costs[1][:2]
    assert costs[1][2] - costs[0][2] < 8 * 400  # edge items of the lists, no KV


def test_another_sink_gets_everything(engine: Engine) -> None:
    one, two = DictStore(), DictStore()
    sequence = opened(engine)
    part = sequence.capture(one, None).write()
    again = sequence.capture(two, None).write()
    assert again.ref == part.ref
    assert two.objects == one.objects
    assert sequence.capture(one, part.ref).write().ref == part.ref


def test_a_fork_builds_on_what_its_parent_wrote(engine: Engine) -> None:
    store = DictStore()
    sequence = opened(engine, 300, 5)
    ref = sequence.capture(store, None).write().ref
    fork = sequence.fork(1)[0]
    fork.append([5] * 30)
    fork.generate(forced=[6]).result(30)
    pending = fork.capture(store, None)
    assert len(pending.cut.known_refs) == 4
    pending.write()
    assert sequence.capture(store, ref).write().ref == ref


def test_truncation_keeps_the_blocks_below_it(engine: Engine) -> None:
    store = DictStore()
    sequence = opened(engine, 300, 5)
    ref = sequence.capture(store, None).write().ref
    sequence.truncate(200)
    sequence.append([8] * 60)
    sequence.generate(forced=[6]).result(30)
    pending = sequence.capture(store, ref)
    assert len(pending.cut.known_refs) == 3
    body = cbor2.loads(store.objects[pending.write().ref])[3]
    assert body["edits"]["e"] == [[305, 200]]
    assert body["n"] == 261


def test_recomputed_blocks_are_captured_again(engine: Engine) -> None:
    """They may hold other bytes: those of a decode beside others cannot be had again."""
    store = DictStore()
    sequence = opened(engine, 200, 5)
    ref = sequence.capture(store, None).write().ref
    with engine.lock:
        sequence.context.drop()
        engine.pool.version = [version + 1 for version in engine.pool.version]
    pending = sequence.capture(store, ref)
    assert (len(pending.cut.known_refs), len(pending.cut.runs)) == (3, 0)
    part = pending.write()
    assert part.facts["num_captured"] == 192
    sequence.generate(forced=[6]).result(30)
    pending = sequence.capture(store, part.ref)
    assert (len(pending.cut.known_refs), len(pending.cut.runs)) == (0, 3)
    pending.write()


# Pins


def test_pins_hold_from_the_cut_to_the_end_of_the_write(engine: Engine) -> None:
    store = DictStore()
    sequence = opened(engine, 60, 5)
    pending = sequence.capture(store, None)
    assert engine.pool.num_pinned == 4
    assert all(engine.pool.pinned_length(block) == length for block, length in zip(sequence.context.table, (16, 16, 16, 16), strict=True))
    table = list(sequence.context.table)
    sequence.generate(forced=[1]).result(30)
    assert sequence.context.table[:4] == table, "appending beyond the pinned length needs no copy"
    sequence.truncate(50)
    sequence.append([9] * 4)
    sequence.generate(forced=[1]).result(30)
    assert sequence.context.table[:3] == table[:3]
    assert sequence.context.table[3] != table[3], "a write below the pinned length goes to a copy"
    sequence.close()
    assert engine.pool.num_pinned == 4
    pending.write()
    assert engine.pool.num_free == 64
    with pytest.raises(ConflictError):
        pending.write()
    pending.cancel()


def test_cancel_releases_and_leaves_no_trace(engine: Engine) -> None:
    store = DictStore()
    sequence = opened(engine)
    pending = sequence.capture(store, None)
    pending.cancel()
    pending.cancel()
    assert engine.pool.num_pinned == 0
    assert store.objects == {}
    assert sequence.context.marks == []
    with pytest.raises(ConflictError):
        pending.write()


class FailingStore(DictStore):
    """Fails at one put."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def put(self, kind: Kind, data: Buffer, *, compress: bool = False) -> Ref:
        if self.num_puts == self.at:
            raise OSError("disk full")
        return super().put(kind, data, compress=compress)


@pytest.mark.parametrize("at", range(0, 9, 2))
def test_a_failed_write_releases_its_pins_and_the_next_one_is_whole(engine: Engine, at: int) -> None:
    store: Any = FailingStore(at)
    sequence = opened(engine)
    with pytest.raises(OSError, match="disk full"):
        sequence.capture(store, None).write()
    assert engine.pool.num_pinned == 0
    store.at = -1
    part = sequence.capture(store, None).write()
    assert part.facts["num_captured"] == 209
    twin = engine.open_sequence()
    assert twin.prepare(store, part.ref).commit().restored == 209


def test_above_the_limit_a_capture_waits_for_one_that_is_written() -> None:
    with Engine(MODEL, num_blocks=64, pin_share=0.1) as engine:
        store = DictStore()
        store.gate = threading.Event()
        one, two = opened(engine, 100, 2), opened(engine, 90, 2)
        first = one.capture(store, None)
        writer = threading.Thread(target=first.write)
        writer.start()
        while not first.started:
            threading.Event().wait(0.001)
        taken: list[Any] = []
        waiter = threading.Thread(target=lambda: taken.append(two.capture(store, None)))
        waiter.start()
        waiter.join(0.05)
        assert waiter.is_alive() or engine.pool.num_pinned <= 6
        store.gate.set()
        writer.join(30)
        waiter.join(30)
        assert taken[0].staged is None
        assert taken[0].write().facts["num_captured"] == 91


def test_above_the_limit_with_nothing_being_written_bytes_are_copied_at_once() -> None:
    """Two parts of one cut are pinned before either is written: waiting would never end."""
    with Engine(MODEL, num_blocks=64, pin_share=0.1) as engine:
        store = DictStore()
        one, two = opened(engine, 100, 2), opened(engine, 90, 2)
        first, second = one.capture(store, None), two.capture(store, None)
        assert first.staged is None
        assert second.staged is not None
        assert engine.pool.num_pinned == 7
        two.truncate(3)
        two.append([4] * 80)
        two.generate(forced=[1]).result(30)
        for pending, count in ((second, 91), (first, 101)):
            part = pending.write()
            twin = engine.open_sequence()
            assert twin.prepare(store, part.ref).commit().restored == count


class SlowStore(DictStore):
    """A few milliseconds a chunk."""

    def put(self, kind: Kind, data: Buffer, *, compress: bool = False) -> Ref:
        threading.Event().wait(0.002)
        return super().put(kind, data, compress=compress)


def test_many_agents_on_few_blocks_and_a_slow_disk_all_finish() -> None:
    with Engine(MODEL, num_blocks=64, max_batch_tokens=32) as engine:
        store = SlowStore()
        ends: list[int] = []

        def agent(number: int) -> None:
            sequence, ref = engine.open_sequence(nonce=bytes([number]) * 16), None
            for turn in range(3):
                sequence.append([number, turn] * 20)
                sequence.generate(max_tokens=10, temperature=1.0, seed=turn).result(60)
                ref = sequence.capture(store, ref).write().ref
            ends.append(len(sequence.tokens))
            assert sequence.prepare(store, ref).commit().rejected == 0  # type: ignore[arg-type]
            sequence.close()

        threads = [threading.Thread(target=agent, args=(number,)) for number in range(32)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(ends) == 32
        engine.check()
        assert engine.pool.num_free == 64
