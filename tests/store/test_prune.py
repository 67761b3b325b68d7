"""Prune deletes what nothing needs, keeps what anything needs, and loses nothing wherever it is cut."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from independent_reader import Reader
from worlds import Written, append, checkpoint, closure, effect, new_session, octets, put_tree, remove

from agentckpt.errors import AgentckptError, CapacityError, ConflictError, CorruptionError, IncompatibleError, NotFoundError
from agentckpt.nodes import get_node, ref_kind
from agentckpt.store import Draft, Store
from agentckpt.store.ids import make_ref
from agentckpt.store.policy import Policy, parse_policy
from agentckpt.store.prune import prune
from agentckpt.store.record import HEADER_BYTES
from agentckpt.store.verify import verify
from agentckpt.testing.faults import Fault, FaultyIO, SimulatedCrash
from agentckpt.testing.posix_model import PosixModel
from agentckpt.testing.recorder import RecorderIO
from agentckpt.types import Ref


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    with Store.init(path, secret=octets("secret", 32)) as made:
        yield made


def manifests(*sessions: Written) -> list[Ref]:
    return [make_ref("manifest", manifest) for session in sessions for manifest in session.manifests]


def contents(store: Store, refs: list[Ref]) -> dict[Ref, bytes]:
    return {ref: store.get(ref, 1 << 24) for ref in closure(store, refs)}


def stored(store: Store) -> set[Ref]:
    return {ref for name in store.packs() for ref, _ in store.pack_entries(name)}


def weak_of(store: Store, session: Written, cut: int) -> set[Ref]:
    """Every KV chunk of one cut, through the list's nodes."""
    below = closure(store, [session.parts[cut]["kv"][1]])
    nodes = [get_node(store, ref) for ref in below if ref[0] != 1]
    return {weak for node in nodes for weak in node.weak}


def test_a_removed_session_goes_and_the_others_stay(store: Store, path: Path) -> None:
    kept, gone = new_session(store, "kept"), new_session(store, "gone")
    for turn in range(3):
        checkpoint(store, kept, kv=70 + 64 * turn, files={"a": b"a" * 3000})
        checkpoint(store, gone, kv=200 + 64 * turn, files={"b": octets("b", 70_000)})
    before = contents(store, manifests(kept))
    store.seal()
    size = store.stats().pack_bytes
    remove(store, gone)
    report = prune(store, kv="all")
    assert (report.dropped, report.dry_run) == ((), False)
    assert report.num_objects_removed > 20
    assert 0 <= store.stats().pack_bytes - (size - report.freed_bytes) < 2000, "but for header and footer of the new pack"
    assert contents(store, manifests(kept)) == before
    assert stored(store) == set(before), "what is left is what is needed, and nothing else"
    with pytest.raises(NotFoundError):
        store.get(manifests(gone)[0], 1 << 24)
    assert verify(store, "data").ok
    again = prune(store, kv="all")
    assert (again.num_objects_removed, again.num_packs_removed) == (0, 0)
    store.close()
    reader = Reader(path)
    assert {ref: reader.get(ref) for ref in before} == before
    gc = [(body["state"], body["packs"]) for kind, body in reader.journal if kind == 14]
    removed = [pack.pack for pack in report.packs if pack.fate != "keep"]
    assert gc == [("begin", removed), ("swept", removed)]
    with Store.open(path) as other:
        assert contents(other, manifests(kept)) == before


def test_the_default_keeps_kv_of_the_last_cut_of_forks_and_of_tags(store: Store) -> None:
    main = new_session(store, "main")
    for turn in range(3):
        checkpoint(store, main, kv=300, kv_label=f"turn {turn}")
    fork = new_session(store, "fork", parent=main)
    checkpoint(store, fork, kv=300, kv_label="turn 3")
    for turn in range(4, 6):
        checkpoint(store, main, kv=300, kv_label=f"turn {turn}")
    append(store, Draft("tag", None, {"tag": "good", "manifest": main.manifests[1]}))
    kv = {(s.name, i): weak_of(store, s, i) for s in (main, fork) for i in range(len(s.manifests))}
    report = prune(store)
    dropped = {(drop.checkpoint, drop.part): drop for drop in report.dropped}
    assert set(dropped) == {(main.manifests[i].hex(), "kv") for i in (0, 3)}
    assert dropped[main.manifests[0].hex(), "kv"].holders == ("session main",)
    for (name, i), chunks in kv.items():
        assert {store.has(ref) for ref in chunks} == {(name, i) not in {("main", 0), ("main", 3)}}, (name, i)
    assert store.view().drops == {(main.manifests[i], "kv") for i in (0, 3)}
    for manifest in manifests(main, fork):
        assert store.get(manifest, 1 << 20)
    checked = verify(store, "data")
    assert checked.ok, "dropped is not missing"
    assert checked.num_dropped == len(kv["main", 0] | kv["main", 3]) > 0
    assert prune(store).dropped == ()


