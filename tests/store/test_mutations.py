"""Each flush and each ordering of the store is left out or turned round, and a crash test must notice.

The flushes are found, not listed: every place in ``agentckpt/store`` that calls ``fdatasync`` or ``fsync_dir`` while the
laboratories run. So a new flush without a test that needs it fails here, and so does one that a change took away.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import pytest
import store_crash
import test_faults
from store_crash import Violation

import agentckpt.store.catalog as catalog_module
import agentckpt.store.journal as journal_module
import agentckpt.store.objects as objects_module
import agentckpt.store.pack as pack_module
import agentckpt.store.store as store_module
from agentckpt.errors import AgentckptError
from agentckpt.store.io import IO, File
from agentckpt.testing._wrap import WrappedIO

T = TypeVar("T")
STORE = Path(store_module.__file__).parent
EXPECTED_SITES = {
    "fdatasync in pack.py flush": 1,
    "fdatasync in journal.py _flush_once": 1,
    "fdatasync in journal.py _ready_segment": 1,
    "fdatasync in durable.py write_durable": 1,
    "fsync_dir in pack.py _sync_name": 1,
    "fsync_dir in pack.py seal": 3,
    "fsync_dir in journal.py _flush_once": 1,
    "fsync_dir in durable.py write_durable": 1,
    "fsync_dir in store.py init": 1,
    "fsync_dir in store.py __init__": 2,
}
"""function and number of places in it"""


def site() -> str:
    """File, function and line of the innermost frame in the store."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.parent == STORE and path.name not in ("io.py", "unflushed.py"):
            return f"{path.name} {frame.f_code.co_name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "outside"


class SiteIO(WrappedIO):
    """Notes where flushes are asked for, and swallows those of one place."""

    def __init__(self, inner: IO, seen: set[str], swallow: str | None = None) -> None:
        super().__init__(inner)
        self.seen, self.swallow = seen, swallow

    def around(self, kind: str, path: str, num_bytes: int, call: Callable[[], T]) -> T:
        if kind == "fsync_dir" and self._swallows(kind):
            return None  # type: ignore[return-value]
        return call()

    def sync(self, file: File) -> None:
        if not self._swallows("fdatasync"):
            file.fdatasync()

    def _swallows(self, kind: str) -> bool:
        where = f"{kind} in {site()}"
        self.seen.add(where)
        return where == self.swallow


def run_all(wrap: Callable[[IO], IO], seeds: tuple[int, ...] = (0, 2, 3)) -> None:
    """Every laboratory, the quick ones first."""
    store_crash.run("birth", range(20) if seeds else (), wrap=wrap)
    store_crash.kill_birth(range(4) if seeds else (), wrap=wrap)
    store_crash.kill((0, 3) if seeds else (), wrap=wrap, every=1000)
    store_crash.run("pair", seeds, wrap=wrap)
    store_crash.run("main", seeds, wrap=wrap)


def find_sites() -> list[str]:
    seen: set[str] = set()
    run_all(lambda io: SiteIO(io, seen), ())
    return sorted(seen)


SITES = find_sites()


def test_the_places_are_the_known_ones() -> None:
    found: dict[str, int] = {}
    for name in SITES:
        found[name.rpartition(":")[0]] = found.get(name.rpartition(":")[0], 0) + 1
    assert found == EXPECTED_SITES


@pytest.mark.parametrize("name", SITES)
def test_a_flush_that_is_left_out_is_noticed(name: str) -> None:
    with pytest.raises(Violation):
        run_all(lambda io: SiteIO(io, set(), name))


# --- orderings: the production code, turned round ------------------------------------------------------------------------


def marker_before_the_flush(patch: pytest.MonkeyPatch) -> None:
    """Invariant 4 of packs: the commit marker must not claim what is not durable."""
    flush, mark = pack_module.PackWriter.flush, pack_module.PackWriter.mark

    def early(self: Any) -> None:
        self.synced = self.length
        mark(self)
        flush(self)

    patch.setattr(pack_module.PackWriter, "flush", early)


def seal_renames_before_it_flushes(patch: pytest.MonkeyPatch) -> None:
    """A name in ``packs/ab/`` promises a whole pack."""
    flush = pack_module.PackWriter.flush
    patch.setattr(pack_module.PackWriter, "flush", lambda self: None if sys._getframe(1).f_code.co_name == "seal" else flush(self))
    seal = pack_module.PackWriter.seal

    def late(self: Any) -> str:
        name = seal(self)
        flush(self)
        return name

    patch.setattr(pack_module.PackWriter, "seal", late)


def head_before_its_objects(patch: pytest.MonkeyPatch) -> None:
    """Invariant 1 of the format: chunks, nodes, manifest, flush, head."""
    sync, append = store_module.Store.sync, store_module.Store.append
    patch.setattr(store_module.Store, "_require_durable", lambda self, draft: None)
    patch.setattr(store_module.Store, "sync", lambda self: pack_module.PackMark("", 0))

    def turned(self: Any, build: Any, durable: bool = True) -> Any:
        entries = append(self, build, durable)
        sync(self)
        return entries

    patch.setattr(store_module.Store, "append", turned)


def segment_without_temp_file(patch: pytest.MonkeyPatch) -> None:
    """Invariant 2 of the journal: a segment appears whole or not at all."""

    def direct(io: IO, temporary: str, path: str, pieces: Any, *, mode: int = 0o600) -> None:
        with suppress(FileNotFoundError):
            io.unlink(path)
        file = io.write_new(path, mode=mode)
        io.fsync_dir(path.rpartition("/")[0])
        file.pwritev(0, pieces)
        file.fdatasync()
        file.close()

    patch.setattr(journal_module, "write_durable", direct)


