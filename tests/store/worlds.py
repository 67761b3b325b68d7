"""Builds stores with checkpoints of every part kind, node by node as FORMAT.md says, for tests of what the store must keep.

Everything is a function of its arguments: with a fixed secret, clock and randomness two runs write the same bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from blake3 import blake3

from agentckpt.manifest import Checkpoint, encode_checkpoint
from agentckpt.nodes import ListSlot, MerkleList, Node, put_node
from agentckpt.store import Draft, Store, View
from agentckpt.types import Mark, Ref

LAYERS, HEADS, DIM = 2, 2, 8


def octets(label: str, length: int) -> bytes:
    """``length`` bytes that depend on ``label`` alone and do not compress."""
    return blake3(label.encode()).digest(length)


def put_kv(store: Store, label: str, num_tokens: int) -> Ref:
    """A ``kv`` node. Equal labels share the blocks of their common prefix, as forks and later turns do."""
    strong: list[Ref] = []
    weak: list[Ref] = []
    tokens = [int.from_bytes(octets(f"{label} token {i}", 2), "little") for i in range(num_tokens)]
    computed = max(0, num_tokens - 1)
    items, blocks, spans = MerkleList(), MerkleList(), MerkleList()
    for at in range(0, num_tokens - 63, 64):
        items.append(store, struct.pack("<64I", *tokens[at : at + 64]))
    for block in range(computed // 64):
        chunks = [store.put("chunk", octets(f"{label} block {block} head {h}", LAYERS * 2 * 64 * DIM * 2)) for h in range(HEADS)]
        blocks.append(store, octets(f"{label} link {block}", 32), (), chunks)
    spans.append(store, [0, computed, "append"])
    messages = MerkleList()
    messages.append(store, ["user", 0, "go on"])
    tail = computed % 64
    body: dict[str, Any] = {
        "v": 1,
        "n": num_tokens,
        "computed": computed,
        "tokens": items.root(strong, weak),
        "tail": tokens[num_tokens - num_tokens % 64 :],
        "spans": spans.root(strong, weak),
        "open_span": None,
        "messages": messages.root(strong, weak),
        "edits": MerkleList().root(strong, weak),
        "model_id": octets("model", 32),
        "tokenizer_id": octets("tokenizer", 32),
        "template_id": None,
        "kv_id": octets("kv", 32),
        "numerics_id": octets("numerics", 32),
        "groups": [
            {
                "layers": list(range(LAYERS)), "kind": "full", "window": None, "heads": HEADS,
                "planes": [{"name": name, "dtype": "bf16", "shape": [DIM]} for name in "KV"],
            }
        ],
        "blocks": blocks.root(strong, weak),
        "tail_block": {"len": tail, "w": len(weak), "count": HEADS} if tail else None,
    }  # fmt: skip
    if tail:
        weak += [store.put("chunk", octets(f"{label} tail {num_tokens} head {h}", LAYERS * 2 * tail * DIM * 2)) for h in range(HEADS)]
    return put_node(store, Node("kv", strong, weak, body))


def put_state(store: Store, label: str, num_items: int) -> Ref:
    """A ``state`` node whose value has an append-only list."""
    strong: list[Ref] = []
    weak: list[Ref] = []
    log = MerkleList()
    for i in range(num_items):
        log.append(store, {"step": i, "text": f"{label} {i}", "score": i / 8})
    value = {
        "big": 1 << 70,
        "log": ListSlot(0),
        "done": num_items > 30,
        "goal": label,
        "digest": octets(label, 8),
    }  # in the encoding's order
    return put_node(
        store, Node("state", strong, weak, {"v": 1, "value": value, "order": [], "lists": [log.root(strong, weak)]}), compress=True
    )


def put_tree(store: Store, label: str, files: dict[str, bytes]) -> Ref:
    """A ``tree`` node with one directory level below the root for names with a slash."""
    below: dict[str, dict[str, bytes]] = {}
    for path, data in files.items():
        folder, _, name = path.rpartition("/")
        below.setdefault(folder, {})[name] = data
    root = _dir(store, below.pop("", {}), {name: _dir(store, inner, {}) for name, inner in sorted(below.items())})
    body = {
        "v": 1, "backend": "workspace", "consistency": "quiescent", "root": 0, "m": 0o755, "mt": 1_700_000_000_000_000_000, "ignored": [],
        "facts": {"label": label},
    }  # fmt: skip
    return put_node(store, Node("tree", [root], [], body))


def _dir(store: Store, files: dict[str, bytes], folders: dict[str, Ref]) -> Ref:
    strong: list[Ref] = []
    entries: list[dict[str, Any]] = []
    for name in sorted([*files, *folders], key=str.encode):
        entry: dict[str, Any] = {"n": name.encode(), "t": "f", "m": 0o644, "mt": 1_700_000_000_000_000_000}
        if name in folders:
            entry |= {"t": "d", "m": 0o755, "d": len(strong)}
            strong.append(folders[name])
        elif len(files[name]) <= 512:
            entry |= {"s": len(files[name]), "x": files[name]}
        else:
            entry |= {"s": len(files[name]), "c": [len(strong), 1]}
            strong.append(store.put("chunk", files[name], compress=True))
        entries.append(entry)
    return put_node(store, Node("dir", strong, [], {"l": 0, "e": entries}), compress=True)


@dataclass
class Written:
    """One session as it was written: manifest ids, oldest first, and the parts of each."""

    sid: bytes
    name: str
    manifests: list[bytes] = field(default_factory=list)
    parts: list[dict[str, tuple[str, Ref]]] = field(default_factory=list)


def new_session(store: Store, name: str, *, parent: Written | None = None) -> Written:
    """Session and owner records; a fork names its parent's present mark and takes its head."""
    session = Written(octets(f"sid {name}", 16), name)

    def build(view: View) -> list[Draft]:
        above = None
        if parent is not None:
            seen = view.sessions[parent.sid]
            above = {"sid": parent.sid, "sseq": seen.sseq, "hash": seen.hash}
        body = {"name": name, "tenant": "local", "lineage": octets(f"lineage {name}", 16), "parent": above}
        owner = {"epoch": 1, "owner": {"host": "host", "pid": 1, "boot": ""}}
        return [Draft("session", session.sid, body), Draft("owner", session.sid, owner)]

    store.append(build)
    if parent is not None:
        _head(store, session, parent.manifests[-1], "fork")
        session.manifests.append(parent.manifests[-1])
        session.parts.append(parent.parts[-1])
    return session


