"""skeleton"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from ..types import Mark, Value
from .effects import EffectRecord
from .keys import Call
from .table import Action

ZERO_MARK = Mark(0, bytes(32))
Layer = Literal["key", "arguments", "intent"]


class LedgerEntry(Protocol):
    """What the ledger needs of a journal entry (the store's ``Entry`` has it)."""

    @property
    def kind(self) -> str: ...
    @property
    def sseq(self) -> int: ...
    @property
    def hash(self) -> bytes: ...
    @property
    def body(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Ancestor:
    """The entries of an ancestor's journal, and the mark at which the next one was forked from it."""

    sid: bytes
    entries: Sequence[LedgerEntry]
    mark: Mark


@dataclass(frozen=True, slots=True)
class Match:
    """What to do with a call.

    ``new``: dispatch it (intent first). Otherwise ``record`` is what was found and ``action`` what the table says.
    ``orphan``: the record comes from a timeline that a rollback left; append ``matched_body`` before the next cut.
    """

    call: Call
    action: Action | Literal["new"]
    layer: Layer | None = None
    record: EffectRecord | None = None
    orphan: bool = False


class Ledger:
    """A session's effects, folded from its journal entries. Not thread-safe: the session's lock guards it."""

    def __init__(
        self,
        *,
        sid: bytes,
        entries: Iterable[LedgerEntry] = (),
        ancestors: Sequence[Ancestor] = (),
        end: Mark | None = None,
        load: Callable[[Value], Value] | None = None,
    ) -> None:
        """``ancestors`` oldest first. ``end``: the session's last journal position, if the caller knows it.

        ``load`` turns a stored ``{"$ref": ...}`` into its value (``load_value`` with the store's ``get``).
        Raises ``CorruptionError`` for entries that cannot follow each other and for an ancestor shorter than its mark.
        """

    @property
    def mark(self) -> Mark:
        """Position of the last entry of the session's own journal that the ledger holds; ``ZERO_MARK`` if none."""
        raise RuntimeError

    @property
    def effects(self) -> tuple[EffectRecord, ...]:
        """All effects (ancestors' up to the fork first), in order of their first intents."""
        raise RuntimeError

    def get(self, key: bytes | str) -> EffectRecord | None: ...

    def add(self, entry: LedgerEntry) -> EffectRecord | None:
        """Fold one more entry of the session's own journal; returns the effect's new record (None for other kinds).

        Effects added here were made by this run: later calls are not matched against them, unless they are ``unknown``.
        """

    def check_mark(self, mark: Mark, *, sid: bytes | None = None) -> None:
        """Raises ``CorruptionError`` (code ``ledger-short`` or ``ledger-mismatch``): the ledger fails closed."""

    def restored(self, mark: Mark, *, sid: bytes | None = None, mode: Literal["recover", "rollback"] = "recover",
                 keys: Sequence[bytes] = ()) -> None:
        """Say which cut was restored (its mark, and the session that the mark belongs to): what is later can be matched.

        ``keys``: the checkpoint's ``in_flight`` and ``undelivered`` keys, matched as well.
        """

    def effects_after(self, mark: Mark, *, sid: bytes | None = None) -> tuple[EffectRecord, ...]:
        """Effects whose first intent is later than ``mark``, on any timeline."""
        raise RuntimeError

    @property
    def open_effects(self) -> tuple[EffectRecord, ...]:
        """Intended without outcome, or unknown."""
        raise RuntimeError

    @property
    def unmatched(self) -> tuple[EffectRecord, ...]:
        """Effects of the open turn that no call has matched yet, in order. Left at the turn's end: a divergence."""
        raise RuntimeError

    @property
    def orphans(self) -> tuple[EffectRecord, ...]:
        """Effects that a rollback left done and that no call has matched: facts that the model can be shown."""
        raise RuntimeError

    def peek(self, call: Call) -> Match:
        """As ``match``, without consuming the record."""
        raise RuntimeError

    def match(self, call: Call) -> Match:
        """Match a call, in layers: exact key; canonical arguments less volatile fields; declared intent key; resources.

        Consumes the record. Raises ``ConflictError`` (code ``effect-overlap``) if a resource overlaps with other arguments.
        """
        raise RuntimeError