def test_dropped_and_missing_are_told_apart_where_two_checkpoints_share_a_chunk(store: Store, path: Path) -> None:
    main = new_session(store, "main")
    for turn in range(2):
        checkpoint(store, main, kv=200 + 64 * turn)
    shared = weak_of(store, main, 0) & weak_of(store, main, 1)
    only_old = weak_of(store, main, 0) - shared
    assert len(shared) >= 4
    assert len(only_old) == 2
    prune(store, max_unused=0.0)
    assert {store.has(ref) for ref in shared} == {True}
    assert {store.has(ref) for ref in only_old} == {False}
    report = verify(store)
    assert (report.num_dropped, report.num_missing) == (2, 0)
    append(store, Draft("drop", None, {"manifest": main.manifests[1], "part": "kv"}))
    store.seal()
    assert verify(store).num_missing == 0
    for name in store.packs():
        (path / "packs" / name[:2] / name).unlink()
    store.reindex()
    assert verify(store).num_missing > 0, "nodes and manifests are strong: no drop record covers them"


@pytest.mark.parametrize(
    ("policy", "kept"),
    [("all", {0, 1, 2, 3}), ("keep-last=2", {2, 3}), ("keep-last=0", set()), ("pinned", {1}), ("keep-last=1, pinned", {1, 3})],
)
def test_policies(store: Store, policy: str, kept: set[int]) -> None:
    main = new_session(store, "main")
    for turn in range(4):
        checkpoint(store, main, kv=100, kv_label=f"turn {turn}")
    append(store, Draft("tag", None, {"tag": "good", "manifest": main.manifests[1]}))
    report = prune(store, kv=policy)
    assert {main.manifests.index(bytes.fromhex(drop.checkpoint)) for drop in report.dropped} == {0, 1, 2, 3} - kept
    assert verify(store).ok


def test_words_of_a_policy() -> None:
    assert str(parse_policy("all")) == "all"
    assert parse_policy("forks,keep-last=3") == Policy(3, True, False)
    assert parse_policy(str(Policy())) == Policy()
    for bad in ("", "keep-last", "keep-last=-1", "keep-last=x", "keep-last=²", "none", "all,forks", "keep_last=1"):
        with pytest.raises(IncompatibleError):
            parse_policy(bad)


def test_children_of_a_kept_checkpoint_keep_their_kv(store: Store) -> None:
    boss, child = new_session(store, "boss"), new_session(store, "child")
    first = checkpoint(store, child, kv=100, kv_label="first")
    checkpoint(store, boss, children={"child": first})
    checkpoint(store, child, kv=100, kv_label="second")
    remove(store, child)
    report = prune(store)
    assert report.dropped == ()
    assert {store.has(ref) for ref in weak_of(store, child, 0)} == {True}
    assert not store.has(child.parts[1]["kv"][1])


def test_what_records_refer_to_stays_also_for_forks_of_a_removed_session(store: Store) -> None:
    main = new_session(store, "main")
    checkpoint(store, main)
    value, post = store.put("chunk", octets("value", 9000)), put_tree(store, "post", {"made": octets("made", 5000)})
    store.sync()
    effect(store, main, "v1", {"$ref": value}, post)
    note = store.put("chunk", octets("note", 9000))
    store.sync()
    append(store, Draft("annotate", main.sid, {"manifest": main.manifests[0], "values": {"note": {"$ref": note}}}))
    new_session(store, "fork", parent=main)
    remove(store, main)
    below = closure(store, [value, post, note])
    prune(store)
    assert all(store.has(ref) for ref in below)
    remove(store, Written(octets("sid fork", 16), "fork"))
    prune(store)
    assert not any(store.has(ref) for ref in below)
    assert stored(store) == set()


