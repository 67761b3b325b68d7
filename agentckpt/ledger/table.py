"""What recovery does with an effect later than the restored cut: one table, as data.

Source: the table "After recovery to cut k" in the design of the ledger; ``tests/ledger/test_table.py`` holds one test a cell.
"""

from __future__ import annotations

from typing import Final, Literal

from ..types import EffectClass, EffectState
from .effects import EffectRecord

Action = Literal["void", "record", "record-and-install", "run", "send-again", "unknown", "post-missing"]
"""
- ``void``: run again on the restored sandbox; the recorded output stays in the conversation, a different digest is reported
- ``record``: return (or raise) what is recorded
- ``record-and-install``: the same, and the sandbox becomes the recorded post-state
- ``run``: run it (again), under the same key
- ``send-again``: run it again because the tool honours the key
- ``unknown``: ask ``verify``, else ``EffectUnknownError``
- ``post-missing``: the outcome of a tool that reaches the sandbox has no post-state: stop and say so
"""

TABLE: Final[dict[tuple[EffectClass, bool], Action]] = {
    # (class, finished)
    ("sandbox", True): "void",
    ("sandbox", False): "run",
    ("read", True): "record",
    ("read", False): "run",
    ("model", True): "record",
    ("model", False): "run",
    ("idempotent", True): "record",
    ("idempotent", False): "send-again",
    ("compensable", True): "record",
    ("compensable", False): "unknown",
    ("irreversible", True): "record",
    ("irreversible", False): "unknown",
    ("authority", True): "record",
    ("authority", False): "unknown",
}

NOT_STANDING: Final[frozenset[EffectState]] = frozenset({"verified-not", "compensated"})
"""Known not to stand in the world although it was dispatched: the call may be made, under the same key."""


def action_for(effect_class: EffectClass, finished: bool, *, sandbox: bool = False, has_post: bool = False) -> Action:
    """The cell of the table. ``sandbox``: declared ``sandbox=True`` beside a class other than ``sandbox``."""
    action = TABLE[effect_class, finished]
    if action != "record" or not sandbox:
        return action
    return "record-and-install" if has_post else "post-missing"


def action_of(record: EffectRecord) -> Action:
    """What recovery does with this record.

    Beside the table: what is known not to stand runs again, and a person's resolution (state ``resolved``) is taken as it
    is, also without a post-state.
    """
    if record.state in NOT_STANDING:
        return "run"
    if record.state == "resolved" and record.effect_class != "sandbox" and record.post is None:
        return "record"
    return action_for(record.effect_class, record.finished, sandbox=record.sandbox, has_post=record.post is not None)