def checkpoint(
    store: Store, session: Written, *, kv: int = 0, kv_label: str = "", items: int = 3, files: dict[str, bytes] | None = None,
    children: dict[str, bytes] | None = None,
) -> bytes:  # fmt: skip
    """One cut: parts, sync, manifest, sync, head. Returns the manifest's id."""
    parts: dict[str, tuple[str, Ref]] = {"state": ("state", put_state(store, session.name, items))}
    if kv:
        parts["kv"] = ("kv", put_kv(store, kv_label or session.name, kv))
    if files is not None:
        parts["sandbox"] = ("sandbox", put_tree(store, session.name, files))
    seen = store.view().sessions[session.sid]
    cut = Checkpoint(
        session=session.sid, lineage=seen.lineage, turn=len(session.manifests), parts=parts, nonce=octets(f"nonce {session.name}", 16),
        mark=Mark(seen.sseq, seen.hash), parents=tuple(session.manifests[-1:]), children=children or {},
        consistency={"sandbox": "quiescent"} if files is not None else {},
    )  # fmt: skip
    manifest = store.put("manifest", encode_checkpoint(cut))[1:]
    mark = store.sync()
    _head(store, session, manifest, "cut", mark.value)
    session.manifests.append(manifest)
    session.parts.append(parts)
    return manifest


def _head(store: Store, session: Written, manifest: bytes, reason: str, pack: Any = None) -> None:
    def build(view: View) -> list[Draft]:
        seen = view.sessions[session.sid]
        body = {
            "manifest": manifest, "previous": seen.head["manifest"] if seen.head else None, "epoch": 1, "generation": seen.generation + 1,
            "reason": reason, "nonce": octets(f"nonce {session.name}", 16), "message": "", "pack": pack, "facts": {},
        }  # fmt: skip
        return [Draft("head", session.sid, body)]

    store.append(build)


def append(store: Store, *drafts: Draft) -> None:
    store.append(lambda view: drafts)


def remove(store: Store, session: Written) -> None:
    append(store, Draft("name", None, {"name": session.name, "sid": None}), Draft("tombstone", session.sid, {}))


def effect(store: Store, session: Written, label: str, value: Any, post: Ref | None = None) -> None:
    """An intent and its outcome, with a value that may be a reference."""
    key = octets(f"key {label}", 32)
    intent = {
        "epoch": 1, "turn": 0, "key": key, "tool": "deploy", "class": "irreversible", "sandbox": post is not None,
        "args": {"version": label}, "intent_key": label, "occurrence": 0, "resources": [],
    }  # fmt: skip
    outcome = {"epoch": 1, "key": key, "state": "committed", "value": value, "error": None, "late": False, "post": post}
    append(store, Draft("intent", session.sid, intent), Draft("outcome", session.sid, outcome))


def closure(store: Store, refs: Sequence[Ref]) -> set[Ref]:
    """All that ``refs`` reach, by a walk of its own (weak references that are absent, and parents, left out)."""
    from agentckpt.nodes import decode_node

    found: set[Ref] = set()
    waiting = list(refs)
    while waiting:
        ref = waiting.pop()
        if ref not in found:
            found.add(ref)
            if ref[0] != 1:
                node = decode_node(store.get(ref, 1 << 24))
                waiting += [*node.strong, *(weak for weak in node.weak if ref[0] != 3 and store.has(weak))]
    return found