def test_a_dry_run_says_the_same_and_changes_nothing(store: Store, path: Path) -> None:
    main, gone = new_session(store, "main"), new_session(store, "gone")
    for turn in range(2):
        checkpoint(store, main, kv=300, kv_label=f"turn {turn}")
        checkpoint(store, gone, kv=500)
    remove(store, gone)
    store.seal()
    files = {file: file.read_bytes() for file in path.rglob("*") if file.is_file() and "index" not in file.parts}
    would = prune(store, dry_run=True)
    with Store.open(path, mode="ro") as reader:
        assert prune(reader, dry_run=True) == would
    assert files == {file: file.read_bytes() for file in path.rglob("*") if file.is_file() and "index" not in file.parts}
    did = prune(store)
    assert (did.dropped, did.packs, did.freed_bytes, did.num_objects_removed) == (
        would.dropped,
        would.packs,
        would.freed_bytes,
        would.num_objects_removed,
    )
    assert would.num_packs_removed == 1
    assert any("would be dropped" in line for line in would.describe())
    assert any("was rewritten" in line for line in did.describe())


def test_a_pack_that_is_mostly_alive_is_left_alone(store: Store) -> None:
    main, gone = new_session(store, "main"), new_session(store, "gone")
    checkpoint(store, main, files={"a": octets("a", 500_000)})
    checkpoint(store, gone, files={"b": octets("b", 20_000)})
    remove(store, gone)
    assert prune(store).num_packs_removed == 0
    assert prune(store, max_unused=0.01).num_packs_removed == 1


def test_prune_is_alone(store: Store, path: Path) -> None:
    main = new_session(store, "main")
    checkpoint(store, main)
    with Store.open(path):
        with pytest.raises(ConflictError):
            prune(store)
    with store.lease(main.sid.hex()):
        with pytest.raises(ConflictError):
            prune(store)
    with store.exclusive(), pytest.raises(ConflictError):
        Store.open(path)
    prune(store)
    Store.open(path).close()


def test_a_damaged_closure_stops_prune_before_anything_is_deleted(store: Store, path: Path) -> None:
    main, gone = new_session(store, "main"), new_session(store, "gone")
    checkpoint(store, main)
    store.seal()
    (name,) = store.packs()
    checkpoint(store, gone, kv=500)
    remove(store, gone)
    store.seal()
    place = store.location(main.parts[0]["state"][1])
    assert place is not None
    file = path / "packs" / name[:2] / name
    data = bytearray(file.read_bytes())
    data[place.offset + HEADER_BYTES] ^= 1
    file.write_bytes(data)
    before = store.packs()
    with pytest.raises(CorruptionError) as caught:
        prune(store)
    assert caught.value.code == "closure-damaged"
    assert store.packs() == before


def test_a_pack_with_a_damaged_chunk_that_is_needed_stays(store: Store, path: Path) -> None:
    main, gone = new_session(store, "main"), new_session(store, "gone")
    checkpoint(store, main, files={"a": octets("a", 5000)})
    checkpoint(store, gone, files={"b": octets("b", 300_000)})
    remove(store, gone)
    store.seal()
    (name,) = store.packs()
    chunk = next(ref for ref in closure(store, [main.parts[0]["sandbox"][1]]) if ref[0] == 1)
    place = store.location(chunk)
    assert place is not None
    file = path / "packs" / name[:2] / name
    data = bytearray(file.read_bytes())
    data[place.offset + HEADER_BYTES + 7] ^= 1
    file.write_bytes(data)
    report = prune(store)
    assert {pack.pack: pack.fate for pack in report.packs}[name] == "keep"
    assert file.exists(), "evidence is not destroyed"
    assert any("stays" in line for line in report.describe())
    assert verify(store, "data").num_corrupt == 1


