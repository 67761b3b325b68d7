"""Shared by the store's tests: checkpoints with known content, and what must be true of a store that was opened again."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from agentckpt.nodes import Node, encode_node
from agentckpt.store import Draft, PackMark, Store, View
from agentckpt.types import Ref

ZERO16 = bytes(16)


@dataclass
class Content:
    """What a checkpoint is made of: every object of its closure by reference."""

    manifest: bytes
    objects: dict[Ref, bytes]


@dataclass
class Book:
    """What a run was told and what it tried: the truth that a store is compared with."""

    contents: dict[bytes, Content] = field(default_factory=dict)
    """by manifest id"""
    acked: dict[bytes, bytes] = field(default_factory=dict)
    """sid -> manifest of the last acknowledged head"""
    tried: dict[bytes, bytes] = field(default_factory=dict)
    """sid -> manifest of a head whose append had begun and was not acknowledged"""
    acked_seq: int = 0
    """number of the last acknowledged journal record"""
    values: dict[int, str] = field(default_factory=dict)
    """record number -> tag name of acknowledged tags"""


def session_draft(sid: bytes, name: str) -> Draft:
    return Draft("session", sid, {"name": name, "tenant": "local", "lineage": sid, "parent": None})


def head_draft(view: View, sid: bytes, manifest: bytes, mark: PackMark, *, reason: str = "cut") -> Draft:
    session = view.sessions[sid]
    previous = session.head["manifest"] if session.head else None
    body = {
        "manifest": manifest, "previous": previous, "epoch": session.epoch, "generation": session.generation + 1, "reason": reason,
        "nonce": ZERO16, "message": "", "pack": mark.value, "facts": {},
    }  # fmt: skip
    return Draft("head", sid, body)


def put_checkpoint(store: Store, rng: random.Random, *, num_chunks: int = 3, chunk_bytes: int = 6000) -> Content:
    """Chunks (a shared one among them), a node over them, a manifest over the node. Nothing is synced."""
    objects: dict[Ref, bytes] = {}

    def put(kind: str, data: bytes, compress: bool = False) -> Ref:
        ref = store.put(kind, data, compress)  # type: ignore[arg-type]
        objects[ref] = data
        return ref

    chunks = [put("chunk", rng.randbytes(rng.randrange(1, chunk_bytes))) for _ in range(num_chunks)]
    chunks.append(put("chunk", b"the same in every checkpoint " * 40, compress=True))
    node = put("node", encode_node(Node("test", chunks, (), {"n": rng.random()})))
    manifest = put("manifest", encode_node(Node("manifest", [node], (), {"v": 1, "salt": rng.randbytes(8)})))
    return Content(manifest[1:], objects)


def commit(store: Store, sid: bytes, rng: random.Random, book: Book, **options: int) -> Content:
    """One checkpoint of a session, entered in the book before and after it is acknowledged."""
    content = put_checkpoint(store, rng, **options)
    book.contents[content.manifest] = content
    mark = store.sync()
    book.tried[sid] = content.manifest
    entries = store.append(lambda view: [head_draft(view, sid, content.manifest, mark)])
    book.acked[sid] = content.manifest
    book.tried.pop(sid)
    book.acked_seq = entries[-1].seq
    return content


def check_content(store: Store, content: Content) -> None:
    """Every object of a checkpoint comes back bit for bit."""
    for ref, data in content.objects.items():
        assert store.get(ref, 1 << 24) == data


def check_store(store: Store, book: Book) -> None:
    """Every acknowledged commit is there and whole; every other head has its old or its new value."""
    view = store.view()
    assert view.seq >= book.acked_seq, f"record {book.acked_seq} was acknowledged, the journal ends at {view.seq}"
    for sid, manifest in book.acked.items():
        assert sid in view.sessions, f"session {sid.hex()} was acknowledged and is gone"
        head = view.sessions[sid].head
        allowed = {manifest, book.tried.get(sid, manifest)}
        assert (head or {}).get("manifest") in allowed, f"session {sid.hex()}: a head that nobody wrote"
    for manifest in {head["manifest"] for session in view.sessions.values() for head in session.heads}:
        check_content(store, book.contents[manifest])
    for seq, tag in book.values.items():
        assert tag in view.tags, f"tag {tag} (record {seq}) was acknowledged and is gone"
