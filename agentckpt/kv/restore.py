"""From the store to engine memory. Everything that is read is untrusted: lengths are checked before memory is taken.

Invariants:
1. ``read_image`` allocates in proportion to what it has read, never to what a number claims, and at most for ``max_tokens``.
2. A chunk is verified (by the source) before any of its bytes reaches engine memory, and blocks are taken in order: what
   follows the first block that is absent, damaged or of another size is not used.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ..errors import CapacityError, CorruptionError, IncompatibleError, NotFoundError
from ..nodes import MerkleList, Node, get_node
from ..types import Ref, Source
from . import spans as span_rules
from .capture import KVMemory, Marks, Message, Run, Written, weakly
from .groups import BLOCK_TOKENS, Group, read_groups, total_heads
from .spans import Span

LISTS = ("tokens", "spans", "messages", "edits", "blocks")


@dataclass(frozen=True, slots=True)
class Image:
    """A decoded ``kv`` node and the lists that it names; no KV bytes yet."""

    ref: Ref
    tokens: list[int]
    computed: int
    spans: list[Span]
    messages: list[Message]
    edits: list[tuple[int, int]]
    model_id: bytes
    tokenizer_id: bytes
    template_id: bytes | None
    kv_id: bytes | None
    numerics_id: bytes | None
    groups: tuple[Group, ...]
    block_refs: list[tuple[Ref, ...]]
    """by whole 64-token block; empty tuples where nothing was captured"""
    tail_refs: tuple[Ref, ...]
    lists: dict[str, MerkleList]

    def written(self, source: Source) -> Written:
        """The state that the next capture to the same store may build on: ``source``, or one that published ``ref``."""
        whole = next((index for index, refs in enumerate(self.block_refs) if not refs), len(self.block_refs))
        return Written(
            ref=self.ref, sink=weakly(source), block_refs=self.block_refs[:whole], num_tokens=len(self.tokens), **self.lists
        )  # fmt: skip

    def marks(self, num_restored: int) -> Marks:
        """All of it holds, but only ``num_restored`` positions have the stored bytes."""
        return Marks(
            token_items=len(self.tokens) // BLOCK_TOKENS, spans=len(self.lists["spans"]),
            messages=len(self.messages), blocks=num_restored // BLOCK_TOKENS,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Loaded:
    """How many positions came from the store, how many were refused, and why."""

    restored: int
    rejected: int
    reason: str | None


def read_image(source: Source, ref: Ref, *, max_tokens: int, vocab_size: int) -> Image:
    """Read and check a ``kv`` node.

    Raises ``NotFoundError`` or ``CorruptionError`` from the source; ``CorruptionError`` for a wrong form;
    ``CapacityError`` for more than ``max_tokens`` tokens; ``IncompatibleError`` for a version or group kind that is not known.
    """
    node = get_node(source, ref, type="kv")
    body = _checked_body(node)
    num_tokens, computed = body["n"], body["computed"]
    if num_tokens > max_tokens:
        raise CapacityError(
            object="kv part", expected=f"at most {max_tokens} tokens", found=f"{num_tokens}", hint="use an engine with more blocks"
        )
    if not 0 <= computed <= max(num_tokens - 1, 0):
        raise CorruptionError(object="kv part", expected=f"0 to {max(num_tokens - 1, 0)} computed positions", found=f"{computed}")
    lists = {name: MerkleList.open(body[name], node.strong, node.weak) for name in LISTS}
    bounds = {"tokens": num_tokens // BLOCK_TOKENS, "blocks": computed // BLOCK_TOKENS}
    for name, bound in bounds.items():
        if len(lists[name]) != bound:
            raise CorruptionError(object=f"kv part: {name}", expected=f"{bound} items", found=f"{len(lists[name])}")
    for name in ("spans", "messages", "edits"):
        if len(lists[name]) > 2 * max_tokens + 64:
            raise CorruptionError(object=f"kv part: {name}", expected=f"at most {2 * max_tokens + 64} items", found=f"{len(lists[name])}")
    groups = read_groups(body["groups"])
    open_span = [] if body["open_span"] is None else [body["open_span"]]
    raw_spans = [item.value for item in lists["spans"].items(source)] + open_span
    return Image(
        ref=ref,
        tokens=_read_tokens(source, lists["tokens"], body["tail"], num_tokens, vocab_size),
        computed=computed,
        spans=span_rules.check(raw_spans, computed, name="kv part"),
        messages=_read_messages(source, lists["messages"], num_tokens),
        edits=_read_edits(source, lists["edits"]),
        groups=groups,
        block_refs=_read_blocks(source, lists["blocks"], total_heads(groups)),
        tail_refs=_tail_refs(node, body["tail_block"], computed % BLOCK_TOKENS, total_heads(groups)),
        lists=lists,
        **{name: body[name] for name in ("model_id", "tokenizer_id", "template_id", "kv_id", "numerics_id")},
    )


def _checked_body(node: Node) -> dict[str, Any]:
    body = node.body
    if not isinstance(body, dict) or type(body.get("v")) is not int:
        raise CorruptionError(object="kv part", expected="a map with v", found=type(body).__name__)
    if body["v"] != 1:
        raise IncompatibleError(object="kv part", expected="version 1", found=f"version {body['v']}", hint="use a newer agentckpt")
    names = {"n": int, "computed": int, "tail": bytes, "groups": list, "model_id": bytes, "tokenizer_id": bytes}
    for name, kind in names.items():
        if type(body.get(name)) is not kind or (kind is int and body[name] < 0):
            raise CorruptionError(object=f"kv part: {name}", expected=kind.__name__, found=type(body.get(name)).__name__)
    for name in ("template_id", "kv_id", "numerics_id", "open_span", "tail_block", *LISTS):
        if name not in body:
            raise CorruptionError(object=f"kv part: {name}", expected="a value or null", found="nothing")
    for name in ("model_id", "tokenizer_id", "template_id", "kv_id", "numerics_id"):
        value = body[name]
        if value is not None and (type(value) is not bytes or len(value) != 32):
            raise CorruptionError(object=f"kv part: {name}", expected="32 bytes", found=repr(value)[:40])
    return body


def _read_tokens(source: Source, items: MerkleList, tail: bytes, num_tokens: int, vocab_size: int) -> list[int]:
    if len(tail) != num_tokens % BLOCK_TOKENS * 4:
        raise CorruptionError(object="kv part: tail", expected=f"{num_tokens % BLOCK_TOKENS} tokens", found=f"{len(tail)} bytes")
    tokens: list[int] = []
    for item in items.items(source):
        if type(item.value) is not bytes or len(item.value) != 4 * BLOCK_TOKENS:
            raise CorruptionError(object="kv part: tokens", expected="items of 256 bytes", found=repr(item.value)[:40])
        tokens.extend(struct.unpack(f"<{BLOCK_TOKENS}I", item.value))
    tokens.extend(struct.unpack(f"<{len(tail) // 4}I", tail))
    largest = max(tokens, default=0)
    if largest >= vocab_size:
        raise CorruptionError(object="kv part: tokens", expected=f"ids below {vocab_size}", found=f"{largest}")
    return tokens


def _read_messages(source: Source, items: MerkleList, num_tokens: int) -> list[Message]:
    messages: list[Message] = []
    for item in items.items(source):
        value = item.value
        good = isinstance(value, list) and len(value) == 3 and isinstance(value[0], str) and type(value[1]) is int
        if not good or not (messages[-1][1] if messages else 0) <= value[1] <= num_tokens:
            raise CorruptionError(object="kv part: messages", expected="[role, first position, content]", found=repr(value)[:80])
        messages.append((value[0], value[1], value[2]))
    return messages


def _read_edits(source: Source, items: MerkleList) -> list[tuple[int, int]]:
    edits: list[tuple[int, int]] = []
    for item in items.items(source):
        value = item.value
        if not isinstance(value, list) or len(value) != 2 or any(type(v) is not int or v < 0 for v in value):
            raise CorruptionError(object="kv part: edits", expected="[length before, length after]", found=repr(value)[:80])
        edits.append((value[0], value[1]))
    return edits


def _read_blocks(source: Source, items: MerkleList, num_heads: int) -> list[tuple[Ref, ...]]:
    blocks = []
    for item in items.items(source):
        if len(item.weak) not in (0, num_heads):
            raise CorruptionError(object="kv part: blocks", expected=f"0 or {num_heads} chunks a block", found=f"{len(item.weak)}")
        blocks.append(item.weak)
    return blocks


def _tail_refs(node: Node, raw: object, length: int, num_heads: int) -> tuple[Ref, ...]:
    if raw is None:
        return ()
    good = isinstance(raw, dict) and all(type(raw.get(name)) is int for name in ("len", "w", "count"))
    if not good or not isinstance(raw, dict) or raw["len"] != length or raw["count"] != num_heads or length == 0:
        raise CorruptionError(object="kv part: tail_block", expected=f"len {length}, count {num_heads}", found=repr(raw)[:80])
    first, count = raw["w"], raw["count"]
    if not 0 <= first <= len(node.weak) - count:
        raise CorruptionError(object="kv part: tail_block", expected=f"references below {len(node.weak)}", found=f"{first} + {count}")
    return tuple(node.weak[first : first + count])


Block = tuple[int, int, tuple[Ref, ...]]
"""(first position, number of positions, chunks)"""
NUM_READERS = 2
NUM_AHEAD = 4
"""blocks that are read and verified while earlier ones are scattered: hashing and copying overlap on two cores"""


def load_blocks(source: Source, image: Image, memory: KVMemory, runs_of: Callable[[int, int], Sequence[Run] | None]) -> Loaded:
    """Read, verify and scatter blocks in order until one cannot be used.

    ``runs_of(first, end)`` makes room for positions and says where they stand, or None if there is none.
    """
    if image.kv_id is None:
        reason = "no KV was captured" if image.computed else None
        return Loaded(0, 0, reason)
    blocks: list[Block] = [(index * BLOCK_TOKENS, BLOCK_TOKENS, refs) for index, refs in enumerate(image.block_refs)]
    rest = image.computed % BLOCK_TOKENS
    if rest:
        blocks.append((image.computed - rest, rest, image.tail_refs))
    with _ReadAhead(source, blocks, memory) as ahead:
        for first, length, refs in blocks:
            if not refs:
                return Loaded(first, 0, f"no KV was captured from position {first} on")
            runs = runs_of(first, first + length)
            if runs is None:
                return Loaded(first, 0, f"no free blocks for the KV from position {first} on")
            try:
                ahead.scatter_next(runs)
            except NotFoundError:
                return Loaded(first, 0, f"the KV from position {first} on is absent (dropped or missing)")
            except CorruptionError as error:
                return Loaded(first, length, f"the KV at position {first} is corrupt: {error}")
    return Loaded(image.computed, 0, None)


class _ReadAhead:
    """Reads and verifies the next blocks on a few threads. Staging buffers are used in turn: fresh memory for each block
    would cost a page fault every 4 KiB."""

    def __init__(self, source: Source, blocks: Sequence[Block], memory: KVMemory) -> None:
        self._source, self._memory = source, memory
        self._left = deque(block for block in blocks if block[2])
        self._free: list[tuple[Any, list[memoryview]]] = []
        self._waiting: deque[tuple[int, tuple[Any, list[memoryview]], list[Future[None]]]] = deque()
        self._threads = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="agentckpt-restore")

    def __enter__(self) -> _ReadAhead:
        return self

    def __exit__(self, *exc: object) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    def scatter_next(self, runs: Sequence[Run]) -> None:
        """Scatter the next block to ``runs``, if all of its chunks were verified. Raises what their reads raised."""
        self._start()
        length, staging, reads = self._waiting.popleft()
        for read in reads:
            read.result()
        self._memory.scatter(runs, staging[0])
        if length == BLOCK_TOKENS:
            self._free.append(staging)

    def _start(self) -> None:
        while self._left and len(self._waiting) < NUM_AHEAD:
            _, length, refs = self._left.popleft()
            staging = self._free.pop() if self._free and length == BLOCK_TOKENS else self._memory.staging(length)
            reads = [self._threads.submit(self._source.read_into, ref, view) for ref, view in zip(refs, staging[1], strict=True)]
            self._waiting.append((length, staging, reads))