def test_a_pack_with_a_damaged_frame_stays(store: Store, path: Path) -> None:
    gone = new_session(store, "gone")
    checkpoint(store, gone, kv=100)
    remove(store, gone)
    store.seal()
    (name,) = store.packs()
    file = path / "packs" / name[:2] / name
    data = bytearray(file.read_bytes())
    data[-30] ^= 1
    file.write_bytes(data)
    store.reindex()
    report = prune(store)
    assert [(pack.fate, pack.reason) for pack in report.packs] == [("keep", "it is damaged")]
    assert file.read_bytes() == data


def test_sessions_of_another_tenant_cannot_be_judged(path: Path) -> None:
    key = {"acme": octets("acme", 32)}
    with Store.init(path, tenants=key) as store:
        ours = new_session(store, "ours")
        checkpoint(store, ours, kv=100)
        remove(store, ours)
    with Store.open(path, tenant="acme", tenant_keys=key) as store:
        sid = octets("sid theirs", 16)
        body = {"name": "theirs", "tenant": "acme", "lineage": octets("lineage", 16), "parent": None}
        append(store, Draft("session", sid, body), Draft("owner", sid, {"epoch": 1, "owner": {}}))
        theirs = Written(sid, "theirs")
        checkpoint(store, theirs, kv=100)
        before = contents(store, manifests(theirs))
    with Store.open(path) as store:
        packs = store.packs()
        with pytest.raises(IncompatibleError) as caught:
            prune(store)
        assert caught.value.code == "other-tenants"
        assert store.packs() == packs
    with Store.open(path, tenant="acme", tenant_keys=key) as store:
        prune(store)
        assert contents(store, manifests(theirs)) == before


def test_of_two_copies_a_sound_one_is_kept(store: Store, path: Path) -> None:
    main = new_session(store, "main")
    checkpoint(store, main, files={"a": octets("a", 200_000)})
    store.seal()
    (first,) = store.packs()
    for ref, _ in store.pack_entries(first):
        store.write_again(ref_kind(ref), store.get(ref, 1 << 24))
    store.seal()
    refs = manifests(main)
    before = contents(store, refs)
    low = min(store.packs())  # the copy that would be kept
    chunk = next(ref for ref in before if ref[0] == 1)
    place = next(at for ref, at in store.pack_entries(low) if ref == chunk)
    file = path / "packs" / low[:2] / low
    data = bytearray(file.read_bytes())
    data[place.offset + HEADER_BYTES + 7] ^= 1
    file.write_bytes(data)
    prune(store)
    assert contents(store, refs) == before
    file.write_bytes(
        bytes(data[: place.offset + HEADER_BYTES + 7])
        + bytes([data[place.offset + HEADER_BYTES + 7] ^ 1])
        + data[place.offset + HEADER_BYTES + 8 :]
    )
    store.reindex()
    prune(store)
    assert len(store.packs()) == 1, "the superfluous copy goes when the other one is sound"
    assert contents(store, refs) == before


def test_a_rewritten_pack_that_gets_the_name_of_one_that_goes_is_not_deleted() -> None:
    """What a crash between two deletions leaves: a pack whose content is exactly what the next prune writes, so its name too."""
    for i in range(8):  # whether it happens depends on how the names sort
        model = PosixModel()
        with Store.init("s", io=model) as store:
            main, gone = new_session(store, f"main {i}"), new_session(store, "gone")
            checkpoint(store, main, files={"a": octets("a", 5000)})
            checkpoint(store, gone, kv=100)
            store.seal()
            remove(store, gone)
            (first,) = store.packs()
            held = closure(store, manifests(main))
            for ref, at in store.pack_entries(first):
                if ref in held:
                    store.write_again(ref_kind(ref), store.get(ref, 1 << 24), compress=at.codec == 1)
            checkpoint(store, main, files={"a": octets("a", 5000), "b": octets("b", 5000)})
            before = contents(store, manifests(main))
            prune(store, max_unused=0.0)
            assert contents(store, manifests(main)) == before, i
            assert stored(store) == set(before), i


