"""Content-defined chunks: where a big file is cut, so that an insertion moves few boundaries.

The rolling hash is Gear (Xia et al., FastCDC, USENIX ATC 2016) over a window of 32 bytes: ``H(i) = sum G[b(i-j)] << j``
modulo 2**32, for all positions at once by doubling the window five times (1, 2, 4 ... 32) in numpy. A position may end a
chunk if H is below a threshold: the strict one before the average size, the loose one after it (FastCDC's normalised
chunking). The 256 words of G are BLAKE3's output for a fixed text. A reader needs none of this: boundaries are data.

Invariants:
1. Boundaries depend on the bytes alone, never on how they were read.
2. Every chunk has ``MIN_BYTES`` to ``MAX_BYTES`` bytes, except the last one, which may be shorter.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import blake3
import numpy as np
from numpy.typing import NDArray

MIN_BYTES = 16 << 10
AVG_BYTES = 64 << 10
MAX_BYTES = 256 << 10
WINDOW_BYTES = 32
_STRICT = np.uint32(1 << 14)  # 2**-18: rare, before the average size
_LOOSE = np.uint32(1 << 18)  # 2**-14: frequent, after it
_BLOCK_BYTES = 256 << 10  # the arrays of one block stay in the processor's cache
_GEAR: NDArray[np.uint32] = np.frombuffer(blake3.blake3(b"agentckpt gear v1").digest(1024), dtype="<u4").astype(np.uint32)


class ReadInto(Protocol):
    def __call__(self, view: memoryview, /) -> int:
        """Fill ``view`` from its start, return the number of bytes; 0 at the end."""
        ...


class _Scratch:
    """Two arrays that are used for every block of a file: fresh ones would cost more in page faults than the sums."""

    def __init__(self) -> None:
        self.hashes = np.empty(_BLOCK_BYTES + WINDOW_BYTES, np.uint32)
        self.shifted = np.empty_like(self.hashes)


def gear(data: NDArray[np.uint8], scratch: _Scratch | None = None) -> NDArray[np.uint32]:
    """H for each position of ``data`` [n] -> [n]; the first 31 values see a shorter window."""
    scratch = scratch or _Scratch()
    count = len(data)
    if count > len(scratch.hashes):
        raise ValueError(f"at most {len(scratch.hashes)} positions at a time")
    hashes, shifted = scratch.hashes[:count], scratch.shifted[:count]
    np.take(_GEAR, data, out=hashes, mode="clip")  # "clip" is what lets numpy write straight into ``out``
    for step in (1, 2, 4, 8, 16):
        if count > step:
            part = shifted[: count - step]
            np.left_shift(hashes[:-step], np.uint32(step), out=part)
            hashes[step:] += part
    return hashes


def candidates(data: NDArray[np.uint8], first: int, scratch: _Scratch | None = None) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Positions in ``data[first:]`` (as offsets into ``data``) after which a chunk may end, and which are strict."""
    scratch = scratch or _Scratch()
    offsets, strict = [], []
    for start in range(first, len(data), _BLOCK_BYTES):
        lead = max(0, start - WINDOW_BYTES + 1)
        hashes = gear(data[lead : start + _BLOCK_BYTES], scratch)[start - lead :]
        hits = np.flatnonzero(hashes < _LOOSE)
        offsets.append(hits + start)
        strict.append(hashes[hits] < _STRICT)
    if not offsets:
        return np.empty(0, np.int64), np.empty(0, np.bool_)
    return np.concatenate(offsets), np.concatenate(strict)


def cut(start: int, end: int, offsets: NDArray[np.int64], strict: NDArray[np.bool_]) -> int:
    """Where the chunk that begins at ``start`` ends, given the candidates up to ``end`` (which is an end itself)."""
    limit = min(end, start + MAX_BYTES)
    low = int(np.searchsorted(offsets, start + MIN_BYTES - 1))
    for index in range(low, len(offsets)):
        after = int(offsets[index]) + 1
        if after > limit:
            break
        if strict[index] or after - start >= AVG_BYTES:
            return after
    return limit


def chunks(read_into: ReadInto, *, buffer_bytes: int = 4 << 20) -> Iterator[bytes]:
    """Cut what ``read_into`` delivers; holds ``buffer_bytes`` (at least 2 * MAX_BYTES) in memory."""
    buffer = bytearray(max(buffer_bytes, 2 * MAX_BYTES))
    view = memoryview(buffer)
    array = np.frombuffer(buffer, np.uint8)
    scratch = _Scratch()
    filled = start = 0
    while True:
        ended = False
        while filled < len(buffer) and not ended:
            count = read_into(view[filled:])
            filled += count
            ended = count == 0
        offsets, strict = candidates(array[:filled], start, scratch)
        while start < filled and (ended or filled - start >= MAX_BYTES):
            stop = cut(start, filled, offsets, strict)
            yield bytes(view[start:stop])
            start = stop
        if ended:
            return
        # H of the next few positions lacks what stood before them; none can end a chunk: MIN_BYTES is longer than a window.
        buffer[: filled - start] = buffer[start:filled]
        start, filled = 0, filled - start
