"""The state part: what comes back, what a capture costs, what it freezes, and what is refused."""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections import OrderedDict
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Any

import hypothesis.strategies as st
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, rule

from agentckpt.errors import AgentckptError, CorruptionError, IncompatibleError, NotFoundError
from agentckpt.nodes import ListSlot, Node, decode, decode_node, encode, encode_node, put_node
from agentckpt.session.appendlist import MAX_ANCESTRY, AppendList
from agentckpt.session.state import INLINE_BYTES, ITEM_BYTES, StatePart
from agentckpt.session.values import Result, from_value, to_value
from agentckpt.types import KIND_BYTE, Kind, Ref


class Memory:
    """A sink and source that counts what it is given."""

    def __init__(self) -> None:
        self.objects: dict[Ref, bytes] = {}
        self.put_bytes = 0
        self.num_puts = 0

    def put(self, kind: Kind, data: Any, *, compress: bool = False) -> Ref:
        plain = bytes(data)
        ref = Ref(bytes([KIND_BYTE[kind]]) + blake3(plain, key=blake3(kind.encode()).digest()).digest())
        self.put_bytes += len(plain)
        self.num_puts += 1
        self.objects[ref] = plain
        return ref

    def get(self, ref: Ref, max_bytes: int) -> bytes:
        if ref not in self.objects:
            raise NotFoundError("absent")
        if len(self.objects[ref]) > max_bytes:
            raise CorruptionError("too long")
        return self.objects[ref]

    def read_into(self, ref: Ref, target: memoryview) -> None:
        target[:] = self.get(ref, len(target))

    def has(self, ref: Ref) -> bool:
        return ref in self.objects


class Agent:
    """A state like an agent's: messages that only grow, and a plan that changes."""

    def __init__(self) -> None:
        self.messages = AppendList()
        self.plan: Any = {}

    def state_dict(self) -> dict[str, Any]:
        return {"messages": self.messages, "plan": self.plan}

    def load_state_dict(self, state: Any) -> None:
        self.messages = state["messages"]
        self.plan = state["plan"]


class Holder:
    """Gives whatever it holds."""

    def __init__(self, state: Any = None) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


def saved(part: StatePart, store: Memory, previous: Ref | None = None) -> Ref:
    return part.capture(store, previous).write().ref


def restored(store: Memory, ref: Ref) -> Any:
    part = StatePart(Holder)
    part.prepare(store, ref).commit()
    return part.value.state


# ---- what comes back --------------------------------------------------------------------------------------------------

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5)
plain = st.recursive(
    scalars | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(max_size=5), plain, max_size=4))
def test_plain_values_come_back_as_they_were(state: dict[str, Any]) -> None:
    store = Memory()
    back = restored(store, saved(StatePart(Holder(state)), store))
    assert back == state
    assert repr(back) == repr(to_value(state, keep_order=True))


@given(plain)
def test_to_value_is_what_its_encoding_decodes_to(value: Any) -> None:
    made = to_value(value)
    assert repr(decode(encode(made), max_bytes=1 << 20)) == repr(made)


def test_the_order_of_keys_comes_back() -> None:
    store = Memory()
    state = {"zz": 1, "a": [{"second": 2, "1st": 1}, AppendList()], "mm": {"y": {"b": 1, "a": 2}, "x": 0}}
    for blob in (b"", b"x" * INLINE_BYTES):
        back = restored(store, saved(StatePart(Holder({**state, "blob": blob})), store))
        assert json.dumps({**back, "a": back["a"][:1], "blob": ""}) == json.dumps({**state, "a": state["a"][:1], "blob": ""})  # type: ignore[index]


def test_items_and_records_have_the_encodings_order_at_once() -> None:
    store = Memory()
    items = AppendList([{"content": 1, "role": 2}])
    assert list(items[0]) == ["role", "content"] == list(from_value(to_value({"content": 1, "role": 2})))
    assert list(restored(store, saved(StatePart(Holder({"items": items})), store))["items"][0]) == ["role", "content"]


@pytest.mark.parametrize("size", [INLINE_BYTES - 100, INLINE_BYTES + 1, 5 * INLINE_BYTES])
def test_large_states_stand_in_pieces(size: int) -> None:
    store = Memory()
    state = {"blob": b"x" * size, "notes": AppendList(["a"])}
    ref = saved(StatePart(Holder(state)), store)
    body = decode_node(store.objects[ref]).body
    assert ("pieces" in body) == (size > INLINE_BYTES)
    back = restored(store, ref)
    assert back == state
    assert isinstance(back["notes"], AppendList)


