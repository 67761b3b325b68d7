"""Making and opening stores: what is refused and how, leases, names of checkpoints, the index thrown away."""

from __future__ import annotations

import os
import random
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import lmdb
import pytest
from store_drive import Book, check_store, commit, head_draft, put_checkpoint, session_draft

from agentckpt.errors import AmbiguousIdError, ConflictError, CorruptionError, IncompatibleError, NotFoundError, StoreError
from agentckpt.store import Draft, Store
from agentckpt.store.config import MAGIC, decode_config, encode_config
from agentckpt.store.ids import hash32
from agentckpt.store.index import LmdbIndex, MemoryIndex

SID = b"1" * 16


def test_create_makes_a_store_only_where_nothing_is(tmp_path: Path) -> None:
    with Store.open(tmp_path / "absent", create=True) as store:
        assert store.view().seq == 0
    with Store.open(tmp_path / "absent", create=True) as again:
        assert again.config.store_id == store.config.store_id
    (tmp_path / "empty").mkdir()
    Store.open(tmp_path / "empty", create=True).close()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    for call in (
        lambda: Store.open(tmp_path / "full", create=True),
        lambda: Store.init(tmp_path / "full"),
        lambda: Store.open(tmp_path / "full"),
    ):
        with pytest.raises(StoreError):
            call()
    assert os.listdir(tmp_path / "full") == ["mine.txt"]
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError):
        Store.open(tmp_path / "file", create=True)


def test_what_is_no_store_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="there is no store") as absent:
        Store.open(tmp_path / "absent")
    assert absent.value.hint
    assert not (tmp_path / "absent").exists()
    with pytest.raises(StoreError, match="is not a store"):
        Store.open(tmp_path)
    Store.init(tmp_path / "s").close()
    with pytest.raises(ConflictError, match="a store already"):
        Store.init(tmp_path / "s")
    with pytest.raises(StoreError, match="bad option"):
        Store.open(tmp_path / "s", mode="rwx")  # type: ignore[arg-type]


def test_the_secret_is_kept_from_others(tmp_path: Path) -> None:
    Store.init(tmp_path / "s", secret=b"k" * 32).close()
    assert stat.S_IMODE((tmp_path / "s" / "config").stat().st_mode) == 0o600
    config = decode_config((tmp_path / "s" / "config").read_bytes())
    assert config.secret_of("local", None) == b"k" * 32
    assert "k" * 32 not in repr(config)


def test_every_damaged_config_is_refused(tmp_path: Path) -> None:
    Store.init(tmp_path / "s").close()
    path = tmp_path / "s" / "config"
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(CorruptionError):
            Store.open(tmp_path / "s")
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CorruptionError):
            Store.open(tmp_path / "s")


def rewrite_config(path: Path, old: bytes, new: bytes) -> None:
    data = (path / "config").read_bytes()[:-32].replace(old, new)
    data = MAGIC + (len(data) - 12).to_bytes(4, "little") + data[12:]
    (path / "config").write_bytes(data + hash32(data))


def test_newer_formats_and_unknown_features_are_refused(tmp_path: Path) -> None:
    for name, old, new in (
        ("f", b"fformat\x01", b"fformat\x02"),
        ("r", b"dread\x80", b"dread\x81\x61x"),
        ("w", b"ewrite\x80", b"ewrite\x81\x61x"),
    ):
        Store.init(tmp_path / name).close()
        rewrite_config(tmp_path / name, old, new)
        with pytest.raises(IncompatibleError):
            Store.open(tmp_path / name)
    Store.open(tmp_path / "w", mode="ro").close()
    with pytest.raises(IncompatibleError):
        Store.open(tmp_path / "r", mode="ro")


