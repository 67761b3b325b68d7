"""The ``state`` part: whatever the user's object gives as ``state_dict()`` (``store/FORMAT.md`` section 6).

Invariants:
1. ``capture`` copies everything that may change before it returns; ``Pending.write`` reads nothing of the user's.
2. An append-only list continues only what a *published* capture wrote: everything else might have been pruned.
3. ``prepare`` has read, checked and decoded the whole state before ``commit`` touches the object. With a factory, ``commit`` loads
   a new object, so that a failing ``load_state_dict`` leaves the old one as it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple, NoReturn

from ..errors import CapacityError, CorruptionError, IncompatibleError
from ..nodes import Item, ListSlot, MerkleList, Node, decode, encode, get_node, put_node
from ..types import PartRef, PartReport, Ref, Sink, Source, Stateful, Value
from .appendlist import AppendList, Prefix, Snapshot
from .maporder import order_of, put_in_order
from .values import to_value

__all__ = ["AppendList", "StatePart"]

StateLike = Stateful | Callable[[], Stateful]

VERSION: Final = 1
INLINE_BYTES: Final = 64 << 10
"""a longer encoding stands in chunks of this size"""
ITEM_BYTES: Final = 1 << 10
"""a longer item of a list stands in chunks, so that a list's edge (15 items) never makes a cut expensive"""
MAX_STATE_BYTES: Final = 1 << 30
MAX_PIECES: Final = MAX_STATE_BYTES // INLINE_BYTES
MAX_ITEMS: Final = 1 << 24
"""of one list; a few nodes that name each other many times could claim more items than memory holds"""
MAX_KEPT_CAPTURES: Final = 4
"""captures that were written and may become the published one"""


class _Written(NamedTuple):
    """What one capture wrote of one list."""

    prefix: Prefix
    merkle: MerkleList


class StatePart:
    """Kind ``state``: wraps one ``Stateful`` object, or a factory of them (a fork needs a second object)."""

    kind = "state"

    def __init__(self, state: StateLike) -> None:
        """``state``: an object with ``state_dict`` and ``load_state_dict``, or a class or function that makes one.

        Raises ``IncompatibleError`` (code ``not-stateful``) for anything else.
        """
        is_factory = isinstance(state, type) or not isinstance(state, Stateful)
        if is_factory and not callable(state):
            _refuse_stateful(state)
        self._factory: Callable[[], Any] | None = state if is_factory else None  # type: ignore[assignment]
        self._value: Any = self._make() if is_factory else state
        self._written: dict[Ref, list[_Written]] = {}

    @property
    def value(self) -> Any:
        """The live object (``session.state``). A restore with a factory replaces it, so do not keep it."""
        return self._value

    def _make(self) -> Any:
        assert self._factory is not None
        made = self._factory()
        if not isinstance(made, Stateful):
            _refuse_stateful(made)
        return made

    def capture(self, sink: Sink, previous: Ref | None) -> _Capture:
        """Call ``state_dict()`` and copy what it gives, now; ``Pending.write`` encodes it.

        Raises ``IncompatibleError`` (code ``not-encodable``) naming the path of a value that cannot be stored, and
        (code ``bad-state``) if ``state_dict()`` gives no map.
        """
        state = self._value.state_dict()
        if not isinstance(state, Mapping):
            raise IncompatibleError(code="bad-state", object="state_dict()", expected="a map", found=type(state).__name__)
        value, snapshots = _freeze_state(state)
        known = self._written.get(previous, []) if previous is not None else []
        return _Capture(self, sink, value, snapshots, known)

    def prepare(self, source: Source, ref: Ref) -> _StagedState:
        """Read and check the state; ``commit`` loads it into the object, or into a new one from the factory.

        Raises ``CorruptionError`` (code ``bad-state``, or what a node says), ``IncompatibleError`` (code ``state-version``).
        """
        started = time.perf_counter()
        state, written = _read_state(source, ref)
        return _StagedState(self, ref, state, written, time.perf_counter() - started)

    def fork(self, n: int) -> Sequence[StatePart]:
        """``n`` parts on new objects from the factory, loaded with ``state_dict()`` of this one.

        Raises ``IncompatibleError`` (code ``no-factory``) if the session was given an object and not a factory.
        """
        if self._factory is None:
            raise IncompatibleError(
                "a fork needs a second object", code="no-factory", object="state", expected="a class or function that makes one",
                found=type(self._value).__name__, hint="open the session with state=MyAgent, not state=MyAgent()",
            )  # fmt: skip
        state = self._value.state_dict()
        branches = []
        for _ in range(n):
            branch = StatePart(self._factory)
            branch._value.load_state_dict(_copy_state(state))
            branch._written = dict(self._written)
            branches.append(branch)
        return branches

    def exchange(self, other: StatePart) -> None:
        """Take over the object of a fork of this part, and give it this one (promote)."""
        self._value, other._value = other._value, self._value
        self._written, other._written = other._written, self._written

    def close(self) -> None:
        """Forget the object's captures; the object is the user's."""
        self._written.clear()

    def _note_written(self, ref: Ref, written: list[_Written]) -> None:
        kept = {**{key: value for key, value in self._written.items() if key != ref}, ref: written}
        self._written = dict(list(kept.items())[-MAX_KEPT_CAPTURES:])