@pytest.mark.parametrize("num_items", [0, 1, 15, 16, 17, 255, 256, 300])
def test_append_lists_come_back_as_append_lists(num_items: int) -> None:
    store = Memory()
    items = [{"role": "user", "content": f"message {index}", "raw": b"\x00"} for index in range(num_items)]
    back = restored(store, saved(StatePart(Holder({"a": {"b": [AppendList(items)]}})), store))["a"]["b"][0]
    assert isinstance(back, AppendList)
    assert back == items


def test_large_items_stand_in_chunks() -> None:
    store = Memory()
    items = ["small", "x" * (ITEM_BYTES + 1), b"y" * (2 * INLINE_BYTES), None, {"deep": ["z" * 2000]}]
    ref = saved(StatePart(Holder({"items": AppendList(items)})), store)
    assert restored(store, ref)["items"] == items
    assert len(store.objects[ref]) < ITEM_BYTES


def test_one_list_in_two_places_is_one_list_again() -> None:
    store = Memory()
    shared = AppendList([1])
    back = restored(store, saved(StatePart(Holder({"a": shared, "b": [shared]})), store))
    assert back["a"] is back["b"][0]


# ---- cost -------------------------------------------------------------------------------------------------------------


def turn_cost(num_items: int, num_turns: int = 16) -> float:
    """Bytes that one turn of 8 messages writes, after ``num_items`` items of history."""
    store = Memory()
    agent = Agent()
    part = StatePart(agent)
    agent.messages.extend({"role": "user", "content": f"{index:06d} " + "word " * 60} for index in range(num_items))
    ref = saved(part, store)
    before = store.put_bytes
    for turn in range(num_turns):
        agent.messages.extend({"role": "assistant", "content": f"{turn:03d}{index:03d} " + "reply " * 50} for index in range(8))
        agent.plan = {"step": turn}
        ref = saved(part, store, ref)
    return (store.put_bytes - before) / num_turns


def test_a_turn_costs_what_it_appends_whatever_came_before() -> None:
    short, long = turn_cost(1_000), turn_cost(100_000)
    assert long / short < 1.3
    assert short < 8 * 420 * 3


def test_without_the_published_capture_everything_is_written_again() -> None:
    store = Memory()
    agent = Agent()
    part = StatePart(agent)
    agent.messages.extend(range(500))
    first = part.capture(store, None).write()
    assert first.facts["num_new_items"] == 500
    agent.messages.append("more")
    unpublished = part.capture(store, None).write()
    assert unpublished.facts["num_new_items"] == 501
    published = part.capture(store, first.ref).write()
    assert published.facts["num_new_items"] == 1
    assert published.ref == unpublished.ref
    stranger = part.capture(store, Ref(b"\x02" + bytes(32))).write()
    assert stranger.facts["num_new_items"] == 501


def test_a_restored_state_continues_at_the_cost_of_what_is_new() -> None:
    store = Memory()
    agent = Agent()
    agent.messages.extend(range(500))
    ref = saved(StatePart(agent), store)
    part = StatePart(Agent)
    part.prepare(store, ref).commit()
    part.value.messages.append("new")
    pending = part.capture(store, ref).write()
    assert pending.facts["num_new_items"] == 1
    assert restored(store, pending.ref)["messages"] == [*range(500), "new"]


def test_clear_starts_the_list_again() -> None:
    store = Memory()
    agent = Agent()
    part = StatePart(agent)
    agent.messages.extend(range(40))
    ref = saved(part, store)
    agent.messages.clear()
    agent.messages.extend(range(100, 150))
    assert restored(store, saved(part, store, ref))["messages"] == list(range(100, 150))