def test_tenants_have_ids_of_their_own(tmp_path: Path) -> None:
    key = b"t" * 32
    Store.init(tmp_path / "s", tenants={"acme": key}).close()
    assert key not in (tmp_path / "s" / "config").read_bytes()
    with Store.open(tmp_path / "s") as local, Store.open(tmp_path / "s", tenant="acme", tenant_keys={"acme": key}) as acme:
        assert local.put("chunk", b"same") != acme.put("chunk", b"same")
    with pytest.raises(NotFoundError, match="its secret"):
        Store.open(tmp_path / "s", tenant="acme")
    with pytest.raises(IncompatibleError, match="not the one"):
        Store.open(tmp_path / "s", tenant="acme", tenant_keys={"acme": b"u" * 32})
    with pytest.raises(NotFoundError, match="no tenant"):
        Store.open(tmp_path / "s", tenant="nobody")
    with pytest.raises(IncompatibleError, match="32 bytes"):
        Store.init(tmp_path / "t", secret=b"short")
    assert encode_config(decode_config((tmp_path / "s" / "config").read_bytes())) == (tmp_path / "s" / "config").read_bytes()


HOLDER = """
import sys
from agentckpt.store import Store
store = Store.open(sys.argv[1])
lease = store.lease("x")
print("held", flush=True)
sys.stdin.read()
"""


def test_a_lease_has_one_holder_and_ends_with_it(tmp_path: Path) -> None:
    with Store.init(tmp_path / "s") as store:
        child = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(tmp_path / "s")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert child.stdin
        assert child.stdout
        assert child.stdout.readline() == "held\n"
        with pytest.raises(ConflictError, match=f"process {child.pid} on "):
            store.lease("x")
        with store.lease("y"):
            child.kill()
            child.wait()
        for pipe in (child.stdin, child.stdout):
            pipe.close()
        with store.lease("x") as lease:
            assert lease.held
            with pytest.raises(ConflictError):
                store.lease("x")
        store.lease("x").release()
        for name in ("", "../x", "_writers", "a/b", ".x"):
            with pytest.raises(StoreError, match="no name for a lease"):
                store.lease(name)


def test_exclusive_meets_no_other_writer(tmp_path: Path) -> None:
    with Store.init(tmp_path / "s") as store:
        with Store.open(tmp_path / "s") as other, pytest.raises(ConflictError), store.exclusive():
            raise AssertionError(other)
        with Store.open(tmp_path / "s", mode="ro"), store.exclusive():
            with pytest.raises(ConflictError):
                Store.open(tmp_path / "s")
        Store.open(tmp_path / "s").close()


def test_read_only_leaves_no_trace(tmp_path: Path) -> None:
    book = Book()
    with Store.init(tmp_path / "s") as store:
        store.append(lambda view: [session_draft(SID, "a")])
        commit(store, SID, random.Random(1), book)
    shutil.rmtree(tmp_path / "s" / "index")
    for lock in [tmp_path / "s" / "journal" / "lock", *(tmp_path / "s" / "leases").iterdir()]:
        lock.unlink()
    before = sorted(str(path) for path in (tmp_path / "s").rglob("*"))
    with Store.open(tmp_path / "s", mode="ro") as store:
        check_store(store, book)
        store.stats()
        assert store.find_manifest(book.acked[SID].hex()[:8]) == book.acked[SID]
    assert sorted(str(path) for path in (tmp_path / "s").rglob("*")) == before


def test_finding_a_checkpoint(tmp_path: Path) -> None:
    book, rng = Book(), random.Random(2)
    with Store.init(tmp_path / "s") as store:
        store.append(lambda view: [session_draft(SID, "a")])
        ids = [commit(store, SID, rng, book, num_chunks=1, chunk_bytes=10).manifest for _ in range(3)]
        for id in ids:
            assert store.find_manifest(id.hex()) == id
            assert store.find_manifest(id.hex()[:9].upper()) == id
        for prefix in ("", "abc", "zzzz", "a" * 65, ids[0].hex() + "0", "00000000"):
            with pytest.raises(NotFoundError):
                store.find_manifest(prefix)
        unnamed = put_checkpoint(store, rng).manifest
        store.seal()
        assert store.find_manifest(unnamed.hex()[:11]) == unnamed, "also one that no head names"
        store.append(lambda view: [Draft("tag", None, {"tag": "good", "manifest": ids[1]})])
        assert store.find_manifest("good") == ids[1]


