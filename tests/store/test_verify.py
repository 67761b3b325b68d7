"""Verify finds every damaged byte, says whom it touches, and tells corrupt, missing and dropped apart."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from independent_reader import Reader
from worlds import Written, append, checkpoint, effect, new_session, octets

from agentckpt.errors import IncompatibleError
from agentckpt.store import Draft, Store
from agentckpt.store.ids import make_ref
from agentckpt.store.record import HEADER_BYTES
from agentckpt.store.verify import LEVELS, Touched, verify
from agentckpt.types import Ref


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def world(path: Path) -> Iterator[tuple[Store, Written, Written]]:
    """Two sessions: ``main`` with three cuts and KV, ``other`` that shares nothing with it."""
    with Store.init(path, secret=octets("secret", 32)) as store:
        main, other = new_session(store, "main"), new_session(store, "other")
        for turn in range(3):
            checkpoint(store, main, kv=100 + 64 * turn, items=20 * (turn + 1), files={"a.txt": b"a" * 2000, "src/b.py": octets("b", 900)})
        checkpoint(store, other, kv=70)
        yield store, main, other


def flip(path: Path, store: Store, ref: Ref, at: int = 0) -> str:
    """Flip one bit of the payload (or with a negative ``at`` of the header) of an object's record; its pack's name."""
    store.seal()
    place = store.location(ref)
    assert place is not None
    file = path / "packs" / place.pack[:2] / place.pack
    data = bytearray(file.read_bytes())
    data[place.offset + HEADER_BYTES + at] ^= 4
    file.write_bytes(data)
    return place.pack


def weak_of(store: Store, main: Written, cut: int) -> tuple[Ref, ...]:
    from agentckpt.nodes import get_node

    return tuple(get_node(store, main.parts[cut]["kv"][1]).weak)


@pytest.mark.parametrize("level", LEVELS)
def test_a_sound_store_is_ok(world: tuple[Store, Written, Written], path: Path, level: str) -> None:
    store, _, _ = world
    report = verify(store, level)  # type: ignore[arg-type]
    assert report.ok
    assert (report.num_sessions, report.num_checkpoints, report.num_dropped, report.num_skipped) == (2, 4, 0, 0)
    assert report.num_objects > 30
    assert (report.checked_bytes > 50_000) == (level == "data")
    assert report.describe()[-1] == "ok"
    with Store.open(path, mode="ro") as reader:
        assert verify(reader, level).ok  # type: ignore[arg-type]
    with pytest.raises(IncompatibleError):
        verify(store, "deep")  # type: ignore[arg-type]


def test_a_flipped_bit_in_any_object_is_found_by_data_and_touches_the_right_parts(
    world: tuple[Store, Written, Written], path: Path
) -> None:
    store, main, _other = world
    chunk = weak_of(store, main, 0)[0]  # in the first whole block: all three cuts share it
    name = flip(path, store, chunk)
    assert verify(store, "quick").ok
    assert verify(store, "structure").ok
    report = verify(store, "data")
    assert not report.ok
    assert (report.num_corrupt, report.num_missing) == (1, 0)
    assert report.corrupt[0].weak
    expected = {Touched("session main", manifest.hex(), "kv") for manifest in main.manifests[:1]}
    assert expected <= set(report.corrupt[0].touched)
    assert {item.holder for item in report.corrupt[0].touched} == {"session main"}
    assert {item.part for item in report.corrupt[0].touched} == {"kv"}
    assert [pack.pack for pack in report.damaged_packs] == [name]
    assert report.damaged_packs[0].touched == report.corrupt[0].touched
    assert any("session main" in line for line in report.describe())
    assert "NOT ok" in report.describe()[-1]


def test_every_object_that_is_damaged_is_reported(world: tuple[Store, Written, Written], path: Path) -> None:
    """Flip a bit in each record of the store in turn; parts of ``other`` never count as parts of ``main``."""
    store, main, other = world
    store.seal()
    (name,) = store.packs()
    file = path / "packs" / name[:2] / name
    whole = file.read_bytes()
    manifests = {m.hex(): s.name for s in (main, other) for m in s.manifests}
    for ref, at in store.pack_entries(name):
        data = bytearray(whole)
        data[at.offset + HEADER_BYTES + at.stored_bytes // 2] ^= 1
        file.write_bytes(data)
        report = verify(store, "data")
        assert not report.ok, ref.hex()
        assert report.num_corrupt >= 1
        assert report.damaged_packs[0].pack == name
        for item in report.damaged_packs[0].touched:
            assert item.holder == f"session {manifests[item.checkpoint]}"
        assert report.damaged_packs[0].touched
    file.write_bytes(whole)
    assert verify(store, "data").ok


def test_a_damaged_node_and_manifest_are_found_by_structure(world: tuple[Store, Written, Written], path: Path) -> None:
    store, main, _ = world
    flip(path, store, main.parts[1]["state"][1])
    report = verify(store, "structure")
    assert (report.num_corrupt, report.num_missing) == (1, 0)
    assert report.corrupt[0].touched == (Touched("session main", main.manifests[1].hex(), "state"),)
    assert not report.corrupt[0].weak
    flip(path, store, make_ref("manifest", main.manifests[2]))
    report = verify(store, "structure")
    assert report.num_corrupt == 2
    assert Touched("session main", main.manifests[2].hex(), "") in {item for lost in report.corrupt for item in lost.touched}


def test_a_pack_that_is_gone_is_missing_objects(world: tuple[Store, Written, Written], path: Path) -> None:
    store, main, _ = world
    store.seal()
    checkpoint(store, main, kv=400, kv_label="fresh", items=61)
    store.seal()
    newest = max(store.packs(), key=lambda name: (path / "packs" / name[:2] / name).stat().st_mtime_ns)
    (path / "packs" / newest[:2] / newest).unlink()
    store.reindex()
    report = verify(store, "structure")
    assert not report.ok
    assert report.num_corrupt == 0
    assert report.num_missing >= 1
    assert {item.checkpoint for lost in report.missing for item in lost.touched} == {main.manifests[3].hex()}


@pytest.mark.parametrize("where", ["trailer", "footer", "header of a record"])
def test_damage_of_the_frame_is_found_by_quick(world: tuple[Store, Written, Written], path: Path, where: str) -> None:
    store, main, _ = world
    ref = main.parts[0]["state"][1]
    if where == "header of a record":
        # A sound footer still leads to the payload, so only a look at the record itself can find this.
        name = flip(path, store, ref, -60)
        assert verify(store, "quick").ok
        assert [pack.pack for pack in verify(store, "data").damaged_packs] == [name]
        return
    store.seal()
    (name,) = store.packs()
    file = path / "packs" / name[:2] / name
    data = bytearray(file.read_bytes())
    data[-40 if where == "trailer" else -200] ^= 1
    file.write_bytes(data)
    for level in LEVELS:
        report = verify(store, level)
        assert [pack.pack for pack in report.damaged_packs] == [name]
        assert (report.num_missing, report.num_corrupt) == (0, 0), "the records themselves are sound"


def test_an_open_pack_of_a_dead_writer_with_a_damaged_header(world: tuple[Store, Written, Written], path: Path) -> None:
    """The lost object is called corrupt, not missing: there is a place where it may have been."""
    store, main, _ = world
    (name,) = store.packs()
    place = store.location(main.parts[0]["state"][1])
    assert place is not None
    file = path / "packs" / name
    data = bytearray(file.read_bytes())
    data[place.offset + 20] ^= 1
    file.write_bytes(data)
    with Store.open(path, mode="ro") as reader:
        report = verify(reader, "structure")
    assert (report.num_missing, report.num_corrupt) == (0, 1)
    assert [pack.pack for pack in report.damaged_packs] == [name]
    assert Touched("session main", main.manifests[0].hex(), "state") in report.damaged_packs[0].touched
    with pytest.raises(ValueError, match="damage in an open pack"):
        Reader(path)


def test_what_records_refer_to_is_checked_too(world: tuple[Store, Written, Written], path: Path) -> None:
    store, main, _ = world
    value = store.put("chunk", octets("a large value", 5000))
    store.sync()
    effect(store, main, "v1", {"$ref": value})
    assert verify(store).ok
    flip(path, store, value)
    report = verify(store, "data")
    assert report.corrupt[0].touched == (Touched("session main", "", ""),)
    effect(store, main, "v2", {"$ref": Ref(b"\x01" + octets("nowhere", 32))})
    report = verify(store, "structure")
    assert (report.num_missing, report.missing[0].touched) == (1, (Touched("session main", "", ""),))


def test_a_removed_session_is_not_checked_and_a_tag_holds(world: tuple[Store, Written, Written], path: Path) -> None:
    store, main, _ = world
    append(store, Draft("tag", None, {"tag": "good", "manifest": main.manifests[0]}))
    append(store, Draft("name", None, {"name": "main", "sid": None}), Draft("tombstone", main.sid, {}))
    flip(path, store, main.parts[2]["state"][1])
    assert verify(store, "structure").ok
    flip(path, store, main.parts[0]["state"][1])
    report = verify(store, "structure")
    assert report.corrupt[0].touched == (Touched("tag good", main.manifests[0].hex(), "state"),)


def test_a_child_is_checked_through_the_checkpoint_that_pins_it(path: Path) -> None:
    with Store.init(path) as store:
        boss, child = new_session(store, "boss"), new_session(store, "child")
        pinned = checkpoint(store, child, items=5)
        checkpoint(store, boss, children={"child": pinned})
        append(store, Draft("name", None, {"name": "child", "sid": None}), Draft("tombstone", child.sid, {}))
        assert verify(store).ok
        flip(path, store, child.parts[0]["state"][1])
        report = verify(store)
        assert report.corrupt[0].touched == (Touched("session boss", pinned.hex(), "state"),)


def test_other_tenants_are_skipped_and_counted(path: Path) -> None:
    with Store.init(path, tenants={"acme": octets("acme", 32)}) as store:
        checkpoint(store, new_session(store, "ours"), kv=70)
    with Store.open(path, tenant="acme", tenant_keys={"acme": octets("acme", 32)}) as store:
        sid = octets("sid theirs", 16)
        body = {"name": "theirs", "tenant": "acme", "lineage": octets("lineage", 16), "parent": None}
        append(store, Draft("session", sid, body), Draft("owner", sid, {"epoch": 1, "owner": {}}))
        checkpoint(store, Written(sid, "theirs"), kv=70)
        report = verify(store, "data")
        assert report.ok
        assert (report.num_sessions, report.num_checkpoints) == (1, 1)
        assert report.num_skipped > 5


def test_both_readers_agree(world: tuple[Store, Written, Written], path: Path) -> None:
    store, main, _ = world
    for sealed in (False, True):
        if sealed:
            store.seal()
        reader = Reader(path)
        assert {s["name"]: [h["manifest"] for h in s["heads"]] for s in reader.sessions.values()}["main"] == main.manifests
        view = store.view()
        assert {sid: (s.sseq, s.hash) for sid, s in view.sessions.items()} == {sid: s["mark"] for sid, s in reader.sessions.items()}
        for manifest in main.manifests:
            below = reader.closure(make_ref("manifest", manifest))
            assert len(below) > 10
            for ref in below:
                assert reader.get(ref) == store.get(ref, 1 << 24)
