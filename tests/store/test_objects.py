"""Objects: round trips, dedupe, what is refused, how many flushes, several threads and processes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import agentckpt.store.pack as pack_module
from agentckpt.errors import CapacityError, CorruptionError, NotFoundError, StoreError
from agentckpt.store import Store
from agentckpt.store.ids import IdKeys, make_ref
from agentckpt.store.io import RealIO
from agentckpt.store.record import Location
from agentckpt.testing.posix_model import PosixModel
from agentckpt.testing.recorder import RecorderIO
from agentckpt.types import Kind, Ref

SECRET = bytes(range(32))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    with Store.init(tmp_path / "s", secret=SECRET) as made:
        yield made


@given(
    data=st.one_of(st.binary(max_size=200), st.integers(0, 70_000).map(lambda n: b"ab" * n)),
    kind=st.sampled_from(["chunk", "node", "manifest"]),
    compress=st.booleans(),
    synced=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_what_was_put_comes_back(data: bytes, kind: Kind, compress: bool, synced: bool) -> None:
    with Store.init("s", secret=SECRET, io=PosixModel()) as store:
        ref = store.put(kind, data, compress)
        assert ref == IdKeys(SECRET).ref(kind, data)
        if synced:
            store.sync()
        assert store.get(ref, len(data)) == data
        target = bytearray(len(data))
        store.read_into(ref, memoryview(target))
        assert bytes(target) == data
        assert store.has(ref)


def test_an_object_comes_back_after_reopening_from_sealed_and_open_packs(tmp_path: Path) -> None:
    first = Store.init(tmp_path / "s")
    a = first.put("chunk", b"a" * 5000)
    first.seal()
    b = first.put("chunk", b"b" * 5000)
    first.sync()
    with Store.open(tmp_path / "s") as second:
        assert second.get(a, 5000) == b"a" * 5000
        assert second.get(b, 5000) == b"b" * 5000
    first.close()
    with Store.open(tmp_path / "s", mode="ro") as third:
        assert third.get(a, 5000) + third.get(b, 5000) == b"a" * 5000 + b"b" * 5000


@pytest.mark.parametrize("data", [bytearray(b"xyz" * 1000), memoryview(b"xyz" * 1000), memoryview(bytearray(12)).cast("i")])
def test_any_buffer_can_be_put_and_is_the_callers_again(store: Store, data: bytearray | memoryview) -> None:
    before = bytes(data)
    ref = store.put("chunk", data)
    if isinstance(data, bytearray):
        data[:] = bytes(len(data))
    store.sync()
    assert store.get(ref, 1 << 20) == before


def test_the_kind_enters_the_id(store: Store) -> None:
    assert len({store.put(kind, b"same")[1:] for kind in ("chunk", "node", "manifest")}) == 3  # type: ignore[arg-type]


def test_equal_data_is_written_once(store: Store) -> None:
    for _ in range(3):
        store.put("chunk", b"z" * 10_000)
    store.sync()
    store.put("chunk", b"z" * 10_000)
    store.sync()
    stats = store.stats().objects
    assert (stats.num_puts, stats.num_new, stats.new_bytes, stats.num_flushes) == (4, 1, 10_000, 1)


def test_dedupe_reaches_over_reopening_and_other_writers(tmp_path: Path) -> None:
    with Store.init(tmp_path / "s") as one, Store.open(tmp_path / "s") as two:
        ref = one.put("chunk", b"q" * 9000)
        assert not two.has(ref), "un-synced objects are seen in their own process alone"
        two.put("chunk", b"q" * 9000)
        assert two.stats().objects.num_new == 1, "and nobody else may rely on them"
        one.sync()
    with Store.open(tmp_path / "s") as three:
        three.put("chunk", b"q" * 9000)
        assert three.stats().objects.num_new == 0


def test_compression_is_kept_only_if_it_gains(store: Store) -> None:
    store.put("chunk", os.urandom(4096), compress=True)
    assert store.stats().objects.stored_bytes == 4096
    store.put("chunk", b"soft" * 4096, compress=True)
    assert store.stats().objects.stored_bytes < 4096 + 1000


def test_too_long_is_refused(store: Store) -> None:
    with pytest.raises(CapacityError, match="at most 16777216 bytes"):
        store.put("chunk", bytes((16 << 20) + 1))
    assert store.get(store.put("chunk", bytes(16 << 20)), 16 << 20) == bytes(16 << 20)


def test_what_is_not_there_is_not_found(store: Store) -> None:
    absent = make_ref("chunk", bytes(32))
    assert not store.has(absent)
    with pytest.raises(NotFoundError, match="chunk 000000000000"):
        store.get(absent, 10)
    with pytest.raises(NotFoundError):
        store.read_into(absent, memoryview(bytearray(3)))
    with pytest.raises(CorruptionError, match="is not a reference"):
        store.get(Ref(b"\x01short"), 10)


@pytest.mark.parametrize("synced", [False, True])
def test_limits_of_the_reader_hold(store: Store, synced: bool) -> None:
    ref = store.put("chunk", b"12345")
    if synced:
        store.sync()
    with pytest.raises(CorruptionError, match="longer than it may be"):
        store.get(ref, 4)
    for size in (4, 6):
        with pytest.raises(CorruptionError, match="another length"):
            store.read_into(ref, memoryview(bytearray(size)))


def test_packs_are_sealed_when_they_are_full(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pack_module, "TARGET_BYTES", 20_000)
    with Store.init(tmp_path / "s") as store:
        refs = {store.put("chunk", bytes([i]) * 6000): bytes([i]) * 6000 for i in range(10)}
        store.sync()
        names = store.packs()
        assert sum(name.endswith(".pack") for name in names) == 3
        assert sum(name.endswith(".open") for name in names) == 1
        for ref, data in refs.items():
            assert store.get(ref, 6000) == data
        for name in names:
            if name.endswith(".pack"):
                assert (tmp_path / "s" / "packs" / name[:2] / name).stat().st_size <= 20_000 + 1024


def test_flushes_of_a_checkpoint(tmp_path: Path) -> None:
    recorder = RecorderIO(RealIO())
    with Store.init(tmp_path / "s", io=recorder) as store:
        store.put("chunk", b"first")
        store.sync()
        recorder.reset()
        for i in range(50):
            store.put("chunk", bytes([i]) * 1000)
        store.sync()
        assert (recorder.num_fdatasync, recorder.num_fsync_dir) == (1, 0), "steady state"
        recorder.reset()
        store.sync()
        assert recorder.num_fdatasync == 0, "nothing was put"
        store.seal()
        store.put("chunk", b"a new pack")
        recorder.reset()
        store.sync()
        assert (recorder.num_fdatasync, recorder.num_fsync_dir) == (1, 1), "a new pack adds the sync of its directory"


def test_many_threads_share_flushes(tmp_path: Path) -> None:
    recorder = RecorderIO(RealIO())
    with Store.init(tmp_path / "s", io=recorder) as store:
        store.put("chunk", b"first")
        store.sync()
        recorder.reset()
        started = threading.Barrier(16)
        failures: list[BaseException] = []

        def work(number: int) -> None:
            try:
                started.wait()
                for i in range(8):
                    data = f"{number} {i}".encode() * 50
                    ref = store.put("chunk", data)
                    store.put("chunk", f"shared {i}".encode() * 50)
                    store.sync()
                    assert store.location(ref) is not None
                    assert store.get(ref, 10_000) == data
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert recorder.num_fdatasync < 16 * 8, "some flush served more than one caller"
        assert store.stats().objects.num_new == 1 + 16 * 8 + 8


READER = """
import sys
from agentckpt.store import Store
with Store.open(sys.argv[1]) as store:
    print("ready", flush=True)
    for line in sys.stdin:
        ref = bytes.fromhex(line.strip())
        data = store.get(ref, 1 << 20)
        back = store.put("chunk", data[::-1])
        assert store.put("chunk", data) == ref and store.stats().objects.num_new % 1 == 0
        store.sync()
        print(back.hex(), store.stats().objects.num_new, flush=True)
