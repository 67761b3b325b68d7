"""From engine memory to the store: the cut is integers and pins, the bytes follow on a worker thread.

Invariants:
1. What a ``Cut`` names cannot change: tokens and spans are copied, blocks are pinned below their valid length.
2. A block is left out of a capture only if the sequence knows (``Marks``) that it is the same block, with the same bytes, that
   ``Written`` holds the references of, and that the sink is the one that got it, or the caller says that it was published.
3. Pins are released exactly once, whether ``write`` returns, raises, or is never called (``cancel``).
4. Cost follows change: a capture copies, pins, gathers and writes what is new since ``Written``, and O(log n) edge nodes.
"""

from __future__ import annotations

import struct
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..errors import ConflictError
from ..nodes import MerkleList, Node, put_node
from ..types import Buffer, Kind, PartRef, Ref, Sink
from .groups import BLOCK_TOKENS, Group, total_heads
from .spans import Span

Run = tuple[int, int, int]
"""(engine block, first slot, number of slots)"""
Message = tuple[str, int, Any]
"""(role, first position, content)"""


class KVMemory(Protocol):
    """The engine's KV as the store sees it: one dense byte string a (group, head), ``[layer, plane, token, dim]``."""

    groups: tuple[Group, ...]

    def gather(self, runs: Sequence[Run]) -> list[memoryview]:
        """One fresh buffer a (group, head); the caller may keep them."""
        ...

    def staging(self, num_tokens: int) -> tuple[Any, list[memoryview]]:
        """Host memory for ``num_tokens`` tokens and one writable view a (group, head)."""
        ...

    def scatter(self, runs: Sequence[Run], staged: Any) -> None:
        """Write what stands in ``staged`` to engine memory."""
        ...


@dataclass(frozen=True, slots=True)
class Identity:
    """The digests of a running model, 32 bytes each."""

    model_id: bytes
    tokenizer_id: bytes
    template_id: bytes | None
    kv_id: bytes
    numerics_id: bytes


