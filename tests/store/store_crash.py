"""The crash laboratory: production code on the POSIX model, cut before every operation that changes something.

``LABS`` are the scenarios. Each runs once and, before every operation that matters, lets the machine die in several ways
(seeds); what is found afterwards must satisfy ``check_store``. A violation names lab, operation and seed:
``python tests/store/store_crash.py LAB OPERATION SEED`` shows the same one again.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from store_drive import Book, check_store, commit, session_draft

import agentckpt.store.journal as journal_module
import agentckpt.store.objects as objects_module
import agentckpt.store.pack as pack_module
from agentckpt.store import Draft, Store
from agentckpt.store.io import IO, File
from agentckpt.testing._wrap import WrappedIO
from agentckpt.testing.faults import FaultyIO, SimulatedCrash
from agentckpt.testing.posix_model import ALL_KEPT, ALL_LOST, LAST_ONLY, PosixModel
from agentckpt.types import Buffer

T = TypeVar("T")
CHANGING = frozenset(
    {"pwritev", "fdatasync", "fsync_dir", "rename", "exchange", "unlink", "mkdir", "rmdir", "write_new", "open_append", "lock"}
)
QUICK_SEEDS = (ALL_LOST, ALL_KEPT, LAST_ONLY, 3, 4)
A, B = b"a" * 16, b"b" * 16
Wrap = Callable[[IO], IO]


class Violation(AssertionError):
    """A crash that lost or damaged something."""


@contextmanager
def small_files() -> Iterator[None]:
    """Packs, segments and batches so small that a short run meets every seam."""
    saved = pack_module.TARGET_BYTES, journal_module.SEGMENT_BYTES, objects_module.INDEX_BATCH, objects_module.WRITE_BYTES
    pack_module.TARGET_BYTES, journal_module.SEGMENT_BYTES = 12_000, 1_500  # type: ignore[misc]
    objects_module.INDEX_BATCH, objects_module.WRITE_BYTES = 5, 5_000  # type: ignore[misc]
    try:
        yield
    finally:
        (pack_module.TARGET_BYTES, journal_module.SEGMENT_BYTES, objects_module.INDEX_BATCH, objects_module.WRITE_BYTES) = saved  # type: ignore[misc]


class CrashingIO(WrappedIO):
    """Before each changing operation, lets a copy of the machine die and looks at what is left."""

    def __init__(self, model: PosixModel, look: Callable[[PosixModel, int, int], None], seeds: Sequence[int], only: int | None) -> None:
        super().__init__(model)
        self.model, self.look, self.seeds, self.only = model, look, seeds, only
        self.number = 0

    def cut(self, kind: str, path: str) -> None:
        if kind not in CHANGING:
            return
        self.number += 1
        if self.only not in (None, self.number):
            return
        for seed in self.seeds:
            try:
                self.look(self.model.crash(seed), self.number, seed)
            except Exception as error:
                raise Violation(f"operation {self.number} ({kind} {path}), seed {seed}: {type(error).__name__}: {error}") from error

    def around(self, kind: str, path: str, num_bytes: int, call: Callable[[], T]) -> T:
        self.cut(kind, path)
        return call()

    def write(self, file: File, offset: int, buffers: Sequence[Buffer]) -> None:
        self.cut("pwritev", file.path)
        file.pwritev(offset, buffers)

    def sync(self, file: File) -> None:
        self.cut("fdatasync", file.path)
        file.fdatasync()


class Truth:
    """The book of a run, and whether the store's making was acknowledged."""

    def __init__(self) -> None:
        self.book = Book()
        self.made = False
        self.sealed = False
        """the writer's pack was sealed and acknowledged, and nothing was written since"""

    def look(self, model: PosixModel, number: int, seed: int) -> None:
        """Open what a crash left, check it, go on writing, let that crash too, check again."""
        if not self.made:
            Store.open("s", create=True, io=model).close()
            return
        names = [name for name in model.list("s/packs") if name.endswith(".open")]
        assert not (self.sealed and names), f"a sealed pack kept its old name: {names}"
        if seed == ALL_KEPT:
            with Store.open("s", mode="ro", io=model) as store:
                check_store(store, self.book)
        store = Store.open("s", io=model)
        check_store(store, self.book)
        if seed in (ALL_KEPT, 3) and A in store.view().sessions:
            after = Book(contents=dict(self.book.contents), acked=dict(self.book.acked), tried=dict(self.book.tried))
            commit(store, A, random.Random(number), after, num_chunks=1)
            with Store.open("s", mode="ro", io=model.crash(ALL_LOST)) as once_more:
                check_store(once_more, after)


