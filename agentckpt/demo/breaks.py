"""Two controls: a comparison that cannot fail proves nothing.

``flip_kv_byte`` damages one captured KV block on disk: the restore must notice, recompute from there, and end with the same tokens.
``ZeroedEngine`` hands zeros to the engine in place of the stored KV, behind the verification: the tokens must come out different.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cli.stores import part_node, read_checkpoint, session_named
from ..errors import NotFoundError
from ..nodes import MerkleList
from ..store import Store
from ..types import EngineLike, Ref, Source, Staged

RECORD_MAGIC = b"\x89AKR"
RECORD_HEADER_BYTES = 64


@dataclass(frozen=True, slots=True)
class Flip:
    """Where a bit was changed: the block of 64 tokens, and in how many copies (a killed worker may have left one)."""

    block: int
    num_blocks: int
    num_copies: int


def flip_kv_byte(store_path: Path, session_name: str, share: float) -> Flip:
    """Flip one bit in a KV chunk of the session's head: of the block at ``share`` (0 to 1) of its length.

    Nobody may have the store open for writing. Raises ``NotFoundError`` if the head has no whole block.
    """
    with Store.open(str(store_path), mode="ro") as store:
        head = session_named(store.view(), session_name).head
        if head is None:
            raise NotFoundError("the session has no checkpoint yet", object=session_name)
        references = _blocks(store, head["manifest"])
    if not references:
        raise NotFoundError("the head has no whole block of KV", object=session_name)
    block = min(int(share * len(references)), len(references) - 1)
    num_copies = sum(_flip_in(path, references[block][0]) for path in sorted((store_path / "packs").rglob("*")) if path.is_file())
    if not num_copies:
        raise NotFoundError("the KV chunk is in no pack", object=references[block][0].hex()[:14])
    return Flip(block, len(references), num_copies)


def _flip_in(path: Path, reference: Ref) -> int:
    """Flip a bit in the middle of each copy of an object that a pack has (FORMAT.md section 3): how many."""
    data = path.read_bytes()
    headers = list(_headers(data, bytes(reference[1:])))
    with path.open("r+b") as pack:
        for header in headers:
            stored_bytes = int.from_bytes(data[header + 44 : header + 48], "little")
            offset = header + RECORD_HEADER_BYTES + stored_bytes // 2
            pack.seek(offset)
            pack.write(bytes([data[offset] ^ 0x40]))
    return len(headers)


def _blocks(store: Store, manifest: bytes) -> list[Sequence[Ref]]:
    """The chunk references of each captured whole block."""
    found = part_node(store, read_checkpoint(store, manifest), "kv")
    if found is None:
        return []
    node = found[1]
    return [item.weak for item in MerkleList.open(node.body["blocks"], node.strong, node.weak).items(store) if item.weak]


def _headers(data: bytes, identity: bytes) -> Iterator[int]:
    position = data.find(identity)
    while position >= 0:
        header = position - 8
        if header >= 0 and header % 64 == 0 and data[header : header + 4] == RECORD_MAGIC:
            yield header
        position = data.find(identity, position + 1)


class ZeroedSource:
    """A source whose reads into memory, which is how KV comes back, are verified and then wiped."""

    def __init__(self, inner: Source) -> None:
        self._inner = inner

    def get(self, ref: Ref, max_bytes: int) -> bytes:
        return self._inner.get(ref, max_bytes)

    def has(self, ref: Ref) -> bool:
        return self._inner.has(ref)

    def read_into(self, ref: Ref, target: memoryview) -> None:
        self._inner.read_into(ref, target)
        target.cast("B")[:] = bytes(target.nbytes)


class ZeroedSequence:
    """A live sequence that restores zeros; all else is the engine's own."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def prepare(self, source: Source, ref: Ref) -> Staged:
        staged: Staged = self._inner.prepare(ZeroedSource(source), ref)
        return staged

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class ZeroedEngine:
    """An engine whose sequences forget what they restored."""

    def __init__(self, inner: EngineLike) -> None:
        self._inner = inner

    def open_sequence(self, *, nonce: bytes) -> Any:
        return ZeroedSequence(self._inner.open_sequence(nonce=nonce))

    def describe(self) -> Any:
        return self._inner.describe()