class Lists(RuleBasedStateMachine):
    """Append, clear, copy, capture, restore and fork in any order: what is read back is always what was captured."""

    def __init__(self) -> None:
        super().__init__()
        self.store = Memory()
        self.parts = [StatePart(Agent)]
        self.refs: list[Ref | None] = [None]
        self.pending: list[tuple[int, Any, list[int]]] = []
        self.next = 0

    def part(self, choice: int) -> int:
        return choice % len(self.parts)

    @rule(choice=st.integers(0, 9), count=st.integers(1, 40))
    def append(self, choice: int, count: int) -> None:
        self.parts[self.part(choice)].value.messages.extend(range(self.next, self.next + count))
        self.next += count

    @rule(choice=st.integers(0, 9))
    def clear(self, choice: int) -> None:
        self.parts[self.part(choice)].value.messages.clear()

    @rule(choice=st.integers(0, 9))
    def replace_by_copy(self, choice: int) -> None:
        agent = self.parts[self.part(choice)].value
        agent.messages = agent.messages.copy()

    @rule(choice=st.integers(0, 9))
    def capture(self, choice: int) -> None:
        index = self.part(choice)
        part = self.parts[index]
        self.pending.append((index, part.capture(self.store, self.refs[index]), list(part.value.messages)))

    @rule(publish=st.booleans())
    def write_late(self, publish: bool) -> None:
        if not self.pending:
            return
        index, pending, expected = self.pending.pop(0)
        ref = pending.write().ref
        assert restored(self.store, ref)["messages"] == expected
        if publish:
            self.refs[index] = ref

    @rule(choice=st.integers(0, 9))
    def restore(self, choice: int) -> None:
        index = self.part(choice)
        ref = self.refs[index]
        if ref is not None:
            self.parts[index].prepare(self.store, ref).commit()

    @rule(choice=st.integers(0, 9))
    def fork(self, choice: int) -> None:
        index = self.part(choice)
        if len(self.parts) < 4:
            self.parts.extend(self.parts[index].fork(1))  # type: ignore[arg-type]
            self.refs.append(self.refs[index])
            assert list(self.parts[-1].value.messages) == list(self.parts[index].value.messages)


Lists.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestLists = Lists.TestCase


# ---- the instant ------------------------------------------------------------------------------------------------------


def test_a_capture_holds_the_instant_however_late_it_is_written() -> None:
    store = Memory()
    agent = Agent()
    agent.plan = {"steps": ["one"], "raw": bytearray(b"ab")}
    agent.messages.append({"content": "first"})
    pending = StatePart(agent).capture(store, None)
    agent.plan["steps"].append("two")
    agent.plan["raw"][0] = 0
    agent.messages.append("second")
    agent.messages.clear()
    back = restored(store, pending.write().ref)
    assert back == {"messages": [{"content": "first"}], "plan": {"steps": ["one"], "raw": b"ab"}}


def test_items_cannot_be_changed_behind_the_captures_back() -> None:
    original: dict[str, Any] = {"tags": ["a"], "meta": {"n": 1}}
    items = AppendList([original])
    original["tags"].append("b")
    assert items[0]["tags"] == ["a"]
    changes = [
        lambda: items[0].update(x=1),
        lambda: items[0].__setitem__("x", 1),
        lambda: items[0].pop("tags"),
        lambda: items[0]["tags"].append("c"),
        lambda: items[0]["tags"].sort(),
        lambda: items[0]["meta"].clear(),
    ]
    for change in changes:
        with pytest.raises(TypeError, match="cannot be changed"):
            change()
    with pytest.raises(TypeError):
        items[0]["tags"] += ["c"]
    assert items == [{"tags": ["a"], "meta": {"n": 1}}]


def test_items_are_dicts_and_lists_to_those_who_read_them() -> None:
    items = AppendList([{"content": ["a", {"b": 1}]}])
    assert json.loads(json.dumps(items[0])) == {"content": ["a", {"b": 1}]}
    for plain_copy in (copy.copy(items[0]), copy.deepcopy(items[0]), pickle.loads(pickle.dumps(items[0]))):
        assert type(plain_copy) is dict
        plain_copy["content"][1]["b"] = 2
        assert items[0]["content"][1]["b"] == 1


def test_an_append_list_is_a_sequence() -> None:
    items = AppendList("abc")
    items += ["d"]
    assert (len(items), items[1], items[-1], items[1:3], list(reversed(items))) == (4, "b", "d", ["b", "c"], list("dcba"))
    assert "c" in items
    assert items == ["a", "b", "c", "d"] == list(items)
    assert items == AppendList("abcd")
    assert items != ("a",)
    assert items != 3
    assert repr(items) == "AppendList(['a', 'b', 'c', 'd'])"
    twin = copy.deepcopy(items)
    twin.append("e")
    assert len(items) == 4
    for removal in ("pop", "insert", "remove", "__setitem__", "__delitem__"):
        assert not hasattr(items, removal)