class _Capture:
    """A ``Pending``: the state as it was, and what an earlier capture wrote of its lists."""

    def __init__(self, part: StatePart, sink: Sink, value: Value, snapshots: list[Snapshot], known: list[_Written]) -> None:
        self._part = part
        self._sink = sink
        self._value = value
        self._snapshots = snapshots
        self._known = known

    def write(self) -> PartRef:
        """Write what is new. Facts: ``logical_bytes`` (of value and order), ``num_lists``, ``num_items``, ``num_new_items``."""
        strong: list[Ref] = []
        weak: list[Ref] = []
        written, num_new = self._write_lists()
        roots = [item.merkle.root(strong, weak) for item in written]
        order = order_of(self._value)
        encoded = encode([self._value, order])
        body: dict[str, Any] = {"v": VERSION, "value": self._value, "order": order, "lists": roots}
        if len(encoded) > INLINE_BYTES:
            first = len(strong)
            strong.extend(_put_pieces(self._sink, encoded))
            body = {"v": VERSION, "pieces": list(range(first, len(strong))), "lists": roots}
        ref = put_node(self._sink, Node("state", strong, weak, body), compress=True)
        self._part._note_written(ref, written)
        facts: dict[str, Value] = {
            "logical_bytes": len(encoded),
            "num_lists": len(written),
            "num_items": sum(len(item.merkle) for item in written),
            "num_new_items": num_new,
        }
        return PartRef("state", ref, facts)

    def _write_lists(self) -> tuple[list[_Written], int]:
        written: list[_Written] = []
        num_new = 0
        for snapshot in self._snapshots:
            if snapshot.prefix.length > MAX_ITEMS:
                raise CapacityError(
                    code="list-too-long", object="AppendList", expected=f"at most {MAX_ITEMS} items", found=str(snapshot.prefix.length)
                )
            earlier = max((item for item in self._known if snapshot.continues(item.prefix)), key=_length, default=None)
            merkle = MerkleList() if earlier is None else earlier.merkle.copy()
            for item in snapshot.items(len(merkle)):
                _append_item(self._sink, merkle, item)
                num_new += 1
            written.append(_Written(snapshot.prefix, merkle))
        return written, num_new

    def cancel(self) -> None:
        """Nothing is pinned."""


class _StagedState:
    """A ``Staged``: the decoded state, not yet loaded."""

    def __init__(self, part: StatePart, ref: Ref, state: dict[str, Any], written: list[_Written], read_s: float) -> None:
        self._part = part
        self._ref = ref
        self._state: dict[str, Any] | None = state
        self._written = written
        self._read_s = read_s
        self._report: PartReport | None = None

    def commit(self) -> PartReport:
        """Load. A second call returns the first one's report."""
        if self._report is not None:
            return self._report
        if self._state is None:
            raise IncompatibleError("was aborted", code="aborted", object="state restore")
        started = time.perf_counter()
        part = self._part
        target = part._value if part._factory is None else part._make()
        target.load_state_dict(self._state)
        part._value = target
        part._written = {self._ref: self._written}
        seconds = {"read": self._read_s, "load": time.perf_counter() - started}
        self._report = PartReport("state", restored=sum(len(item.merkle) for item in self._written), seconds=seconds)
        self._state = None
        return self._report

    def abort(self) -> None:
        self._state = None


def _length(written: _Written) -> int:
    return written.prefix.length


def _freeze_state(state: Mapping[str, Any]) -> tuple[Value, list[Snapshot]]:
    """A plain copy in which the i-th append-only list is ``ListSlot(i)``, and the lists as they are now."""
    snapshots: list[Snapshot] = []
    positions: dict[int, int] = {}

    def slot(item: Any) -> ListSlot | None:
        if not isinstance(item, AppendList):
            return None
        # One list in two places is one list; after a restore it is one again.
        position = positions.setdefault(id(item), len(snapshots))
        if position == len(snapshots):
            snapshots.append(item.snapshot())
        return ListSlot(position)

    return to_value(state, "state", special=slot, keep_order=True), snapshots


