"""Where a session comes from: its ledger with its ancestors', and its nonces.

Invariants:
1. A fork sees its ancestors' effects up to each fork as its own.
2. Every nonce is a function, so a program that is run again, or in another store, draws the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from blake3 import blake3

from ..ledger import Ancestor, Ledger
from ..ledger.values import load_value
from ..manifest import Checkpoint, CutFacts, check_cut
from ..store import SessionView, Store, View
from ..types import Mark
from .restore import NONCE_BYTES


def first_nonce(name: str) -> bytes:
    """A new session's nonce is a function of its name: the same program, name and seeds draw the same, in any store."""
    return blake3(name.encode(), derive_key_context="agentckpt v1 session nonce").digest(NONCE_BYTES)


def next_nonce(nonce: bytes, generation: int) -> bytes:
    """After a rollback: other draws than the first time, and the same ones if the rollback is done again."""
    return blake3(nonce + generation.to_bytes(8, "little"), derive_key_context="agentckpt v1 rollback nonce").digest(NONCE_BYTES)


def session_ledger(store: Store, view: View, session: SessionView) -> Ledger:
    """The ledger of a session with its ancestors' up to each fork."""
    return Ledger(
        sid=session.sid,
        entries=session.entries,
        ancestors=ancestors_of(view, session.parent),
        load=lambda value: load_value(value, store.get),
    )


def ancestors_of(view: View, parent: Mapping[str, Any] | None) -> Sequence[Ancestor]:
    """Oldest first. An ancestor that was removed from the store cannot be read: its effects are unknown to the fork."""
    chain: list[Ancestor] = []
    while parent is not None:
        session = view.sessions.get(parent["sid"])
        if session is None:
            break
        chain.append(Ancestor(session.sid, session.entries, Mark(parent["sseq"], parent["hash"])))
        parent = session.parent
    return chain[::-1]


def check_restored(ledger: Ledger, checkpoint: Checkpoint) -> None:
    later = {record.key for record in ledger.effects_after(checkpoint.mark, sid=checkpoint.session)}
    still_open = {bytes.fromhex(record.key) for record in ledger.open_effects if record.key not in later}
    check_cut(checkpoint, CutFacts(open_keys=frozenset(still_open)))