def test_a_copy_continues_only_what_it_was_copied_from() -> None:
    store = Memory()
    original = AppendList(range(40))
    twin = original.copy()
    original.extend(range(100, 120))
    twin.extend(range(200, 230))
    holder = Holder({"items": original})
    part = StatePart(holder)
    ref = saved(part, store)
    holder.state = {"items": twin}
    assert restored(store, saved(part, store, ref))["items"] == [*range(40), *range(200, 230)]


def test_copies_of_copies_stay_bounded_and_right() -> None:
    store = Memory()
    holder = Holder({"items": AppendList(range(50))})
    part = StatePart(holder)
    ref = saved(part, store)
    for _ in range(MAX_ANCESTRY + 2):
        holder.state = {"items": holder.state["items"].copy()}
    holder.state["items"].append("x")
    assert len(holder.state["items"].snapshot().ancestry) == MAX_ANCESTRY
    assert restored(store, saved(part, store, ref))["items"] == [*range(50), "x"]


# ---- load, fork -------------------------------------------------------------------------------------------------------


def test_prepare_touches_nothing_and_commit_is_idempotent() -> None:
    store = Memory()
    ref = saved(StatePart(Holder({"a": 1})), store)
    holder = Holder({"a": 2})
    part = StatePart(holder)
    staged = part.prepare(store, ref)
    assert holder.state == {"a": 2}
    report = staged.commit()
    assert part.value is holder
    assert holder.state == {"a": 1}
    holder.state = {"a": 3}
    assert staged.commit() is report
    assert holder.state == {"a": 3}


def test_abort_leaves_the_object() -> None:
    store = Memory()
    ref = saved(StatePart(Holder({"a": 1})), store)
    part = StatePart(Holder({"a": 2}))
    staged = part.prepare(store, ref)
    staged.abort()
    with pytest.raises(IncompatibleError):
        staged.commit()
    assert part.value.state == {"a": 2}


def test_a_factory_makes_a_new_object_and_a_failing_load_keeps_the_old_one() -> None:
    class Picky(Holder):
        def load_state_dict(self, state: Any) -> None:
            if state.get("bad"):
                raise RuntimeError("no")
            super().load_state_dict(state)

    store = Memory()
    good, bad = (saved(StatePart(Holder(state)), store) for state in ({"a": 1}, {"bad": True}))
    part = StatePart(Picky)
    first = part.value
    part.prepare(store, good).commit()
    second = part.value
    assert second is not first
    assert second.state == {"a": 1}
    with pytest.raises(RuntimeError):
        part.prepare(store, bad).commit()
    assert part.value is second


def test_forks_are_independent_and_cheap() -> None:
    store = Memory()
    part = StatePart(Agent)
    part.value.messages.extend(range(300))
    part.value.plan = {"steps": []}
    ref = saved(part, store)
    branches = part.fork(3)
    for number, branch in enumerate(branches):
        branch.value.messages.append(number)
        branch.value.plan["steps"].append(number)
    part.value.messages.append("parent")
    assert part.value.plan == {"steps": []}
    for number, branch in enumerate(branches):
        pending = branch.capture(store, ref).write()
        assert pending.facts["num_new_items"] == 1
        assert restored(store, pending.ref) == {"messages": [*range(300), number], "plan": {"steps": [number]}}
    winner = branches[1]
    live = winner.value
    part.exchange(winner)
    assert part.value is live
    assert restored(store, saved(part, store, ref))["messages"][-1] == 1


def test_a_fork_without_a_factory_is_refused() -> None:
    with pytest.raises(IncompatibleError) as raised:
        StatePart(Holder({})).fork(1)
    assert raised.value.code == "no-factory"
    assert "state=MyAgent" in (raised.value.hint or "")


@pytest.mark.parametrize("state", [3, object(), lambda: 3])
def test_what_is_not_stateful_is_refused(state: Any) -> None:
    with pytest.raises(IncompatibleError) as raised:
        StatePart(state)
    assert raised.value.code == "not-stateful"


