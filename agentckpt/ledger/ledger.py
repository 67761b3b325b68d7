"""A session's effects, folded from its journal, and the matching of calls against them.

Invariants:
1. The ledger never rolls back: records change only by entries, and a rollback only says which of them are orphans.
2. A call is matched only against effects later than the restored cut (or listed by it), and each record at most once. Only what is
   ``unknown`` stays: until it is resolved, every call that means the same is refused.
3. What this run dispatched itself is no candidate, unless it became ``unknown``.
4. No two effects share a key: where a key is taken, the call gets the next occurrence.
5. A ledger shorter than a mark, or with another hash there, fails closed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal, NoReturn

from ..errors import ConflictError, CorruptionError
from ..types import Mark, Value
from .drafts import outcome_body
from .effects import WORLD_CLASSES, EffectRecord
from .entries import OUTCOME_STATES, LedgerEntry, read_intent, read_outcome, read_resolve, read_rollback
from .fold import fold_intent, fold_outcome, fold_resolve
from .keys import Call, canonical_arguments, next_occurrence
from .table import Action, action_of
from .timeline import BEGINNING, Position, Return, Timeline

ZERO_MARK: Final = Mark(0, bytes(32))
Layer = Literal["key", "arguments", "intent"]


@dataclass(frozen=True, slots=True)
class Ancestor:
    """The entries of an ancestor's journal, and the mark at which the next one was forked from it."""

    sid: bytes
    entries: Sequence[LedgerEntry]
    mark: Mark


@dataclass(frozen=True, slots=True)
class Match:
    """What to do with a call; go on with ``call``, whose key may have got another occurrence.

    ``new``: dispatch it (intent first). Otherwise ``record`` is what was found and ``action`` what the table says;
    what is dispatched again keeps the record's key. ``orphan``: the record comes from a timeline that a rollback left;
    append ``matched_body`` before the next cut. ``displaced``: of a new call, the unmatched effect that the open turn had at this
    place (the same index): the program does something else than before, so raise a divergence before anything is dispatched.
    """

    call: Call
    action: Action | Literal["new"]
    layer: Layer | None = None
    record: EffectRecord | None = None
    orphan: bool = False
    displaced: EffectRecord | None = None


