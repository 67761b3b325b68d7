"""What of un-synced data and names survives a crash of the model: the drawing alone, without the filesystem's calls."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

ALL_LOST = 0
"""seed of the crash that keeps only what is durable"""
ALL_KEPT = 1
"""seed of the crash that keeps everything"""
LAST_ONLY = 2
"""seed of the crash that keeps of each file only the last un-synced write, and all names"""


@dataclass(slots=True)
class Write:
    offset: int
    data: bytes
    lost: bool = False


@dataclass(slots=True, eq=False)
class Inode:
    number: int
    mode: int
    is_dir: bool = False
    data: bytearray = field(default_factory=bytearray)
    durable: bytes = b""
    pending: list[Write] = field(default_factory=list)
    names: dict[str, Inode] = field(default_factory=dict)
    durable_names: dict[str, Inode] = field(default_factory=dict)
    mtime_s: float = 0.0


@dataclass(slots=True, eq=False)
class NameOp:
    """``name`` in ``directory`` becomes ``inode`` (None: is removed). ``after``: survives only if that one does."""

    directory: Inode
    name: str
    inode: Inode | None
    after: NameOp | None = None
    together: bool = False
    """survives exactly if ``after`` does"""
    synced: bool = False
    """its directory was synced since; durable as soon as ``after`` is"""


def set_name(names: dict[str, Inode], op: NameOp) -> None:
    if op.inode is None:
        names.pop(op.name, None)
    else:
        names[op.name] = op.inode


def apply_write(data: bytearray, offset: int, piece: bytes) -> None:
    if offset > len(data):
        data.extend(bytes(offset - len(data)))
    data[offset : offset + len(piece)] = piece


def written(durable: bytes, writes: list[Write]) -> bytes:
    data = bytearray(durable)
    for write in writes:
        apply_write(data, write.offset, write.data)
    return bytes(data)


def settle(ops: list[NameOp]) -> list[NameOp]:
    """Make durable what was synced; returns the operations that still are not, in order."""
    left: list[NameOp] = []
    pending = {id(op) for op in ops}
    for op in ops:
        waits = op.after is not None and id(op.after) in pending
        joined = op.together and op.after is not None and not waits
        if joined or (op.synced and not waits):
            set_name(op.directory.durable_names, op)
            pending.discard(id(op))
            # What was pending for the same name is overtaken by this later operation.
            overtaken = [other for other in left if (other.directory, other.name) == (op.directory, op.name)]
            left = [other for other in left if other not in overtaken]
            pending.difference_update(id(other) for other in overtaken)
        else:
            left.append(op)
    return left


def surviving_names(ops: list[NameOp], dirs: Sequence[Inode], rng: random.Random, seed: int) -> dict[Inode, dict[str, Inode]]:
    names = {directory: dict(directory.durable_names) for directory in dirs}
    pending = {id(op) for op in ops}
    kept: set[int] = set()
    keep_share = rng.choice([0.1, 0.5, 0.9])
    for op in ops:
        chosen = seed in (ALL_KEPT, LAST_ONLY) or (seed != ALL_LOST and rng.random() < keep_share)
        if op.after is not None and id(op.after) in pending:
            chosen = id(op.after) in kept and (op.together or chosen)
        if chosen:
            kept.add(id(op))
            set_name(names[op.directory], op)
    return names


def after_crash(inode: Inode, copy: Inode, rng: random.Random, seed: int) -> Inode:
    if not inode.is_dir:
        data = bytes(_surviving_data(inode, rng, seed))
        copy.data, copy.durable = bytearray(data), data
        copy.mtime_s = inode.mtime_s
    return copy


def _surviving_data(inode: Inode, rng: random.Random, seed: int) -> bytearray:
    writes = [write for write in inode.pending if not write.lost]
    data = bytearray(inode.durable)
    if not writes or seed == ALL_LOST:
        return data
    keep_share = rng.choice([0.0, 0.3, 0.7, 1.0])
    sector = rng.choice([512, 4096])
    for number, write in enumerate(writes):
        sure = seed == ALL_KEPT or (seed == LAST_ONLY and number == len(writes) - 1)
        for offset, piece in _pieces(write, sector):
            if sure:
                apply_write(data, offset, piece)
            elif seed != LAST_ONLY:
                fate = rng.random()
                if fate < keep_share:
                    apply_write(data, offset, piece)
                elif fate > 0.95:
                    apply_write(data, offset, rng.randbytes(len(piece)))
    if seed not in (ALL_KEPT, LAST_ONLY):
        _resize(data, _size_after_crash(len(inode.durable), len(data), _volatile_end(inode), rng))
    return data


def _volatile_end(inode: Inode) -> int:
    return max([len(inode.durable), *(write.offset + len(write.data) for write in inode.pending if not write.lost)])


def _size_after_crash(durable: int, survived: int, volatile: int, rng: random.Random) -> int:
    """A size is never below the durable one."""
    return rng.choice([durable, survived, survived, volatile, rng.randint(durable, max(durable, volatile))])


def _resize(data: bytearray, size: int) -> None:
    del data[size:]
    data.extend(bytes(size - len(data)))


def _pieces(write: Write, sector: int) -> list[tuple[int, bytes]]:
    """The write cut at multiples of ``sector`` in the file."""
    pieces = []
    start = 0
    while start < len(write.data):
        stop = min(len(write.data), start + sector - (write.offset + start) % sector)
        pieces.append((write.offset + start, write.data[start:stop]))
        start = stop
    return pieces
