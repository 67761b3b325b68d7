"""The model really loses, reorders and tears, and never what was synced."""

from __future__ import annotations

import pytest

from agentckpt.store.io import IO, read_file
from agentckpt.testing.posix_model import ALL_KEPT, ALL_LOST, LAST_ONLY, PosixModel

SEEDS = range(200)


def new_file(io: IO, path: str, data: bytes = b"", *, sync_name: bool = True) -> None:
    file = io.write_new(path)
    if data:
        file.pwritev(0, [data])
        file.fdatasync()
    if sync_name:
        io.fsync_dir(path.rpartition("/")[0])


def after(model: PosixModel, path: str) -> set[bytes | None]:
    """What all crashes show at ``path``; None if it is not there."""
    found: set[bytes | None] = set()
    for seed in SEEDS:
        crashed = model.crash(seed)
        found.add(read_file(crashed, path, 1 << 20) if crashed.exists(path) else None)
    return found


def test_what_was_synced_always_survives() -> None:
    model = PosixModel()
    model.mkdir("d")
    model.fsync_dir("")
    new_file(model, "d/a", b"x" * 5000)
    file = model.open_append("d/a")
    file.pwritev(5000, [b"y" * 5000])
    for seed in SEEDS:
        data = read_file(model.crash(seed), "d/a", 1 << 20)
        assert data[:5000] == b"x" * 5000
        assert len(data) >= 5000
    file.fdatasync()
    assert after(model, "d/a") == {b"x" * 5000 + b"y" * 5000}