def test_a_prefix_that_fits_several_checkpoints_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(3)
    monkeypatch.setattr("agentckpt.store.store.MIN_PREFIX", 1)
    with Store.init(tmp_path / "s") as store:
        store.append(lambda view: [session_draft(SID, "a")])
        book = Book()
        ids = [commit(store, SID, rng, book, num_chunks=1, chunk_bytes=10).manifest for _ in range(17)]
        digits = [id.hex()[0] for id in ids]
        twice = next(digit for digit in digits if digits.count(digit) > 1)
        with pytest.raises(AmbiguousIdError, match="checkpoints") as found:
            store.find_manifest(twice)
        assert all(id.hex()[:12] in str(found.value) for id in ids if id.hex()[0] == twice)


def some_store(path: Path, *, num: int = 4) -> Book:
    book, rng = Book(), random.Random(5)
    with Store.init(path) as store:
        store.append(lambda view: [session_draft(SID, "a")])
        for i in range(num):
            commit(store, SID, rng, book)
            if i % 2:
                store.seal()
    return book


def index_files(path: Path) -> Path:
    return next((path / "index").iterdir())


def test_the_index_may_be_lost_replaced_or_garbage(tmp_path: Path) -> None:
    book = some_store(tmp_path / "s")
    other = some_store(tmp_path / "other")
    assert other.acked != book.acked
    folder = index_files(tmp_path / "s")
    good = (folder / "data.mdb").read_bytes()
    foreign = (index_files(tmp_path / "other") / "data.mdb").read_bytes()
    for data in (None, b"", b"garbage", os.urandom(20_000), good[: len(good) // 2], good[:8192], good[:5000], foreign, good):
        shutil.rmtree(folder) if data is None else (folder / "data.mdb").write_bytes(data)
        with Store.open(tmp_path / "s") as store:
            check_store(store, book)
            commit(store, SID, random.Random(6), book)
            assert isinstance(store._catalog.index, LmdbIndex)


def test_an_index_that_was_copied_along_is_not_opened(tmp_path: Path) -> None:
    book = some_store(tmp_path / "s")
    shutil.copytree(tmp_path / "s", tmp_path / "copy")
    copied = (index_files(tmp_path / "copy") / "data.mdb").stat().st_ino
    with Store.open(tmp_path / "copy") as store:
        check_store(store, book)
        assert (index_files(tmp_path / "copy") / "data.mdb").stat().st_ino != copied


def test_an_index_that_fails_in_use_is_replaced_in_memory(tmp_path: Path) -> None:
    book = some_store(tmp_path / "s")
    with Store.open(tmp_path / "s") as store:
        index = store._catalog.index
        assert isinstance(index, LmdbIndex)
        index._shared.env.close()
        check_store(store, book)
        commit(store, SID, random.Random(7), book)
        assert isinstance(store._catalog.index, MemoryIndex)
    with Store.open(tmp_path / "s") as store:
        check_store(store, book)


def test_the_index_holds_only_what_is_synced(tmp_path: Path) -> None:
    with Store.init(tmp_path / "s") as store:
        ref = store.put("chunk", b"not yet")
        store._objects.index_now()
        assert store._catalog.index.get(ref) is None
        store.sync()
        store._objects.index_now()
        assert store._catalog.index.get(ref) is not None
        assert lmdb.version()[0] >= 0


def test_two_stores_on_one_path_share_an_environment(tmp_path: Path) -> None:
    with Store.init(tmp_path / "s") as one:
        with Store.open(tmp_path / "s") as two:
            ref = one.put("chunk", b"x")
            one.seal()
            assert two.has(ref)
        assert one.has(ref)
        assert isinstance(one._catalog.index, LmdbIndex)
        mark = one.sync()
        one.append(lambda view: [session_draft(SID, "a")])
        content = put_checkpoint(one, random.Random(8))
        mark = one.sync()
        one.append(lambda view: [head_draft(view, SID, content.manifest, mark)])
