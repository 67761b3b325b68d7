"""Ceilings, measured in the run that they are compared with: read, hash, copy, write."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from blake3 import blake3

PIECE_BYTES = 480 * 1024
"""one KV chunk of SmolLM2 in bf16"""


def best_of(action: Callable[[], float], repeat: int) -> float:
    """The largest of several rates: a shared machine only ever takes away."""
    return max(action() for _ in range(repeat))


def rate(num_bytes: int, action: Callable[[], object]) -> float:
    """Bytes per second of one call."""
    begun = time.perf_counter()
    action()
    return num_bytes / (time.perf_counter() - begun)


def copy_rate(num_bytes: int, repeat: int = 3) -> float:
    """memcpy of ``num_bytes`` to memory that was touched before."""
    source = np.frombuffer(os.urandom(min(num_bytes, 2**24)) * max(1, num_bytes // 2**24), dtype=np.uint8)
    target = np.zeros_like(source)
    return best_of(lambda: rate(source.nbytes, lambda: np.copyto(target, source)), repeat)


def hash_rate(num_bytes: int, repeat: int = 3) -> float:
    """Keyed BLAKE3 of pieces of a chunk's size that come from memory and not from a cache, one thread."""
    data, key = memoryview(os.urandom(min(num_bytes, 2**24)) * max(1, num_bytes // 2**24)), bytes(32)

    def run() -> None:
        for at in range(0, len(data), PIECE_BYTES):
            blake3(data[at : at + PIECE_BYTES], key=key).digest()

    return best_of(lambda: rate(len(data), run), repeat)


def read_rate(folder: Path, num_bytes: int, repeat: int = 3) -> float:
    """preadv of a file that the page cache holds, in pieces of a chunk's size, to memory that was touched before."""
    path = folder / "read-rate"
    path.write_bytes(os.urandom(min(num_bytes, 2**24)) * max(1, num_bytes // 2**24))
    length = path.stat().st_size
    buffer = memoryview(np.ones(length, dtype=np.uint8))
    handle = os.open(path, os.O_RDONLY)

    def run() -> None:
        for at in range(0, length, PIECE_BYTES):
            os.preadv(handle, [buffer[at : at + PIECE_BYTES]], at)

    try:
        return best_of(lambda: rate(length, run), repeat)
    finally:
        os.close(handle)
        path.unlink()


def sync_seconds(folder: Path, num_bytes: int, repeat: int = 20) -> float:
    """Median time of appending ``num_bytes`` and one fdatasync."""
    data = os.urandom(num_bytes)
    handle = os.open(folder / "sync", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    times = []
    for _ in range(repeat):
        begun = time.perf_counter()
        os.write(handle, data)
        os.fdatasync(handle)
        times.append(time.perf_counter() - begun)
    os.close(handle)
    (folder / "sync").unlink()
    return sorted(times)[len(times) // 2]