class Ledger:
    """A session's effects. Not thread-safe: the session's lock guards it."""

    def __init__(
        self,
        *,
        sid: bytes,
        entries: Iterable[LedgerEntry] = (),
        ancestors: Sequence[Ancestor] = (),
        end: Mark | None = None,
        load: Callable[[Value], Value] | None = None,
    ) -> None:
        """``ancestors`` oldest first; their entries count up to the fork. ``end``: the session's last position, if known.

        ``load`` turns a stored ``{"$ref": ...}`` into its value (``load_value`` with the store's ``get``).
        Raises ``CorruptionError`` for entries that cannot follow each other and for an ancestor shorter than its mark.
        """
        self.sid = sid
        self._load = load or (lambda value: value)
        self._depths = {ancestor.sid: depth for depth, ancestor in enumerate(ancestors)}
        self._depths[sid] = len(ancestors)
        self._sids = [*(ancestor.sid for ancestor in ancestors), sid]
        self._known: list[dict[int, bytes]] = [{} for _ in self._sids]
        self._end = end
        self._last: list[Mark] = [ZERO_MARK] * len(self._sids)
        self._records: dict[str, EffectRecord] = {}
        self._dispatched: dict[str, Position] = {}
        self._matched: dict[str, Position] = {}
        self._timeline = Timeline()
        self._cut: Position = BEGINNING
        self._loaded: Position = BEGINNING
        self._open: dict[str, None] = {}
        self._orphans: dict[str, None] = {}
        self._unfinished: dict[str, None] = {}
        self._taken: set[str] = set()
        for depth, ancestor in enumerate(ancestors):
            for entry in ancestor.entries:
                if entry.sseq <= ancestor.mark.seq:
                    self._fold(depth, entry)
                elif entry.sseq == ancestor.mark.seq + 1:
                    self._note_previous(depth, entry)
            self._check(depth, ancestor.mark)
        for entry in entries:
            self._fold(len(ancestors), entry)

    # ---- reading -------------------------------------------------------------------------------------------------

    @property
    def mark(self) -> Mark:
        """Position of the last entry of the session's own journal that the ledger holds; ``ZERO_MARK`` if none."""
        return self._last[-1]

    @property
    def effects(self) -> tuple[EffectRecord, ...]:
        """All effects (ancestors' up to the fork first), in order of their first intents, on any timeline."""
        return tuple(self._records.values())

    def get(self, key: bytes | str) -> EffectRecord | None:
        """The record of a key (32 bytes or 64 hex digits), or None."""
        return self._records.get(key if isinstance(key, str) else key.hex())

    def effects_after(self, mark: Mark, *, sid: bytes | None = None) -> tuple[EffectRecord, ...]:
        """Effects whose last dispatch is later than ``mark`` (a position of ``sid``'s journal, default the session's own)."""
        position = self._position(mark, sid)
        return tuple(record for key, record in self._records.items() if self._dispatched[key] > position)

    @property
    def open_effects(self) -> tuple[EffectRecord, ...]:
        """Intended without outcome, or unknown: what a cut lists as ``in_flight``. Costs what is open, not what there is."""
        return tuple(self._records[key] for key in self._unfinished)

    @property
    def unmatched(self) -> tuple[EffectRecord, ...]:
        """Effects of the open turn that no call has matched yet, in order. Left at the turn's end: a divergence."""
        return tuple(self._records[key] for key in self._open if key not in self._taken and self._was_loaded(key))

    @property
    def orphans(self) -> tuple[EffectRecord, ...]:
        """Effects that a rollback left done and that no call has matched: facts that the model can be shown."""
        return tuple(self._records[key] for key in self._orphans if key not in self._taken)

    def bodies_after(self, mark: Mark, *, epoch: int) -> list[tuple[str, dict[str, Value]]]:
        """(kind, body) that say in another journal, at its ``epoch``, what is known of the effects after ``mark``: for promote.

        One intent and, where the effect ended, one outcome or resolution each; history and late evidence stay behind.
        """
        return [draft for record in self.effects_after(mark) for draft in _bodies_of(record, epoch)]

    # ---- folding -------------------------------------------------------------------------------------------------

    def add(self, entry: LedgerEntry) -> EffectRecord | None:
        """Fold one more entry of the session's own journal; returns the effect's new record (None for other kinds)."""
        return self._fold(len(self._sids) - 1, entry)

    def _fold(self, depth: int, entry: LedgerEntry) -> EffectRecord | None:
        if entry.sseq <= self._last[depth].seq:
            _corrupt("ledger-order", f"journal entry {entry.sseq}", "entries in order", f"one after {self._last[depth].seq}")
        self._last[depth] = Mark(entry.sseq, entry.hash)
        self._known[depth][entry.sseq] = entry.hash
        self._note_previous(depth, entry)
        position = (depth, entry.sseq)
        if entry.kind == "restore":
            self._fold_restore(depth, entry)
            return None
        if entry.kind not in ("intent", "outcome", "resolve"):
            return None
        record = self._folded(position, entry)
        self._records[record.key] = record
        if record.finished:
            self._unfinished.pop(record.key, None)
        else:
            self._unfinished[record.key] = None
        return record

    def _note_previous(self, depth: int, entry: LedgerEntry) -> None:
        # A mark may name a record that is none of the ledger's (a head): the next record's chain hash proves it.
        previous = entry.body.get("prev")
        if isinstance(previous, bytes):
            known = self._known[depth].setdefault(entry.sseq - 1, previous)
            if known != previous and entry.sseq > 1:
                _corrupt("ledger-mismatch", f"journal entry {entry.sseq}", f"the chain hash {known.hex()[:12]}", previous.hex()[:12])

    def _folded(self, position: Position, entry: LedgerEntry) -> EffectRecord:
        if entry.kind == "intent":
            intent = read_intent(entry)
            self._dispatched[intent.key] = position
            return fold_intent(self._records.get(intent.key), intent, sid=self._sids[position[0]], seq=entry.sseq)
        if entry.kind == "outcome":
            outcome = read_outcome(entry)
            return fold_outcome(self._known_record(outcome.key, entry), outcome, seq=entry.sseq)
        resolve = read_resolve(entry)
        record = fold_resolve(self._known_record(resolve.key, entry), resolve, seq=entry.sseq)
        if resolve.state == "matched":
            self._matched[resolve.key] = position
        return record

    def _known_record(self, key: str, entry: LedgerEntry) -> EffectRecord:
        record = self._records.get(key)
        if record is None:
            _corrupt("ledger-transition", f"journal entry {entry.sseq}", f"an intent of effect {key[:12]} before it", "none")
        return record

    def _fold_restore(self, depth: int, entry: LedgerEntry) -> None:
        rollback = read_rollback(entry)
        if rollback is not None:
            mark = self._position(Mark(rollback.seq, rollback.hash), rollback.sid)
            self._timeline.add(Return(at=(depth, entry.sseq), mark=mark))

    # ---- marks ---------------------------------------------------------------------------------------------------

    def check_mark(self, mark: Mark, *, sid: bytes | None = None) -> None:
        """Raises ``CorruptionError`` (code ``ledger-short`` or ``ledger-mismatch``): the ledger fails closed."""
        self._check(self._position(mark, sid)[0], mark)

    def _check(self, depth: int, mark: Mark) -> None:
        if mark == ZERO_MARK or (mark == self._end and depth == len(self._sids) - 1):
            return
        known = self._known[depth].get(mark.seq)
        where = f"ledger of session {self._sids[depth].hex()[:12]}"
        if known is None:
            _corrupt("ledger-short", where, f"an entry at position {mark.seq}", f"the last one at {self._last[depth].seq}")
        if known != mark.hash:
            _corrupt("ledger-mismatch", where, f"hash {mark.hash.hex()[:12]} at position {mark.seq}", known.hex()[:12])

    def _position(self, mark: Mark, sid: bytes | None) -> Position:
        depth = self._depths.get(self.sid if sid is None else sid)
        if depth is None:
            _corrupt("ledger-mismatch", "mark", "a position of this session or of an ancestor", f"session {sid.hex() if sid else ''}")
        return (depth, mark.seq)

    # ---- a restored cut ------------------------------------------------------------------------------------------

    def restored(
        self,
        mark: Mark,
        *,
        sid: bytes | None = None,
        mode: Literal["recover", "rollback"] = "recover",
        keys: Sequence[bytes] = (),
    ) -> None:
        """Say which cut was restored: its mark, and the session that the mark belongs to. What is later can be matched.

        ``rollback``: everything later becomes an orphan; the session appends a ``restore`` record with this mark as well.
        ``keys``: the checkpoint's ``in_flight`` and ``undelivered`` effects, which can be matched although they are not later.
        Raises as ``check_mark``.
        """
        self.check_mark(mark, sid=sid)
        self._cut = self._position(mark, sid)
        self._loaded = (len(self._sids) - 1, self.mark.seq)
        if mode == "rollback":
            self._timeline.add(Return(at=self._loaded, mark=self._cut))
        self._taken.clear()
        listed = {key.hex() for key in keys}
        positions = self._dispatched.items()
        self._open = {key: None for key, at in positions if at in self._timeline and (at > self._cut or key in listed)}
        self._orphans = {key: None for key in self._dispatched if self._is_orphan(key)}

    def _is_orphan(self, key: str) -> bool:
        record = self._records[key]
        if self._dispatched[key] in self._timeline or record.effect_class in ("sandbox", "model") or not record.stands:
            return False
        matched = self._matched.get(key)
        # A match within the open turn is made again with it; one on an abandoned timeline went with that.
        return matched is None or matched not in self._timeline or matched > self._cut

    def _was_loaded(self, key: str) -> bool:
        return self._dispatched[key] <= self._loaded

    # ---- matching ------------------------------------------------------------------------------------------------

    def match(self, call: Call) -> Match:
        """Match a call, in layers: exact key; canonical arguments less volatile fields; declared intent key; resources.

        The record is taken, unless the action is ``unknown`` or ``post-missing``: append what resolves it and match again.
        Raises ``ConflictError`` (code ``effect-overlap``) if a declared resource overlaps with other arguments.
        """
        found = self.peek(call)
        if found.record is not None and found.action not in ("unknown", "post-missing"):
            self._taken.add(found.record.key)
        return found

    def give_back(self, key: bytes) -> None:
        """The record that a call took was not returned to it: another equal call may take it."""
        self._taken.discard(key.hex())

    def peek(self, call: Call) -> Match:
        """As ``match``, without taking the record."""
        candidates = self._candidates()
        by_key = {record.key: record for record in candidates}
        while call.key.hex() in self._records:
            exact = by_key.get(call.key.hex())
            if exact is not None and exact.tool == call.tool:
                return self._found(call, exact, "key")
            call = next_occurrence(call)
        for record in candidates:
            if record.tool == call.tool and self._canonical(record, call) == call.canonical:
                return self._found(call, record, "arguments")
        for record in candidates:
            if record.tool == call.tool and call.intent_key is not None and self._load(record.intent_key) == call.intent_key:
                return self._found(call, record, "intent")
        self._refuse_overlap(call, candidates)
        displaced = next((record for record in self.unmatched if (record.turn, record.index) == (call.turn, call.index)), None)
        return Match(call=call, action="new", displaced=displaced)

    def _candidates(self) -> list[EffectRecord]:
        keys = {**self._open, **self._orphans, **self._unfinished}
        return [self._records[key] for key in keys if self._is_candidate(key)]

    def _is_candidate(self, key: str) -> bool:
        record = self._records[key]
        reaches_world = record.effect_class in WORLD_CLASSES
        if record.state == "unknown" and reaches_world:
            return True
        if key in self._taken or not self._was_loaded(key):
            return False
        return key in self._open or (reaches_world and (key in self._orphans or record.state == "intended"))

    def _canonical(self, record: EffectRecord, call: Call) -> bytes | None:
        args = self._load(record.args)
        return canonical_arguments(args, call.volatile) if isinstance(args, dict) else None

    def _found(self, call: Call, record: EffectRecord, layer: Layer) -> Match:
        orphan = self._dispatched[record.key] not in self._timeline
        call = replace(call, key=bytes.fromhex(record.key), occurrence=record.occurrence)
        return Match(call=call, action=action_of(record), layer=layer, record=record, orphan=orphan)

    def _refuse_overlap(self, call: Call, candidates: Sequence[EffectRecord]) -> None:
        if call.effect_class not in WORLD_CLASSES:
            return
        for record in candidates:
            later = self._was_loaded(record.key) and (record.key in self._open or record.key in self._orphans)
            shared = sorted(set(record.resources) & set(call.resources))
            if later and shared and record.stands and record.effect_class in WORLD_CLASSES:
                raise ConflictError(
                    f"turn {call.turn} asks for other arguments on {shared}",
                    code="effect-overlap",
                    object=f"tool {call.tool}",
                    expected=f"the arguments of effect {record.key[:12]} ({record.tool}, turn {record.turn}, {record.state})",
                    found=f"arguments {sorted(call.args)} that differ",
                    hint="fork the session to go another way, or resolve the recorded effect first",
                )


def _bodies_of(record: EffectRecord, epoch: int) -> list[tuple[str, dict[str, Value]]]:
    key = bytes.fromhex(record.key)
    intent: dict[str, Value] = {
        "epoch": epoch,
        "turn": record.turn,
        "key": key,
        "tool": record.tool,
        "class": record.effect_class,
        "sandbox": record.sandbox,
        "args": record.args,
        "intent_key": record.intent_key,
        "occurrence": record.occurrence,
        "index": record.index,
        "resources": list(record.resources),
    }
    if record.state == "intended":
        return [("intent", intent)]
    if record.state in OUTCOME_STATES:
        outcome = outcome_body(key, record.state, epoch=epoch, value=record.value, error=record.error, post=record.post)
        return [("intent", intent), ("outcome", outcome)]
    by, note = record.resolved_by or "", record.note or ""
    resolve: dict[str, Value] = {
        "epoch": epoch, "key": key, "state": record.state, "by": by, "note": note, "value": record.value,
    }  # fmt: skip
    return [("intent", intent), ("resolve", resolve)]


def _corrupt(code: str, object: str, expected: str, found: str) -> NoReturn:
    raise CorruptionError(code=code, object=object, expected=expected, found=found, hint="run agentckpt verify on the store")