@dataclass(slots=True)
class Marks:
    """How much of a ``Written`` state is still true of the live sequence; only ever lowered."""

    token_items: int
    spans: int
    messages: int
    blocks: int

    def lower(self, *, tokens: int, spans: int, messages: int, computed: int) -> None:
        """The sequence now has these lengths, and may grow differently from here on."""
        self.token_items = min(self.token_items, tokens // BLOCK_TOKENS)
        self.spans = min(self.spans, max(spans - 1, 0))
        self.messages = min(self.messages, messages)
        self.blocks = min(self.blocks, computed // BLOCK_TOKENS)


@dataclass(frozen=True, slots=True)
class Written:
    """What one finished capture, or a restore, left in a store: lists opened at their right edge."""

    ref: Ref
    sink: Callable[[], object | None]
    """a weak reference to the sink that has the bytes; gives None where only ``ref`` is known"""
    tokens: MerkleList
    spans: MerkleList
    messages: MerkleList
    edits: MerkleList
    blocks: MerkleList
    block_refs: Sequence[tuple[Ref, ...]]
    """the chunks of each whole block from the first on, as far as all were captured"""
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Base:
    """A ``Written`` state beside how much of it still holds."""

    written: Written
    marks: Marks

    def usable(self, sink: Sink, previous: Ref | None) -> bool:
        return (previous is not None and previous == self.written.ref) or self.written.sink() is sink


@dataclass(frozen=True, slots=True)
class Growth:
    """Items to add to a Merkle list: to ``kept``, or to an empty one (then ``items`` are all there are)."""

    kept: MerkleList | None
    items: Sequence[Any]

    def write(self, sink: Sink) -> MerkleList:
        grown = MerkleList() if self.kept is None else self.kept.copy()
        for item in self.items:
            grown.append(sink, item)
        return grown


@dataclass(frozen=True, slots=True)
class Cut:
    """One instant of a sequence, as integers. ``runs`` hold pins."""

    identity: Identity
    num_tokens: int
    computed: int
    tokens: Growth
    tail: bytes
    spans: Growth
    open_span: Span | None
    messages: Growth
    edits: Growth
    blocks_kept: MerkleList | None
    known_refs: Sequence[tuple[Ref, ...]]
    """references of the leading blocks that are not captured again"""
    links: Sequence[bytes]
    """chain links of the blocks that are written to the list: all, or those after ``blocks_kept``"""
    runs: Sequence[Sequence[Run]]
    """of the blocks after ``known_refs`` that are resident; blocks after these stay without chunks"""
    tail_runs: Sequence[Run]
    previous_tokens: int
    marks: Marks


def pack_tokens(tokens: Sequence[int]) -> bytes:
    """u32 each, little endian."""
    return struct.pack(f"<{len(tokens)}I", *tokens)


class CountingSink:
    """Passes everything on and counts the bytes that were given to the store."""

    def __init__(self, inner: Sink) -> None:
        self._inner = inner
        self.num_bytes = 0
        self.num_objects = 0

    def put(self, kind: Kind, data: Buffer, *, compress: bool = False) -> Ref:
        self.num_bytes += memoryview(data).nbytes
        self.num_objects += 1
        return self._inner.put(kind, data, compress=compress)


@dataclass(slots=True)
class KVPending:
    """A capture whose instant is fixed. See ``Pending`` in types."""

    cut: Cut
    sink: Sink
    memory: KVMemory
    unpin: Callable[[Iterable[Run]], None]
    done: Callable[[Written | None], None]
    """called once with what was written, or None; the sequence forgets or adopts the marks"""
    pause_s: float
    staged: list[list[memoryview]] | None = None
    """bytes that were copied at the cut because the pins were used up"""
    started: bool = field(default=False, init=False)
    _ended: bool = field(default=False, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)
    _pinned: list[Sequence[Run]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if self.staged is None:
            self._pinned = [*self.cut.runs, *([self.cut.tail_runs] if self.cut.tail_runs else [])]

    def write(self) -> PartRef:
        with self._lock:
            if self.started or self._ended:
                raise ConflictError(object="kv capture", expected="a capture that was neither written nor cancelled", code="capture-ended")
            self.started = True
        written = None
        try:
            written, part = _write(self)
            return part
        finally:
            self._end(written)

    def cancel(self) -> None:
        with self._lock:
            if self.started or self._ended:
                return
            self._ended = True
        self._end(None)

    def take(self) -> Iterable[list[memoryview]]:
        """The bytes of each run, in order; its pins are released as soon as they are gathered."""
        if self.staged is not None:
            while self.staged:
                yield self.staged.pop(0)
            return
        while self._pinned:
            buffers = self.memory.gather(self._pinned[0])
            self.unpin(self._pinned.pop(0))
            yield buffers

    def _end(self, written: Written | None) -> None:
        self._ended = True
        rest = [run for runs in self._pinned for run in runs]
        self._pinned.clear()
        self.staged = None
        self.unpin(rest)
        self.done(written)


def _write(pending: KVPending) -> tuple[Written, PartRef]:
    begun = time.perf_counter()
    cut, sink = pending.cut, CountingSink(pending.sink)
    groups = pending.memory.groups
    fresh = [tuple(sink.put("chunk", head) for head in heads) for heads in pending.take()]
    tail_refs = fresh.pop() if cut.tail_runs else ()
    refs = [*cut.known_refs, *fresh]
    blocks = _write_blocks(cut, refs, sink)
    lists = {"tokens": cut.tokens.write(sink), "spans": cut.spans.write(sink)}
    lists |= {"messages": cut.messages.write(sink), "edits": cut.edits.write(sink), "blocks": blocks}
    ref = put_node(sink, _kv_node(cut, lists, groups, tail_refs, captured=bool(refs or tail_refs)))
    written = Written(
        ref=ref, sink=weakly(pending.sink), block_refs=refs, num_tokens=cut.num_tokens,
        tokens=lists["tokens"], spans=lists["spans"], messages=lists["messages"], edits=lists["edits"], blocks=blocks,
    )  # fmt: skip
    num_captured = len(refs) * BLOCK_TOKENS + cut.computed % BLOCK_TOKENS * bool(tail_refs)
    kv_bytes = sum(group.chunk_bytes(num_captured) * group.heads for group in groups)
    facts = {
        "num_tokens": cut.num_tokens,
        "new_tokens": max(0, cut.num_tokens - cut.previous_tokens),
        "num_computed": cut.computed,
        "num_captured": num_captured,
        "kv_bytes": kv_bytes,
        "logical_bytes": kv_bytes + 4 * cut.num_tokens,
        "new_bytes": sink.num_bytes,
        "pause_s": pending.pause_s,
        "write_s": time.perf_counter() - begun,
    }
    return written, PartRef("kv", ref, facts)


def _write_blocks(cut: Cut, refs: Sequence[tuple[Ref, ...]], sink: Sink) -> MerkleList:
    """The list of blocks; those after ``refs`` have no chunks and are computed again at a restore."""
    grown = MerkleList() if cut.blocks_kept is None else cut.blocks_kept.copy()
    for index, link in enumerate(cut.links, start=len(grown)):
        grown.append(sink, link, weak=refs[index] if index < len(refs) else ())
    return grown


def _kv_node(cut: Cut, lists: dict[str, MerkleList], groups: Sequence[Group], tail_refs: tuple[Ref, ...], *, captured: bool) -> Node:
    strong: list[Ref] = []
    weak: list[Ref] = []
    identity = cut.identity
    body: dict[str, Any] = {"v": 1, "n": cut.num_tokens, "computed": cut.computed, "tail": cut.tail, "open_span": cut.open_span}
    body |= {"model_id": identity.model_id, "tokenizer_id": identity.tokenizer_id, "template_id": identity.template_id}
    body |= {"kv_id": identity.kv_id if captured else None, "numerics_id": identity.numerics_id if captured else None}
    body["groups"] = [group.body() for group in groups]
    for name, items in lists.items():
        body[name] = items.root(strong, weak)
    body["tail_block"] = None
    if tail_refs:
        body["tail_block"] = {"len": cut.computed % BLOCK_TOKENS, "w": len(weak), "count": total_heads(groups)}
        weak.extend(tail_refs)
    return Node("kv", tuple(strong), tuple(weak), body)


def weakly(store: object) -> Callable[[], object | None]:
    """A weak reference to a sink, or to a source that is the same object; gives None where there can be none."""
    try:
        return weakref.ref(store)
    except TypeError:
        return lambda: None
