"""The bytes of a file: inline, chunks, or a tree of ``file`` nodes; both ways (``store/FORMAT.md`` section 6).

Invariants:
1. Files of at most ``INLINE_BYTES`` stand in their directory; of at most ``SINGLE_BYTES`` in one chunk; larger ones are cut by content.
2. Reading yields exactly ``size`` bytes or raises; no object is asked for with a limit above what may still come.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ..errors import CorruptionError
from ..nodes import MAX_NODE_BYTES, Node, encode_node, get_node, ref_kind
from ..types import Ref, Source
from . import cdc
from .dirs import Put
from .entries import INLINE_BYTES, MAX_CHUNKS, Entry

SINGLE_BYTES = 64 << 10
MAX_CHUNK_BYTES = 16 << 20
_MAX_REFS_A_NODE = 1024
_BOUNDARY = 256
_MAX_LEVEL = 8

PutChunk = Callable[[bytes, bool], Ref]
"""(bytes, whether compressing pays) -> reference"""


@dataclass(frozen=True, slots=True)
class Content:
    """Where a file's bytes went; the fields of ``Entry`` with the same names."""

    size: int
    inline: bytes | None = None
    chunks: tuple[Ref, ...] = ()
    node: Ref | None = None


def compresses(data: bytes) -> bool:
    """Whether compressing pays, judged by the first 4 KiB."""
    sample = data[:4096]
    return len(zlib.compress(sample, 1)) < 0.9 * len(sample)


def write_content(put_chunk: PutChunk, put_node: Put, read_into: cdc.ReadInto) -> Content:
    """Store what ``read_into`` delivers."""
    head = bytearray(SINGLE_BYTES + 1)
    filled = _fill(read_into, memoryview(head))
    if filled <= INLINE_BYTES:
        return Content(filled, inline=bytes(head[:filled]))
    if filled <= SINGLE_BYTES:
        data = bytes(head[:filled])
        return Content(filled, chunks=(put_chunk(data, compresses(data)),))
    refs, size = [], 0
    for piece in cdc.chunks(_after(head, read_into)):
        size += len(piece)
        refs.append(put_chunk(piece, compresses(piece)))
    if len(refs) <= MAX_CHUNKS:
        return Content(size, chunks=tuple(refs))
    return Content(size, node=_file_nodes(put_node, refs))


def _fill(read_into: cdc.ReadInto, view: memoryview) -> int:
    filled = 0
    while filled < len(view):
        count = read_into(view[filled:])
        if not count:
            break
        filled += count
    return filled


def _after(head: bytearray, read_into: cdc.ReadInto) -> cdc.ReadInto:
    """Delivers ``head`` first."""
    rest = memoryview(head)

    def read(view: memoryview) -> int:
        nonlocal rest
        if not rest:
            return read_into(view)
        count = min(len(rest), len(view))
        view[:count] = rest[:count]
        rest = rest[count:]
        return count

    return read


def _file_nodes(put_node: Put, refs: Sequence[Ref]) -> Ref:
    """Boundaries follow the references' own bytes, so that a changed chunk rewrites one node a level."""
    level = 0
    while True:
        parts, start = [], 0
        for index, ref in enumerate(refs):
            if index + 1 - start >= _MAX_REFS_A_NODE or int.from_bytes(ref[-8:], "little") % _BOUNDARY == 0:
                parts.append(refs[start : index + 1])
                start = index + 1
        if start < len(refs):
            parts.append(refs[start:])
        refs = [put_node(encode_node(Node("file", part, (), {"l": level}))) for part in parts]
        if len(refs) == 1:
            return refs[0]
        level += 1


def read_content(source: Source, entry: Entry, where: str) -> Iterator[bytes]:
    """A file's bytes in order. Raises ``CorruptionError`` if they are not ``entry.size`` many."""
    if entry.inline is not None:
        yield entry.inline
        return
    left = entry.size
    refs: Iterator[Ref] = iter(entry.chunks) if entry.node is None else _chunks(source, entry.node, None, where)
    for ref in refs:
        if left == 0:
            raise CorruptionError("a file has more chunks than its size says", code="bad-size", object=where)
        data = source.get(ref, min(left, MAX_CHUNK_BYTES))
        if not data:
            raise CorruptionError("an empty chunk", code="bad-size", object=where)
        left -= len(data)
        yield data
    if left:
        raise CorruptionError("a file has fewer bytes than its size says", code="bad-size", object=where, found=f"{left} missing")


def _chunks(source: Source, ref: Ref, level: int | None, where: str) -> Iterator[Ref]:
    node = get_node(source, ref, type="file", max_bytes=MAX_NODE_BYTES)
    found = node.body.get("l") if isinstance(node.body, dict) else None
    if type(found) is not int or not 0 <= found <= _MAX_LEVEL or (level is not None and found != level) or not node.strong:
        raise CorruptionError("a file node has a wrong level", code="bad-file", object=where)
    expected = "node" if found else "chunk"
    for child in node.strong:
        if ref_kind(child) != expected:
            raise CorruptionError("a reference of the wrong kind", code="bad-file", object=where)
        if found:
            yield from _chunks(source, child, found - 1, where)
        else:
            yield child
