"""What two runs left in their stores and at their witnesses, side by side. Nothing here asks a worker.

Files are compared by path, kind, mode and content: times of modification differ between any two runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cli.effects import ledger_of
from ..cli.parts import state_value, token_ids
from ..cli.stores import part_node, read_checkpoint, session_named
from ..errors import NotFoundError
from ..ledger import EffectRecord
from ..manifest import Checkpoint
from ..sandbox.content import read_content
from ..sandbox.tree import walk_tree
from ..store import SessionView, Store
from ..testing.witness import Arrival
from .results import TurnRow, WitnessCount
from .tools import DEPLOYS

DEPLOY_NAMES = frozenset(deploy.spec.name for deploy in DEPLOYS)


@dataclass(frozen=True, slots=True)
class Account:
    """One run as its store tells it. ``cut`` is the last one before the deploys: what the twins are compared at."""

    cut: str
    turn: int
    tokens: tuple[int, ...]
    files: Mapping[str, str]
    """path -> kind, mode and digest"""
    state: Mapping[str, Any]
    """with the tries and a digest of the ranking of every bug"""
    deploys: tuple[EffectRecord, ...]
    turns: tuple[TurnRow, ...]


def account(path: Path, session_name: str) -> Account:
    """Read a run's store. Raises ``NotFoundError`` if it never came to the deploys."""
    with Store.open(str(path), mode="ro") as store:
        view = store.view()
        session = session_named(view, session_name)
        deploys = tuple(effect for effect in ledger_of(view, session).effects if effect.tool in DEPLOY_NAMES)
        if not deploys:
            raise NotFoundError("no deploy was intended", object=session_name)
        checkpoint = _last_before(store, session, min(effect.turn for effect in deploys))
        return Account(
            cut=checkpoint.id.hex(),
            turn=checkpoint.turn,
            tokens=tuple(tokens_of(store, checkpoint)),
            files=files_of(store, checkpoint),
            state=_plain_state(store, checkpoint),
            deploys=deploys,
            turns=tuple(_turn_row(head) for head in session.heads),
        )


def _last_before(store: Store, session: SessionView, turn: int) -> Checkpoint:
    for head in reversed(session.heads):
        checkpoint = read_checkpoint(store, head["manifest"])
        if checkpoint.turn < turn:
            return checkpoint
    raise NotFoundError("no cut before the deploys", object=session.name)


def _plain_state(store: Store, checkpoint: Checkpoint) -> dict[str, Any]:
    state = state_value(store, checkpoint)
    return {**state, "closed": [dict(bug) for bug in state["closed"]]}


def tokens_of(store: Store, checkpoint: Checkpoint) -> list[int]:
    found = part_node(store, checkpoint, "kv")
    return token_ids(store, found[1]) if found else []


def files_of(store: Store, checkpoint: Checkpoint) -> dict[str, str]:
    reference = checkpoint.parts["sandbox"][1]
    files = {}
    for path, entry in walk_tree(store, reference):
        name = path.decode(errors="surrogateescape")
        content = b"".join(read_content(store, entry, name)) if entry.type == "f" else entry.inline or b""
        files[name] = f"{entry.type} {entry.mode:o} {hashlib.sha256(content).hexdigest()}"
    return files


def _turn_row(head: Mapping[str, Any]) -> TurnRow:
    parts = head["facts"]["parts"].values()
    total = {name: sum(int(part.get(name) or 0) for part in parts) for name in ("num_tokens", "logical_bytes", "new_bytes")}
    return TurnRow(turn=head["facts"]["turn"], **total, pause_s=head["facts"].get("pause_s"), exposed_s=None, durable_s=None)


def count_effects(deploys: Sequence[EffectRecord], arrivals: Sequence[Arrival]) -> WitnessCount:
    """Intents of the ledger beside what the witness saw."""
    unknown = {effect.tool for effect in deploys if effect.state in ("unknown", "intended")}
    return _count([effect.tool for effect in deploys], unknown, arrivals)


def count_arrivals(arrivals: Sequence[Arrival]) -> WitnessCount:
    """Of a run without a ledger: each deploy is expected once, and nothing is known to be unknown."""
    return _count(sorted(DEPLOY_NAMES), set(), arrivals)


def _count(intended: Sequence[str], unknown: set[str], arrivals: Sequence[Arrival]) -> WitnessCount:
    applied = dict.fromkeys(sorted({*intended, *(arrival.tool for arrival in arrivals)}), 0)
    for arrival in arrivals:
        applied[arrival.tool] += arrival.num_applied
    return WitnessCount(
        expected=len(intended),
        arrived=sum(min(count, 1) for count in applied.values()),
        duplicated=sum(max(count - 1, 0) for count in applied.values()),
        lost=sum(1 for tool in intended if not applied[tool] and tool not in unknown),
        unknown=len(unknown),
        num_requests=sum(arrival.num_requests for arrival in arrivals),
    )
