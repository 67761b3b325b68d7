"""The journal: what may be appended, what a view shows, flushes, several writers, torn and damaged segments."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from independent_reader import Reader
from store_drive import ZERO16, Book, commit, head_draft, put_checkpoint, session_draft

import agentckpt.store.journal as journal_module
from agentckpt.errors import CapacityError, ConflictError, CorruptionError, IncompatibleError, NotFoundError, StoreError
from agentckpt.nodes import encode
from agentckpt.store import Draft, Store, View
from agentckpt.store.ids import hash32
from agentckpt.store.io import RealIO
from agentckpt.store.segment import encode_record
from agentckpt.testing.posix_model import PosixModel
from agentckpt.testing.recorder import RecorderIO

SID, OTHER = b"1" * 16, b"2" * 16


@pytest.fixture
def store(tmp_path: Path) -> Store:
    with Store.init(tmp_path / "s") as made:
        yield made


def add(store: Store, *drafts: Draft, durable: bool = True) -> list[Any]:
    return store.append(lambda view: drafts, durable)


def outcome(epoch: int, **more: Any) -> Draft:
    return Draft(
        "outcome",
        SID,
        {"epoch": epoch, "key": bytes(32), "state": "committed", "value": 1, "error": None, "late": False, "post": None, **more},
    )


def owner(epoch: int) -> Draft:
    return Draft("owner", SID, {"epoch": epoch, "owner": {"host": "h", "pid": 1, "boot": "b"}})


def test_a_session_from_its_first_record_to_its_tombstone(store: Store) -> None:
    rng, book = random.Random(1), Book()
    add(store, session_draft(SID, "a"), owner(1))
    first = commit(store, SID, rng, book)
    second = commit(store, SID, rng, book)
    add(store, outcome(1), Draft("annotate", SID, {"manifest": first.manifest, "values": {"reward": 0.5}}))
    add(
        store,
        Draft("annotate", SID, {"manifest": first.manifest, "values": {"note": "x"}}),
        Draft("tag", None, {"tag": "best", "manifest": first.manifest}),
    )
    session = store.view().sessions[SID]
    assert (session.name, session.epoch, session.generation, len(session.heads), session.sseq) == ("a", 1, 2, 2, 7)
    assert session.head is not None
    assert session.head["manifest"] == second.manifest
    assert [entry.kind for entry in session.entries] == ["outcome"]
    assert session.annotations[first.manifest] == {"reward": 0.5, "note": "x"}
    assert session.created > 1e9
    assert store.find_manifest("best") == first.manifest
    add(store, Draft("name", None, {"name": "a", "sid": None}), Draft("name", None, {"name": "b", "sid": SID}))
    assert store.view().names == {"b": SID}
    assert store.view().sessions[SID].name == "b"
    add(store, Draft("tombstone", SID, {}), Draft("tag", None, {"tag": "best", "manifest": None}))
    assert store.view().names == {}
    assert store.view().sessions[SID].removed
    assert store.view().tags == {}
    with pytest.raises(ConflictError, match="never used twice"):
        add(store, session_draft(SID, "again"))
    with pytest.raises(ConflictError, match="was removed"):
        add(store, owner(2))


def test_a_view_read_from_disk_equals_the_one_that_grew(tmp_path: Path) -> None:
    rng, book = random.Random(2), Book()
    with Store.init(tmp_path / "s") as store:
        add(store, session_draft(SID, "a"), session_draft(OTHER, "b"), owner(3))
        for _ in range(5):
            commit(store, SID, rng, book)
            add(store, outcome(3), Draft("drop", None, {"manifest": bytes(32), "part": "kv"}), durable=False)
        grown = store.view()
    with Store.open(tmp_path / "s") as again:
        assert again.view() == grown
    with Store.open(tmp_path / "s", mode="ro") as again:
        assert again.view() == grown


def test_a_view_that_was_kept_does_not_change(store: Store) -> None:
    rng, book = random.Random(3), Book()
    add(store, session_draft(SID, "a"))
    commit(store, SID, rng, book)
    kept = store.view()
    session, heads, seq = kept.sessions[SID], list(kept.sessions[SID].heads), kept.seq
    commit(store, SID, rng, book)
    add(store, outcome(0), Draft("drop", None, {"manifest": bytes(32), "part": "kv"}), session_draft(OTHER, "b"))
    with pytest.raises(ConflictError):
        add(store, outcome(0), outcome(0), session_draft(OTHER, "c"))
    assert (kept.sessions[SID], kept.seq, list(kept.sessions), kept.drops, kept.names) == (session, seq, [SID], set(), {"a": SID})
    assert list(session.heads) == heads
    assert list(session.entries) == []
    assert len(store.view().sessions[SID].entries) == 1


def changed(draft: Draft, **values: Any) -> Draft:
    return Draft(draft.kind, draft.sid, {**draft.body, **values})


REFUSED: dict[str, tuple[Callable[[View, bytes, Any], list[Draft]], type[Exception], str]] = {
    "an old epoch": (lambda v, m, p: [outcome(4)], ConflictError, "expected epoch 5 or above; found 4"),
    "an old epoch, falsely late": (lambda v, m, p: [outcome(4, late=1)], ConflictError, "newer owner"),
    "a taken epoch": (lambda v, m, p: [owner(5)], ConflictError, "an epoch above 5"),
    "a stale generation": (lambda v, m, p: [changed(head_draft(v, SID, m, p), generation=1)], ConflictError, "its head moved"),
    "a stale previous": (lambda v, m, p: [changed(head_draft(v, SID, m, p), previous=None)], ConflictError, "its head moved"),
    "two heads from one view": (lambda v, m, p: [head_draft(v, SID, m, p)] * 2, ConflictError, "expected generation 3"),
    "a taken name": (lambda v, m, p: [session_draft(OTHER, "a")], ConflictError, "the name is taken"),
    "a rename to a taken name": (
        lambda v, m, p: [session_draft(OTHER, "b"), Draft("name", None, {"name": "a", "sid": OTHER})], ConflictError, "the name is taken"
    ),
    "an unknown session": (lambda v, m, p: [Draft("tombstone", OTHER, {})], NotFoundError, "no such session"),
    "an unknown kind": (lambda v, m, p: [Draft("party", None, {})], StoreError, "is no kind of record"),
    "a missing field": (lambda v, m, p: [Draft("owner", SID, {"epoch": 9})], StoreError, "owner is missing"),
    "a manifest that is not there": (lambda v, m, p: [head_draft(v, SID, bytes(32), p)], StoreError, "not durable"),
    "a body above 1 MiB": (lambda v, m, p: [outcome(5, value=bytes(1 << 20))], CapacityError, "is too long"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_may_not_be_appended_leaves_no_trace(store: Store, case: str) -> None:
    drafts, error, match = REFUSED[case]
    add(store, session_draft(SID, "a"), owner(5))
    commit(store, SID, random.Random(4), Book())
    content = put_checkpoint(store, random.Random(5))
    mark = store.sync()
    before, size = store.view(), store.stats().journal_bytes
    with pytest.raises(error, match=match):
        store.append(lambda view: [outcome(5), *drafts(view, content.manifest, mark)])
    assert store.view() == before
    assert store.stats().journal_bytes == size
    add(store, outcome(5))


def test_a_late_outcome_is_kept(store: Store) -> None:
    add(store, session_draft(SID, "a"), owner(5), outcome(4, late=True))
    assert store.view().sessions[SID].entries[0].body["late"] is True


def test_a_head_may_not_name_what_is_not_synced(store: Store) -> None:
    add(store, session_draft(SID, "a"))
    content = put_checkpoint(store, random.Random(6))
    with pytest.raises(StoreError, match="not durable"):
        store.append(lambda view: [head_draft(view, SID, content.manifest, journal_mark())])
    mark = store.sync()
    store.append(lambda view: [head_draft(view, SID, content.manifest, mark)])


def journal_mark() -> Any:
    from agentckpt.store import PackMark

    return PackMark("", 0)


def test_what_build_raises_passes_and_nothing_is_written(store: Store) -> None:
    def build(view: View) -> list[Draft]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        store.append(build)
    assert store.append(lambda view: []) == []
    assert store.view().seq == 0


def test_the_callers_objects_are_not_kept(store: Store) -> None:
    values = {"list": [1]}
    add(store, session_draft(SID, "a"), Draft("annotate", SID, {"manifest": None, "values": values}))
    values["list"].append(2)
    assert store.view().sessions[SID].annotations[None] == {"list": [1]}


def test_two_flushes_a_checkpoint(tmp_path: Path) -> None:
    recorder = RecorderIO(RealIO())
    rng, book = random.Random(7), Book()
    with Store.init(tmp_path / "s", io=recorder) as store:
        add(store, session_draft(SID, "a"))
        commit(store, SID, rng, book)
        for _ in range(10):
            recorder.reset()
            commit(store, SID, rng, book, num_chunks=10)
            assert (recorder.num_fdatasync, recorder.num_fsync_dir, recorder.num_renames) == (2, 0, 0)
        recorder.reset()
        add(store, outcome(0), durable=False)
        assert recorder.num_fdatasync == 0
        store.flush_journal()
        store.flush_journal()
        assert recorder.num_fdatasync == 1


def test_threads_that_append_share_flushes(tmp_path: Path) -> None:
    recorder = RecorderIO(RealIO())
    with Store.init(tmp_path / "s", io=recorder) as store:
        add(store, *[session_draft(bytes([n]) * 16, f"s{n}") for n in range(16)])
        recorder.reset()
        started, failures = threading.Barrier(16), []

        def work(number: int) -> None:
            try:
                started.wait()
                for _ in range(10):
                    add(store, Draft("segment", bytes([number]) * 16, {"epoch": 0, "turn": 1}))
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert recorder.num_fdatasync < 160, "some flush served more than one caller"
        assert all(len(session.entries) == 10 and session.sseq == 11 for session in store.view().sessions.values())


WRITER = """
import sys
from agentckpt.errors import ConflictError
from agentckpt.store import Draft, Store
with Store.open(sys.argv[1]) as store:
    done = 0
    while done < int(sys.argv[2]):
        seen = store.view().sessions[b"1" * 16].epoch
        try:
            store.append(lambda view: [Draft("owner", b"1" * 16, {"epoch": seen + 1, "owner": {"host": "h", "pid": 1, "boot": ""}})])
            done += 1
        except ConflictError:
            pass
    assert store.view().sessions[b"1" * 16].epoch >= done
