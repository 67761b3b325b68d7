"""Errors of every I/O operation: nothing is damaged, the error is typed, and trying again works once the cause is gone."""

from __future__ import annotations

import errno
import random
import threading
from typing import Any

import pytest
import store_crash
from store_crash import CHANGING, A, B, small_files
from store_drive import Book, Content, check_content, check_store, head_draft, put_checkpoint, session_draft

from agentckpt.errors import AgentckptError, CapacityError, ConflictError, StoreError
from agentckpt.store import Draft, Store
from agentckpt.testing.faults import Fault, FaultyIO
from agentckpt.testing.posix_model import ALL_KEPT, ALL_LOST, PosixModel

ACTIONS: dict[str, tuple[Any, frozenset[str] | None]] = {
    "EIO": (errno.EIO, None),
    "ENOSPC": (errno.ENOSPC, CHANGING),
    "EDQUOT": (errno.EDQUOT, frozenset({"pwritev", "write_new", "mkdir", "fdatasync"})),
    "EINTR": (errno.EINTR, None),
    "EMFILE": (errno.EMFILE, frozenset({"open_read", "open_append", "write_new", "lock", "list", "fsync_dir"})),
    "short": ("short", frozenset({"pwritev"})),
}


def publish(store: Store, sid: bytes, content: Content, book: Book) -> None:
    """Commit what was put; after an error of the append the head may have moved all the same: then that is the commit."""
    book.contents[content.manifest] = content
    book.tried[sid] = content.manifest
    mark = store.sync()
    head = store.view().sessions[sid].head
    if head is None or head["manifest"] != content.manifest:
        store.append(lambda view: [head_draft(view, sid, content.manifest, mark)])
    else:
        store.flush_journal()
    book.acked[sid] = content.manifest
    del book.tried[sid]


def patient(io: FaultyIO, call: Any) -> Any:
    """Try until it works; every failure must be typed, and the fault is cleared after the first."""
    for _ in range(3):
        try:
            return call()
        except (StoreError, CapacityError):
            io.clear()
    return call()


def scenario(io: FaultyIO, book: Book) -> None:
    """Sessions, commits over seals and rotations, unflushed records, close, open again; each step tried until it works."""
    rng = random.Random(4)
    store = patient(io, lambda: Store.open("s", create=True, io=io))

    def sessions() -> None:
        if A not in store.view().sessions:
            store.append(lambda view: [session_draft(A, "a")])
        if B not in store.view().sessions:
            store.append(lambda view: [session_draft(B, "b")])
        store.flush_journal()

    patient(io, sessions)
    for i in range(4):
        for sid in (A, B):
            state = rng.getstate()

            def put(state: Any = state) -> Content:
                rng.setstate(state)
                return put_checkpoint(store, rng, num_chunks=3, chunk_bytes=3000)

            content = patient(io, put)
            patient(io, lambda sid=sid, content=content: publish(store, sid, content, book))
        patient(io, lambda i=i: store.append(lambda view: [Draft("segment", A, {"epoch": 0, "turn": i})], durable=False))
        patient(io, lambda content=content: check_content(store, content))
    patient(io, store.close)
    store = patient(io, lambda: Store.open("s", io=io))
    patient(io, lambda: check_store(store, book))
    patient(io, store.close)


def num_operations() -> tuple[int, list[tuple[str, str]]]:
    with small_files():
        io = FaultyIO(PosixModel(1))
        scenario(io, Book())
    return io.num_operations, io.log


@pytest.mark.parametrize("name", ACTIONS)
def test_an_error_at_every_operation(name: str) -> None:
    action, kinds = ACTIONS[name]
    total, log = num_operations()
    assert total > 300
    num_hits = 0
    with small_files():
        for number in range(1, total + 1):
            kind = log[number - 1][0]
            if (
                (kinds is not None and kind not in kinds)
                or (name == "EINTR" and number % 5)
                or (name == "EIO" and kind not in CHANGING and number % 3)
            ):
                continue
            num_hits += run_with(name, action, number)
    assert num_hits > 20


def run_with(name: str, action: Any, number: int) -> int:
    book = Book()
    model = PosixModel(1)
    io = FaultyIO(model, [Fault("*", action, nth=number)])
    try:
        scenario(io, book)
        store_crash.release_locks(model)
        for seed in (ALL_LOST, ALL_KEPT):
            with Store.open("s", io=model.crash(seed)) as store:
                check_store(store, book)
    except Exception as error:
        raise AssertionError(f"{name} at operation {number} {io.log[number - 1]}: {type(error).__name__}: {error}") from error
    return len(io.hits)


