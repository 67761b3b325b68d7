"""What one sequence holds: tokens, which of their positions have KV, in which blocks, and how that KV was computed.

Invariants (outside a step of the engine):
1. ``valid <= computed <= max(len(tokens) - 1, 0)``. ``computed`` is what the spans describe and a checkpoint names;
   ``valid`` is what stands in blocks now. They differ only after a preemption, until the KV was computed again.
2. ``len(table) == ceil(valid / block_size)``; each entry is one reference counted in the pool.
3. ``links`` holds the chain links of the whole 16-token pieces below ``computed``.
4. Every ``Marks`` in ``marks`` is lowered before what it vouches for changes.

Guarded by the engine's lock.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from ..kv import chain
from ..kv import spans as span_rules
from ..kv.capture import Base, Cut, Growth, Identity, Marks, Message, Run, pack_tokens
from ..kv.groups import BLOCK_TOKENS
from ..kv.spans import Piece, Span
from ..nodes import MerkleList
from ..types import Ref, Sink
from .blocks import BlockName, BlockPool, PagedKV

Reuse = Literal["exact", "any", "off"]


@dataclass(frozen=True, slots=True)
class _Entry:
    """KV of one unit of a known text: which blocks, computed how."""

    names: tuple[BlockName, ...]
    spans: tuple[Span, ...]
    plain: bool
    """everything up to here was computed from position 0 in whole append pieces"""


class Memory:
    """What the sequences of one engine share: pool, tensor, chain index, the fixed sizes."""

    def __init__(self, pool: BlockPool, kv: PagedKV, identity: Identity, *, seed: bytes, piece_tokens: int, reuse: Reuse) -> None:
        self.pool = pool
        self.kv = kv
        self.identity = identity
        self.seed = seed
        self.piece_tokens = piece_tokens
        self.reuse = reuse
        self.unit = max(chain.LINK_TOKENS, pool.block_size)
        self._index: OrderedDict[bytes, _Entry] = OrderedDict()
        self.num_hit_tokens = 0

    def note(self, link: bytes, entry: _Entry) -> None:
        self._index[link] = entry
        self._index.move_to_end(link)
        if len(self._index) > 2 * self.pool.num_blocks:
            self._index.popitem(last=False)

    def find(self, link: bytes) -> _Entry | None:
        entry = self._index.get(link)
        if entry is None or not all(self.pool.holds(name, self.pool.block_size) for name in entry.names):
            return None
        return entry


@dataclass(slots=True)
class Context:
    """See the module's invariants. A fork is ``fork()``; a restore builds one aside and swaps it in."""

    memory: Memory
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    valid: int = 0
    table: list[int] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    links: list[bytes] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    edits: list[tuple[int, int]] = field(default_factory=list)
    hits: list[tuple[int, int]] = field(default_factory=list)
    """(start, length) of positions whose KV was taken over from another sequence"""
    lost: tuple[int, list[BlockName]] = (0, [])
    """(positions, blocks) given up by the last preemption: revived if their bytes are still there"""
    recomputing: bool = False
    base: Base | None = None
    marks: list[Marks] = field(default_factory=list)

    def fork(self) -> Context:
        for block in self.table:
            self.memory.pool.share(block)
        base = self.base and Base(self.base.written, replace(self.base.marks))
        return replace(
            self, tokens=list(self.tokens), table=list(self.table), spans=list(self.spans), links=list(self.links),
            messages=list(self.messages), edits=list(self.edits), hits=list(self.hits), base=base, marks=[base.marks] if base else [],
        )  # fmt: skip

    # Positions and blocks

    def runs(self, first: int, end: int) -> list[Run]:
        """Where the positions ``first`` to ``end`` stand."""
        size = self.memory.pool.block_size
        found: list[Run] = []
        while first < end:
            count = min(size - first % size, end - first)
            found.append((self.table[first // size], first % size, count))
            first += count
        return found

    def num_needed(self, end: int) -> int:
        """Blocks that must be free to write positions ``valid`` to ``end``."""
        pool = self.memory.pool
        size = pool.block_size
        grown = -(-end // size) - len(self.table)
        slot = self.valid % size
        return grown + (slot > 0 and not pool.writable(self.table[-1], slot))

    def prepare(self, end: int) -> None:
        """Make the positions ``valid`` to ``end`` writable: copy a shared or pinned tail, add blocks."""
        pool, first = self.memory.pool, self.valid
        size = pool.block_size
        if first % size and not pool.writable(self.table[-1], first % size):
            shared, copy = self.table[-1], pool.allocate()
            self.memory.kv.copy_block(shared, copy)
            pool.note_write(copy, 0, first % size)
            self.table[-1] = copy
            pool.release(shared)
        while len(self.table) * size < end:
            self.table.append(pool.allocate())
        for block, slot, count in self.runs(first, end):
            pool.note_write(block, slot, slot + count)
        if first < self.computed:
            for marks in self.marks:
                marks.blocks = min(marks.blocks, first // BLOCK_TOKENS)

    def trim(self) -> None:
        """Give back the blocks beyond ``valid``."""
        size = self.memory.pool.block_size
        while len(self.table) > -(-self.valid // size):
            self.memory.pool.release(self.table.pop())

    def drop(self) -> None:
        """Give back all blocks, remembering them (preemption)."""
        pool = self.memory.pool
        if self.valid:
            self.lost = (self.valid, [pool.name(block) for block in self.table])
        self.valid = 0
        self.recomputing = False
        self.trim()

    # Progress

    def wrote(self, end: int, kind: str) -> None:
        """Positions ``valid`` to ``end`` were computed, and are new."""
        span_rules.add(self.spans, self.valid, end - self.valid, kind, self.memory.piece_tokens)
        before, self.computed, self.valid = self.valid, end, end
        chain.grow(self.links, self.memory.seed, self.tokens, end)
        self.publish(before)

    def rewrote(self, end: int) -> None:
        """Positions ``valid`` to ``end`` were computed again."""
        before, self.valid = self.valid, end
        self.recomputing = end < self.computed
        self.publish(before)

    def next_recompute(self) -> Piece | None:
        """The forward that comes next, starting at ``valid``, while ``valid < computed``."""
        if self.valid < self.computed and not self.recomputing:
            self._revive()
            changed = span_rules.redone(self.spans, self.valid) if self.valid < self.computed else len(self.spans)
            for marks in self.marks:
                marks.spans = min(marks.spans, changed)
        self.recomputing = self.valid < self.computed
        if not self.recomputing:
            return None
        return next(span_rules.pieces(self.spans, self.valid, self.computed, self.memory.piece_tokens))

    def publish(self, before: int) -> None:
        """Enter the units that became whole since position ``before`` into the chain index."""
        memory, pool = self.memory, self.memory.pool
        if memory.reuse == "off":
            return
        for end in range((before // memory.unit + 1) * memory.unit, self.valid + 1, memory.unit):
            first = end - memory.unit
            names = tuple(pool.name(block) for block in self.table[first // pool.block_size : -(-end // pool.block_size)])
            taken = span_rules.covering(self.spans, first, end, memory.piece_tokens)
            memory.note(self.links[end // chain.LINK_TOKENS - 1], _Entry(names, taken, self._is_plain(end)))

    def _is_plain(self, end: int) -> bool:
        _, rows, kind = self.spans[0]
        following = self.spans[1][0] if len(self.spans) > 1 else end
        piece = self.memory.piece_tokens
        return kind == "append" and end <= rows // piece * piece and end <= following

    def _revive(self) -> None:
        """Take back lost blocks that still hold their bytes; then stand at the start of a forward."""
        length, names = self.lost if self.valid == 0 else (self.valid, [])
        self.lost = (0, [])
        pool, size = self.memory.pool, self.memory.pool.block_size
        length = min(length, self.computed)
        for index, name in enumerate(names[: -(-length // size)]):
            if not pool.holds(name, min(size, length - index * size)):
                length = index * size
                break
            pool.share(name[0])
            self.table.append(name[0])
        self.valid = length
        if length < self.computed:
            self.valid = span_rules.piece_start(self.spans, length, self.memory.piece_tokens)
        self.trim()

    def reuse_prefix(self, end: int) -> None:
        """Before the first forward of a run up to ``end``: take over known KV of the same text, all but the last position.

        ``exact`` takes only whole pieces that this sequence would have computed with the very same forwards.
        """
        memory = self.memory
        if memory.reuse == "off" or self.computed or end < 2:
            return
        grain = memory.piece_tokens if memory.reuse == "exact" else memory.unit
        limit = min(end, len(self.tokens) - 1) // grain * grain
        entries, links = self._known(limit)
        reached = len(entries) * memory.unit // grain * grain
        for index, entry in enumerate(entries[: reached // memory.unit]):
            first = index * memory.unit
            span_rules.adopt(self.spans, entry.spans, first, first + memory.unit, memory.piece_tokens)
            for block, _ in entry.names:
                memory.pool.share(block)
                self.table.append(block)
        if reached:
            self.links = links[: reached // chain.LINK_TOKENS]
            self.computed = self.valid = reached
            self.hits.append((0, reached))
            memory.num_hit_tokens += reached

    def _known(self, limit: int) -> tuple[list[_Entry], list[bytes]]:
        entries: list[_Entry] = []
        links: list[bytes] = []
        for end in range(self.memory.unit, limit + 1, self.memory.unit):
            chain.grow(links, self.memory.seed, self.tokens, end)
            entry = self.memory.find(links[-1])
            if entry is None or (self.memory.reuse == "exact" and not entry.plain):
                break
            entries.append(entry)
        return entries, links

    # Edits

    def converse(self, messages: list[Message]) -> None:
        """``messages`` is the conversation from now on."""
        same = 0
        for old, new in zip(self.messages, messages, strict=False):
            if old != new:
                break
            same += 1
        for marks in self.marks:
            marks.messages = min(marks.messages, same)
        self.messages = messages

    def truncate(self, length: int) -> None:
        """Forget the tokens from ``length`` on; the KV of the rest stays."""
        self.edits.append((len(self.tokens), length))
        del self.tokens[length:]
        self.computed = min(self.computed, max(length - 1, 0))
        self.valid = min(self.valid, self.computed)
        self.lost = (min(self.lost[0], self.computed), self.lost[1])
        self.trim()
        span_rules.cut(self.spans, self.computed, self.memory.piece_tokens)
        del self.links[self.computed // chain.LINK_TOKENS :]
        while self.messages and self.messages[-1][1] >= length:
            self.messages.pop()
        self.lower()

    def lower(self) -> None:
        for marks in self.marks:
            marks.lower(tokens=len(self.tokens), spans=len(self.spans), messages=len(self.messages), computed=self.computed)

    # Capture

    def cut(self, sink: Sink, previous: Ref | None) -> Cut:
        """Fix this instant: copy what is new since the last capture, and name the blocks to pin."""
        base = self.base if self.base is not None and self.base.usable(sink, previous) else None
        marks = base.marks if base else Marks(0, 0, 0, 0)
        kept = base.written if base else None
        num_items, whole = len(self.tokens) // BLOCK_TOKENS, self.computed // BLOCK_TOKENS
        known = kept.block_refs[: marks.blocks] if kept else ()
        blocks_kept = kept.blocks if kept and len(kept.blocks) <= min(marks.blocks, len(kept.block_refs)) else None
        resident = self.valid // BLOCK_TOKENS
        first_item = len(kept.tokens) if kept and len(kept.tokens) <= marks.token_items else 0
        end_links = range(len(blocks_kept) if blocks_kept is not None else 0, whole)
        with_tail = self.valid == self.computed and self.computed % BLOCK_TOKENS > 0
        return Cut(
            identity=self.memory.identity,
            num_tokens=len(self.tokens),
            computed=self.computed,
            tokens=Growth(
                kept.tokens if kept and first_item == len(kept.tokens) else None,
                [pack_tokens(self.tokens[i * BLOCK_TOKENS : (i + 1) * BLOCK_TOKENS]) for i in range(first_item, num_items)],
            ),
            tail=pack_tokens(self.tokens[num_items * BLOCK_TOKENS :]),
            spans=_growth(kept.spans if kept else None, marks.spans, self.spans, max(len(self.spans) - 1, 0)),
            open_span=self.spans[-1] if self.spans else None,
            messages=_growth(kept.messages if kept else None, marks.messages, self.messages, len(self.messages)),
            edits=_growth(kept.edits if kept else None, len(self.edits), self.edits, len(self.edits)),
            blocks_kept=blocks_kept,
            known_refs=known,
            links=[self.links[(i + 1) * BLOCK_TOKENS // chain.LINK_TOKENS - 1] for i in end_links],
            runs=[self.runs(i * BLOCK_TOKENS, (i + 1) * BLOCK_TOKENS) for i in range(len(known), max(resident, len(known)))],
            tail_runs=self.runs(whole * BLOCK_TOKENS, self.computed) if with_tail else (),
            previous_tokens=kept.num_tokens if kept else 0,
            marks=Marks(num_items, max(len(self.spans) - 1, 0), len(self.messages), max(resident, len(known))),
        )


def _growth(kept: MerkleList | None, still: int, items: Sequence[object], stop: int) -> Growth:
    """``items[:stop]`` as an extension of ``kept``, if its items are among the first ``still`` ones, else from the start."""
    if kept is not None and len(kept) <= min(still, stop):
        return Growth(kept, items[len(kept) : stop])
    return Growth(None, items[:stop])