"""


def test_processes_that_compare_and_swap_lose_no_update(tmp_path: Path) -> None:
    with Store.init(tmp_path / "s") as store:
        add(store, session_draft(SID, "a"))
        children = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / "s"), "40"], cwd=Path.cwd()) for _ in range(3)]
        assert [child.wait() for child in children] == [0, 0, 0]
        assert store.view().sessions[SID].epoch == 120
        assert store.view().sessions[SID].sseq == 121


def test_segments_rotate_and_are_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "SEGMENT_BYTES", 1000)
    io = PosixModel()
    rng, book = random.Random(8), Book()
    with Store.init("s", io=io) as store, Store.open("s", io=io) as other, Store.open("s", io=io, mode="ro") as reader:
        add(store, session_draft(SID, "a"))
        for i in range(20):
            commit(store if i % 3 else other, SID, rng, book, num_chunks=1)
            if i % 5 == 0:
                assert reader.view() == store.view()
        assert len([name for name in io.list("s/journal") if name.endswith(".log")]) > 4
        assert other.view() == store.view() == reader.view()
    with Store.open("s", io=io) as again:
        assert again.view().sessions[SID].generation == 20


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, list[int]]:
    """A closed store whose only segment holds 6 records, and where each of them ends."""
    ends = []
    with Store.init(tmp_path / "s") as store:
        segment = tmp_path / "s" / "journal" / f"{1:016d}.log"
        add(store, session_draft(SID, "a"))
        ends.append(segment.stat().st_size)
        for i in range(5):
            add(store, outcome(0, value="v" * 10 * i))
            ends.append(segment.stat().st_size)
    return segment, ends


def test_a_torn_tail_is_void_at_every_length(written: tuple[Path, list[int]]) -> None:
    segment, ends = written
    whole = segment.read_bytes()
    # The last 15 bytes of a record may be padding, which no check covers: any bytes will do there.
    for length in [*range(ends[3], ends[4] - 16, 5), ends[4], ends[5] - 16]:
        for filler in (b"", bytes(40), os.urandom(40)):
            segment.write_bytes(whole[:length] + filler)
            for extra in segment.parent.glob("*2.log"):
                extra.unlink()
            num = sum(end <= length for end in ends)
            with Store.open(segment.parent.parent) as store:
                assert store.view().seq == num
                add(store, outcome(0, value="after"))
            with Store.open(segment.parent.parent, mode="ro") as store:
                assert store.view().seq == num + 1
                assert store.view().sessions[SID].entries[-1].body["value"] == "after"
            assert segment.read_bytes().startswith(whole[:length] + filler), "evidence is not truncated"


def test_a_flipped_bit_in_what_was_durable_is_corruption(written: tuple[Path, list[int]]) -> None:
    segment, ends = written
    whole = bytearray(segment.read_bytes())
    for at in range(64, ends[3], 7):
        broken = bytearray(whole)
        broken[at] ^= 1 << at % 8
        segment.write_bytes(broken)
        try:
            store = Store.open(segment.parent.parent)
        except CorruptionError:
            continue
        # Padding behind a body is covered by no check and means nothing.
        assert store.view().seq == 6
        assert any(end - 16 < at < end for end in ends)
        store.close()


def test_a_missing_or_foreign_segment_is_corruption(written: tuple[Path, list[int]]) -> None:
    segment, _ = written
    whole = segment.read_bytes()
    segment.write_bytes(whole[:40])
    with pytest.raises(CorruptionError, match="header is damaged"):
        Store.open(segment.parent.parent)
    other = Store.init(segment.parent.parent.parent / "other")
    other.close()
    segment.write_bytes((segment.parent.parent.parent / "other" / "journal" / segment.name).read_bytes())
    with pytest.raises(CorruptionError, match="another store"):
        Store.open(segment.parent.parent)
    segment.unlink()
    with pytest.raises(CorruptionError, match="first segment is missing"):
        Store.open(segment.parent.parent)
    assert not segment.exists()


def append_raw(segment: Path, seq: int, kind: int, flags: int, body: dict[str, Any]) -> None:
    with segment.open("ab") as file:
        file.write(encode_record(seq, kind, flags, segment.stat().st_size, encode(body)))


def test_unknown_kinds_are_skipped_unless_critical(written: tuple[Path, list[int]]) -> None:
    segment, _ = written
    path = segment.parent.parent
    with Store.open(path, mode="ro") as store:
        last = store.view().sessions[SID]
    append_raw(segment, 7, 99, 0, {"sid": SID, "sseq": last.sseq + 1, "prev": last.hash, "what": "is this"})
    with Store.open(path) as store:
        assert store.view().seq == 7
        entry = add(store, outcome(0))[0]
        assert entry.sseq == last.sseq + 2, "the chain goes over a skipped record"
    append_raw(segment, 9, 99, 1, {})
    with pytest.raises(IncompatibleError, match="unknown kind"):
        Store.open(path)


@pytest.mark.parametrize(
    ("kind", "body", "match"),
    [
        (6, {"sid": SID, "sseq": 9, "prev": bytes(32), "epoch": 0, "key": bytes(32)}, "does not continue"),
        (6, {"sid": OTHER, "sseq": 1, "prev": bytes(32), "epoch": 0, "key": bytes(32)}, "before its session record"),
        (3, {"sid": SID, "sseq": 7}, "manifest is missing"),
        (10, {"tag": 1, "manifest": None}, "tag is int"),
    ],
)
def test_a_hostile_record_is_refused(written: tuple[Path, list[int]], kind: int, body: dict[str, Any], match: str) -> None:
    append_raw(written[0], 7, kind, 1, body)
    with pytest.raises(CorruptionError, match=match):
        Store.open(written[0].parent.parent)


def test_a_record_out_of_order_is_refused(written: tuple[Path, list[int]]) -> None:
    append_raw(written[0], 9, 10, 1, {"tag": "t", "manifest": None})
    with pytest.raises(CorruptionError, match="out of order"):
        Store.open(written[0].parent.parent)


def test_the_hash_of_an_entry_is_that_of_its_bytes(store: Store) -> None:
    entries = add(store, session_draft(SID, "a"), outcome(0))
    assert [entry.hash for entry in entries] == [hash32(encode(dict(entry.body))) for entry in entries]
    assert entries[1].body["prev"] == entries[0].hash
    assert entries[0].body["prev"] == bytes(32)
    assert entries[0].body["lineage"] == SID
    assert len(ZERO16) == 16


def test_the_records_of_one_append_count_together_or_not_at_all(tmp_path: Path) -> None:
    with Store.init(tmp_path / "s") as store:
        add(store, session_draft(SID, "a"))
        (segment,) = (tmp_path / "s" / "journal").glob("*.log")
        before = segment.stat().st_size
        add(store, session_draft(OTHER, "b"), Draft("tag", None, {"tag": "t", "manifest": None}))
    whole = segment.read_bytes()
    for length in range(before, len(whole)):
        os.truncate(segment, before)
        with segment.open("r+b") as file:
            file.seek(before)
            file.write(whole[before:length])
        with Store.open(tmp_path / "s", mode="ro") as store:
            assert list(store.view().names) == ["a"], length
        assert list(Reader(tmp_path / "s").sessions) == [SID]
    with Store.open(tmp_path / "s") as store:
        add(store, session_draft(OTHER, "b"))
        assert sorted(store.view().names) == ["a", "b"]
    with Store.open(tmp_path / "s", mode="ro") as store:
        assert sorted(store.view().names) == ["a", "b"]


def test_a_skipped_record_need_not_have_a_place(written: tuple[Path, list[int]]) -> None:
    for seq, body in enumerate(({"sid": SID, "sseq": 7}, {"sid": SID, "sseq": "7", "prev": b""}, {"sid": 1}), start=7):
        append_raw(written[0], seq, 99, 0, body)
    with Store.open(written[0].parent.parent) as store:
        assert store.view().seq == 9
        add(store, outcome(0))
