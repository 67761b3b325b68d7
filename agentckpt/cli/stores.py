"""What most commands begin with: open the store that was named, and find the checkpoint that a word means."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from ..errors import AgentckptError, CorruptionError, NotFoundError
from ..manifest import Checkpoint, decode_checkpoint
from ..nodes import Node, decode_node
from ..store import SessionView, Store, View
from ..types import KIND_BYTE, Ref

MAX_NODE_BYTES = 16 * 2**20


class UsageError(AgentckptError, ValueError):
    """The command line lacks something, or says it twice. The exit code is the one of argparse."""

    exit_code = 2
    default_code = "usage"


@dataclass(frozen=True, slots=True)
class Found:
    """A checkpoint, and the session that a head record of it belongs to (None if only children or forks name it)."""

    checkpoint: Checkpoint
    session: SessionView | None
    record: dict[str, Any] | None


def open_store(args: argparse.Namespace, *, write: bool = False) -> Store:
    if not args.store:
        raise UsageError("no store was named", code="no-store", hint="pass -s DIR, or set AGENTCKPT_STORE")
    return Store.open(args.store, mode="rw" if write else "ro")


def session_named(view: View, name: str) -> SessionView:
    sid = view.names.get(name)
    if sid is None:
        known = ", ".join(sorted(view.names)[:5]) or "none"
        raise NotFoundError("no such session", object=name, expected=f"one of: {known}", hint="`agentckpt ls` lists them")
    return view.sessions[sid]


def find(store: Store, view: View, word: str) -> Found:
    """A session's name (its head), a tag, or a short unique id."""
    if word in view.names:
        session = view.sessions[view.names[word]]
        if session.head is None:
            raise NotFoundError("the session has no checkpoint yet", object=word)
        identity = session.head["manifest"]
    else:
        identity = view.tags.get(word) or store.find_manifest(word)
    owner, record = head_record(view, identity)
    return Found(read_checkpoint(store, identity), owner, record)


def head_record(view: View, identity: bytes) -> tuple[SessionView | None, dict[str, Any] | None]:
    for session in view.sessions.values():
        for record in reversed(session.heads):
            if record["manifest"] == identity:
                return session, dict(record)
    return None, None


def manifest_ref(identity: bytes) -> Ref:
    return Ref(bytes([KIND_BYTE["manifest"]]) + identity)


def read_checkpoint(store: Store, identity: bytes) -> Checkpoint:
    """The manifest that a head, a tag or a found id names. Its absence is damage: what names it was written after it."""
    try:
        data = store.get(manifest_ref(identity), MAX_NODE_BYTES)
    except NotFoundError as error:
        found = f"checkpoint {identity.hex()[:12]}"
        hint = "`agentckpt verify` lists what is damaged; older checkpoints may be whole (`agentckpt log`)"
        raise CorruptionError("a head names it and it is not in the store", object=found, code="missing", hint=hint) from error
    return decode_checkpoint(data, identity)


def part_node(store: Store, checkpoint: Checkpoint, kind: str) -> tuple[str, Node] | None:
    """Name and node of the first part of a kind."""
    for name, (found, ref) in sorted(checkpoint.parts.items()):
        if found == kind:
            return name, decode_node(store.get(ref, MAX_NODE_BYTES))
    return None