def _copy_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values copied, append-only lists as independent lists that remember what was captured."""
    copies: dict[int, AppendList] = {}

    def copy(item: Any) -> AppendList | None:
        return copies.setdefault(id(item), item.copy()) if isinstance(item, AppendList) else None

    made = to_value(state, "state", special=copy, keep_order=True)
    assert isinstance(made, dict)
    return made


def _append_item(sink: Sink, merkle: MerkleList, item: Value) -> None:
    encoded = encode(item)
    if len(encoded) <= ITEM_BYTES:
        merkle.append(sink, item)
    else:
        # An inline item owns no references, so that null with references can be nothing else.
        merkle.append(sink, None, strong=_put_pieces(sink, encoded))


def _put_pieces(sink: Sink, encoded: bytes) -> list[Ref]:
    if len(encoded) > MAX_STATE_BYTES:
        raise IncompatibleError(
            code="too-long", object="state", expected=f"at most {MAX_STATE_BYTES} bytes", found=str(len(encoded)),
            hint="keep large data in files of the sandbox",
        )  # fmt: skip
    return [sink.put("chunk", encoded[start : start + INLINE_BYTES], compress=True) for start in range(0, len(encoded), INLINE_BYTES)]


def read_state(source: Source, ref: Ref) -> dict[str, Any]:
    """The stored state as a plain value; append-only lists are ``AppendList``. Raises what ``StatePart.prepare`` raises."""
    return _read_state(source, ref)[0]


def _read_state(source: Source, ref: Ref) -> tuple[dict[str, Any], list[_Written]]:
    node = get_node(source, ref, type="state")
    body = node.body
    if type(body) is not dict or type(body.get("v")) is not int:
        _refuse_state("body", "a map with a version", type(body).__name__)
    if body["v"] > VERSION:
        raise IncompatibleError(code="state-version", object="state", expected=f"version {VERSION}", found=str(body["v"]))
    if set(body) not in ({"v", "value", "order", "lists"}, {"v", "pieces", "lists"}) or type(body["lists"]) is not list:
        _refuse_state("body", "{v, value and order or pieces, lists}", str(sorted(body)))
    whole = _read_pieces(source, _at(node, body["pieces"])) if "pieces" in body else [body["value"], body["order"]]
    if type(whole) is not list or len(whole) != 2:
        _refuse_state("pieces", "[value, order]", type(whole).__name__)
    value, order = whole
    put_in_order(value, order)
    lists = [_read_list(source, MerkleList.open(root, node.strong, node.weak)) for root in body["lists"]]
    used: set[int] = set()
    state = _fill_slots(value, [appendlist for appendlist, _ in lists], used)
    if not isinstance(state, dict) or len(used) != len(lists):
        _refuse_state("value", f"a map that names {len(lists)} lists", f"{type(state).__name__} with {len(used)}")
    return state, [written for _, written in lists]


def _read_list(source: Source, merkle: MerkleList) -> tuple[AppendList, _Written]:
    if len(merkle) > MAX_ITEMS:
        _refuse_state("list", f"at most {MAX_ITEMS} items", str(len(merkle)))
    made = AppendList.from_plain(_read_item(source, item) for item in merkle.items(source))
    return made, _Written(made.snapshot().prefix, merkle)


def _read_item(source: Source, item: Item) -> Any:
    if item.weak or (item.strong and item.value is not None):
        _refuse_state("list item", "a value, or null with chunks", "something else")
    value = _read_pieces(source, item.strong) if item.strong else item.value
    if _has_slot(value):
        _refuse_state("list item", "a value", "a list within a list")
    return value


def _read_pieces(source: Source, refs: Sequence[Ref]) -> Any:
    if not 0 < len(refs) <= MAX_PIECES or any(ref[0] != 1 for ref in refs):
        _refuse_state("pieces", f"1 to {MAX_PIECES} chunks", f"{len(refs)} references")
    encoded = b"".join(source.get(ref, INLINE_BYTES) for ref in refs)
    return decode(encoded, max_bytes=MAX_STATE_BYTES)


def _at(node: Node, positions: Any) -> list[Ref]:
    if type(positions) is not list or not all(type(position) is int and 0 <= position < len(node.strong) for position in positions):
        _refuse_state("pieces", "positions of strong references", repr(positions)[:40])
    return [node.strong[position] for position in positions]


def _fill_slots(value: Any, lists: list[AppendList], used: set[int]) -> Any:
    if isinstance(value, ListSlot):
        if value.position >= len(lists):
            _refuse_state("value", f"list positions below {len(lists)}", str(value.position))
        used.add(value.position)
        return lists[value.position]
    if isinstance(value, dict):
        return {name: _fill_slots(item, lists, used) for name, item in value.items()}
    if isinstance(value, list):
        return [_fill_slots(item, lists, used) for item in value]
    return value


def _has_slot(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_has_slot(item) for item in value.values())
    return isinstance(value, ListSlot) or (isinstance(value, list) and any(_has_slot(item) for item in value))


def _refuse_stateful(found: object) -> NoReturn:
    raise IncompatibleError(
        code="not-stateful", object="state", expected="an object with state_dict() and load_state_dict(), or what makes one",
        found=type(found).__name__,
    )  # fmt: skip


def _refuse_state(name: str, expected: str, found: str) -> NoReturn:
    raise CorruptionError(code="bad-state", object=f"state: {name}", expected=expected, found=found)