def test_unsynced_data_is_lost_kept_torn_and_never_invented_elsewhere() -> None:
    model = PosixModel()
    new_file(model, "a")
    data = b"".join(bytes([i]) * 512 for i in range(1, 17))
    model.open_append("a").pwritev(0, [data])
    seen = after(model, "a")
    assert {b"", data} <= seen
    whole = [s for s in seen if s is not None]
    assert any(s and data.startswith(s) and len(s) < len(data) for s in whole), "cut short"
    assert any(len(s) == len(data) and s != data and s.endswith(data[-512:]) for s in whole), "a hole before the end"
    assert any(s[512 * i : 512 * (i + 1)] == bytes(512) for s in whole for i in range(len(s) // 512)), "zeros"
    assert max(map(len, whole)) == len(data)
    assert read_file(model, "a", 1 << 20) == data, "a crash leaves the model as it was"


def test_writes_are_reordered_within_a_file_and_between_files() -> None:
    model = PosixModel()
    new_file(model, "a")
    new_file(model, "b")
    file = model.open_append("a")
    file.pwritev(0, [b"1" * 512])
    file.pwritev(512, [b"2" * 512])
    model.open_append("b").pwritev(0, [b"3" * 512])
    seen = [(read_file(c, "a", 9999), read_file(c, "b", 9999)) for c in map(model.crash, SEEDS)]
    assert any(a[512:] == b"2" * 512 and a[:512] != b"1" * 512 for a, _ in seen), "the second write without the first"
    assert any(a == b"" and b == b"3" * 512 for a, b in seen), "a later file without the earlier one"
    assert read_file(model.crash(LAST_ONLY), "a", 9999) == bytes(512) + b"2" * 512


def test_tears_are_at_sectors_of_the_file() -> None:
    model = PosixModel()
    new_file(model, "a", b"o" * 700)
    model.open_append("a").pwritev(700, [b"n" * 2000])
    for seed in SEEDS:
        data = read_file(model.crash(seed), "a", 9999)
        assert data[:700] == b"o" * 700
        for at in range(1024, 2560, 512):
            piece = data[at : at + 512]
            if len(piece) == 512 and b"n" in piece and piece.count(b"n") > 300:
                assert piece == b"n" * 512


def test_an_overwrite_keeps_the_old_or_the_new_sector() -> None:
    model = PosixModel()
    new_file(model, "a", b"old" * 100)
    model.open_append("a").pwritev(0, [b"new" * 100])
    seen = after(model, "a")
    assert {b"old" * 100, b"new" * 100} <= seen
    assert all(s is not None and len(s) == 300 for s in seen)


def test_a_name_survives_surely_only_after_its_directory_was_synced() -> None:
    model = PosixModel()
    new_file(model, "a", b"data", sync_name=False)
    assert after(model, "a") == {None, b"data"}
    model.fsync_dir("")
    assert after(model, "a") == {b"data"}


def test_syncing_a_directory_does_not_make_its_own_name_durable() -> None:
    model = PosixModel()
    model.mkdir("d")
    new_file(model, "d/a", b"data")
    assert not model.crash(ALL_LOST).exists("d")
    model.fsync_dir("")
    assert after(model, "d/a") == {b"data"}


def test_a_rename_in_one_directory_is_atomic() -> None:
    model = PosixModel()
    new_file(model, "config", b"old")
    new_file(model, "temp", b"new")
    model.rename("temp", "config")
    seen = set()
    for seed in SEEDS:
        crashed = model.crash(seed)
        seen.add((read_file(crashed, "config", 9), crashed.exists("temp")))
    assert seen == {(b"old", True), (b"new", False)}
    model.fsync_dir("")
    assert after(model, "config") == {b"new"}
    assert after(model, "temp") == {None}


@pytest.mark.parametrize("order", [("to", "from"), ("from", "to")])
def test_a_rename_between_directories_never_loses_the_file(order: tuple[str, str]) -> None:
    model = PosixModel()
    for name in ("from", "to"):
        model.mkdir(name)
    model.fsync_dir("")
    new_file(model, "from/a", b"data")
    model.rename("from/a", "to/a")

    def seen() -> set[tuple[bool, bool]]:
        return {(c.exists("from/a"), c.exists("to/a")) for c in map(model.crash, SEEDS)}

    assert seen() == {(True, False), (True, True), (False, True)}
    model.fsync_dir(order[0])
    assert (False, False) not in seen()
    assert ((True, False) in seen()) == (order[0] == "from")
    model.fsync_dir(order[1])
    assert seen() == {(False, True)}
    assert after(model, "to/a") == {b"data"}


def test_a_name_that_was_reused_after_a_move_stays() -> None:
    model = PosixModel()
    for name in ("from", "to"):
        model.mkdir(name)
    model.fsync_dir("")
    new_file(model, "from/a", b"first")
    model.rename("from/a", "to/a")
    new_file(model, "from/a", b"second")  # syncs "from", while the move still waits for "to"
    assert after(model, "from/a") == {b"second"}
    model.fsync_dir("to")
    assert after(model, "from/a") == {b"second"}
    assert after(model, "to/a") == {b"first"}


def test_an_exchange_is_atomic_and_an_unlink_may_be_undone() -> None:
    model = PosixModel()
    new_file(model, "a", b"A")
    new_file(model, "b", b"B")
    model.exchange("a", "b")
    assert {(read_file(c, "a", 9), read_file(c, "b", 9)) for c in map(model.crash, SEEDS)} == {(b"A", b"B"), (b"B", b"A")}
    model.fsync_dir("")
    model.unlink("a")
    assert after(model, "a") == {None, b"B"}
    model.fsync_dir("")
    assert after(model, "a") == {None}


def test_names_are_reordered() -> None:
    model = PosixModel()
    new_file(model, "first", b"1", sync_name=False)
    new_file(model, "second", b"2", sync_name=False)
    seen = {tuple(c.list("")) for c in map(model.crash, SEEDS)}
    assert seen == {(), ("first",), ("second",), ("first", "second")}


def test_an_open_file_that_was_renamed_or_unlinked_goes_on() -> None:
    model = PosixModel()
    new_file(model, "a", b"data")
    file = model.open_append("a")
    model.rename("a", "b")
    model.fsync_dir("")
    file.pwritev(4, [b"more"])
    file.fdatasync()
    assert after(model, "b") == {b"datamore"}
    model.unlink("b")
    file.pwritev(0, [b"gone"])
    assert file.pread(0, 4) == b"gone"


def test_locks_end_with_the_crash_and_crashes_can_follow_each_other() -> None:
    model = PosixModel()
    new_file(model, "a", b"data")
    model.lock("lock")
    model.fsync_dir("")
    second = model.crash(ALL_KEPT)
    assert second.num_unsynced == 0
    second.lock("lock", blocking=False)
    second.open_append("a").pwritev(0, [b"DATA"])
    assert read_file(second.crash(ALL_LOST), "a", 9) == b"data"
    assert read_file(second.crash(ALL_KEPT), "a", 9) == b"DATA"
    assert read_file(model, "a", 9) == b"data"


def test_the_same_seed_gives_the_same_state() -> None:
    def history() -> PosixModel:
        model = PosixModel(seed=3)
        for i in range(10):
            file = model.write_new(f"f{i}")
            file.pwritev(0, [model.random(3000)])
        return model

    for seed in range(20):
        a, b = history().crash(seed), history().crash(seed)
        assert a.list("") == b.list("")
        assert all(read_file(a, name, 9999) == read_file(b, name, 9999) for name in a.list(""))
    assert PosixModel(1).random(8) != PosixModel(2).random(8)
    model = PosixModel()
    assert model.now() < model.now()
