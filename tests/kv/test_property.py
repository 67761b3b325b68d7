"""The property of kv.md: append, truncate, fork, preempt, capture with the copy arbitrarily late; every captured byte equals
a copy taken at the cut.

Method: a random history over a few sequences in a pool too small for them. At each cut the bytes of all resident positions
are copied; whenever a pending capture is written, however late, the chunks that its node names are compared with that copy.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from agentckpt.engine import Engine
from agentckpt.engine.operations import Operation
from agentckpt.engine.sequence import Sequence
from agentckpt.errors import CapacityError
from agentckpt.kv.capture import KVPending
from agentckpt.kv.groups import BLOCK_TOKENS
from agentckpt.types import Ref

from .support import DictStore, tiny_model

MODEL = tiny_model()


@dataclass
class Owner:
    """A sequence, its published head, and its captures that are not written yet."""

    sequence: Sequence
    head: Ref | None = None
    pending: list[tuple[KVPending, dict[int, list[bytes]], list[int], int]] = field(default_factory=list)


def copy_at_cut(engine: Engine, sequence: Sequence) -> dict[int, list[bytes]]:
    """Bytes by head of each 64-token block, the dense tail included, as far as they are resident."""
    context = sequence.context
    end = context.computed if context.valid == context.computed else context.valid // BLOCK_TOKENS * BLOCK_TOKENS
    copies = {}
    for first in range(0, end, BLOCK_TOKENS):
        runs = context.runs(first, min(first + BLOCK_TOKENS, end))
        copies[first // BLOCK_TOKENS] = [bytes(view) for view in engine.kv.gather(runs)]
    return copies


class History:
    """Runs one list of operations. Each takes two small numbers and does nothing where it cannot apply."""

    def __init__(self, reuse: str, block_size: int, kv_order: str) -> None:
        self.engine = Engine(
            MODEL, num_blocks=512 // block_size, block_size=block_size, max_batch_tokens=32, pin_share=0.5,
            prefix_reuse=reuse, kv_order=kv_order,  # type: ignore[arg-type]
        )  # fmt: skip
        self.store = DictStore()
        self.owners = [Owner(self.engine.open_sequence(nonce=bytes(16)))]
        self.num_compared = 0
        self.num_kept = 0
        self.num_repeated = 0
        self.append(0, 80)
        self.generate(0, 3)

    def pick(self, a: int) -> Owner:
        return self.owners[a % len(self.owners)]

    def append(self, a: int, b: int) -> None:
        sequence = self.pick(a).sequence
        if len(sequence.tokens) + b + 1 < 230:
            sequence.append([(a + 7 * i) % 250 for i in range(b + 1)]).result()

    def generate(self, a: int, b: int) -> None:
        sequence = self.pick(a).sequence
        if 0 < len(sequence.tokens) < 230:
            sequence.generate(forced=[(a + 3 * i) % 250 for i in range(b % 20 + 1)]).result(60)

    def generate_together(self, a: int, b: int) -> None:
        ready = [owner.sequence for owner in self.owners if 0 < len(owner.sequence.tokens) < 230]
        handles = [sequence.generate(max_tokens=b % 8 + 1, temperature=1.0, seed=i) for i, sequence in enumerate(ready)]
        for handle in handles:
            handle.result(60)

    def truncate(self, a: int, b: int) -> None:
        sequence = self.pick(a).sequence
        sequence.truncate(max(0, len(sequence.tokens) - b))

    def score(self, a: int, b: int) -> None:
        sequence = self.pick(a).sequence
        if len(sequence.tokens) > 0:
            before = list(sequence.tokens)
            sequence.score(["ab", "ac", "b"]).result(60)
            assert sequence.tokens == before

    def fork(self, a: int, b: int) -> None:
        owner = self.pick(a)
        if len(self.owners) < 5:
            self.owners.append(Owner(owner.sequence.fork(1)[0], head=owner.head))

    def close(self, a: int, b: int) -> None:
        if len(self.owners) > 1:
            self.pick(a).sequence.close()
            closed = self.owners.pop(a % len(self.owners))
            for entry in closed.pending:
                self.finish(closed, entry)

    def preempt(self, a: int, b: int) -> None:
        with self.engine.lock:
            self.pick(a).sequence.context.drop()

    def capture(self, a: int, b: int) -> None:
        owner = self.pick(a)
        if len(owner.pending) < 3:
            copies = copy_at_cut(self.engine, owner.sequence)
            pending = owner.sequence.capture(self.store, owner.head)
            owner.pending.append((pending, copies, list(owner.sequence.tokens), owner.sequence.num_computed))

    def write(self, a: int, b: int) -> None:
        owner = self.pick(a)
        if owner.pending:
            entry = owner.pending.pop(b % len(owner.pending))
            if b % 10 == 0:
                entry[0].cancel()
            else:
                self.finish(owner, entry)

    def finish(self, owner: Owner, entry: tuple[KVPending, dict[int, list[bytes]], list[int], int]) -> None:
        pending, copies, tokens, computed = entry
        self.num_kept += len(pending.cut.known_refs)
        part = pending.write()
        owner.head = part.ref
        assert part.facts["num_tokens"] == len(tokens)
        named = self.store.chunks(part.ref)
        for number, expected in copies.items():
            assert [self.store.objects[ref] for ref in named[number]] == expected, f"block {number} is not what it was at the cut"
        self.num_compared += len(copies)
        shadow = self.engine.open_sequence(nonce=bytes(16))
        report = shadow.prepare(self.store, part.ref).commit()
        assert shadow.tokens == tokens
        assert report.restored + report.recomputed == computed == shadow.num_computed
        assert report.rejected == 0
        if report.recomputed == 0 and shadow.context.valid == computed:
            again = copy_at_cut(self.engine, shadow)
            assert all(again[number] == copies[number] for number in copies)
        shadow.close()

    def compare_with_a_fresh_engine(self, sequence: Sequence) -> None:
        """KV computed along the recorded spans, alone, elsewhere, has the very same bytes."""
        computed = sequence.num_computed
        if any(kind == "batch" for _, _, kind in sequence.spans):
            return
        with Engine(MODEL, num_blocks=64, max_batch_tokens=32, prefix_reuse="off") as fresh:
            twin = fresh.import_(sequence.export())
            for engine, one in ((self.engine, sequence), (fresh, twin)):
                engine.start(Operation(one, goal=computed)).result(60)
            assert copy_at_cut(fresh, twin) == copy_at_cut(self.engine, sequence)
            self.num_repeated += computed

    def end(self) -> None:
        for owner in self.owners:
            for entry in owner.pending:
                self.finish(owner, entry)
            self.compare_with_a_fresh_engine(owner.sequence)
            owner.sequence.close()
        self.engine.check()
        assert self.engine.pool.num_free == self.engine.pool.num_blocks
        self.engine.close()


WEIGHTS = {
    "append": 4, "generate": 3, "generate_together": 2, "truncate": 4, "score": 1, "fork": 3, "close": 1, "preempt": 1,
    "capture": 7, "write": 4,
}  # fmt: skip
OPERATIONS = st.tuples(
    st.sampled_from([name for name, weight in WEIGHTS.items() for _ in range(weight)]), st.integers(0, 7), st.integers(0, 89)
)
HISTORIES = st.lists(OPERATIONS, min_size=50, max_size=70)
COMMON = settings(
    max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None, phases=[Phase.generate]
)


def run(history: list[tuple[str, int, int]], reuse: str, block_size: int, kv_order: str) -> History:
    machine = History(reuse, block_size, kv_order)
    for name, a, b in history:
        getattr(machine, name)(a, b)
        machine.engine.check()
    machine.end()
    return machine


@pytest.mark.parametrize(
    ("reuse", "block_size", "kv_order"), [("exact", 16, "block"), ("any", 4, "layer"), ("off", 64, "block"), ("any", 128, "block")]
)
def test_captured_bytes_are_those_at_the_cut(reuse: str, block_size: int, kv_order: str) -> None:
    done: list[History] = []

    @COMMON
    @given(HISTORIES)
    def check(history: list[tuple[str, int, int]]) -> None:
        done.append(run(history, reuse, block_size, kv_order))

    check()
    assert sum(one.num_compared for one in done) > 120, "the histories compared next to nothing"
    assert sum(one.num_kept for one in done) > 12, "no capture left out a block that it had captured before"
    assert sum(one.num_repeated for one in done) > 500, "next to nothing was computed again elsewhere"
    assert sum(one.engine.scheduler.num_preempted for one in done) > 2 or block_size == 64


@pytest.mark.slow
@settings(COMMON, max_examples=2000, derandomize=False)
@given(HISTORIES, st.sampled_from(["exact", "any", "off"]), st.sampled_from([1, 8, 16, 32, 128]), st.sampled_from(["block", "layer"]))
def test_many_histories(history: list[tuple[str, int, int]], reuse: str, block_size: int, kv_order: str) -> None:
    run(history, reuse, block_size, kv_order)


def test_a_sequence_larger_than_the_pool_is_refused() -> None:
    with Engine(MODEL, num_blocks=4, block_size=16) as engine:
        sequence = engine.open_sequence()
        sequence.append([1] * 80)
        with pytest.raises(CapacityError):
            sequence.generate(max_tokens=1).result(30)
        engine.check()
        sequence.truncate(40)
        assert len(sequence.generate(max_tokens=3, forced=[1, 2, 3]).result(30).ids) == 3
