"""Chunk boundaries: by content alone, within the limits, and stable under insertion."""

from __future__ import annotations

import io
import random

import blake3
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from agentckpt.sandbox import cdc

MIB = 1 << 20


def cut(data: bytes, buffer_bytes: int = 4 << 20) -> list[bytes]:
    return list(cdc.chunks(io.BytesIO(data).readinto, buffer_bytes=buffer_bytes))


def slow_cut(data: bytes) -> list[int]:
    """The definition, position by position, with Python's integers."""
    words = [int.from_bytes(blake3.blake3(b"agentckpt gear v1").digest(1024)[4 * i : 4 * i + 4], "little") for i in range(256)]
    value, start, ends = 0, 0, []
    for index, byte in enumerate(data):
        value = ((value << 1) + words[byte]) & 0xFFFFFFFF
        length = index + 1 - start
        strict, loose = value < 1 << 14, value < 1 << 18
        if length >= cdc.MIN_BYTES and (strict or (loose and length >= cdc.AVG_BYTES) or length >= cdc.MAX_BYTES):
            ends.append(index + 1)
            start = index + 1
    return ends if start == len(data) else [*ends, len(data)]


def test_the_fast_form_cuts_where_the_definition_does() -> None:
    rng = random.Random(3)
    data = rng.randbytes(700_000) + bytes(600_000) + b"abc" * 100_000 + rng.randbytes(123)
    ends = np.cumsum([len(piece) for piece in cut(data)]).tolist()
    assert ends == slow_cut(data)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 3 * MIB), st.integers(512 << 10, 3 * MIB))
def test_chunks_join_to_the_data_whatever_the_buffer(seed: int, length: int, buffer_bytes: int) -> None:
    data = random.Random(seed).randbytes(length)
    pieces = cut(data, buffer_bytes)
    assert b"".join(pieces) == data
    assert pieces == cut(data)
    assert all(cdc.MIN_BYTES <= len(piece) <= cdc.MAX_BYTES for piece in pieces[:-1])


def test_short_reads_change_nothing() -> None:
    data = random.Random(5).randbytes(2 * MIB)
    stream, rng = io.BytesIO(data), random.Random(6)

    def short(view: memoryview) -> int:
        return stream.readinto(view[: rng.randint(1, 70_000)])

    assert list(cdc.chunks(short)) == cut(data)


def test_an_inserted_byte_makes_few_new_chunks() -> None:
    data = random.Random(7).randbytes(4 * MIB)
    before, after = cut(data), cut(b"x" + data)
    assert len(before) > 30
    assert len(set(after) - set(before)) <= 2
    middle = cut(data[: 2 * MIB] + b"yy" + data[2 * MIB :])
    assert len(set(middle) - set(before)) <= 3


def test_sizes_are_near_the_average() -> None:
    pieces = cut(random.Random(8).randbytes(16 * MIB))
    assert 40 << 10 < sum(map(len, pieces)) / len(pieces) < 110 << 10