# ---- what is refused --------------------------------------------------------------------------------------------------


class Colour(Enum):
    RED = "red"


class Level(IntEnum):
    HIGH = 3


class Word(str):
    pass


@dataclass
class Point:
    x: int
    y: tuple[int, ...]


cycle: list[Any] = []
cycle.append(cycle)


@pytest.mark.parametrize(
    ("value", "where"),
    [
        (math.nan, "state['plan']['deep'][1]"),
        (math.inf, "state['plan']['deep'][1]"),
        ({1, 2}, "state['plan']['deep'][1]"),
        (object(), "state['plan']['deep'][1]"),
        (Colour.RED, "state['plan']['deep'][1]"),
        ({3: "x"}, "state['plan']['deep'][1]"),
        ("\ud800", "state['plan']['deep'][1]"),
        ({"\ud800": 1}, "state['plan']['deep'][1]"),
        ([0, math.nan], "state['plan']['deep'][1][1]"),
        (Point(1, (2, math.nan)), "state['plan']['deep'][1].y[1]"),  # type: ignore[arg-type]
        (cycle, "state['plan']['deep'][1][0][0]"),
        (Point, "state['plan']['deep'][1]"),
    ],
)
def test_bad_values_are_refused_with_their_path(value: Any, where: str) -> None:
    agent = Agent()
    agent.plan = {"deep": [0, value]}
    with pytest.raises(IncompatibleError) as raised:
        StatePart(agent).capture(Memory(), None)
    assert raised.value.code == "not-encodable"
    assert str(raised.value).startswith(where)


def test_bad_items_are_refused_when_they_are_appended() -> None:
    items = AppendList([1])
    with pytest.raises(IncompatibleError) as raised:
        items.append({"score": math.nan})
    assert str(raised.value).startswith("AppendList[1]['score']")
    assert items == [1]


@pytest.mark.parametrize("state", [None, [1], "text"])
def test_a_state_that_is_no_map_is_refused(state: Any) -> None:
    with pytest.raises(IncompatibleError) as raised:
        StatePart(Holder(state)).capture(Memory(), None)
    assert raised.value.code == "bad-state"


def test_conversions() -> None:
    given_value = OrderedDict(a=(1, [2]), b=Point(1, (2,)), c=Level.HIGH, d=Word("w"), e=bytearray(b"x"), f=memoryview(b"y"), g=range(2))
    made = to_value(given_value)
    assert made == {"a": [1, [2]], "b": {"x": 1, "y": [2]}, "c": 3, "d": "w", "e": b"x", "f": b"y", "g": [0, 1]}
    assert [type(item) for item in made.values()] == [list, dict, int, str, bytes, bytes, list]


def test_results_have_attributes() -> None:
    result = from_value(to_value({"exit_code": 0, "lines": [{"n": 1}], "items": 3}))
    assert isinstance(result, Result)
    assert result.exit_code == 0
    assert result.lines[0].n == 1
    assert result["items"] == 3
    with pytest.raises(AttributeError, match="no field 'nothing'; it has"):
        _ = result.nothing
    assert str(result) == str({"items": 3, "lines": [{"n": 1}], "exit_code": 0})
    assert to_value(result) == {"exit_code": 0, "lines": [{"n": 1}], "items": 3}


# ---- hostile bytes ----------------------------------------------------------------------------------------------------

ROOT: dict[str, Any] = {"n": 1, "e": [1], "k": [], "s": 0, "w": 0}
CHUNK = Ref(b"\x01" + b"c" * 32)