def segment_renamed_before_its_flush(patch: pytest.MonkeyPatch) -> None:
    def turned(io: IO, temporary: str, path: str, pieces: Any, *, mode: int = 0o600) -> None:
        with suppress(FileNotFoundError):
            io.unlink(temporary)
        file = io.write_new(temporary, mode=mode)
        file.pwritev(0, pieces)
        io.rename(temporary, path)
        io.fsync_dir(path.rpartition("/")[0])
        file.fdatasync()
        file.close()

    patch.setattr(journal_module, "write_durable", turned)
    patch.setattr(store_module, "write_durable", turned)


def a_dead_writers_tail_is_trusted(patch: pytest.MonkeyPatch) -> None:
    """Invariant 1 of the catalog: records above the last marker may be read, never referred to."""
    patch.setattr(
        catalog_module.Catalog,
        "durable",
        lambda self, ref: self.index.get(ref) or next((t[ref] for t in self._tails.values() if ref in t), None),
    )


def a_torn_segment_is_written_on(patch: pytest.MonkeyPatch) -> None:
    """Invariant 3 of the journal: what follows a torn tail in the same segment would never be read."""
    patch.setattr(journal_module.Journal, "_ready_segment", lambda self: None)

    def at_the_end(self: Any, data: Any) -> None:
        self._end = max(self._end, self._opened().size())
        self._opened().pwritev(self._end, data)

    patch.setattr(journal_module.Journal, "_put", at_the_end)


def the_flush_is_not_waited_for(patch: pytest.MonkeyPatch) -> None:
    append = journal_module.Journal.append
    patch.setattr(journal_module.Journal, "append", lambda self, build, durable=True: append(self, build, durable=False))


def sync_forgets_what_was_put_last(patch: pytest.MonkeyPatch) -> None:
    write_waiting = objects_module.Objects._write_waiting

    def all_but_one(self: Any) -> None:
        kept = self._waiting.pop() if len(self._waiting) > 1 else None
        write_waiting(self)
        if kept is not None:
            self._waiting.append(kept)
            self._recent[kept.ref] = self._by_ref and None

    patch.setattr(objects_module.Objects, "_write_waiting", all_but_one)


def the_skeleton_comes_after_the_config(patch: pytest.MonkeyPatch) -> None:
    """Invariant 2 of the config: a directory with a config is a whole store."""
    make = store_module._make_skeleton
    create = store_module.create_journal
    write = store_module.write_durable
    late: list[tuple[Any, ...]] = []

    def bare(io: IO, root: str) -> None:
        if not io.exists(root):
            io.mkdir(root)

    patch.setattr(store_module, "_make_skeleton", bare)
    patch.setattr(store_module, "create_journal", lambda *arguments: late.append(arguments))

    def config_first(io: IO, temporary: str, path: str, pieces: Any) -> None:
        config = path
        write(io, temporary, path, pieces)
        io.rename(config, temporary)
        make(io, path.rpartition("/")[0])
        io.rename(temporary, config)
        create(*late.pop())

    patch.setattr(store_module, "write_durable", config_first)


ORDERINGS = [
    marker_before_the_flush,
    seal_renames_before_it_flushes,
    head_before_its_objects,
    segment_without_temp_file,
    segment_renamed_before_its_flush,
    a_dead_writers_tail_is_trusted,
    a_torn_segment_is_written_on,
    the_flush_is_not_waited_for,
    sync_forgets_what_was_put_last,
    the_skeleton_comes_after_the_config,
]


@pytest.mark.parametrize("mutation", ORDERINGS, ids=lambda f: f.__name__)
def test_an_ordering_that_is_turned_round_is_noticed(
    mutation: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutation(monkeypatch)
    with pytest.raises(Violation):
        run_all(lambda io: io)


# --- a failed flush is final ---------------------------------------------------------------------------------------------


def a_failed_pack_is_synced_again(patch: pytest.MonkeyPatch) -> None:
    """Linux answers success the second time and the bytes are gone."""

    def stubborn(self: Any) -> None:
        file, end = self._file, self.length
        file.fdatasync()
        self._sync_name()
        self.synced = end

    patch.setattr(pack_module.PackWriter, "flush", stubborn)
    patch.setattr(objects_module.Objects, "_drop_writer", lambda self: None)


def a_failed_segment_is_synced_again(patch: pytest.MonkeyPatch) -> None:
    flush_once = journal_module.Journal._flush_once

    def stubborn(self: Any) -> None:
        with suppress(OSError):
            self._opened().fdatasync()
        flush_once(self)

    patch.setattr(journal_module.Journal, "_flush_once", stubborn)


def a_new_segment_forgets_what_was_not_durable(patch: pytest.MonkeyPatch) -> None:
    new_segment = journal_module.Journal._new_segment

    def forgetful(self: Any) -> None:
        self._undurable, self._synced = [], self._end
        new_segment(self)

    patch.setattr(journal_module.Journal, "_new_segment", forgetful)


FINAL = [
    (a_failed_pack_is_synced_again, test_faults.test_a_pack_whose_flush_failed_is_never_synced_again),
    (a_failed_segment_is_synced_again, test_faults.test_a_segment_whose_flush_failed_is_replaced_and_nothing_is_lost),
    (a_new_segment_forgets_what_was_not_durable, test_faults.test_a_segment_whose_flush_failed_is_replaced_and_nothing_is_lost),
]


@pytest.mark.parametrize(("mutation", "check"), FINAL, ids=lambda f: f.__name__)
def test_a_failed_flush_that_is_not_final_is_noticed(mutation: Any, check: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    check()
    mutation(monkeypatch)
    with pytest.raises((AssertionError, AgentckptError)):
        check()