def test_a_stale_open_pack_of_a_dead_writer_is_pruned(tmp_path: Path) -> None:
    model = PosixModel()
    with Store.init("s", io=model) as store:
        kept = new_session(store, "kept")
        checkpoint(store, kept, files={"a": octets("a", 5000)})
    dead = Store.open("s", io=model)
    gone = new_session(dead, "gone")
    checkpoint(dead, gone, files={"b": octets("b", 50_000)})
    after = model.crash(0)
    with Store.open("s", io=after) as store:
        assert [name for name in store.packs() if name.endswith(".open")]
        before = contents(store, manifests(kept))
        remove(store, gone)
        prune(store)
        assert not [name for name in store.packs() if name.endswith(".open")]
        assert contents(store, manifests(kept)) == before


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["cut", "kv", "fork", "remove", "tag", "prune", "reopen"])), max_size=14),
    st.data(),
)
def test_any_history_keeps_what_is_held_and_only_that(steps: list[tuple[int, str]], data: st.DataObject) -> None:
    model = PosixModel()
    store = Store.init("s", io=model)
    sessions: list[Written] = []
    for number, (who, step) in enumerate(steps):
        alive = [s for s in sessions if not store.view().sessions[s.sid].removed]
        session = alive[who % len(alive)] if alive else None
        if step in ("cut", "kv") or session is None:
            session = session or new_session(store, f"s{number}")
            sessions += [] if session in sessions else [session]
            checkpoint(store, session, kv=90 * (step == "kv"), kv_label=f"{session.name} {number // 2}", items=number)
        elif step == "fork":
            sessions.append(new_session(store, f"s{number}", parent=session))
        elif step == "remove":
            remove(store, session)
        elif step == "tag":
            append(store, Draft("tag", None, {"tag": "t", "manifest": session.manifests[who % len(session.manifests)]}))
        elif step == "reopen":
            store.close()
            store = Store.open("s", io=model)
        else:
            prune(store, kv=data.draw(st.sampled_from(["all", "keep-last=1", "keep-last=0", "keep-last=1,forks,pinned"])), max_unused=0.0)
            assert verify(store, "data").ok
            held = [*(h["manifest"] for s in store.view().sessions.values() if not s.removed for h in s.heads), *store.view().tags.values()]
            assert stored(store) == closure(store, [make_ref("manifest", m) for m in held])
        assert verify(store).ok
    store.close()


# --- cut at every place


def ready(model: PosixModel) -> tuple[Written, Written]:
    with Store.init("s", io=model) as store:
        main, gone = new_session(store, "main"), new_session(store, "gone")
        for turn in range(2):
            checkpoint(store, main, kv=130, kv_label=f"turn {turn}", files={"a": octets("a", 3000)})
            checkpoint(store, gone, kv=200)
            store.seal()
        remove(store, gone)
    return main, gone


def check_after(model: PosixModel, main: Written, needed: dict[Ref, bytes]) -> None:
    """Everything strong of ``main``, and KV of its last cut, is there; verify agrees; the next prune goes on."""
    with Store.open("s", io=model) as store:
        for ref, data in needed.items():
            assert store.get(ref, 1 << 24) == data
        assert verify(store, "data").ok
        prune(store, max_unused=0.0)
        for ref, data in needed.items():
            assert store.get(ref, 1 << 24) == data
        assert verify(store, "data").ok
        assert stored(store) <= set(needed)


def run_and_die(io: FaultyIO) -> None:
    """Prune until the crash, or to the end; the store is not closed: the machine is gone."""
    with suppress(SimulatedCrash):
        prune(Store.open("s", io=io), max_unused=0.0)


def needed_of(store: Store, main: Written) -> dict[Ref, bytes]:
    dropped = weak_of(store, main, 0)
    return {ref: data for ref, data in contents(store, manifests(main)).items() if ref not in dropped - weak_of(store, main, 1)}


def test_prune_cut_at_every_operation_loses_nothing() -> None:
    base = PosixModel()
    main, _ = ready(base)
    base = base.crash(1)
    with Store.open("s", io=base.crash(1), mode="ro") as store:
        needed = needed_of(store, main)
    counter = FaultyIO(base.crash(1))
    with Store.open("s", io=counter) as store:
        first = counter.num_operations
        report = prune(store, max_unused=0.0)
    assert report.dropped
    assert report.num_packs_removed == 2
    writes = {"pwritev", "fdatasync", "fsync_dir", "rename", "unlink", "write_new", "mkdir"}
    cuts = [n for n, (kind, _) in enumerate(counter.log, 1) if n > first and kind in writes]
    assert len(cuts) > 20
    for n in cuts:
        model = base.crash(1)
        run_and_die(FaultyIO(model, crash_at=n))
        for seed in (0, 1, 2, 100 + n):
            try:
                check_after(model.crash(seed), main, needed)
            except BaseException as error:
                raise AssertionError(f"cut before operation {n} {counter.log[n - 1]}, seed {seed}") from error


