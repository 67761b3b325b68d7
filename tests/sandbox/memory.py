"""A store in memory for the tests of sandboxes: real ids, real limits, and counts of what was new."""

from __future__ import annotations

import threading

import blake3

from agentckpt.errors import CorruptionError, NotFoundError
from agentckpt.types import KIND_BYTE, Buffer, Kind, Ref


class MemoryStore:
    """Sink and Source. ``new`` holds (kind, length) of each object that was not there before the last ``reset``."""

    def __init__(self) -> None:
        self.objects: dict[Ref, bytes] = {}
        self.new: list[tuple[Kind, int]] = []
        self.num_puts = 0
        self.num_gets = 0
        self._lock = threading.Lock()

    def reset(self) -> None:
        self.new, self.num_puts, self.num_gets = [], 0, 0

    def put(self, kind: Kind, data: Buffer, *, compress: bool = False) -> Ref:
        content = bytes(data)
        assert len(content) <= 16 << 20
        ref = Ref(bytes([KIND_BYTE[kind]]) + blake3.blake3(kind.encode() + b"\0" + content).digest())
        with self._lock:
            self.num_puts += 1
            if ref not in self.objects:
                self.objects[ref] = content
                self.new.append((kind, len(content)))
        return ref

    def get(self, ref: Ref, max_bytes: int) -> bytes:
        self.num_gets += 1
        if ref not in self.objects:
            raise NotFoundError("no such object", object=ref.hex())
        data = self.objects[ref]
        if len(data) > max_bytes:
            raise CorruptionError("longer than allowed", object=ref.hex(), found=str(len(data)))
        return data

    def read_into(self, ref: Ref, target: memoryview) -> None:
        data = self.get(ref, len(target))
        if len(data) != len(target):
            raise CorruptionError("another length", object=ref.hex())
        target[:] = data

    def has(self, ref: Ref) -> bool:
        return ref in self.objects

    def num_new(self, kind: Kind) -> int:
        return sum(1 for found, _ in self.new if found == kind)

    def new_bytes(self) -> int:
        return sum(length for _, length in self.new)