@pytest.mark.parametrize("action", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_a_capacity_error_and_reading_goes_on(action: int) -> None:
    io = FaultyIO(PosixModel(1))
    book = Book()
    with Store.init("s", io=io) as store:
        store.append(lambda view: [session_draft(A, "a")])
        first = put_checkpoint(store, random.Random(1))
        publish(store, A, first, book)
        io.plan.append(Fault("pwritev", action, repeat=True))
        io._seen.append(0)
        second = put_checkpoint(store, random.Random(2))
        for _ in range(3):
            with pytest.raises(CapacityError, match="no space left") as found:
                store.sync()
            assert found.value.hint
            with pytest.raises(CapacityError):
                store.append(lambda view: [session_draft(B, "b")])
        check_content(store, first)
        check_content(store, second)
        assert B not in store.view().sessions
        io.clear()
        publish(store, A, second, book)
        store.append(lambda view: [session_draft(B, "b")])
    with Store.open("s", io=io.inner) as store:
        check_store(store, book)


def test_a_pack_whose_flush_failed_is_never_synced_again() -> None:
    model = PosixModel(1)
    io = FaultyIO(model)
    with Store.init("s", io=io) as store:
        ref = store.put("chunk", b"x" * 5000)
        io.plan.append(Fault("fdatasync", errno.EIO, path="*.open"))
        io._seen.append(0)
        with pytest.raises(StoreError, match="EIO"):
            store.sync()
        (failed,) = [name for name in model.list("s/packs") if name.endswith(".open")]
        begin = len(io.log)
        store.sync()
        assert (("fdatasync", f"s/packs/{failed}")) not in io.log[begin:]
        assert not any(kind == "pwritev" and path.endswith(failed) for kind, path in io.log[begin:])
        assert store.get(ref, 5000) == b"x" * 5000
    with Store.open("s", io=model.crash(ALL_LOST)) as store:
        assert store.get(ref, 5000) == b"x" * 5000


def test_a_segment_whose_flush_failed_is_replaced_and_nothing_is_lost() -> None:
    model = PosixModel(1)
    io = FaultyIO(model)
    with Store.init("s", io=io) as store, Store.open("s", io=model) as other:
        store.append(lambda view: [session_draft(A, "a")])
        other.append(lambda view: [session_draft(B, "b")], durable=False)
        io.plan.append(Fault("fdatasync", errno.EIO, path="*1.log"))
        io._seen.append(0)
        begin = len(io.log)
        store.append(lambda view: [Draft("tag", None, {"tag": "t", "manifest": bytes(32)})])
        assert io.log[begin:].count(("fdatasync", f"s/journal/{1:016d}.log")) == 1, "asked once, never again"
        lost = Store.open("s", mode="ro", io=model.crash(ALL_LOST))
        assert set(lost.view().tags) == {"t"}
        assert set(lost.view().names) == {"a", "b"}, "the other process's record was written again too"
        assert other.view() == store.view() == lost.view()
        other.append(lambda view: [Draft("tag", None, {"tag": "u", "manifest": bytes(32)})])
        assert store.view().tags.keys() == {"t", "u"}


def test_a_failed_append_is_void() -> None:
    model = PosixModel(1)
    io = FaultyIO(model)
    with Store.init("s", io=io) as store, Store.open("s", io=model) as other:
        store.append(lambda view: [session_draft(A, "a")])
        for action in ("short", errno.EIO):
            io.plan, io._seen = [Fault("pwritev", action, path="*/journal/*")], [0]
            with pytest.raises(AgentckptError):
                store.append(lambda view: [session_draft(B, "b")])
            assert B not in other.view().sessions
            assert B not in store.view().sessions
        with pytest.raises(ConflictError):
            other.append(lambda view: [session_draft(B, "a")])
        store.append(lambda view: [session_draft(B, "b")])
        assert other.view() == store.view()


class UnluckyIO(FaultyIO):
    """One in ``one_in`` changing operations fails, at random."""

    def __init__(self, inner: Any, seed: int, one_in: int) -> None:
        super().__init__(inner)
        self.rng, self.one_in, self.num_failures = random.Random(seed), one_in, 0

    def _next(self, kind: str, path: str) -> Any:
        super()._next(kind, path)
        if kind not in CHANGING or kind == "lock" or self.rng.randrange(self.one_in):
            return None
        self.num_failures += 1
        return self.rng.choice([errno.EIO, errno.ENOSPC, "short" if kind == "pwritev" else errno.EDQUOT])


@pytest.mark.parametrize("seed", range(3))
def test_threads_that_commit_while_the_disk_fails(seed: int) -> None:
    model = PosixModel(seed)
    sids = [bytes([65 + n]) * 16 for n in range(6)]
    books = {sid: Book() for sid in sids}
    with Store.init("s", io=model) as store:
        store.append(lambda view: [session_draft(sid, sid.decode()) for sid in sids])
    with small_files():
        io = UnluckyIO(model, seed, 12)
        store = Store.open("s", io=model)
        store._io = store._objects._io = store._journal._io = store._catalog._io = store._files._io = io  # type: ignore[assignment]
        failures: list[BaseException] = []

        def work(sid: bytes) -> None:
            rng = random.Random(sid[0] + seed)
            try:
                for _ in range(6):
                    state = rng.getstate()
                    for attempt in range(60):
                        rng.setstate(state)
                        try:
                            publish(store, sid, put_checkpoint(store, rng, num_chunks=2, chunk_bytes=2000), books[sid])
                            break
                        except (StoreError, CapacityError):
                            assert attempt < 59
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(sid,)) for sid in sids]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not failures, f"seed {seed}: {failures}"
        assert io.num_failures > 0
        for crash in (ALL_LOST, ALL_KEPT, 7):
            with Store.open("s", io=model.crash(crash)) as found:
                for sid in sids:
                    check_store_of(found, sid, books)


def check_store_of(store: Store, sid: bytes, books: dict[bytes, Book]) -> None:
    session = store.view().sessions[sid]
    assert session.head is not None
    assert session.head["manifest"] == books[sid].acked[sid]
    assert session.generation == 6
    for head in session.heads:
        check_content(store, books[sid].contents[head["manifest"]])
