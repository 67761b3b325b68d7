"""What the parts of stored checkpoints hold, read without an engine and without torch."""

from __future__ import annotations

import difflib
import json
import os
import sys
from array import array
from typing import Any

from ..errors import IncompatibleError, NotFoundError
from ..manifest import Checkpoint
from ..nodes import MerkleList, Node, get_node
from ..sandbox import read_path, tree_diff, walk_tree
from ..session.state import read_state
from ..store import Store
from . import render as r
from .stores import UsageError, part_node

MAX_STATE_LINES = 400


def token_ids(store: Store, node: Node, start: int = 0) -> list[int]:
    """Token ids of a ``kv`` node from position ``start`` on."""
    items = MerkleList.open(node.body["tokens"], node.strong, node.weak).items(store, start // 64)
    data = b"".join(item.value for item in items) + bytes(node.body["tail"])
    ids = array("I", data)
    if sys.byteorder == "big":
        ids.byteswap()
    return ids.tolist()[start - start // 64 * 64 :]


def token_text(node: Node, ids: list[int], model: str | None) -> str:
    """The tokens as text, by the tokenizer of ``model``; refused if its digest is not the checkpoint's."""
    if model is None:
        raise UsageError("a tokenizer is needed", code="no-tokenizer", hint="add --model NAME, for example smollm2-135m-instruct")
    from ..engine.load import load_tokenizer

    tokenizer, digest = load_tokenizer(model)
    if digest != node.body["tokenizer_id"]:
        raise IncompatibleError("another tokenizer", object=model, expected=node.body["tokenizer_id"].hex()[:12], found=digest.hex()[:12])
    return str(tokenizer.decode(ids))


def messages(store: Store, node: Node, start: int = 0) -> list[tuple[str, str]]:
    """(role, content) of the conversation's messages from number ``start`` on."""
    items = MerkleList.open(node.body["messages"], node.strong, node.weak).items(store, start)
    return [(str(item.value[0]), str(item.value[2])) for item in items]


def state_value(store: Store, checkpoint: Checkpoint) -> Any:
    found = part_node(store, checkpoint, "state")
    if found is None:
        raise NotFoundError("the checkpoint has no state part", object=r.short(checkpoint.id))
    return read_state(store, checkpoint.parts[found[0]][1])


def read_file(store: Store, checkpoint: Checkpoint, path: str) -> bytes:
    for _, (kind, ref) in sorted(checkpoint.parts.items()):
        if kind == "sandbox":
            return bytes(read_path(store, ref, path))
    raise NotFoundError("the checkpoint has no sandbox part", object=r.short(checkpoint.id))


class Differ:
    """Differences between checkpoints, part by part. ``model``: whose tokenizer shows new tokens as text."""

    def __init__(self, store: Store, *, model: str | None = None) -> None:
        self._store, self._model = store, model

    def changes(self, before: Checkpoint | None, after: Checkpoint) -> list[tuple[str, list[str]]]:
        """(part, lines) of the parts that differ; lines begin with ``+``, ``-`` or ``~``."""
        found = []
        names = sorted({*after.parts, *(before.parts if before else ())})
        for name in names:
            old = before.parts.get(name) if before else None
            new = after.parts.get(name)
            if old == new:
                continue
            kind = (new or old or ("", b""))[0]
            how = {"kv": self._kv, "sandbox": self._sandbox, "state": self._state}.get(kind)
            lines = how(old and old[1], new and new[1]) if how else ["~ changed"]
            if lines:
                found.append((name, lines))
        return found

    def messages(self, before: Checkpoint | None, after: Checkpoint) -> list[tuple[str, str]]:
        """The messages, and with a tokenizer the text, that the later checkpoint has beyond the earlier one."""
        new = part_node(self._store, after, "kv")
        if new is None:
            return []
        old = part_node(self._store, before, "kv") if before else None
        seen = old[1].body["messages"]["n"] if old else 0
        found = messages(self._store, new[1], min(seen, new[1].body["messages"]["n"]))
        if self._model:
            start = min(old[1].body["n"] if old else 0, new[1].body["n"])
            found.append(("tokens as text", token_text(new[1], token_ids(self._store, new[1], start), self._model)))
        return found

    def _kv(self, old: Any, new: Any) -> list[str]:
        if new is None:
            return ["- kv"]
        node = get_node(self._store, new, type="kv")
        before = get_node(self._store, old, type="kv") if old else None
        kept, count = before.body["n"] if before else 0, node.body["n"]
        lines = [f"+ {r.plural(count - kept, 'token')} ({kept:,} -> {count:,}), {node.body['computed']:,} with KV"]
        if count < kept:
            lines = [f"- {r.plural(kept - count, 'token')} ({kept:,} -> {count:,})"]
        edits = node.body["edits"]["n"] - (before.body["edits"]["n"] if before else 0)
        return lines + ([f"~ {r.plural(edits, 'truncation')}"] if edits > 0 else [])

    def _sandbox(self, old: Any, new: Any) -> list[str]:
        if old is None or new is None:
            sign, ref = ("+", new) if old is None else ("-", old)
            return [f"{sign} {os.fsdecode(path)}" for path, entry in walk_tree(self._store, ref) if entry.type != "d"]
        signs = {"added": "+", "removed": "-", "changed": "~"}
        return [f"{signs[c.kind]} {os.fsdecode(c.path)}" for c in tree_diff(self._store, old, new) if c.kind in signs]

    def _state(self, old: Any, new: Any) -> list[str]:
        texts = [self._state_lines(old), self._state_lines(new)]
        if sum(map(len, texts)) > MAX_STATE_LINES * 10:
            return [f"~ state: {len(texts[0]):,} -> {len(texts[1]):,} lines"]
        marked = difflib.unified_diff(texts[0], texts[1], lineterm="", n=0)
        return [line for line in marked if not line.startswith(("---", "+++", "@@"))][:MAX_STATE_LINES]

    def _state_lines(self, ref: Any) -> list[str]:
        return json.dumps(r.to_plain(read_state(self._store, ref)), indent=1, sort_keys=True).splitlines() if ref else []