"""


def test_two_processes_read_each_others_objects(tmp_path: Path) -> None:
    with Store.init(tmp_path / "s") as store:
        child = subprocess.Popen(
            [sys.executable, "-c", READER, str(tmp_path / "s")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
        )
        assert child.stdin
        assert child.stdout
        assert child.stdout.readline() == "ready\n"
        for i in range(20):
            data = f"object {i} ".encode() * 300
            ref = store.put("chunk", data)
            store.sync()
            if i % 7 == 6:
                store.seal()
            child.stdin.write(ref.hex() + "\n")
            child.stdin.flush()
            answer, num_new = child.stdout.readline().split()
            assert store.get(Ref(bytes.fromhex(answer)), 1 << 20) == data[::-1]
            assert int(num_new) == i + 1, "what the other process synced is not written again"
        child.stdin.close()
        assert child.wait() == 0
        child.stdout.close()


def test_a_forked_child_is_refused_and_can_open_its_own(tmp_path: Path) -> None:
    store = Store.init(tmp_path / "s")
    ref = store.put("chunk", b"of the parent")
    store.sync()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            for call in (lambda: store.put("chunk", b"x"), lambda: store.get(ref, 100), store.sync, store.view):
                with pytest.raises(StoreError, match="opened by the parent"):
                    call()
            store.close()
            with Store.open(tmp_path / "s") as own:
                assert own.get(ref, 100) == b"of the parent"
                own.put("chunk", b"of the child")
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    assert store.has(IdKeys(store.config.secret_of("local", None)).ref("chunk", b"of the child"))
    assert store.get(store.put("chunk", b"of the child"), 100) == b"of the child"
    assert store.stats().objects.num_new == 1
    store.put("chunk", b"the parent goes on")
    store.close()


def test_a_closed_or_read_only_store_says_so(tmp_path: Path) -> None:
    store = Store.init(tmp_path / "s")
    store.close()
    store.close()
    with pytest.raises(StoreError, match="is closed"):
        store.put("chunk", b"")
    with Store.open(tmp_path / "s", mode="ro") as readable:
        for call in (
            lambda: readable.put("chunk", b""),
            readable.sync,
            lambda: readable.append(lambda view: []),
            lambda: readable.lease("x"),
        ):
            with pytest.raises(StoreError, match="read-only"):
                call()


def test_waiting_bytes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    import agentckpt.store.objects as objects

    monkeypatch.setattr(objects, "MAX_WAITING_BYTES", 50_000)
    monkeypatch.setattr(objects, "WRITE_BYTES", 8_000)
    with Store.init("s", io=PosixModel()) as store:
        for i in range(30):
            store.put("chunk", bytes([i]) * 5000)
        assert store.stats().objects.num_flushes == 3


def test_a_lying_index_is_noticed(store: Store) -> None:
    a, b = store.put("chunk", b"a" * 3000), store.put("chunk", b"b" * 3000)
    store.seal()
    at_a, at_b = store.location(a), store.location(b)
    assert at_a
    assert at_b
    for lie in (at_b, at_a._replace(offset=at_a.offset + 64), Location(at_a.pack, 1 << 40, 3000, 3000, 0), at_a._replace(codec=1)):
        store._catalog.index.add(at_a.pack, [(a, lie)], 0)
        assert store.get(a, 3000) == b"a" * 3000
        assert store.location(a) == at_a