def note(truth: Truth, entries: Sequence[Any]) -> None:
    truth.book.acked_seq = entries[-1].seq


def unflushed(store: Store, turn: int, num_ids: int) -> None:
    """A record that is flushed with whatever flushes next."""
    store.append(lambda view: [Draft("segment", A, {"epoch": 0, "turn": turn, "ids": [turn] * num_ids})], durable=False)


def birth(io: IO, truth: Truth, durability: Any) -> None:
    """Nothing but ``init`` and the first record."""
    store = Store.open("s", create=True, io=io, durability=durability)
    truth.made = True
    note(truth, store.append(lambda view: [session_draft(A, "a")]))


def main(io: IO, truth: Truth, durability: Any) -> None:
    """One process: init, commits that fill and seal packs and rotate segments, tags, close, open again."""
    rng, book = random.Random(1), truth.book
    store = Store.open("s", create=True, io=io, durability=durability)
    truth.made = True
    note(truth, store.append(lambda view: [session_draft(A, "a"), session_draft(B, "b")]))
    for i in range(4):
        commit(store, A, rng, book, num_chunks=2)
        unflushed(store, i, 20)
        commit(store, B, rng, book, num_chunks=2)
    store.append(lambda view: [Draft("tag", None, {"tag": "t", "manifest": book.acked[A]})], durable=False)
    store.flush_journal()
    book.values[0], book.acked_seq = "t", store.view().seq
    store.seal()
    truth.sealed = True
    io.exists("s")
    note(truth, store.append(lambda view: [Draft("annotate", A, {"manifest": None, "values": {"x": 1}})]))
    truth.sealed = False
    commit(store, A, rng, book, num_chunks=1)
    store.close()
    store = Store.open("s", io=io, durability=durability)
    commit(store, B, rng, book, num_chunks=1)
    store.close()


def pair(io: IO, truth: Truth, durability: Any) -> None:
    """Two writers of one store that take turns and refer to each other's objects."""
    rng, book = random.Random(2), truth.book
    one = Store.open("s", create=True, io=io, durability=durability)
    truth.made = True
    two = Store.open("s", io=io, durability=durability)
    note(truth, one.append(lambda view: [session_draft(A, "a"), session_draft(B, "b")]))
    for _ in range(3):
        content = commit(one, A, rng, book, num_chunks=2)
        for ref in content.objects:
            two.has(ref)
        state = random.getstate(), rng.getstate()
        commit(two, B, rng, book, num_chunks=1)
        rng.setstate(state[1])
        commit(one, A, rng, book, num_chunks=2)
    two.close()
    one.close()


LABS: dict[str, Callable[[IO, Truth, Any], None]] = {"birth": birth, "main": main, "pair": pair}


def run(lab: str, seeds: Sequence[int], *, wrap: Wrap = lambda io: io, durability: str = "commit", only: int | None = None) -> int:
    """Run a lab; returns the number of operations cut. Raises ``Violation``."""
    truth = Truth()
    model = PosixModel(1)
    io = CrashingIO(model, truth.look, seeds, only)
    with small_files():
        try:
            LABS[lab](wrap(io), truth, durability)
            io.cut("lock", "the end")
        except Violation:
            raise
        except Exception as error:
            raise Violation(f"{lab} itself fails: {type(error).__name__}: {error}") from error
    return io.number


