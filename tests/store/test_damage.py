"""Damaged packs: cut at every length, flipped bits, garbage behind, hostile headers. Never wrong bytes, never a crash."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest
import zstandard
from store_drive import Book, Content, check_content, check_store, commit, session_draft

from agentckpt.errors import AgentckptError, CorruptionError, IncompatibleError, NotFoundError
from agentckpt.store import Store
from agentckpt.store.ids import check8
from agentckpt.store.record import HEADER_BYTES, decode_header, encode_header, padding, unsqueeze
from agentckpt.types import Ref

SID = b"1" * 16


def make(path: Path, *, sealed: bool) -> tuple[Book, list[Content], Path]:
    """A store with two small checkpoints in one pack, left as a killed process leaves it if it is not ``sealed``."""
    book, rng = Book(), random.Random(1)
    store = Store.init(path)
    store.append(lambda view: [session_draft(SID, "a")])
    contents = [commit(store, SID, rng, book, num_chunks=2, chunk_bytes=300) for _ in range(2)]
    if sealed:
        store.close()
    else:
        store._objects.abandon()
        store._journal.close()
        store._catalog.index.close()
        store._writers.release()  # type: ignore[union-attr]
        store._closed = True
    (pack,) = [file for file in (path / "packs").rglob("*") if file.is_file()]
    return book, contents, pack


def objects_of(contents: list[Content]) -> dict[Ref, bytes]:
    return {ref: data for content in contents for ref, data in content.objects.items()}


def read_all(path: Path, objects: dict[Ref, bytes]) -> set[Ref]:
    """What can be read; whatever comes back must be right, whatever does not must say why."""
    found = set()
    with Store.open(path, mode="ro") as store:
        for ref, data in objects.items():
            try:
                assert store.get(ref, 1 << 20) == data
                found.add(ref)
            except (NotFoundError, CorruptionError):
                pass
    return found


@pytest.mark.parametrize("sealed", [False, True])
def test_a_pack_cut_at_every_length(tmp_path: Path, sealed: bool) -> None:
    _, contents, pack = make(tmp_path / "s", sealed=sealed)
    objects = objects_of(contents)
    whole = pack.read_bytes()
    with Store.open(tmp_path / "s", mode="ro") as store:
        ends = {ref: at.offset + HEADER_BYTES + at.stored_bytes for ref, at in store.pack_entries(pack.name)}
    for length in [*range(0, len(whole), 13), len(whole)]:
        pack.write_bytes(whole[:length])
        assert read_all(tmp_path / "s", objects) == {ref for ref, end in ends.items() if end <= length}
    pack.write_bytes(whole[: len(whole) // 2])
    with Store.open(tmp_path / "s", mode="ro") as store:
        assert store.damage(), "a head names a length of this pack: what is missing below it was durable"
    with Store.open(tmp_path / "s") as store:
        for data in objects.values():
            store.put("chunk", data)
        store.append(lambda view: [session_draft(b"2" * 16, "b")])


@pytest.mark.parametrize("sealed", [False, True])
def test_a_flipped_bit_costs_at_most_the_record_that_it_is_in(tmp_path: Path, sealed: bool) -> None:
    _, contents, pack = make(tmp_path / "s", sealed=sealed)
    objects = objects_of(contents)
    whole = pack.read_bytes()
    for at in range(0, len(whole), 11):
        pack.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        assert len(read_all(tmp_path / "s", objects)) >= len(objects) - 1, f"bit {at % 8} of byte {at}"


def test_garbage_behind_an_open_pack_is_ignored(tmp_path: Path) -> None:
    book, _, pack = make(tmp_path / "s", sealed=False)
    whole = pack.read_bytes()
    for garbage in (bytes(1000), random.Random(1).randbytes(1000), whole[64:], whole[:300], b"\x89AKR" * 64):
        pack.write_bytes(whole + garbage)
        with Store.open(tmp_path / "s", mode="ro") as store:
            check_store(store, book)
            assert store.damage() == []


def test_damage_below_the_last_marker_is_reported_and_stepped_over(tmp_path: Path) -> None:
    _, contents, pack = make(tmp_path / "s", sealed=False)
    objects = objects_of(contents)
    with Store.open(tmp_path / "s", mode="ro") as store:
        second = sorted(at.offset for _, at in store.pack_entries(pack.name))[1]
    data = bytearray(pack.read_bytes())
    data[second : second + 64] = bytes(64)
    pack.write_bytes(data)
    with Store.open(tmp_path / "s", mode="ro") as store:
        (damage,) = store.damage()
        assert (damage.pack, damage.offset) == (pack.name, second)
        assert damage.length >= 64
    assert len(read_all(tmp_path / "s", objects)) == len(objects) - 1


def test_a_damaged_object_is_read_from_another_copy_and_healed_by_a_put(tmp_path: Path) -> None:
    _, contents, pack = make(tmp_path / "s", sealed=True)
    ref, data = next((ref, data) for ref, data in contents[0].objects.items() if ref[0] == 1 and len(data) > 100)
    with Store.open(tmp_path / "s") as store:
        at = store.location(ref)
        assert at is not None
        broken = bytearray(pack.read_bytes())
        broken[at.offset + HEADER_BYTES + 5] ^= 1
        pack.write_bytes(broken)
        with pytest.raises(CorruptionError, match=rf"pack {pack.name[:8]}.* at {at.offset}: .* its bytes do not match"):
            store.get(ref, 1 << 20)
        with pytest.raises(CorruptionError):
            store.read_into(ref, memoryview(bytearray(len(data))))
        assert store.put("chunk", data) == ref
        assert store.stats().objects.num_new == 1, "a damaged object is not there: it is written again"
        store.sync()
        check_content(store, contents[0])
    (tmp_path / "s" / "index").rename(tmp_path / "away")
    with Store.open(tmp_path / "s", mode="ro") as store:
        check_content(store, contents[0])


def test_records_that_this_version_must_not_read_are_incompatible(tmp_path: Path) -> None:
    _, contents, pack = make(tmp_path / "s", sealed=False)
    ref = next(iter(contents[0].objects))
    with Store.open(tmp_path / "s", mode="ro") as store:
        at = store.location(ref)
    assert at is not None
    whole = pack.read_bytes()
    for place, value in ((48, b"\x01\0\0\0"), (4, b"\x02"), (6, b"\x07"), (7, b"\x80")):
        head = bytearray(whole[at.offset : at.offset + 56])
        head[place : place + len(value)] = value
        payload = bytearray(whole[at.offset + HEADER_BYTES : at.offset + HEADER_BYTES + at.stored_bytes])
        payload[0] ^= 1
        pack.write_bytes(whole[: at.offset] + head + check8(head) + payload + whole[at.offset + HEADER_BYTES + at.stored_bytes :])
        with Store.open(tmp_path / "s", mode="ro") as store, pytest.raises(IncompatibleError):
            store.get(ref, 1 << 20)


BOMB = zstandard.ZstdCompressor(level=19).compress(bytes(8 << 20))


@pytest.mark.parametrize(
    ("stored", "plain_bytes"),
    [
        (BOMB, 1000),
        (BOMB, (8 << 20) - 1),
        (BOMB, 1 << 30),
        (BOMB + b"tail", 8 << 20),
        (BOMB[:-3], 8 << 20),
        (zstandard.ZstdCompressor(write_content_size=False).compress(bytes(100)), 100),
        (BOMB + BOMB, 8 << 20),
        (b"", 0),
        (b"no frame", 8),
    ],
)
def test_a_frame_that_is_not_what_it_says_is_refused(stored: bytes, plain_bytes: int) -> None:
    with pytest.raises(CorruptionError):
        unsqueeze(stored, 1, plain_bytes)


def test_headers_with_impossible_sizes_are_no_headers() -> None:
    good = encode_header(1, 0, bytes(32), 10, 10, bytes(4))
    assert decode_header(good) is not None
    assert decode_header(good[:-1]) is None
    for plain, stored in ((1 << 31, 10), (10, 1 << 31), ((16 << 20) + 1, 10)):
        assert decode_header(encode_header(1, 0, bytes(32), plain, stored, bytes(4))) is None
    assert padding(64) == 0


def test_a_footer_that_lies_is_refused_and_the_records_are_scanned(tmp_path: Path) -> None:
    book, _, pack = make(tmp_path / "s", sealed=True)
    whole = pack.read_bytes()
    for offset in (0, 64, 1 << 40, len(whole) - 64):
        trailer = bytearray(whole[-64:])
        struct.pack_into("<Q", trailer, 8, offset)
        trailer[56:] = check8(trailer[:56])
        pack.write_bytes(whole[:-64] + trailer)
        with Store.open(tmp_path / "s", mode="ro") as store:
            check_store(store, book)
            assert store.damage()
    (tmp_path / "s" / "packs" / "zz").mkdir()
    (tmp_path / "s" / "packs" / "zz" / ("z" * 64 + ".pack")).write_bytes(b"")
    (tmp_path / "s" / "packs" / "stray.tmp").write_bytes(b"")
    (tmp_path / "s" / "packs" / "x-1.open").write_bytes(b"")
    pack.write_bytes(whole)
    with Store.open(tmp_path / "s", mode="ro") as store:
        check_store(store, book)
    assert issubclass(CorruptionError, AgentckptError)