@pytest.mark.slow
def test_prune_cut_at_every_operation_in_many_ways() -> None:
    base = PosixModel()
    main, _ = ready(base)
    base = base.crash(1)
    with Store.open("s", io=base.crash(1), mode="ro") as store:
        needed = needed_of(store, main)
    for n in range(1, 1000):
        model = base.crash(1)
        io = FaultyIO(model, crash_at=n)
        run_and_die(io)
        for seed in range(60):
            try:
                check_after(model.crash(seed), main, needed)
            except BaseException as error:
                raise AssertionError(f"cut before operation {n} {io.log[-1]}, seed {seed}") from error
        if not io.crashed:
            return
    pytest.fail("prune never came to its end")


def test_what_is_wholly_dead_goes_first_so_that_a_full_disk_gets_room() -> None:
    model = PosixModel()
    with Store.init("s", io=model) as store:
        main, gone = new_session(store, "main"), new_session(store, "gone")
        checkpoint(store, gone, kv=400)
        store.seal()
        (dead,) = store.packs()
        checkpoint(store, main, files={"a": octets("a", 5000)})
        checkpoint(store, gone, kv=400, kv_label="other")
        remove(store, gone)
        before = contents(store, manifests(main))
    store = Store.open("s", io=FaultyIO(model, [Fault("pwritev", errno.ENOSPC, repeat=True, path="*/packs/*")]))
    with pytest.raises(CapacityError):
        prune(store)
    assert dead not in store.packs()
    assert contents(store, manifests(main)) == before


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_an_error_at_any_operation_loses_nothing_and_the_next_prune_finishes(code: int) -> None:
    base = PosixModel()
    main, _ = ready(base)
    base = base.crash(1)
    with Store.open("s", io=base.crash(1), mode="ro") as store:
        needed = needed_of(store, main)
    counter = FaultyIO(base.crash(1))
    with Store.open("s", io=counter) as store:
        first = counter.num_operations
        prune(store, max_unused=0.0)
        last = counter.num_operations
    for n in range(first + 1, last + 1, 3):
        model = base.crash(1)
        io = FaultyIO(model, [Fault("*", code, nth=n)])
        store = Store.open("s", io=io)
        with suppress(AgentckptError):  # any other exception is a defect and fails the test
            prune(store, max_unused=0.0)
        io.clear()
        with suppress(AgentckptError):
            store.close()
        for seed in (0, 1):
            check_after(model.crash(seed), main, needed)


MUTATIONS = {
    "none: the control": [],
    "drop and gc records are not flushed": [Fault("fdatasync", "skip", repeat=True, path="*/journal/*")],
    "moved objects are not flushed": [Fault("fdatasync", "skip", repeat=True, path="*/packs/*")],
    "names of packs are not flushed": [Fault("fsync_dir", "skip", repeat=True, path="*/packs*")],
}


@pytest.mark.parametrize("plan", MUTATIONS.values(), ids=MUTATIONS.keys())
def test_each_flush_of_prune_is_needed(plan: list[Fault]) -> None:
    """With a flush forgotten, some crash after the prune shows a loss: so the tests above would see it."""
    base = PosixModel()
    main, _ = ready(base)
    base = base.crash(1)
    with Store.open("s", io=base.crash(1), mode="ro") as store:
        needed = needed_of(store, main)
    model = base.crash(1)
    run_and_die(FaultyIO(model, plan))
    losses = []
    for seed in range(20):
        try:
            check_after(model.crash(seed), main, needed)
        except (AgentckptError, AssertionError):
            losses.append(seed)
    assert bool(losses) == bool(plan)


def test_flushes_of_a_prune_are_few() -> None:
    model = PosixModel()
    ready(model)
    io = RecorderIO(model)
    with Store.open("s", io=io) as store:
        io.reset()
        prune(store, max_unused=0.0)
        assert io.num_fdatasync <= 6, "drop records, moved objects sealed, gc begin, gc swept"
