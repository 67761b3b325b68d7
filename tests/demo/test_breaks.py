"""The controls do what they say: a flipped bit is noticed by the store, and zeros pass behind its back."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentckpt.demo.breaks import ZeroedSource, _flip_in
from agentckpt.errors import CorruptionError
from agentckpt.store import Store

DATA = bytes(range(256)) * 40


def test_a_flipped_bit_is_found_by_the_next_reader(tmp_path: Path) -> None:
    with Store.open(str(tmp_path / "store"), create=True) as store:
        reference, other = store.put("chunk", DATA), store.put("chunk", DATA[1:])
        store.sync()
    packs = [path for path in (tmp_path / "store" / "packs").rglob("*") if path.is_file()]
    assert sum(_flip_in(path, reference) for path in packs) == 1
    with Store.open(str(tmp_path / "store"), mode="ro") as store:
        assert store.get(other, len(DATA)) == DATA[1:]
        with pytest.raises(CorruptionError):
            store.get(reference, len(DATA))


def test_zeros_come_back_in_place_of_verified_bytes(tmp_path: Path) -> None:
    with Store.open(str(tmp_path / "store"), create=True) as store:
        reference = store.put("chunk", DATA)
        store.sync()
        target = bytearray(b"x" * len(DATA))
        ZeroedSource(store).read_into(reference, memoryview(target))
        assert target == bytes(len(DATA))
        assert ZeroedSource(store).get(reference, len(DATA)) == DATA