@pytest.mark.parametrize(
    "node",
    [
        Node("tree", (), (), {"v": 1, "value": {}, "order": [], "lists": []}),
        Node("state", (), (), None),
        Node("state", (), (), {"v": 1, "value": {}}),
        Node("state", (), (), {"v": 1, "value": {}, "order": [], "lists": [], "more": 1}),
        Node("state", (), (), {"v": 1, "value": [], "order": [], "lists": []}),
        Node("state", (), (), {"v": 1, "value": {}, "order": [], "lists": [ROOT]}),
        Node("state", (), (), {"v": 1, "value": {"a": ListSlot(0)}, "order": [], "lists": []}),
        Node("state", (), (), {"v": 1, "value": {"a": ListSlot(1)}, "order": [], "lists": [ROOT]}),
        Node("state", (), (), {"v": 1, "value": {"a": ListSlot(0)}, "order": [], "lists": [{**ROOT, "n": 2}]}),
        Node("state", (), (), {"v": 1, "value": {"a": ListSlot(0)}, "order": [], "lists": [{**ROOT, "e": [ListSlot(0)]}]}),
        Node("state", (CHUNK,), (), {"v": 1, "value": {"a": ListSlot(0)}, "order": [], "lists": [{**ROOT, "t": [[1, 0]]}]}),
        Node("state", (), (CHUNK,), {"v": 1, "value": {"a": ListSlot(0)}, "order": [], "lists": [{**ROOT, "t": [[0, 1]]}]}),
        Node("state", (), (), {"v": 1, "pieces": [], "lists": []}),
        Node("state", (), (), {"v": 1, "pieces": [0], "lists": []}),
        Node("state", (Ref(b"\x02" + b"c" * 32),), (), {"v": 1, "pieces": [0], "lists": []}),
        Node("state", (), (), {"v": 1, "pieces": None, "lists": []}),
        Node("state", (), (), {"v": 1, "value": {}, "order": [], "lists": None}),
        Node("state", (), (), {"v": 1, "value": {}, "order": None, "lists": []}),
        Node("state", (), (), {"v": 1, "value": {}, "order": [3], "lists": []}),
        Node("state", (), (), {"v": 1, "value": {}, "order": [[1, []]], "lists": []}),
        Node("state", (), (), {"v": 1, "value": {"a": 1, "b": 2}, "order": [[0, [0, 0]]], "lists": []}),
        Node("state", (), (), {"v": 1, "value": {"a": 1, "b": 2}, "order": [[0, [0, 2]]], "lists": []}),
        Node("state", (), (), {"v": 1, "value": {"a": 1, "b": 2}, "order": [[0, [1, 0]], [0, [1, 0]]], "lists": []}),
    ],
)
def test_hostile_states_are_corruption(node: Node) -> None:
    store = Memory()
    ref = put_node(store, node)
    with pytest.raises(CorruptionError):
        StatePart(Holder).prepare(store, ref)


def test_a_few_nodes_cannot_claim_more_items_than_memory_holds() -> None:
    store = Memory()
    ref = put_node(store, Node("list", (), (), {"l": 0, "e": list(range(16))}))
    for level in range(1, 7):
        ref = put_node(store, Node("list", (ref,) * 16, (), {"l": level}))
    root = {"n": 16**7, "e": [], "k": [0] * 6 + [1], "s": 0, "w": 0}
    bomb = put_node(store, Node("state", (ref,), (), {"v": 1, "value": {"a": ListSlot(0)}, "order": [], "lists": [root]}))
    with pytest.raises(CorruptionError, match="at most 16777216 items"):
        StatePart(Holder).prepare(store, bomb)


def test_a_newer_state_is_incompatible() -> None:
    store = Memory()
    ref = put_node(store, Node("state", (), (), {"v": 2, "anything": 1}))
    with pytest.raises(IncompatibleError):
        StatePart(Holder).prepare(store, ref)


def test_an_absent_piece_is_not_found_and_the_object_untouched() -> None:
    store = Memory()
    ref = saved(StatePart(Holder({"blob": "x" * (2 * INLINE_BYTES)})), store)
    for piece in [key for key in store.objects if key[0] == 1]:
        del store.objects[piece]
    part = StatePart(Holder({"a": 2}))
    with pytest.raises(NotFoundError):
        part.prepare(store, ref)
    assert part.value.state == {"a": 2}


@given(st.data())
@settings(max_examples=150)
def test_damaged_nodes_are_typed_errors(data: st.DataObject) -> None:
    store = Memory()
    ref = saved(StatePart(Holder({"a": AppendList(["x", {"y": "z" * 1500}]), "b": [1, 2]})), store)
    good = store.objects[ref]
    at = data.draw(st.integers(0, len(good) - 1))
    store.objects[ref] = good[:at] + bytes([good[at] ^ data.draw(st.integers(1, 255))]) + good[at + 1 :]
    try:
        StatePart(Holder).prepare(store, ref).commit()
    except AgentckptError:
        return
    assert encode_node(decode_node(store.objects[ref])) == store.objects[ref]