def release_locks(model: PosixModel) -> None:
    """What the death of all processes does."""
    for holders in list(model.holders.values()):
        for lock in list(holders):
            lock.release()


def victim(io: IO, truth: Truth) -> None:
    """What the first process does until it is killed: commits over a seal and a rotation, with unflushed records between."""
    rng, book = random.Random(3), truth.book
    store = Store.open("s", io=io)
    for i in range(3):
        commit(store, A, rng, book, num_chunks=9, chunk_bytes=1500)
        unflushed(store, i, 40)
    store.close()


def kill(seeds: Sequence[int], *, wrap: Wrap = lambda io: io, every: int = 1, only: int | None = None) -> int:
    """A process is killed before each of its operations; a second one commits; then the machine dies at each operation of that one.

    Returns the number of kills. ``every``: the machine dies at every n-th operation of the second process, and at its end.
    """
    number = 0
    with small_files():
        while True:
            number += 1
            truth = Truth()
            model = PosixModel(number)
            with Store.open("s", create=True, io=wrap(model)) as store:
                truth.made = True
                note(truth, store.append(lambda view: [session_draft(A, "a"), session_draft(B, "b")]))
            if only not in (None, number):
                if only is not None and number > only:
                    return number
                continue
            io = FaultyIO(wrap(model), crash_at=number)
            try:
                victim(io, truth)
                return number
            except SimulatedCrash:
                pass
            kind = io.log[-1]
            if kind[0] not in CHANGING:
                continue
            release_locks(model)
            try:
                survivor(model, truth, number, seeds, wrap, every)
            except Violation as error:
                raise Violation(f"killed before operation {number} {kind}, then {error}") from error
            except Exception as error:
                raise Violation(f"killed before operation {number} {kind}, then {type(error).__name__}: {error}") from error


def kill_birth(seeds: Sequence[int], *, wrap: Wrap = lambda io: io) -> int:
    """A process is killed at each operation of making a store; a second one makes or opens it and writes; then the machine dies."""
    number = 0
    while True:
        number += 1
        model = PosixModel(number)
        io = FaultyIO(wrap(model), crash_at=number)
        try:
            Store.open("s", create=True, io=io)
            return number
        except SimulatedCrash:
            release_locks(model)
        truth = Truth()
        try:
            birth(wrap(model), truth, "commit")
            for seed in seeds:
                truth.look(model.crash(seed), number, seed)
        except Exception as error:
            raise Violation(f"killed before operation {number} {io.log[-1]}, then {type(error).__name__}: {error}") from error


def survivor(model: PosixModel, truth: Truth, number: int, seeds: Sequence[int], wrap: Wrap, every: int) -> None:
    """The second process: finds the store as the first left it, commits, refers to what it found."""
    book = truth.book

    def look(crashed: PosixModel, operation: int, seed: int) -> None:
        if operation % every == 0:
            with Store.open("s", mode="ro", io=crashed) as store:
                check_store(store, book)

    io = CrashingIO(model, look, seeds, None)
    store = Store.open("s", io=wrap(io))
    check_store(store, book)
    head = store.view().sessions[A].head
    book.acked.pop(A, None) if head is None else book.acked.update({A: head["manifest"]})
    book.tried.clear()
    if head is not None:
        book.acked.pop(A)  # read, not acknowledged to anybody: it becomes durable with the next commit
    rng = random.Random(3)
    for _ in range(3):  # the same content as the victim's: what it left is met again, synced or not
        commit(store, A, rng, book, num_chunks=9, chunk_bytes=1500)
    io.look = lambda crashed, operation, seed: look(crashed, 0, seed)
    io.cut("lock", "the end")


if __name__ == "__main__":
    lab, operation, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    print(kill((seed,), only=operation) if lab == "kill" else run(lab, (seed,), only=operation))
